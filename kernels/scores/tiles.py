"""Keys and values in tiles, so that temporaries follow the tile and not the prompt."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import Pairs, Queries, take_pairs

ELEMENTS_AT_ONCE = 2**22
"""Bound on the float32 temporaries of one tile, `B * H * tile * max(w, D)` elements: 16 MiB."""

LEAST_TILE = 128
"""Keys of a tile at least."""

QUERIES_AT_ONCE = 128
"""Queries whose attention exists at one time, where scores are of more than a window's."""


def _tile_size(queries: Queries, length: int) -> int:
    """Keys of a tile: as many as the bound allows, in tiles of nearly the same size."""
    batch, num_kv_heads, group, num_queries, dim = queries.vectors.shape
    at_once = ELEMENTS_AT_ONCE // (batch * num_kv_heads * group * max(num_queries, dim))
    count = -(-length // max(LEAST_TILE, at_once))
    return -(-length // count)


def fold_tiles(step: Callable, state: Any, queries: Queries, pairs: Pairs) -> Any:
    """Takes a state through the tiles: `step(state, tile, is_new, start)`, `is_new` bool [n] marks each pair once."""
    length = pairs.keys.shape[2]
    size = _tile_size(queries, length)

    def one_tile(state: Any, start: Array, is_new: Array) -> Any:
        return step(state, take_pairs(pairs, start, size), is_new, start)

    return fold_places(one_tile, state, length, size)


def fold_places(step: Callable, state: Any, length: int, size: int) -> Any:
    """Takes a state through places 0 to `length`, `size` at a time: `step(state, start, is_new)`.

    The last ones begin early enough to be whole and repeat some places; `is_new` bool [n] marks each place once.
    """

    def some(state, first):
        start = jnp.minimum(first, length - size)
        return step(state, start, start + jnp.arange(size) >= first), None

    if size == length:
        return some(state, jnp.int32(0))[0]
    return jax.lax.scan(some, state, jnp.arange(0, length, size))[0]


def fold_queries(step: Callable, state: Any, queries: Queries) -> Any:
    """Takes a state through many queries, `QUERIES_AT_ONCE` at a time: `step(state, some_queries)`.

    Those that a step is shown again have position -1, as padding has.
    """
    length = queries.positions.shape[1]
    size = min(QUERIES_AT_ONCE, length)

    def some(state: Any, start: Array, is_new: Array) -> Any:
        positions = jax.lax.dynamic_slice_in_dim(queries.positions, start, size, axis=1)
        vectors = jax.lax.dynamic_slice_in_dim(queries.vectors, start, size, axis=3)
        return step(state, queries.replace(vectors=vectors, positions=jnp.where(is_new, positions, -1)))

    return fold_places(some, state, length, size)


def map_tiles(function: Callable[[Pairs, Array], Array], queries: Queries, pairs: Pairs) -> Array:
    """`function(tile, start)` [..., n] of all tiles, put together along the last axis."""
    length = pairs.keys.shape[2]
    size = _tile_size(queries, length)
    if size == length:
        return function(pairs, jnp.int32(0))
    shape = jax.eval_shape(function, jax.eval_shape(lambda: take_pairs(pairs, 0, size)), jnp.int32(0))

    def one_tile(whole, first):
        start = jnp.minimum(first, length - size)
        part = function(take_pairs(pairs, start, size), start)
        return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=-1), None

    empty = jnp.zeros((*shape.shape[:-1], length), shape.dtype)
    return jax.lax.scan(one_tile, empty, jnp.arange(0, length, size))[0]
