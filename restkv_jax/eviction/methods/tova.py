"""TOVA: keep what the last token attends to, the same tokens for all heads."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from restkv_jax import kernels
from restkv_jax.eviction.observation import Observation
from restkv_jax.eviction.policy import EvictionPolicy


@dataclasses.dataclass(frozen=True)
class LastAttention:
    """Attention received from the last query, averaged over all heads of the layer."""

    all_queries: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    def __call__(self, observation: Observation, window: int) -> Array:
        o = observation
        last = o.queries[:, :, -1:], o.keys, o.query_positions[:, -1:], o.key_positions, o.sliding_window
        sums = kernels.column_sums(*last, jnp.ones(1, jnp.float32))[..., : o.keys.shape[2] - window]
        return jnp.broadcast_to(sums.mean(axis=1, keepdims=True), sums.shape)


def tova(budget: int = 128, window: int = 1) -> EvictionPolicy:
    """TOVA: attention received from the last token, one set of positions per layer (arXiv 2401.06104).

    Args:
      budget: slots kept per layer and KV head, the window included.
      window: last tokens of the prompt, always kept.
    """
    return EvictionPolicy(budget=budget, window=window, scorer=LastAttention())
