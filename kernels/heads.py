"""Runs a function of one head over all heads, as many at a time as memory allows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

ELEMENTS_AT_ONCE = 2**22
"""Bound on `heads at once * T * max(w, D)`, the float32 temporaries of one step: 16 MiB."""


def over_query_heads(function: Callable, queries: Array, keys: Array, values: Array, *others: Array) -> Array:
    """Applies `function(queries [w, D], keys [T, D], values [T, D], *others)` to every row and query head.

    Args:
      function: of one head's arrays.
      queries: [B, H, w, D].
      keys: [B, K, T, D]; query head `h` reads KV head `h // (H / K)`.
      values: [B, K, T, D].
      *others: [B, H, ...] or [B, K, ...] where `K < H`.

    Returns:
      the results stacked as [B, H, ...].
    """
    batch, num_heads, num_queries, dim = queries.shape
    num_kv_heads, length = keys.shape[1], keys.shape[2]

    def one_head(index):
        row, head = index // num_heads, index % num_heads
        kv_head = head // (num_heads // num_kv_heads)
        pick = [x[row, head if x.shape[1] == num_heads else kv_head] for x in (queries, keys, values, *others)]
        return function(*pick)

    at_once = ELEMENTS_AT_ONCE // max(1, length * max(num_queries, dim))
    results = jax.lax.map(one_head, jnp.arange(batch * num_heads), batch_size=min(max(1, at_once), batch * num_heads))
    return results.reshape(batch, num_heads, *results.shape[1:])
