"""H2O: keep what the whole prompt attends to."""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.scores import column_sums, fold_queries
from restkv_jax.models.decoder import LayerView


@dataclasses.dataclass(frozen=True)
class AccumulatedAttention:
    """Causal attention received from all queries of the prompt, `sum_t A[t, n]`."""

    all_queries: ClassVar[bool] = True
    additive: ClassVar[bool] = True

    def __call__(self, view: LayerView, pairs: Pairs, window: int) -> Array:
        def add(total: Array, queries: Queries) -> Array:
            return total + column_sums(queries, pairs, jnp.ones(queries.positions.shape[1], jnp.float32))

        *heads, _, _ = view.queries.vectors.shape
        total = fold_queries(add, jnp.zeros((*heads, pairs.keys.shape[2]), jnp.float32), view.queries)
        return total[..., : pairs.keys.shape[2] - window]


def h2o(
    budget: int | str = 128,
    window: int = 32,
    group_reduce: Literal["mean", "max"] = "mean",
) -> EvictionPolicy:
    """H2O: attention accumulated over all queries of the prompt (arXiv 2306.14048).

    Args:
      budget: slots kept per layer and KV head, the window included.
      window: last tokens of the prompt, always kept.
      group_reduce: how the query heads of a KV head agree on one score.
    """
    return EvictionPolicy(
        budget=budget,
        window=window,
        scorer=AccumulatedAttention(),
        group_reduce=group_reduce,
    )
