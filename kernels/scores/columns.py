"""Sums and norms of the columns of attention by Pallas kernels for TPU, in two passes over the keys."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import PAIR_AXES, Pairs, Queries, query_axes
from restkv_jax.kernels.partition import by_device
from restkv_jax.kernels.scores.mosaic import (
    LANES,
    MAX_TILE,
    UNSEEN,
    Described,
    Grid,
    Ref,
    as_column,
    at_first_tile,
    num_rows,
    over_tiles,
    places_of,
    rows_of,
    tile_of,
)
from restkv_jax.kernels.scores.parts import product, split, split_gram
from restkv_jax.kernels.softmax import HIDDEN, cap_logits

DTYPES = jnp.float32, jnp.bfloat16

ROW_LIMIT = 1024
"""Queries of a KV head, of all its query heads, whose logits for a tile the least chip holds, with 16 MiB."""

DIM_LIMIT = 256

GRAM_LIMIT = 2**19
"""Elements of a KV head's Gram matrices that it holds."""

GRAM = "k p g d e"
"""The axes of Gram matrices that are split in two parts."""


class Static(NamedTuple):
    """What a kernel knows when it is compiled: query heads of a KV head, keys in all and in a tile, the soft cap."""

    group: int
    length: int
    tile: int
    soft_cap: float | None


def column_sums(queries: Queries, pairs: Pairs, weights: Array, *, interpret: bool = False) -> Array:
    """As the reference; keys are read twice, values never."""

    def alone(queries: Queries, pairs: Pairs, weights: Array) -> Array:
        inputs = attention_of(queries, pairs, weights, interpret)
        return read_keys(_sums_kernel, queries, pairs, inputs, ["b k g n"], interpret)[0]

    return on_devices(alone, queries, pairs, per_query(weights, queries))


def column_row_norms(queries: Queries, pairs: Pairs, gram: Array, *, interpret: bool = False) -> Array:
    """As the reference; keys are read twice, values once."""

    def alone(queries: Queries, pairs: Pairs, gram: Array) -> Array:
        ones = jnp.ones(queries.positions.shape, jnp.float32)
        inputs = [*attention_of(queries, pairs, ones, interpret), ("b k n d", pairs.values), (GRAM, split_gram(gram))]
        return read_keys(_norms_kernel, queries, pairs, inputs, ["b k g n"], interpret)[0]

    return on_devices(alone, queries, pairs, ("k g d e", gram))


def refusal(queries: Queries, pairs: Pairs, *_: Any, **options: Any) -> str | None:
    """Why the kernels cannot take these arguments."""
    group, width, dim = queries.vectors.shape[2:]
    unknown = {x.dtype for x in (queries.vectors, pairs.keys, pairs.values)} - {jnp.dtype(x) for x in DTYPES}
    if unknown:
        return f"the kernels know float32 and bfloat16, not {', '.join(map(str, unknown))}"
    if dim > DIM_LIMIT or dim % 8:
        return f"the head dimension {dim} is not a multiple of 8 up to {DIM_LIMIT}"
    if group * dim**2 > GRAM_LIMIT:
        return f"Gram matrices of {group} query heads of {dim} dimensions fill the chip's memory"
    if num_rows(queries) > ROW_LIMIT:
        return f"{group} query heads of {width} queries are more than {ROW_LIMIT} in all"
    return None


def on_devices(function: Callable[..., Array], queries: Queries, pairs: Pairs, *others: Described) -> Array:
    """Calls a function of queries, pairs and other arrays for what each device has of them: [B, K, G, ...]."""
    queries = queries.replace(sliding_window=jnp.asarray(queries.sliding_window, jnp.int32))
    axes = query_axes(queries), PAIR_AXES, *(a for a, _ in others)
    return by_device(function, (queries, pairs, *(x for _, x in others)), axes, "b k g n")


def per_query(weights: Array, queries: Queries) -> Described:
    """Weights float32 [w] or [B, w] of every row."""
    return "b q", jnp.broadcast_to(weights, queries.positions.shape)


def read_keys(
    kernel: Callable[..., None],
    queries: Queries,
    pairs: Pairs,
    inputs: Sequence[Described],
    outputs: Sequence[str],
    interpret: bool,
    scratch: Sequence[tuple[str, Any]] = (),
    limit: int = MAX_TILE,
    at_once: int | None = None,
) -> list[Array]:
    """Runs `kernel(static, *blocks)` over the tiles of keys, of at most `limit`, and all queries or `at_once` of them.

    The blocks are those that `logits_of_tile` takes, then inputs, outputs, which are float32, and scratch of some
    dtypes. These are described by their axes: also `r`, queries of a KV head; `g`, its query heads; `d`; `c`, one
    column; `N`, all tiles beside each other.
    """
    rows, length = rows_of(queries), pairs.keys.shape[2]
    batch, num_kv_heads, count, dim = rows.vectors.shape
    at_once = min(at_once or count, count)
    tile = tile_of(max(at_once, dim, LANES), length, limit)
    sizes = {"b": batch, "k": num_kv_heads, "r": count, "g": rows.group, "n": length, "d": dim, "c": 1}
    shapes = [(axes, jax.ShapeDtypeStruct([sizes[a] for a in axes.split()], jnp.float32)) for axes in outputs]
    block = sizes | {"r": at_once, "n": tile, "N": length + -length % tile}
    in_chip = [(tuple(block[a] for a in axes.split()), dtype) for axes, dtype in scratch]
    keys = ("b r c", rows.positions), ("b k r d", rows.vectors), ("b k n d", pairs.keys)
    described = *keys, ("b k c n", pairs.positions[:, :, None]), *inputs
    known = functools.partial(kernel, Static(rows.group, length, tile, queries.soft_cap))
    grid = Grid(batch, num_kv_heads, count, at_once, length, tile)
    return over_tiles(known, queries.sliding_window, described, shapes, grid, interpret, in_chip)


def attention_of(queries: Queries, pairs: Pairs, weights: Array, interpret: bool) -> list[Described]:
    """What `weights_of_tile` takes beside keys: every query's peak, and `weights[t]` over its normaliser.

    One pass over the keys. `weights` float32 [B, w].
    """
    peak, total = read_keys(_peaks_kernel, queries, pairs, [], ["b k r c", "b k r c"], interpret)
    of_heads = jnp.broadcast_to(weights[:, None, None], queries.vectors.shape[:-1])
    return [("b k r c", peak), ("b k r c", as_column(of_heads) / jnp.where(total > 0, total, 1.0))]


def logits_of_tile(static: Static, window: Ref, positions: Ref, queries: Ref, keys: Ref, key_positions: Ref) -> Array:
    """In a kernel: logits of its tile, float32 [R, n], `HIDDEN` where `visible` hides a key and beyond the last one."""
    present = jnp.where(places_of(static.tile) < static.length, key_positions[...], -1)
    past = positions[...] - present
    seen = (past >= 0) & (past < window[0]) & (present >= 0)
    products = product(split(queries[...]), split(keys[...]), over=(1, 1))
    return jnp.where(seen, cap_logits(products, static.soft_cap), HIDDEN)


def weights_of_tile(static: Static, *blocks: Ref) -> Array:
    """In a kernel: attention times the weights of `attention_of`, float32 [R, n]."""
    *of_logits, peak, scale = blocks
    return jnp.exp(logits_of_tile(static, *of_logits) - peak[...]) * scale[...]


def sums_of_heads(static: Static, x: Array) -> Array:
    """In a kernel: sums over each query head's queries, [R, n] to [G, n]."""
    return x.reshape(static.group, -1, static.tile).sum(1)


def projected(static: Static, gram: Ref, transposed: Array, dtype: Any) -> Iterator[Array]:
    """In a kernel: each query head's Gram matrix times values float32 [D, n] that were of a dtype, float32 [D, n]."""
    parts = split(transposed.astype(dtype))
    return (product([gram[0, head], gram[1, head]], parts) for head in range(static.group))


def _peaks_kernel(static: Static, *blocks: Ref) -> None:
    *of_logits, peak, total = blocks

    def initialise() -> None:
        peak[...] = jnp.full_like(peak, UNSEEN)
        total[...] = jnp.zeros_like(total)

    at_first_tile(initialise)
    logits = logits_of_tile(static, *of_logits)
    larger = jnp.maximum(peak[...], logits.max(1, keepdims=True))
    total[...] = total[...] * jnp.exp(peak[...] - larger) + jnp.exp(logits - larger).sum(1, keepdims=True)
    peak[...] = larger


def _sums_kernel(static: Static, *blocks: Ref) -> None:
    *attention, sums = blocks
    sums[...] = sums_of_heads(static, weights_of_tile(static, *attention))


def _norms_kernel(static: Static, *blocks: Ref) -> None:
    *attention, values, gram, norms = blocks
    columns = sums_of_heads(static, weights_of_tile(static, *attention) ** 2)
    transposed = values[...].astype(jnp.float32).T
    for head, moved in enumerate(projected(static, gram, transposed, values.dtype)):
        squared = (transposed * moved).sum(0, keepdims=True)
        norms[head : head + 1] = jnp.sqrt(columns[head : head + 1]) * jnp.sqrt(jnp.maximum(squared, 0.0))
