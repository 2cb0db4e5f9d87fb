"""Optional packages: the extras of setup.cfg, and the error of a feature whose extra is not installed."""

import importlib.util

from smallbatch_jax.config.fields import InputError

# Import names of the packages that each extra adds and this project imports; a test compares them with setup.cfg.
EXTRAS = {
    "photographs": ("grain", "cv2", "simplejpeg"),
    "tensorboard": ("tensorboardX",),
    "wandb": ("wandb",),
    "cluster": ("ray",),
    "prepare": ("tensorflow",),
    "peer": ("torch",),
    "equinox": ("equinox",),
    "target-gpu": ("jax_cuda12_plugin",),
    "target-tpu": ("libtpu",),
}


class MissingPackage(InputError):
    """A feature needs a package that is not installed; the message has the command that installs it."""

    def __init__(self, feature: str, package: str, extra: str):
        super().__init__(f'{feature}: needs {package}, which is not installed; run pip install -e ".[{extra}]".')


def require(extra: str, feature: str) -> None:
    """Raises MissingPackage for the first package of an extra that is not installed; `feature` is a field or flag."""
    for package in EXTRAS[extra]:
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(feature, package, extra)
