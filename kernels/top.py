"""The largest entries, found by counting: thresholds bit by bit instead of a sort, over axes that may be divided."""

import math

import jax
import jax.numpy as jnp
from jax import Array


def top_mask(values: Array, count: int, num_axes: int = 1) -> Array:
    """Marks the `count` largest entries over the last `num_axes` axes, of equals the first ones, as a `top_k` would.

    The threshold is found bit by bit, in 32 passes that count; a sort would cost several times more, and could not be
    divided where heads are.

    Args:
      values: float32 [..., *axes], without NaN.
      count: entries to mark; all where there are fewer.
      num_axes: how many axes the entries of one choice have.

    Returns:
      bool [..., *axes].
    """
    if count >= math.prod(values.shape[-num_axes:]):
        return jnp.ones(values.shape, bool)
    axes = tuple(range(values.ndim - num_axes, values.ndim))
    ordered = _as_integers(values)

    def raise_threshold(bit, threshold):
        candidate = threshold | jnp.uint32(1) << (31 - bit).astype(jnp.uint32)
        return jnp.where((ordered >= candidate).sum(axes, keepdims=True) >= count, candidate, threshold)

    shape = tuple(1 if a in axes else n for a, n in enumerate(values.shape))
    threshold = jax.lax.fori_loop(0, 32, raise_threshold, jnp.zeros(shape, jnp.uint32))
    above, equal = ordered > threshold, ordered == threshold
    return above | (equal & (_ranks(equal, num_axes) <= count - above.sum(axes, keepdims=True)))


def places(mask: Array, count: int) -> Array:
    """Where the first `count` marked entries of the last axis are, ascending.

    Args:
      mask: bool [..., N].
      count: places to return.

    Returns:
      int32 [..., count], `N` for missing ones.
    """
    length = mask.shape[-1]

    def one_row(mask: Array) -> Array:
        goes_to = jnp.where(mask, jnp.cumsum(mask, dtype=jnp.int32) - 1, count)
        return jnp.full(count, length, jnp.int32).at[goes_to].set(jnp.arange(length, dtype=jnp.int32), mode="drop")

    return jnp.vectorize(one_row, signature="(n)->(c)")(mask)


def _as_integers(values: Array) -> Array:
    """uint32 in the order of float32 numbers, -0 and 0 alike."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32) + 0.0, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _ranks(marked: Array, num_axes: int) -> Array:
    """How many entries are marked up to and with each, in the order of the last `num_axes` axes: int32."""
    ranks = jnp.cumsum(marked, axis=-1, dtype=jnp.int32)
    for axis in range(2, num_axes + 1):
        # what stands before along one axis more, counted whole
        blocks = marked.sum(tuple(range(-axis + 1, 0)), keepdims=True, dtype=jnp.int32)
        ranks = ranks + jnp.cumsum(blocks, axis=-axis) - blocks
    return ranks
