"""Attention of some queries over keys that carry their own positions."""

import functools
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.softmax import Softmax, add_keys, empty_softmax, logits_of, wide_einsum

BLOCK = 512
"""Queries, and keys, whose probabilities exist at one time."""


class Reach(NamedTuple):
    """Which of a query's past a set of keys stands for, static under jit.

    Proximal are the first `sink` positions and the last `recent` up to and with the query's own; the others are
    distant. `proximal` says which of the two.
    """

    sink: int
    recent: int
    proximal: bool


class Keys(NamedTuple):
    """A set of keys to attend to: `keys`, `values` [B, K, N, D], `positions` int32 [B, K or 1, N], -1 where empty."""

    keys: Array
    values: Array
    positions: Array


def attention(
    queries: Array,
    keys: Array,
    values: Array,
    query_positions: Array,
    key_positions: Array,
    sliding_window: Array | int,
) -> Array:
    """Causal softmax attention where order is given by positions, not by places in the arrays.

    A key at position `p` is seen by a query at `q` if `0 <= p <= q < p + sliding_window`. Queries and keys are taken in
    blocks with a running maximum and normaliser (online softmax), and pairs of blocks that do not see each other are
    skipped, so temporaries stay at `B * H * BLOCK * BLOCK`. A single query reads all keys at once. Differentiable in
    reverse: besides its arguments the backward pass needs the result and one normaliser per query, and recomputes a
    block's probabilities from them (FlashAttention, arXiv 2205.14135).

    Args:
      queries: [B, H, T, D].
      keys: [B, K, N, D] with `H` a multiple of `K`.
      values: [B, K, N, D].
      query_positions: int32 [B, T].
      key_positions: int32 [B, N], or [B, K, N] where heads hold different keys; -1 marks an empty place.
      sliding_window: int32 scalar, in tokens.

    Returns:
      [B, H, T, D] in the dtype of `queries`; zeros where a query sees nothing. Softmax in float32.
    """
    return _joint((None,), queries, (Keys(keys, values, key_positions),), query_positions, sliding_window)


def shared_key_attention(
    queries: Array,
    keys: Array,
    distant_keys: Array,
    values: Array,
    query_positions: Array,
    key_positions: Array,
    sliding_window: Array | int,
    *,
    sink: int,
    recent: int,
) -> Array:
    """`attention` that reads distant tokens by other keys: one softmax over proximal and distant ones (PoD).

    `sum_P exp(q k) v + sum_D exp(q k') v` over `sum_P exp(q k) + sum_D exp(q k')`, where the proximal tokens `P` of a
    query are the first `sink` and the last `recent` up to and with its own, and `D` the rest of its past.

    Args:
      queries: [B, H, T, D].
      keys: [B, K, N, D], for proximal tokens.
      distant_keys: [B, K, N, D], of the same tokens, for distant ones.
      values: [B, K, N, D].
      query_positions: int32 [B, T].
      key_positions: int32 [B, N] or [B, K, N]; -1 marks an empty place.
      sliding_window: int32 scalar, in tokens.
      sink: tokens at the beginning.
      recent: tokens at the end.

    Returns:
      [B, H, T, D], as `attention`.
    """
    reaches = Reach(sink, recent, proximal=True), Reach(sink, recent, proximal=False)
    parts = Keys(keys, values, key_positions), Keys(distant_keys, values, key_positions)
    return _joint(reaches, queries, parts, query_positions, sliding_window)


def _joint(
    reaches: tuple[Reach | None, ...],
    queries: Array,
    parts: tuple[Keys, ...],
    query_positions: Array,
    sliding_window: Array | int,
) -> Array:
    """One softmax over the union of several sets of keys, each seen as its reach says."""
    num_kv_heads, length = parts[0].keys.shape[1], queries.shape[2]
    grouped = einops.rearrange(queries, "b (k g) t d -> b k g t d", k=num_kv_heads)
    grouped = _pad_to_blocks(grouped, axis=3)
    query_positions = _pad_to_blocks(query_positions, axis=1, empty=-1)
    if length > 1:
        parts = tuple(
            Keys(
                _pad_to_blocks(part.keys, axis=2),
                _pad_to_blocks(part.values, axis=2),
                _pad_to_blocks(part.positions, axis=part.positions.ndim - 1, empty=-1),
            )
            for part in parts
        )
    parts = tuple(p if p.positions.ndim == 3 else p._replace(positions=p.positions[:, None]) for p in parts)
    window = jnp.asarray(sliding_window, jnp.int32)
    context = _blockwise(reaches, grouped, parts, query_positions, window)[:, :, :, :length]
    return einops.rearrange(context, "b k g t d -> b (k g) t d")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(reaches, queries, parts, query_positions, sliding_window) -> Array:
    """Attention of `queries` [B, K, G, T, D] at `query_positions` int32 [B, T], in their shape and dtype."""
    return _forward(reaches, queries, parts, query_positions, sliding_window)[0]


def _forward(reaches, queries, parts, query_positions, sliding_window):
    # Masks depend on positions alone. A scan over layers that is differentiated would compute them ahead of its loop,
    # for all blocks, which is T x T: so let them wait for the layer's queries.
    queries, query_positions = jax.lax.optimization_barrier((queries, query_positions))

    def one_block(start):
        part = functools.partial(_take, start, _block_size(queries.shape[3]))
        state = empty_softmax(part(queries, 3))
        for reach, keys in zip(reaches, parts, strict=True):
            state = _read_keys(reach, part(queries, 3), part(query_positions, 1), keys, sliding_window, state)
        return state.context().astype(queries.dtype), state.normaliser()

    context, normaliser = _over_blocks(one_block, queries.shape[3], axis=3)
    return context, (queries, parts, query_positions, sliding_window, context, normaliser)


def _read_keys(reach, queries, query_positions, keys: Keys, sliding_window, state: Softmax) -> Softmax:
    """Adds a set of keys, block by block, to the softmax of one block of queries."""
    length = keys.keys.shape[2]
    size = length if queries.shape[3] == 1 else _block_size(length)

    def read(state, start):
        block = jax.tree.map(lambda x: _take(start, size, x, 2), keys)
        seen = _visible(reach, block.positions, query_positions, sliding_window)[:, :, None]
        return jax.lax.cond(
            seen.any(), lambda: add_keys(state, queries, block.keys, block.values, seen), lambda: state
        ), None

    if size == length:
        seen = _visible(reach, keys.positions, query_positions, sliding_window)[:, :, None]
        return add_keys(state, queries, keys.keys, keys.values, seen)
    return jax.lax.scan(read, state, jnp.arange(0, length, size))[0]


def _backward(reaches, saved, gradient):
    """Gradients from the saved result and normaliser, a pair of blocks at a time.

    With `w = exp(q k - normaliser)` and `e` the gradient of the result `o`: `dv = w e`, and `e (v - o) w` is the
    gradient of the logit `q k`.
    """
    queries, parts, query_positions, sliding_window, context, normaliser = saved
    rest = jnp.sum(context.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)
    of_queries, of_parts = jnp.zeros(queries.shape, jnp.float32), []
    for reach, keys in zip(reaches, parts, strict=True):
        of_part, of_keys, of_values = _part_gradient(
            reach, queries, keys, query_positions, sliding_window, normaliser, rest, gradient
        )
        of_queries += of_part
        of_parts.append(Keys(of_keys.astype(keys.keys.dtype), of_values.astype(keys.values.dtype), None))
    return of_queries.astype(queries.dtype), tuple(of_parts), None, None


def _part_gradient(reach, queries, keys: Keys, query_positions, sliding_window, normaliser, rest, gradient):
    """float32 gradients of the queries, of a part's keys and of its values."""
    length = keys.keys.shape[2]
    size, scale = _block_size(length), queries.shape[-1] ** -0.5

    def of_query_block(carry, start):
        part = functools.partial(_take, start, _block_size(queries.shape[3]))
        q, error = part(queries, 3), part(gradient, 3)

        def of_key_block(carry, start):
            block = jax.tree.map(lambda x: _take(start, size, x, 2), keys)
            seen = _visible(reach, block.positions, part(query_positions, 1), sliding_window)[:, :, None]

            def gradients():
                weights = jnp.where(seen, jnp.exp(logits_of(q, block.keys) - part(normaliser, 3)[..., None]), 0.0)
                moved = wide_einsum("bkgtd,bknd->bkgtn", error, block.values) - part(rest, 3)[..., None]
                of_logits = (weights * moved * scale).astype(q.dtype)
                return (
                    wide_einsum("bkgtn,bknd->bkgtd", of_logits, block.keys),
                    wide_einsum("bkgtn,bkgtd->bknd", of_logits, q),
                    wide_einsum("bkgtn,bkgtd->bknd", weights.astype(error.dtype), error),
                )

            none = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, block.keys, block.values))
            of_q, *of_pairs = jax.lax.cond(seen.any(), gradients, lambda: none)
            total, *sums = carry
            sums = [_add(start, whole, part) for whole, part in zip(sums, of_pairs, strict=True)]
            return (total + of_q, *sums), None

        carry, _ = jax.lax.scan(of_key_block, (jnp.zeros(q.shape, jnp.float32), *carry), jnp.arange(0, length, size))
        return carry[1:], carry[0]

    starts = jnp.arange(0, queries.shape[3], _block_size(queries.shape[3]))
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys.keys, keys.values))
    of_pairs, of_queries = jax.lax.scan(of_query_block, zeros, starts)
    return _join_blocks(of_queries, axis=3), *of_pairs


_blockwise.defvjp(_forward, _backward)


def _visible(reach: Reach | None, key_positions: Array, query_positions: Array, sliding_window: Array | int) -> Array:
    """bool [B, K or 1, T, N]."""
    places = key_positions[:, :, None, :]
    past = query_positions[:, None, :, None] - places
    seen = (past >= 0) & (past < sliding_window) & (places >= 0)
    if reach is None:
        return seen
    proximal = (places < reach.sink) | (past < reach.recent)
    return seen & (proximal if reach.proximal else ~proximal)


def _block_size(length: int) -> int:
    return largest_divisor(length, BLOCK)


def _pad_to_blocks(x: Array, axis: int, empty: int = 0) -> Array:
    """Lengthens an axis that only small blocks would divide."""
    length = x.shape[axis]
    if _block_size(length) >= min(length, BLOCK // 4):
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -length % BLOCK)
    return jnp.pad(x, widths, constant_values=empty)


def _take(start: Array, size: int, x: Array, axis: int) -> Array:
    return x if size == x.shape[axis] else jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _add(start: Array, whole: Array, part: Array) -> Array:
    """Adds a block of keys' part, in place under jit."""
    before = jax.lax.dynamic_slice_in_dim(whole, start, part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(whole, before + part, start, axis=2)


def _over_blocks(function, length: int, axis: int):
    """Maps a function of a block's start over the blocks of an axis and joins what it returns along it."""
    size = _block_size(length)
    if size == length:
        return function(0)
    return jax.tree.map(lambda x: _join_blocks(x, axis), jax.lax.map(function, jnp.arange(0, length, size)))


def _join_blocks(x: Array, axis: int) -> Array:
    """[blocks, ..., size, ...] to [..., blocks * size, ...], `axis` being the result's."""
    moved = jnp.moveaxis(x, 0, axis)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)
