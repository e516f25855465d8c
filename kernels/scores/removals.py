"""Removal errors by Pallas kernels for TPU, in two passes over keys and two over values."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.scores.columns import (
    GRAM,
    Static,
    attention_of,
    on_devices,
    per_query,
    projected,
    read_keys,
    sums_of_heads,
    weights_of_tile,
)
from restkv_jax.kernels.scores.mosaic import (
    LANES,
    Grid,
    Ref,
    at_first_tile,
    over_tiles,
    places_of,
    tile_of,
)
from restkv_jax.kernels.scores.parts import product, split, split_gram
from restkv_jax.kernels.scores.reference import einsum, error_at


def averaged_attention_removal_error(
    queries: Queries,
    pairs: Pairs,
    gram: Array,
    weights: Array,
    *,
    window: int | None = None,
    tau: float = 1.0,
    interpret: bool = False,
) -> Array:
    """As the reference; keys and values are read twice.

    Its differences `o - v` come first here too, so that they do not cancel, but `G (o - v)` is `G o - G v` with the
    same `G`, in two parts: exact for values in bfloat16, in half the passes.
    """
    num_prefix = pairs.keys.shape[2] - (queries.vectors.shape[3] if window is None else window)

    def alone(queries: Queries, pairs: Pairs, gram: Array, weights: Array) -> Array:
        inputs = [*attention_of(queries, pairs, weights, interpret), ("b k n d", pairs.values)]
        kernel, outputs = functools.partial(_output_kernel, num_prefix), ["b k g n", *OUTPUT]
        received, *found = read_keys(kernel, queries, pairs, inputs, outputs, interpret)
        return _errors(received, Output(*found), pairs.values, gram, num_prefix, tau, interpret)

    return on_devices(alone, queries, pairs, ("k g d e", gram), per_query(weights, queries))


class Output(NamedTuple):
    """A weighted sum of values, the largest weight apart from the others.

    `share` [B, K, G, 1], that weight; `place`, where it is; `value` [B, K, G, D], what it weighs; `others`, the sum of
    the other values; `rest` [B, K, G, 1], of the other weights, those after the prefix included.
    """

    share: Array
    place: Array
    value: Array
    others: Array
    rest: Array

    def measured(self, gram: Array, parts: Array) -> tuple[Array, Array, Array]:
        """The sum, and it times Gram matrices in parts, [B, K, G, D]; the top value's distance from the rest's mean."""
        output = self.others + self.share * self.value
        moved = self.others / jnp.maximum(self.rest, jnp.finfo(jnp.float32).tiny) - self.value
        squared = einsum("bkgd,kgde,bkge->bkg", moved, gram, moved)[..., None]
        projected_output = einsum("kgde,bkge->bkgd", parts.astype(jnp.float32).sum(1), output)
        return output, projected_output, jnp.sqrt(jnp.maximum(squared, 0.0))


OUTPUT = "b k g c", "b k g c", "b k g d", "b k g d", "b k g c"
"""Its axes."""


def _output_kernel(num_prefix: int, static: Static, *blocks: Ref) -> None:
    """Attention received, and the `Output` of the keys before `num_prefix`.

    The largest weight so far stays out of the sum until a larger one comes: taken out afterwards, it would cancel.
    """
    *attention, values, received = blocks[:-5]
    so_far = Output(*blocks[-5:])

    def initialise() -> None:
        for x in so_far:
            x[...] = jnp.zeros_like(x)

    at_first_tile(initialise)
    received[...] = sums = sums_of_heads(static, weights_of_tile(static, *attention))
    place = places_of(static.tile)
    in_prefix = place < num_prefix
    shares = jnp.where(in_prefix, sums, 0.0)
    largest = shares.max(1, keepdims=True)
    best = place[:, :1] + jnp.argmax(shares, axis=1, keepdims=True)
    is_best = (place == best) & in_prefix
    transposed = jnp.where(place < static.length, values[...].astype(jnp.float32).T, 0.0)
    parts = split(transposed.astype(values.dtype))
    value = product([is_best.astype(jnp.bfloat16)], parts, over=(1, 1))
    is_new = largest > so_far.share[...]
    lost = jnp.where(is_new, so_far.share[...], largest)
    lost_value = jnp.where(is_new, so_far.value[...], value)
    others = product(split(jnp.where(is_best, 0.0, shares)), parts, over=(1, 1))
    so_far.others[...] += others + lost * lost_value
    so_far.rest[...] += jnp.where(is_best, 0.0, sums).sum(1, keepdims=True) + lost
    so_far.share[...] = jnp.where(is_new, largest, so_far.share[...])
    so_far.place[...] = jnp.where(is_new, best.astype(jnp.float32), so_far.place[...])
    so_far.value[...] = jnp.where(is_new, value, so_far.value[...])


def _errors(
    received: Array, found: Output, values: Array, gram: Array, num_prefix: int, tau: float, interpret: bool
) -> Array:
    """The removal errors of the keys before `num_prefix`, of attention float32 [B, K, G, T]: one pass over values."""
    batch, num_kv_heads, group, dim = found.value.shape
    parts = split_gram(gram)
    output, projected_output, distance = found.measured(gram, parts)
    tile = tile_of(max(group, dim, LANES), num_prefix)
    inputs = [
        ("b k g n", received), ("b k n d", values), (GRAM, parts), ("b k d g", output.swapaxes(2, 3)),
        ("b k d g", projected_output.swapaxes(2, 3)), ("b k g c", found.place), ("b k g c", distance),
    ]  # fmt: skip
    shape = jax.ShapeDtypeStruct((batch, num_kv_heads, group, num_prefix), jnp.float32)
    grid = Grid(batch, num_kv_heads, 1, 1, num_prefix, tile)
    kernel = functools.partial(_errors_kernel, Static(group, num_prefix, tile, None), tau)
    return over_tiles(kernel, 0, inputs, [("b k g n", shape)], grid, interpret)[0]


def _errors_kernel(static: Static, tau: float, _, *blocks: Ref) -> None:
    received, values, gram, output, projected_output, place, top_distance, errors = blocks
    transposed = values[...].astype(jnp.float32).T
    is_top = places_of(static.tile).astype(jnp.float32) == place[...]
    for head, values_projected in enumerate(projected(static, gram, transposed, values.dtype)):
        one = slice(head, head + 1)
        moved, moved_projected = output[:, one] - transposed, projected_output[:, one] - values_projected
        distance = jnp.sqrt(jnp.maximum((moved * moved_projected).sum(0, keepdims=True), 0.0))
        distance = jnp.where(is_top[one], top_distance[one], distance)
        errors[one] = error_at(distance, received[one], is_top[one], tau)
