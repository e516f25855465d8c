"""Collects the kept keys and values of every head."""

import jax.numpy as jnp
from jax import Array


def gather_pairs(keys: Array, values: Array, indices: Array) -> tuple[Array, Array]:
    """Takes the pairs at `indices` along the token axis.

    Args:
      keys: [B, K, T, D].
      values: [B, K, T, D].
      indices: int32 [B, K, C]; `T` or more marks an empty slot.

    Returns:
      keys and values [B, K, C, D], zero in empty slots.
    """
    take = lambda x: jnp.take_along_axis(x, indices[..., None], axis=2, mode="fill", fill_value=0)  # noqa: E731
    return take(keys), take(values)
