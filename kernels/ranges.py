"""Which keys each query sees, as ranges of places: what attention kernels mask by."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.softmax import Softmax, join


class Span(NamedTuple):
    """Which part of a query's past a set of pairs stands for, static under jit.

    The first `sink` positions and the last `recent` up to and with the query's own where `is_proximal`, else the rest.
    """

    sink: int
    recent: int
    is_proximal: bool


class Ranges(NamedTuple):
    """Places `first <= place < end` of the keys, int32 [B, K or 1, T]; none where `first >= end`.

    None begins before `floor`, int32 [B, K or 1].
    """

    first: Array
    end: Array
    floor: Array

    def see(self) -> Array:
        """Which queries see anything, bool [B, K or 1, T]."""
        return self.first < self.end


def ranges_of(span: Span | None, queries: Queries, positions: Array) -> tuple[Ranges, ...]:
    """The places that queries see of a set of pairs; ranges of one query do not overlap.

    Args:
      span: the part of the past; None: all.
      queries: with positions int32 [B, T].
      positions: of the keys, int32 [B, K or 1, N], ascending, empty places, -1, at the ends.
    """
    used = positions >= 0
    behind = jnp.arange(positions.shape[-1]) >= positions.shape[-1] - used[..., ::-1].argmax(-1, keepdims=True)
    positions = jnp.where(behind, jnp.iinfo(jnp.int32).max, positions)
    own = jnp.broadcast_to(queries.positions[:, None], (*positions.shape[:2], queries.positions.shape[1]))
    places_before = functools.partial(_places_before, positions)
    empty = places_before(jnp.zeros((*positions.shape[:2], 1), jnp.int32))
    end = places_before(own + 1)
    first = jnp.broadcast_to(empty, end.shape)
    if queries.widest_window != 0:
        first = jnp.maximum(places_before(own - queries.sliding_window + 1), empty)
    if span is None:
        return (Ranges(first, end, empty[..., 0]),)
    sink = places_before(jnp.full_like(empty, span.sink))
    recent = jnp.maximum(places_before(own - span.recent + 1), sink)
    if span.is_proximal:
        of_sink = Ranges(first, jnp.minimum(end, sink), empty[..., 0])
        return of_sink, Ranges(jnp.maximum(first, recent), end, sink[..., 0])
    return (Ranges(jnp.maximum(first, sink), jnp.minimum(end, recent), sink[..., 0]),)


def _places_before(positions: Array, bounds: Array) -> Array:
    """How many of ascending positions int32 [B, K or 1, N] are below bounds int32 [B, K or 1, T]: int32 like these."""
    return jax.lax.platform_dependent(positions, bounds, tpu=count_below, default=find_below)


def count_below(positions: Array, bounds: Array) -> Array:
    """As `_places_before`, by counting all, which a TPU's vector unit does faster than looking up."""
    return (positions[:, :, None] < bounds[..., None]).sum(-1, dtype=jnp.int32)


def find_below(positions: Array, bounds: Array) -> Array:
    """As `_places_before`, by looking up."""
    return jax.vmap(jax.vmap(jnp.searchsorted))(positions, bounds).astype(jnp.int32)


def widest(span: Span | None, queries: Queries) -> int | None:
    """How many places a range spans at most that does not begin at its floor; None where that is not known."""
    windows = queries.widest_window
    if windows is None:
        return None
    return windows if span is None or not span.is_proximal else max(windows, span.recent)


def over_ranges(
    read: Callable[[Ranges, Queries, Pairs], Softmax],
    queries: Queries,
    parts: tuple[Pairs, ...],
    spans: tuple[Span | None, ...],
) -> tuple[Array, Array]:
    """One softmax over sets of pairs, of which a kernel reads a range of places at a time.

    Args:
      read: gives the softmax of a range.
      queries: [B, K, G, T, D].
      parts: the sets.
      spans: which part of the past each stands for.

    Returns:
      the context [B, K, G, T, D] in the dtype of the queries, and the logarithm of the sum of all exponentials, float32
      [B, K, G, T], `-HIDDEN` where a query sees nothing.
    """
    found = [
        read(ranges, queries, pairs)
        for span, pairs in zip(spans, parts, strict=True)
        for ranges in ranges_of(span, queries, pairs.positions)
    ]
    whole = functools.reduce(join, found)
    return whole.context().astype(queries.vectors.dtype), whole.normaliser()
