"""What the attention of a few queries says of every key: the hot path of eviction.

All functions take `Queries` [B, K, G, w, D] and `Pairs` [B, K, T, D]. Probabilities and scores are float32. Rows and KV
heads stay axes throughout; the keys go through in tiles, so that temporaries follow the tile and not the prompt.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import Pairs, Queries, take_columns, take_pairs, visible
from restkv_jax.kernels.scores.tiles import ELEMENTS_AT_ONCE, fold_tiles, map_tiles
from restkv_jax.kernels.softmax import HIDDEN, Softmax, empty_softmax, join, logits_of, read_keys
from restkv_jax.kernels.top import top_mask

HIGHEST = jax.lax.Precision.HIGHEST

einsum = functools.partial(jnp.einsum, precision=HIGHEST)


def output_gram(output_projection: Array) -> Array:
    """Gram matrices `W_h W_h^T` of the output projection: [K, G, D, M] to float32 [K, G, D, D].

    `||x W_h||^2 = x^T (W_h W_h^T) x`, so norms after the projection cost `D` instead of `M` per dimension.
    """
    wide = output_projection.astype(jnp.float32)
    return einsum("kgdm,kgem->kgde", wide, wide)


class Peaks(NamedTuple):
    """What turns logits into probabilities, float32 [B, K, G, w]: each query's largest logit and its normaliser."""

    peak: Array
    total: Array


def probabilities(queries: Queries, pairs: Pairs, peaks: Peaks | None = None) -> Array:
    """Attention of the queries, float32 [B, K, G, w, N]; over the pairs given, or over those that `peaks` are of."""
    seen = visible(queries, pairs.positions)[:, :, None]
    logits = _logits(queries, pairs, seen)
    if peaks is None:
        peaks = Peaks(logits.max(-1), jnp.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
    weights = jnp.exp(logits - peaks.peak[..., None]) / peaks.total[..., None]
    return jnp.where(seen, weights, 0.0)


def _logits(queries: Queries, pairs: Pairs, seen: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return jnp.where(seen, logits_of(queries, pairs.keys), HIDDEN)


def find_peaks(queries: Queries, pairs: Pairs) -> Peaks:
    """The `Peaks` of the queries over all pairs, tile by tile."""
    return read_pairs(queries, pairs._replace(values=pairs.values[..., :0]))[1]


def read_pairs(queries: Queries, pairs: Pairs) -> tuple[Array, Peaks]:
    """What the queries get from all pairs, float32 [B, K, G, w, D], and their `Peaks`, tile by tile.

    As exact as `probabilities`: products of float32, whatever the dtypes.
    """

    def read(state: Softmax, tile: Pairs, is_new: Array, _) -> Softmax:
        seen = visible(queries, tile.positions)[:, :, None] & is_new
        with jax.default_matmul_precision("highest"):
            return join(state, read_keys(queries, tile.keys, tile.values.astype(jnp.float32), seen))

    dim = pairs.values.shape[-1]
    read_all = fold_tiles(read, empty_softmax(queries.vectors[..., :dim]), queries, pairs)
    return read_all.context(), Peaks(read_all.peak, jnp.where(read_all.total > 0, read_all.total, 1.0))


class Outputs(NamedTuple):
    """What queries get from all pairs and, once the most attended one is deleted, from the others.

    `output`, `output_rest` float32 [B, K, G, w, D]; `top` int32 [B, K, G, w], the place of that pair.
    """

    output: Array
    output_rest: Array
    top: Array


def find_outputs(queries: Queries, pairs: Pairs) -> Outputs:
    """The `Outputs` of the queries.

    The softmax of the others is taken over logits: from that of all, small probabilities would have underflowed.
    """

    def find_top(best, tile: Pairs, is_new: Array, start: Array):
        logits = _logits(queries, tile, visible(queries, tile.positions)[:, :, None] & is_new)
        largest, place = logits.max(-1), start + logits.argmax(-1).astype(jnp.int32)
        return jnp.maximum(best[0], largest), jnp.where(largest > best[0], place, best[1])

    shape = queries.vectors.shape[:-1]
    _, top = fold_tiles(find_top, (jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)), queries, pairs)

    def read(state: tuple[Softmax, Softmax], tile: Pairs, is_new: Array, start: Array):
        seen = visible(queries, tile.positions)[:, :, None] & is_new
        others = seen & (start + jnp.arange(tile.keys.shape[2]) != top[..., None])
        with jax.default_matmul_precision("highest"):
            values = tile.values.astype(jnp.float32)
            return tuple(
                join(one, read_keys(queries, tile.keys, values, columns))
                for one, columns in zip(state, (seen, others), strict=True)
            )

    empty = empty_softmax(queries.vectors)
    every, rest = fold_tiles(read, (empty, empty), queries, pairs)
    return Outputs(every.context(), rest.context(), top)


def removal_error(
    attention: Array, output: Array, output_rest: Array, is_top: Array, values: Array, gram: Array, tau: float = 1.0
) -> Array:
    """How far a head's projected output moves when one key is deleted and the softmax renormalised, for every key.

    `A / (1 - A) * ||(o - v) W||_2` with `o = sum_n A[n] v[n]`, exact for a single head (ReST-KV, arXiv 2605.08840,
    layer-wise output reconstruction). Both factors cancel for a key that holds nearly all attention; there can be
    one such key, the most attended, and its error is taken in the equal form `A * ||(o_rest - v) W||_2` with
    `o_rest` the output once it is deleted.

    Args:
      attention: float32 [B, K, G, N].
      output: float32 [B, K, G, D].
      output_rest: float32 [B, K, G, D], the output once the most attended key is deleted.
      is_top: bool [B, K, G, N], which key that is.
      values: [B, K, N, D].
      gram: float32 [K, G, D, D], `W W^T`.
      tau: the power of the norm, static; the error is that of 1.

    Returns:
      float32 [B, K, G, N].
    """
    outputs = jnp.where(is_top[..., None], output_rest[..., None, :], output[..., None, :])
    moved = outputs - values.astype(jnp.float32)[:, :, None]
    squared = einsum("bkgnd,kgde,bkgne->bkgn", moved, gram, moved)
    return error_at(jnp.sqrt(jnp.maximum(squared, 0.0)), attention, is_top, tau)


def error_at(distance: Array, attention: Array, is_top: Array, tau: float) -> Array:
    """The `removal_error` of keys whose values are at a distance from what is left, or, of others, from the output."""
    if tau == 1:
        return attention / jnp.where(is_top, 1.0, 1 - attention) * distance
    # The top key's distance is without its factor `1 - A`; a mean of attention may be rounded to more than 1.
    left = jnp.maximum(1 - attention, float(jnp.finfo(jnp.float32).eps))
    return attention / left ** jnp.where(is_top, 1 - tau, 1.0) * distance**tau


def _column_sums(queries: Queries, pairs: Pairs, weights: Array) -> Array:
    """`sum_t weights[t] A[t, n]`: attention received by every key; float32 [B, K, G, T].

    `weights` float32 [w], or [B, w] where rows differ.
    """
    peaks = find_peaks(queries, pairs)
    weights = jnp.broadcast_to(weights, queries.positions.shape)

    def tile_sums(tile: Pairs, _) -> Array:
        return einsum("bw,bkgwn->bkgn", weights, probabilities(queries, tile, peaks))

    return map_tiles(tile_sums, queries, pairs)


def _column_row_norms(queries: Queries, pairs: Pairs, gram: Array) -> Array:
    """`||A[:, n]||_2 ||v[n] W_h||_2` over the queries, `gram` float32 [K, G, D, D] (LaProx); float32 [B, K, G, T]."""
    peaks = find_peaks(queries, pairs)

    def tile_norms(tile: Pairs, _) -> Array:
        values = tile.values.astype(jnp.float32)
        squared = einsum("bknd,kgde,bkne->bkgn", values, gram, values)
        attention = jnp.linalg.norm(probabilities(queries, tile, peaks), axis=3)
        return attention * jnp.sqrt(jnp.maximum(squared, 0.0))

    return map_tiles(tile_norms, queries, pairs)


def _removal_errors(queries: Queries, pairs: Pairs, gram: Array, *, tau: float = 1.0) -> Array:
    """`removal_error` of every query and key, `gram` float32 [K, G, D, D]; float32 [B, K, G, w, T], 0 where unseen."""

    def tile_errors(tile: Pairs, row_errors: Callable) -> Array:
        return jnp.moveaxis(jax.lax.map(row_errors, jnp.arange(queries.vectors.shape[3])), 0, 3)

    return map_tiles(*_by_query(queries, pairs, gram, tau, tile_errors))


def _averaged_removal_error(queries: Queries, pairs: Pairs, gram: Array, weights: Array, *, tau: float = 1.0) -> Array:
    """`sum_t weights[t] I[t, n]` with `I` the `removal_error` of query `t` and key `n` (ReST-KV's formula).

    `gram` float32 [K, G, D, D], `weights` float32 [w] or [B, w]; float32 [B, K, G, T].
    """
    weights = jnp.broadcast_to(weights, queries.positions.shape)

    def tile_errors(tile: Pairs, row_errors: Callable) -> Array:
        def add_row(total, row):
            return total + weights[:, row, None, None, None] * row_errors(row), None

        empty = jnp.zeros((*queries.vectors.shape[:3], tile.keys.shape[2]), jnp.float32)
        return jax.lax.scan(add_row, empty, jnp.arange(queries.vectors.shape[3]))[0]

    return map_tiles(*_by_query(queries, pairs, gram, tau, tile_errors))


def _by_query(queries: Queries, pairs: Pairs, gram: Array, tau: float, tile_errors: Callable):
    """The arguments of `map_tiles` for `tile_errors(tile, row_errors)`, with the errors of one query after another.

    `row_errors(t)` is float32 [B, K, G, n]: projected differences of all queries would be `w` times as much.
    """
    peaks, outputs = find_peaks(queries, pairs), find_outputs(queries, pairs)

    def of_tile(tile: Pairs, start: Array) -> Array:
        attention = probabilities(queries, tile, peaks)
        is_top = start + jnp.arange(tile.keys.shape[2]) == outputs.top[..., None]

        def row_errors(row: Array) -> Array:
            take = functools.partial(jax.lax.dynamic_index_in_dim, index=row, axis=3, keepdims=False)
            output, output_rest = take(outputs.output), take(outputs.output_rest)
            return removal_error(take(attention), output, output_rest, take(is_top), tile.values, gram, tau)

        return tile_errors(tile, row_errors)

    return of_tile, queries, pairs


def _averaged_attention_removal_error(
    queries: Queries, pairs: Pairs, gram: Array, weights: Array, *, window: int | None = None, tau: float = 1.0
) -> Array:
    """`removal_error` of the attention averaged over the queries, on the keys before the window.

    `A'[n] = sum_t weights[t] A[t, n]` on the `T - window` first keys, `o' = sum_n A'[n] v[n]` over the same keys (the
    ReST-KV authors' `metric_mode="after"`). `gram` float32 [K, G, D, D], `weights` float32 [w] or [B, w], `window` the
    number of queries where it is not given; float32 [B, K, G, T - window].
    """
    num_prefix = pairs.keys.shape[2] - (queries.vectors.shape[3] if window is None else window)
    received = _column_sums(queries, pairs, weights)
    averaged = received[..., :num_prefix]
    is_top = jnp.arange(num_prefix) == averaged.argmax(-1, keepdims=True)
    prefix = take_pairs(pairs, 0, num_prefix)
    others = jnp.where(is_top, 0.0, averaged)
    # `1 - A'` of the top key, summed over all other keys: a difference from 1 would cancel
    rest = others.sum(-1, keepdims=True) + received[..., num_prefix:].sum(-1, keepdims=True)
    others = others / jnp.maximum(rest, jnp.finfo(jnp.float32).tiny)

    def read(total, tile: Pairs, is_new: Array, start: Array):
        part = [jnp.where(is_new, take_columns(x, start, tile.keys.shape[2], axis=3), 0) for x in (averaged, others)]
        return tuple(
            t + einsum("bkgn,bknd->bkgd", x, tile.values.astype(jnp.float32)) for t, x in zip(total, part, strict=True)
        )

    nothing = jnp.zeros((*queries.vectors.shape[:3], queries.vectors.shape[4]), jnp.float32)
    output, output_rest = fold_tiles(read, (nothing, nothing), queries, prefix)

    def tile_errors(tile: Pairs, start: Array) -> Array:
        attention, top = (take_columns(x, start, tile.keys.shape[2], axis=3) for x in (averaged, is_top))
        return removal_error(attention, output, output_rest, top, tile.values, gram, tau)

    return map_tiles(tile_errors, queries, prefix)


def _attention_centres(queries: Queries, pairs: Pairs, *, count: int) -> Array:
    """Mean position of each query's `count` most attended keys; float32 [B, K, G, w]."""
    batch, num_kv_heads, group, num_queries, _ = queries.vectors.shape
    key_positions = pairs.positions[:, :, None, None]

    def of_queries(one: tuple[Array, Array]) -> Array:
        some = queries.replace(vectors=one[0][:, :, :, None], positions=one[1][:, None])
        attention = probabilities(some, pairs, find_peaks(some, pairs))
        seen = visible(some, pairs.positions)[:, :, None]
        top = seen & top_mask(jnp.where(seen, attention, -1.0), count)
        # Summed as integers in two parts, exact at any length and so the same with any padding.
        high, low = (jnp.where(top, part, 0).sum(-1) for part in (key_positions >> 10, key_positions & 1023))
        return ((high * 1024.0 + low) / jnp.maximum(top.sum(-1), 1))[..., 0]

    at_once = max(1, ELEMENTS_AT_ONCE // (batch * num_kv_heads * group * pairs.keys.shape[2]))
    by_query = jnp.moveaxis(queries.vectors, 3, 0), queries.positions.T
    centres = jax.lax.map(of_queries, by_query, batch_size=min(at_once, num_queries))
    return jnp.moveaxis(centres, 0, 3)
