"""Collects the kept pairs of every head."""

import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.dispatch import Dispatched
from restkv_jax.kernels.pairs import Pairs


def _gather_pairs(pairs: Pairs, indices: Array) -> Pairs:
    """Takes the pairs at some places of the token axis.

    Args:
      pairs: [B, K, T].
      indices: int32 [B, K, C]; `T` or more marks an empty slot.

    Returns:
      [B, K, C], zeros at position -1 in empty slots.
    """

    def take(x: Array, empty: int) -> Array:
        wide = indices.reshape(*indices.shape, *[1] * (x.ndim - 3))
        return jnp.take_along_axis(x, wide, axis=2, mode="fill", fill_value=empty)

    return Pairs(take(pairs.keys, 0), take(pairs.values, 0), take(pairs.positions, -1))


gather_pairs = Dispatched(_gather_pairs)
