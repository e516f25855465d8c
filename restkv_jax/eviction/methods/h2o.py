"""H2O: keep what the whole prompt attends to."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.kernels.pairs import Pairs
from restkv_jax.kernels.scores import column_sums
from restkv_jax.models.decoder import LayerView

CHUNK = 128
"""Queries whose attention exists at one time."""


@dataclasses.dataclass(frozen=True)
class AccumulatedAttention:
    """Causal attention received from all queries of the prompt, `sum_t A[t, n]`."""

    all_queries: ClassVar[bool] = True
    additive: ClassVar[bool] = True

    def __call__(self, view: LayerView, pairs: Pairs, window: int) -> Array:
        vectors, positions = view.queries.vectors, view.queries.positions
        *heads, length, _ = vectors.shape
        missing = -length % CHUNK
        vectors = jnp.pad(vectors, ((0, 0), (0, 0), (0, 0), (0, missing), (0, 0)))
        positions = jnp.pad(positions, ((0, 0), (0, missing)), constant_values=-1)

        def add_chunk(total, start):
            chunk = view.queries.replace(
                vectors=jax.lax.dynamic_slice_in_dim(vectors, start, CHUNK, axis=3),
                positions=jax.lax.dynamic_slice_in_dim(positions, start, CHUNK, axis=1),
            )
            return total + column_sums(chunk, pairs, jnp.ones(CHUNK, jnp.float32)), None

        zeros = jnp.zeros((*heads, pairs.keys.shape[2]), jnp.float32)
        total, _ = jax.lax.scan(add_chunk, zeros, jnp.arange(0, length, CHUNK))
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
