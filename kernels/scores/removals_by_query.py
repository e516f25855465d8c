"""Removal errors of every window query by Pallas kernels for TPU, in two passes over keys and two over values."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.scores import columns
from restkv_jax.kernels.scores.columns import (
    GRAM,
    Static,
    logits_of_tile,
    on_devices,
    per_query,
    projected,
    read_keys,
    weights_of_tile,
)
from restkv_jax.kernels.scores.mosaic import (
    SUBLANES,
    UNSEEN,
    Described,
    Ref,
    as_column,
    at_first_tile,
    num_rows,
    part,
    places_of,
)
from restkv_jax.kernels.scores.parts import product, split, split_gram
from restkv_jax.kernels.scores.reference import einsum, error_at
from restkv_jax.kernels.softmax import HIDDEN

TILE = 256
"""Keys whose values, and these projected, stay in registers while the queries pass by."""


GROUP_LIMIT, ROW_LIMIT, ELEMENT_LIMIT = 16, 512, 2**15
"""Query heads of a KV head, their queries, and the dimensions of these in all, that the least chip holds, of 16 MiB."""


def averaged_removal_error(
    queries: Queries, pairs: Pairs, gram: Array, weights: Array, *, tau: float = 1.0, interpret: bool = False
) -> Array:
    """As the reference; keys and values are read twice.

    `G (o - v)` is `G o - G v`, of which the second is the same for all queries: a difference and a product for each
    query and dimension are left. `||o||^2 - 2 o v + ||v||^2` would be a matrix product, and cancel.
    """

    def alone(queries: Queries, pairs: Pairs, gram: Array, weights: Array) -> Array:
        outputs = ["b k r c", "b k r c", "b k r d", "b k r c", "b k r c", "b k r d"]
        found = Outputs(*read_keys(_outputs_kernel, queries, pairs, [("b k n d", pairs.values)], outputs, interpret))
        weights = jnp.broadcast_to(weights[:, None, None], queries.vectors.shape[:-1])
        inputs = [*_of_outputs(found, gram), ("b k r c", as_column(weights)), ("b k n d", pairs.values)]
        kernel = functools.partial(_errors_kernel, tau)
        return read_keys(
            kernel, queries, pairs, inputs, ["b k g n"], interpret, scratch=[("r n", jnp.float32)], limit=TILE
        )[0]

    return on_devices(alone, queries, pairs, ("k g d e", gram), per_query(weights, queries))


def refusal(queries: Queries, pairs: Pairs, *arrays: Any, **options: Any) -> str | None:
    """Why the kernels cannot take these arguments."""
    rows, dim = num_rows(queries), queries.vectors.shape[-1]
    if queries.vectors.shape[2] > GROUP_LIMIT or rows > ROW_LIMIT or rows * dim > ELEMENT_LIMIT:
        return f"the outputs of {rows} queries of {dim} dimensions fill the chip's memory"
    return columns.refusal(queries, pairs, *arrays, **options)


class Outputs(NamedTuple):
    """What queries read from the key that they attend to most, and from the others.

    Of the first `logit` and `place`, [B, K, R, 1], and `value` [B, K, R, D]; `peak`, `total` and `weighted` are the
    `Softmax` of the others.
    """

    logit: Array
    place: Array
    value: Array
    peak: Array
    total: Array
    weighted: Array


def _outputs_kernel(static: Static, *blocks: Ref) -> None:
    """`Outputs` of the queries; the most attended key stays out of the softmax until another one takes its place."""
    *of_logits, values = blocks[:-6]
    so_far = Outputs(*blocks[-6:])

    def initialise() -> None:
        for x, start in zip(so_far, (HIDDEN, 0.0, 0.0, UNSEEN, 0.0, 0.0), strict=True):
            x[...] = jnp.full_like(x, start)

    at_first_tile(initialise)
    logits, place = logits_of_tile(static, *of_logits), places_of(static.tile)
    largest = logits.max(1, keepdims=True)
    best = place[:, :1] + jnp.argmax(logits, axis=1, keepdims=True)
    transposed = jnp.where(place < static.length, values[...].astype(jnp.float32).T, 0.0)
    parts = split(transposed.astype(values.dtype))
    value = product([(place == best).astype(jnp.bfloat16)], parts, over=(1, 1))
    is_new = largest > so_far.logit[...]
    lost = jnp.where(is_new, so_far.logit[...], largest)
    lost_value = jnp.where(is_new, so_far.value[...], value)
    logits = jnp.where(place == best, HIDDEN, logits)
    peak = jnp.maximum(jnp.maximum(so_far.peak[...], lost), logits.max(1, keepdims=True))
    decay, weights, lost_weight = jnp.exp(so_far.peak[...] - peak), jnp.exp(logits - peak), jnp.exp(lost - peak)
    so_far.total[...] = so_far.total[...] * decay + weights.sum(1, keepdims=True) + lost_weight
    weighted = product(split(weights), parts, over=(1, 1)) + lost_weight * lost_value
    so_far.weighted[...] = so_far.weighted[...] * decay + weighted
    so_far.peak[...] = peak
    so_far.logit[...] = jnp.where(is_new, largest, so_far.logit[...])
    so_far.place[...] = jnp.where(is_new, best.astype(jnp.float32), so_far.place[...])
    so_far.value[...] = jnp.where(is_new, value, so_far.value[...])


def _of_outputs(found: Outputs, gram: Array) -> list[Described]:
    """What `_errors_kernel` takes of the outputs."""
    seen = found.logit > UNSEEN
    others = jnp.where(seen, jnp.exp(found.peak - found.logit), 0.0)
    total = jnp.where(seen, 1 + others * found.total, 1.0)
    output = (found.value + others * found.weighted) / total
    moved = found.weighted / jnp.where(found.total > 0, found.total, 1.0) - found.value
    parts = split_gram(gram)
    squared = (moved * _project(moved, gram)).sum(-1, keepdims=True)
    columns = [_by_eights(x) for x in (output, _project(output, parts.astype(jnp.float32).sum(1)))]
    numbers = jnp.maximum(found.logit, UNSEEN), 1 / total, found.place, jnp.sqrt(jnp.maximum(squared, 0.0))
    return [*(("b k r c", x) for x in numbers), *(("b k m d i", x) for x in columns), (GRAM, parts)]


def _project(x: Array, gram: Array) -> Array:
    """Gram matrices [K, G, D, D] times rows [B, K, R, D], of one query head after the other."""
    by_head = x.reshape(*x.shape[:2], gram.shape[1], -1, x.shape[-1])
    return einsum("kgde,bkgte->bkgtd", gram, by_head).reshape(x.shape)


def _by_eights(x: Array) -> Array:
    """Rows [B, K, R, D] as columns, eight beside each other: [B, K, R / 8, D, 8]."""
    return x.reshape(*x.shape[:2], -1, SUBLANES, x.shape[-1]).swapaxes(3, 4)


def _errors_kernel(tau: float, static: Static, *blocks: Ref) -> None:
    *attention, place, distance, output, projected_output, gram, weights, values, errors, scratch = blocks
    scratch[...] = weights_of_tile(static, *attention)
    transposed = values[...].astype(jnp.float32).T
    here = places_of(static.tile).astype(jnp.float32)
    per_head = output.shape[0] // static.group
    rank = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, 1), 0)

    for head, values_projected in enumerate(projected(static, gram, transposed, values.dtype)):

        def add_rows(step, total, head=head, values_projected=values_projected):
            """The errors of eight queries."""
            block = head * per_head + step
            left, right = output[block], projected_output[block]
            squared = jnp.zeros((SUBLANES, static.tile), jnp.float32)
            for i in range(SUBLANES):
                terms = (left[:, i : i + 1] - transposed) * (right[:, i : i + 1] - values_projected)
                squared = jnp.where(rank == i, terms.sum(0, keepdims=True), squared)
            rows = part(block * SUBLANES, SUBLANES, SUBLANES)
            is_top = here == place[rows]
            moved = jnp.where(is_top, distance[rows], jnp.sqrt(jnp.maximum(squared, 0.0)))
            return total + (weights[rows] * error_at(moved, scratch[rows], is_top, tau)).sum(0, keepdims=True)

        nothing = jnp.zeros((1, static.tile), jnp.float32)
        errors[head : head + 1] = jax.lax.fori_loop(0, per_head, add_rows, nothing)
