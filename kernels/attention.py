"""Attention of some queries over pairs that carry their own positions."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.dispatch import Dispatched, Implementation
from restkv_jax.kernels.pairs import (
    PAIR_AXES,
    Pairs,
    Queries,
    largest_divisor,
    lengthen,
    proximal,
    query_axes,
    take_columns,
    take_pairs,
    visible,
)
from restkv_jax.kernels.partition import by_device
from restkv_jax.kernels.ranges import Span
from restkv_jax.kernels.softmax import Softmax, cap_gradient, empty_softmax, join, logits_of, read_keys, wide_einsum
from restkv_jax.kernels.splash import part_gradients as splash_gradients
from restkv_jax.kernels.splash import read_parts as read_by_splash
from restkv_jax.kernels.splash import refusal as splash_refusal
from restkv_jax.kernels.triton import read_parts as read_by_triton
from restkv_jax.kernels.triton import refusal as triton_refusal

BLOCK = 512
"""Queries, and keys, whose probabilities exist at one time."""


class How(NamedTuple):
    """Static options of attention: the span of each set of pairs, and the implementation if one is forced."""

    spans: tuple[Span | None, ...]
    implementation: str | None = None

    def of(self, kernel: Dispatched) -> Any:
        """The kernel, or its implementation that is forced."""
        return kernel if self.implementation is None else kernel.force(self.implementation)


def attend(queries: Queries, pairs: Pairs, *, implementation: str | None = None) -> Array:
    """Causal softmax attention where order is given by positions, not by places in the arrays.

    Queries and keys are taken in blocks with a running maximum and normaliser (online softmax), and pairs of blocks
    that do not see each other are skipped, so temporaries stay at `B * H * BLOCK * BLOCK`. A single query reads all
    keys at once. Differentiable in reverse: besides its arguments the backward pass needs the result and one
    normaliser per query, and recomputes a block's probabilities from them (FlashAttention, arXiv 2205.14135).

    Args:
      queries: [B, K, G, T, D].
      pairs: [B, K, N, D]; for several queries in the order of positions, empty places at the ends.
      implementation: forces one by name, of `read_parts`; by the platform if None.

    Returns:
      [B, K, G, T, D] in the dtype of the queries; zeros where a query sees nothing. Softmax in float32.
    """
    return _joint(How((None,), implementation), queries, (pairs,))


def attend_shared(
    queries: Queries, pairs: Pairs, distant_keys: Array, *, sink: int, recent: int, implementation: str | None = None
) -> Array:
    """`attend` that reads distant tokens by other keys: one softmax over proximal and distant ones (PoD).

    `sum_P exp(q k) v + sum_D exp(q k') v` over `sum_P exp(q k) + sum_D exp(q k')`, where the proximal tokens `P` of a
    query are the first `sink` and the last `recent` up to and with its own, and `D` the rest of its past.

    Args:
      queries: as for `attend`.
      pairs: the keys count for proximal tokens.
      distant_keys: [B, K, N, D], of the same tokens, for distant ones.
      sink: tokens at the beginning.
      recent: tokens at the end.
      implementation: as for `attend`.
    """
    spans = Span(sink, recent, is_proximal=True), Span(sink, recent, is_proximal=False)
    return _joint(How(spans, implementation), queries, (pairs, pairs._replace(keys=distant_keys)))


def _joint(how: How, queries: Queries, parts: tuple[Pairs, ...]) -> Array:
    """One softmax over the union of several sets of pairs, each seen as its span says."""
    length = queries.vectors.shape[3]
    padded = queries.replace(
        vectors=_pad_to_blocks(queries.vectors, axis=3),
        positions=_pad_to_blocks(queries.positions, axis=1, empty=-1),
        sliding_window=jnp.asarray(queries.sliding_window, jnp.int32),
    )
    if length > 1:
        parts = tuple(
            Pairs(*(_pad_to_blocks(x, axis=2, empty=empty) for x, empty in zip(part, (0, 0, -1), strict=True)))
            for part in parts
        )
    if length == 1:
        context: Any = _context(how, padded, parts)
        return context
    # every device asks its own rows alone whether a block is seen
    axes = query_axes(padded), (PAIR_AXES,) * len(parts)
    context = by_device(functools.partial(_context, how), (padded, parts), axes, "b k g q d")
    return context[:, :, :, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _context(how: How, queries: Queries, parts: tuple[Pairs, ...]) -> Array:
    return _forward(how, queries, parts)[0]


def _forward(how: How, queries: Queries, parts: tuple[Pairs, ...]):
    context, normaliser = how.of(read_parts)(queries, parts, spans=how.spans)
    return context, (queries, parts, context, normaliser)


def _backward(how: How, saved, gradient):
    queries, parts, context, normaliser = saved
    none: Any = None  # positions have no gradient
    rest = jnp.sum(context.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)
    of_vectors, of_parts = how.of(part_gradients)(queries, parts, normaliser, rest, gradient, spans=how.spans)
    of_queries = queries.replace(vectors=of_vectors.astype(queries.vectors.dtype), positions=none, sliding_window=none)
    return of_queries, tuple(
        Pairs(of_keys.astype(pairs.keys.dtype), of_values.astype(pairs.values.dtype), none)
        for pairs, (of_keys, of_values) in zip(parts, of_parts, strict=True)
    )


_context.defvjp(_forward, _backward)


def _read_parts(queries: Queries, parts: tuple[Pairs, ...], *, spans: tuple[Span | None, ...]) -> tuple[Array, Array]:
    """What queries get from the union of sets of pairs, and how much they see.

    Args:
      queries: [B, K, G, T, D].
      parts: sets of pairs, each in the order of positions, empty places at the ends.
      spans: which part of the past each set stands for, None for all.

    Returns:
      the context [B, K, G, T, D] in the dtype of the queries, and the logarithm of the sum of all exponentials,
      float32 [B, K, G, T].
    """
    # Masks depend on positions alone. A scan over layers that is differentiated would compute them ahead of its loop,
    # for all blocks, which is T x T: so let them wait for the layer's queries.
    vectors, positions = jax.lax.optimization_barrier((queries.vectors, queries.positions))
    queries = queries.replace(vectors=vectors, positions=positions)
    length = vectors.shape[3]

    def one_block(start):
        block = _take_queries(queries, start, _block_size(length))
        state = empty_softmax(block.vectors)
        for span, pairs in zip(spans, parts, strict=True):
            state = _read_pairs(span, block, pairs, state)
        return state.context().astype(vectors.dtype), state.normaliser()

    return _over_blocks(one_block, length, axis=3)


def _read_pairs(span: Span | None, queries: Queries, pairs: Pairs, state: Softmax) -> Softmax:
    """Adds a set of pairs, block by block, to the softmax of one block of queries."""
    length = pairs.keys.shape[2]
    size = length if queries.vectors.shape[3] == 1 else _block_size(length)

    def read(state, start):
        block = take_pairs(pairs, start, size)
        seen = _seen(span, queries, block)
        return jax.lax.cond(
            seen.any(), lambda: join(state, read_keys(queries, block.keys, block.values, seen)), lambda: state
        ), None

    if size == length:
        return join(state, read_keys(queries, pairs.keys, pairs.values, _seen(span, queries, pairs)))
    return jax.lax.scan(read, state, jnp.arange(0, length, size))[0]


def _part_gradients(
    queries: Queries,
    parts: tuple[Pairs, ...],
    normaliser: Array,
    rest: Array,
    gradient: Array,
    *,
    spans: tuple[Span | None, ...],
) -> tuple[Array, tuple[tuple[Array, Array], ...]]:
    """Gradients of `read_parts`, a pair of blocks at a time.

    With `w = exp(q k - normaliser)` and `e` the gradient of the result `o`: `dv = w e`, and `e (v - o) w` is the
    gradient of the logit, `q k` or its soft cap.

    Args:
      queries: as for `read_parts`.
      parts: likewise.
      normaliser: float32 [B, K, G, T], the result's.
      rest: float32 [B, K, G, T], the product of context and gradient.
      gradient: [B, K, G, T, D], of the context.
      spans: as for `read_parts`.

    Returns:
      float32 gradients of the queries' vectors, and of the keys and values of each set.
    """
    of_queries, of_parts = jnp.zeros(queries.vectors.shape, jnp.float32), []
    for span, pairs in zip(spans, parts, strict=True):
        of_part, *of_pairs = _part_gradient(span, queries, pairs, normaliser, rest, gradient)
        of_queries += of_part
        of_parts.append(tuple(of_pairs))
    return of_queries, tuple(of_parts)


def _part_gradient(span, queries: Queries, pairs: Pairs, normaliser: Array, rest: Array, gradient: Array):
    """float32 gradients of the queries, of a part's keys and of its values."""
    length, num_queries = pairs.keys.shape[2], queries.vectors.shape[3]
    size = _block_size(length)

    def of_query_block(carry, start):
        part = functools.partial(take_columns, start=start, size=_block_size(num_queries), axis=3)
        block, error = _take_queries(queries, start, _block_size(num_queries)), part(gradient)
        q = block.vectors

        def of_key_block(carry, start):
            columns = take_pairs(pairs, start, size)
            seen = _seen(span, block, columns)

            def gradients():
                logits = logits_of(block, columns.keys)
                weights = jnp.where(seen, jnp.exp(logits - part(normaliser)[..., None]), 0.0)
                moved = wide_einsum("bkgtd,bknd->bkgtn", error, columns.values) - part(rest)[..., None]
                of_products = (weights * moved * cap_gradient(block, logits)).astype(q.dtype)
                return (
                    wide_einsum("bkgtn,bknd->bkgtd", of_products, columns.keys),
                    wide_einsum("bkgtn,bkgtd->bknd", of_products, q),
                    wide_einsum("bkgtn,bkgtd->bknd", weights.astype(error.dtype), error),
                )

            none = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, columns.keys, columns.values))
            of_q, *of_pairs = jax.lax.cond(seen.any(), gradients, lambda: none)
            total, *sums = carry
            sums = [_add(start, whole, one) for whole, one in zip(sums, of_pairs, strict=True)]
            return (total + of_q, *sums), None

        carry, _ = jax.lax.scan(of_key_block, (jnp.zeros(q.shape, jnp.float32), *carry), jnp.arange(0, length, size))
        return carry[1:], carry[0]

    starts = jnp.arange(0, num_queries, _block_size(num_queries))
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (pairs.keys, pairs.values))
    of_pairs, of_queries = jax.lax.scan(of_query_block, zeros, starts)
    return _join_blocks(of_queries, axis=3), *of_pairs


read_parts = Dispatched(
    _read_parts,
    splash=Implementation(read_by_splash, "tpu", splash_refusal),
    triton=Implementation(read_by_triton, "cuda", triton_refusal),
)
part_gradients = Dispatched(_part_gradients, splash=Implementation(splash_gradients, "tpu", splash_refusal))


def _seen(span: Span | None, queries: Queries, pairs: Pairs) -> Array:
    """bool [B, K or 1, 1, T, N]."""
    seen = visible(queries, pairs.positions)
    if span is not None:
        near = proximal(queries, pairs.positions, span.sink, span.recent)
        seen &= near if span.is_proximal else ~near
    return seen[:, :, None]


def _take_queries(queries: Queries, start: Array, size: int) -> Queries:
    return queries.replace(
        vectors=take_columns(queries.vectors, start, size, axis=3),
        positions=take_columns(queries.positions, start, size, axis=1),
    )


def _block_size(length: int) -> int:
    return largest_divisor(length, BLOCK)


def _pad_to_blocks(x: Array, axis: int, empty: int = 0) -> Array:
    """Lengthens an axis that only small blocks would divide."""
    length = x.shape[axis]
    return x if _block_size(length) >= min(length, BLOCK // 4) else lengthen(x, axis, BLOCK, empty)


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
