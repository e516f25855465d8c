"""TOVA: keep what the last token attends to, the same tokens for all heads."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.kernels.pairs import Pairs
from restkv_jax.kernels.scores import column_sums
from restkv_jax.models.decoder import LayerView


@dataclasses.dataclass(frozen=True)
class LastAttention:
    """Attention received from the last query, averaged over all heads of the layer."""

    all_queries: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    def __call__(self, view: LayerView, pairs: Pairs, window: int) -> Array:
        sums = column_sums(view.queries.last(1), pairs, jnp.ones(1, jnp.float32))
        mean = sums[..., : pairs.keys.shape[2] - window].mean(axis=(1, 2), keepdims=True)
        return jnp.broadcast_to(mean, (*pairs.keys.shape[:2], *mean.shape[2:]))


def tova(budget: int | str = 128, window: int = 1) -> EvictionPolicy:
    """TOVA: attention received from the last token, one set of positions per layer (arXiv 2401.06104).

    Args:
      budget: slots kept per layer and KV head, the window included.
      window: last tokens of the prompt, always kept.
    """
    return EvictionPolicy(budget=budget, window=window, scorer=LastAttention())
