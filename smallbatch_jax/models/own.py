"""A user's own linen module, brought to the calling convention of this package."""

import hashlib
import inspect
from typing import Any

import jax
from flax import linen as nn

from smallbatch_jax.experiment import OWN, InputError


class OwnModel:
    """A linen module as the steps call it: `apply(…, train=…)` even if it knows no `train`.

    Batch norm and dropout work as everywhere in Flax: running statistics live in the collection "batch_stats", dropout
    draws from the key "dropout". Modules with other changing collections are refused.
    """

    def __init__(self, module: Any):
        if not isinstance(module, nn.Module):
            raise InputError(f"model: got {type(module).__name__}, accepts a model's name or a flax.linen.Module.")
        self.module = module
        parameters = inspect.signature(type(module).__call__).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._knows_train = "train" in parameters or takes_any

    def init(self, key: jax.Array, images: jax.Array) -> Any:
        variables: Any = self.module.init(key, images, **self._train(False))  # pyright: ignore[reportArgumentType]
        others = sorted(set(variables) - {"params", "batch_stats"})
        if others or "params" not in variables:
            raise InputError(
                f"model: {type(self.module).__name__} has the collections {sorted(variables)}, accepts params and batch_stats."
            )
        return variables

    def apply(self, variables: Any, images: jax.Array, train: bool = False, **options: Any) -> Any:
        return self.module.apply(variables, images, **self._train(train), **options)

    def _train(self, train: bool) -> dict[str, bool]:
        return {"train": train} if self._knows_train else {}

    def with_bn_batch_size(self, bn_batch_size: int | None, /, axis_name: str | None = None) -> "OwnModel":
        """The same model with its field `bn_batch_size` set; None leaves it as it is. Its batches are never spread."""
        del axis_name
        if bn_batch_size is None:
            return self
        if not hasattr(self.module, "bn_batch_size"):
            raise InputError(f"bn_batch_sizes: {type(self.module).__name__} has no field bn_batch_size to set; give None.")
        return OwnModel(self.module.clone(bn_batch_size=bn_batch_size))

    @property
    def name(self) -> str:
        """A name that tells it from other modules: its class, and a digest of its fields."""
        digest = hashlib.sha256(repr(self.module).encode()).hexdigest()[:12]
        return f"{OWN}{type(self.module).__name__}-{digest}"
