"""Where each query's most attended keys are, by a Pallas kernel for TPU that counts in the chip's memory."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import Pairs, Queries, largest_divisor
from restkv_jax.kernels.scores import columns
from restkv_jax.kernels.scores.columns import Static, logits_of_tile, on_devices, read_keys
from restkv_jax.kernels.scores.mosaic import LANES, SUBLANES, UNSEEN, Ref, at_first_tile, at_last_tile, part, places_of

HELD = 2**21
"""Attention probabilities that the chip holds at one time, in 8 MiB."""

IN_REGISTERS = 2**15
"""Of these at one time."""

BITS = 30
"""Of a float32 number from 0 to 1: as integers they have the same order."""


def attention_centres(queries: Queries, pairs: Pairs, *, count: int, interpret: bool = False) -> Array:
    """As the reference; keys are read once for as many queries as the chip holds the attention of."""
    at_once = HELD // pairs.keys.shape[2] // SUBLANES * SUBLANES

    def alone(queries: Queries, pairs: Pairs) -> Array:
        kernel, width = functools.partial(_centres_kernel, count), queries.vectors.shape[3]
        scratch = [("r N", jnp.int32), ("c N", jnp.int32), ("r c", jnp.float32)]
        found = read_keys(kernel, queries, pairs, [], ["b k r c"], interpret, scratch, at_once=at_once)[0]
        return found.reshape(*queries.vectors.shape[:3], -1)[..., :width]

    return on_devices(alone, queries, pairs)


def refusal(queries: Queries, pairs: Pairs, **options: Any) -> str | None:
    """Why the kernel cannot take these arguments."""
    length = pairs.keys.shape[2]
    if length > HELD // SUBLANES:
        return f"the attention of {SUBLANES} queries for {length} keys fills the chip's memory"
    return columns.refusal(queries, pairs)


def _centres_kernel(count: int, static: Static, *blocks: Ref) -> None:
    """Keeps the logits of all tiles, and at the last one finds the mean position of each query's `count` largest."""
    *of_logits, centres, held, held_positions, peak = blocks

    def initialise() -> None:
        peak[...] = jnp.full_like(peak, UNSEEN)

    at_first_tile(initialise)
    logits = logits_of_tile(static, *of_logits)
    here = part(places_of(static.tile)[0, 0], static.tile, static.tile)
    held[:, here] = _as_bits(logits)
    held_positions[:, here] = of_logits[-1][...]
    peak[...] = jnp.maximum(peak[...], logits.max(1, keepdims=True))

    def find() -> None:
        at_once = largest_divisor(static.tile // LANES, max(1, IN_REGISTERS // held.shape[0] // LANES)) * LANES
        chunks = Chunks(held, at_once)
        _make_probabilities(chunks, peak[...])
        centres[...] = _mean_position(chunks, held_positions, *_find_threshold(chunks, count))

    at_last_tile(find)


class Chunks(NamedTuple):
    """A number for each query and key, int32 [R, N], of which `at_once` keys are gone through at one time."""

    numbers: Ref
    at_once: int

    def each(self, function: Callable[[Any, Array, Any], Any], state: Any) -> Any:
        """Takes a state through all keys: `function(state, numbers [R, n], which of N these are)`."""

        def step(i: Array, state: Any) -> Any:
            here = part(i * self.at_once, self.at_once, self.at_once)
            return function(state, self.numbers[:, here], here)

        return jax.lax.fori_loop(0, self.numbers.shape[1] // self.at_once, step, state)

    def total(self, function: Callable[[Array, Any], Array], dtype: Any = jnp.float32) -> Array:
        """The sum over all keys of what a function makes of numbers [R, n] and where they are: [R, 1]."""
        nothing = jnp.zeros((self.numbers.shape[0], self.at_once), dtype)
        return self.each(lambda state, x, here: state + function(x, here).astype(dtype), nothing).sum(1, keepdims=True)

    def count(self, function: Callable[[Array, Any], Array]) -> Array:
        """How often a function says so, float32 [R, 1], exact for as many keys as fit."""
        return self.total(lambda x, here: jnp.where(function(x, here), 1.0, 0.0))

    def places(self, here: Any) -> Array:
        """Where a chunk's keys stand, int32 [1, n]."""
        return here.start + jax.lax.broadcasted_iota(jnp.int32, (1, self.at_once), 1)


def _make_probabilities(chunks: Chunks, peak: Array) -> None:
    """Logits to the integers of probabilities, -1 where a key is not seen."""

    def weigh(x: Array) -> Array:
        return jnp.exp(_as_float(x) - peak)

    total = chunks.total(lambda x, _: weigh(x))
    total = jnp.where(total > 0, total, 1.0)

    def replace(_, x: Array, here: Any) -> int:
        chunks.numbers[:, here] = jnp.where(_as_float(x) > UNSEEN, _as_bits(weigh(x) / total), -1)
        return 0

    chunks.each(replace, 0)


def _find_threshold(chunks: Chunks, count: int) -> tuple[Array, Array]:
    """What the `count` largest numbers exceed, and before which place they equal it: int32 [R, 1] each."""

    def raise_threshold(i: Array, threshold: Array) -> Array:
        candidate = threshold | (1 << (BITS - 1 - i))
        return jnp.where(chunks.count(lambda x, _: x >= candidate) >= count, candidate, threshold)

    threshold = jax.lax.fori_loop(0, BITS, raise_threshold, jnp.zeros((chunks.numbers.shape[0], 1), jnp.int32))
    wanted = count - chunks.count(lambda x, _: x > threshold)
    length = chunks.numbers.shape[1]

    def raise_bound(i: Array, bound: Array) -> Array:
        candidate = bound | (1 << (length.bit_length() - 1 - i))
        before = chunks.count(lambda x, here: (x == threshold) & (chunks.places(here) < candidate))
        return jnp.where(before <= wanted, candidate, bound)

    has_ties = (chunks.count(lambda x, _: x == threshold) > wanted).astype(jnp.int32).max()
    start = jnp.full_like(threshold, length) * (1 - has_ties)
    return threshold, jax.lax.fori_loop(0, length.bit_length() * has_ties, raise_bound, start)


def _mean_position(chunks: Chunks, positions: Ref, threshold: Array, bound: Array) -> Array:
    """The mean position of the largest numbers, float32 [R, 1], summed as integers in two parts as in the reference."""

    def is_top(x: Array, here: Any) -> Array:
        return (x > threshold) | ((x == threshold) & (chunks.places(here) < bound))

    def total(take: Callable[[Array], Array]) -> Array:
        return chunks.total(lambda x, here: jnp.where(is_top(x, here), take(positions[:, here]), 0), jnp.int32)

    high, low = total(lambda x: x >> 10), total(lambda x: x & 1023)
    return (high * 1024.0 + low) / jnp.maximum(chunks.count(is_top), 1.0)


def _as_bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _as_float(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.float32)
