"""Removal errors of every window query by Pallas kernels for GPU; what the queries read, plain JAX finds before."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import Pairs, Queries, take_places
from restkv_jax.kernels.scores.columns import on_devices, per_query
from restkv_jax.kernels.scores.mosaic import Described, Ref
from restkv_jax.kernels.scores.parts import product, split, split_gram
from restkv_jax.kernels.scores.reference import Outputs, einsum, error_at, find_outputs
from restkv_jax.kernels.scores.triton import (
    Static,
    attention_of,
    each_tile,
    fill,
    load,
    places_of,
    store,
    weights_of_heads,
)


def averaged_removal_error(
    queries: Queries, pairs: Pairs, gram: Array, weights: Array, *, tau: float = 1.0, interpret: bool = False
) -> Array:
    """As the reference; keys and values are read once more than the outputs of the queries take."""

    def alone(queries: Queries, pairs: Pairs, gram: Array, weights: Array) -> Array:
        ones = jnp.ones(queries.positions.shape, jnp.float32)
        inputs = [
            *attention_of(queries, pairs, ones, interpret), ("b k n d", pairs.values),
            *_of_outputs(find_outputs(queries, pairs), pairs, gram), ("b q", fill(weights, 1)),
        ]  # fmt: skip
        return each_tile(functools.partial(_errors_kernel, tau), queries, pairs, inputs, ["b k g n"], interpret)[0]

    return on_devices(alone, queries, pairs, ("k g d e", gram), per_query(weights, queries))


def _of_outputs(found: Outputs, pairs: Pairs, gram: Array) -> list[Described]:
    """What `_errors_kernel` takes of the outputs."""
    best = take_places(pairs.values, found.top.reshape(*found.top.shape[:2], -1))
    moved = found.output_rest - best.reshape(found.output.shape).astype(jnp.float32)
    squared = einsum("bkgqd,kgde,bkgqe->bkgq", moved, gram, moved)
    parts = split_gram(fill(fill(gram, 2), 3))
    output = fill(fill(found.output, 3), 4)
    projected = einsum("kgde,bkgqe->bkgqd", parts.astype(jnp.float32).sum(1), output)
    of_queries = found.top, jnp.sqrt(jnp.maximum(squared, 0.0))
    return [
        ("k p g e f", parts), ("b k g q e", output), ("b k g q e", projected),
        *(("b k g q", fill(x, 3)) for x in of_queries),
    ]  # fmt: skip


def _errors_kernel(tau: float, static: Static, *blocks: Ref) -> None:
    *attention, values, gram, output, projected_output, top, distance, weights, errors = blocks
    tile, places = load(static, values, gram.shape[2]), places_of(static)
    order = jnp.arange(weights.shape[0])[:, None]
    for head, shares in enumerate(weights_of_heads(static, *attention)):
        projected = product(split(tile), [gram[0, head], gram[1, head]])

        def add_row(row, total, head=head, shares=shares, projected=projected):
            """The errors of one query."""
            moved = output[head, row][None] - tile.astype(jnp.float32)
            squared = (moved * (projected_output[head, row][None] - projected)).sum(1)
            is_top = places == top[head, row]
            far = jnp.where(is_top, distance[head, row], jnp.sqrt(jnp.maximum(squared, 0.0)))
            attention = jnp.where(order == row, shares, 0.0).sum(0)
            return total + weights[row] * error_at(far, attention, is_top, tau)

        nothing = jnp.zeros(places.shape, jnp.float32)
        store(static, errors, head, jax.lax.fori_loop(0, weights.shape[0], add_row, nothing))
