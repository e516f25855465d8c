"""Key norm: keep the keys of smallest norm."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.kernels.pairs import Pairs
from restkv_jax.models.decoder import LayerView


@dataclasses.dataclass(frozen=True)
class NegativeKeyNorm:
    """`-||k[n]||_2`: keys of small norm tend to be attended."""

    all_queries: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    def __call__(self, view: LayerView, pairs: Pairs, window: int) -> Array:
        keys = pairs.keys[:, :, None, : pairs.keys.shape[2] - window].astype(jnp.float32)
        return -jnp.linalg.norm(keys, axis=-1)


def knorm(budget: int | str = 128, window: int = 32) -> EvictionPolicy:
    """Key norm: keys of smallest L2 norm (arXiv 2406.11430).

    Args:
      budget: slots kept per layer and KV head, the window included.
      window: last tokens of the prompt, always kept.
    """
    return EvictionPolicy(budget=budget, window=window, scorer=NegativeKeyNorm())
