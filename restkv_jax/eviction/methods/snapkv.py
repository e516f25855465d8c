"""SnapKV: keep what the window attends to."""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.pooling import make_pooling
from restkv_jax.eviction.temporal import Temporal, check_temporal, query_weights
from restkv_jax.kernels.pairs import Pairs
from restkv_jax.kernels.scores import column_sums
from restkv_jax.models.decoder import LayerView


@dataclasses.dataclass(frozen=True)
class WindowAttention:
    """Attention received from the window's queries, `sum_t A[t, n]`, or an average of it over them."""

    temporal: Literal["sum"] | Temporal = "sum"
    alpha: float = 0.3
    all_queries: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    def __post_init__(self):
        if self.temporal != "sum":
            check_temporal(self.temporal, self.alpha)

    def __call__(self, view: LayerView, pairs: Pairs, window: int) -> Array:
        positions = view.queries.positions
        is_sum = self.temporal == "sum"
        weights = jnp.ones(positions.shape) if is_sum else query_weights(self.temporal, positions, self.alpha)
        return column_sums(view.queries, pairs, weights)[..., : pairs.keys.shape[2] - window]


def snapkv(
    budget: int | str = 128,
    window: int = 32,
    pooling: Literal["avg", "max", "successor", "none"] = "avg",
    kernel_size: int = 5,
    group_reduce: Literal["mean", "max"] = "mean",
) -> EvictionPolicy:
    """SnapKV: attention received from the last queries, pooled over neighbours (arXiv 2404.14469).

    kvpress takes a window of 64 by default and averages over 5.

    Args:
      budget: slots kept per layer and KV head, the window included.
      window: last tokens of the prompt, whose queries score the others.
      pooling: smoothing over neighbouring keys, or, "successor", over those before.
      kernel_size: width of that smoothing, in tokens; odd where it is symmetric.
      group_reduce: how the query heads of a KV head agree on one score.
    """
    return EvictionPolicy(
        budget=budget,
        window=window,
        scorer=WindowAttention(),
        pooling=make_pooling(pooling, kernel_size),
        group_reduce=group_reduce,
    )
