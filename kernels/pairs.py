"""What attention is between: the queries of a layer, and its pairs of keys and values."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array


class Queries(flax.struct.PyTreeNode):
    """Queries of one layer, after RoPE and times the scale of the logits.

    `vectors` [B, K, G, T, D], the `G` query heads of each KV head; `positions` int32 [B, T], -1 on padding;
    `sliding_window` int32 scalar, in tokens: how far back they see; `soft_cap`, static: logits are
    `soft_cap tanh(q k / soft_cap)` (Gemma 2, arXiv 2408.00118), `q k` where it is None; `widest_window`, static: the
    widest sliding window of any layer that has one, 0 where none has, None where that is not known.
    """

    vectors: Array
    positions: Array
    sliding_window: Array | int
    soft_cap: float | None = flax.struct.field(pytree_node=False, default=None)
    widest_window: int | None = flax.struct.field(pytree_node=False, default=None)

    def last(self, count: int) -> "Queries":
        """The last `count` of them."""
        return self.replace(vectors=self.vectors[:, :, :, -count:], positions=self.positions[:, -count:])


class Pairs(NamedTuple):
    """Keys and values of one layer, keys after RoPE.

    `keys`, `values` [B, K, N, D]; `positions` int32 [B, K or 1, N], -1 where a place is empty.
    """

    keys: Array
    values: Array
    positions: Array


PAIR_AXES = Pairs._make(("b k n d", "b k n d", "b k n"))
"""The axes of pairs, as `partition.by_device` takes them."""


def query_axes(queries: Queries) -> Queries:
    """The axes of queries, likewise."""
    return queries.replace(vectors="b k g q d", positions="b q", sliding_window="")


def visible(queries: Queries, positions: Array) -> Array:
    """Which keys each query sees: a key at `p` is seen from `q` if `0 <= p <= q < p + sliding_window`.

    Args:
      queries: with positions int32 [B, T].
      positions: of the keys, int32 [B, K or 1, N], -1 where there is none.

    Returns:
      bool [B, K or 1, T, N].
    """
    past = queries.positions[:, None, :, None] - positions[:, :, None, :]
    return (past >= 0) & (past < queries.sliding_window) & (positions >= 0)[:, :, None, :]


def within_reach(queries: Queries, positions: Array) -> Array:
    """Which keys the sliding window lets a later token see, int32 [B, K or 1, N] to bool; none where it is empty."""
    next_position = queries.positions[:, -1:, None] + 1
    return (positions >= 0) & (next_position - positions < queries.sliding_window)


def proximal(queries: Queries, positions: Array, sink: Array | int, recent: Array | int) -> Array:
    """Which keys are among the first `sink` or the last `recent` up to and with a query's own (PoD); as `visible`."""
    past = queries.positions[:, None, :, None] - positions[:, :, None, :]
    return (positions < sink)[:, :, None, :] | (past < recent)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)


def lengthen(x: Array, axis: int, multiple: int, empty: int = 0) -> Array:
    """Fills an axis up to a multiple of some number, at its end."""
    missing = -x.shape[axis] % multiple
    if missing == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = 0, missing
    return jnp.pad(x, widths, constant_values=empty)


def take_columns(x: Array, start: Array | int, size: int, axis: int) -> Array:
    """`size` entries of an axis from `start` on; the array itself where these are all."""
    return x if size == x.shape[axis] else jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def take_pairs(pairs: Pairs, start: Array | int, size: int) -> Pairs:
    """`size` pairs from `start` on."""
    return Pairs(*(take_columns(x, start, size, axis=2) for x in pairs))


def concatenate(first: Pairs, second: Pairs) -> Pairs:
    """Pairs [B, K, N, D] and [B, K, T, D] one after the other, at positions int32 [B, K, N + T]."""
    positions = [jnp.broadcast_to(x.positions, x.keys.shape[:3]) for x in (first, second)]
    sets = zip((first.keys, first.values, positions[0]), (second.keys, second.values, positions[1]), strict=True)
    return Pairs(*(jnp.concatenate(both, axis=2) for both in sets))


def ascending(positions: Array) -> Array:
    """The places of positions int32 [B, K, N] in their order, empty ones, -1, first."""
    return jnp.argsort(positions, axis=-1)


def take_places(x: Array, places: Array) -> Array:
    """Entries [B, K, C, ...] of [B, K, N, ...] at places int32 [B, K, C]."""
    return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 3)), axis=2)


def join_pairs(held: Pairs, new: Pairs) -> Pairs:
    """Held pairs and new ones, ordered as those of a prompt that is padded on the left."""
    together = concatenate(held, new)
    places = ascending(together.positions)
    return Pairs(*(take_places(x, places) for x in together))
