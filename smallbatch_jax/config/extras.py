"""Optional packages: the extras of setup.cfg, and the one line that a feature ends in where its extra is not installed."""

import importlib.util

from smallbatch_jax.config.fields import InputError

# The packages each extra adds that this project imports, by their import names; a test compares them with setup.cfg.
EXTRAS = {
    "photographs": ("grain", "cv2", "simplejpeg"),
    "tensorboard": ("tensorboardX",),
    "wandb": ("wandb",),
    "cluster": ("ray",),
    "prepare": ("tensorflow",),
    "peer": ("torch",),
}


class MissingPackage(InputError):
    """A feature needs a package that is not installed; the message names the command that installs it."""

    def __init__(self, feature: str, package: str, extra: str):
        super().__init__(f'{feature}: needs {package}, which is not installed; run pip install -e ".[{extra}]".')


def require(extra: str, feature: str) -> None:
    """Refuses a feature whose packages are not installed.

    Args:
      extra: one of EXTRAS.
      feature: the field or flag that asks for it, as the user wrote it.

    Raises:
      MissingPackage: for the first of its packages that is not installed.
    """
    for package in EXTRAS[extra]:
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(feature, package, extra)
