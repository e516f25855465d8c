"""Where each query's most attended keys are, by Pallas kernels for GPU that go through the keys again for every digit.

The threshold of the `count` largest probabilities is found four bits at a time: every tile counts how many of its own
reach each of 16 candidates. Kept instead, the probabilities of all queries would be several times as large as the keys.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.scores.centres import BITS
from restkv_jax.kernels.scores.columns import on_devices
from restkv_jax.kernels.scores.mosaic import UNSEEN, Described, Ref
from restkv_jax.kernels.scores.triton import CANDIDATES, Static, each_tile, load, logits_of_heads, peaks_of

DIGIT = CANDIDATES.bit_length() - 1
"""Bits of a threshold that are found at one time."""


def attention_centres(queries: Queries, pairs: Pairs, *, count: int, interpret: bool = False) -> Array:
    """As the reference; keys are read 11 times."""

    def alone(queries: Queries, pairs: Pairs) -> Array:
        peak, total = peaks_of(queries, pairs, interpret)
        attention: list[Described] = [("b k g q", peak), ("b k g q", jnp.where(total > 0, total, 1.0))]

        def reaching(candidates: Array) -> Array:
            """How many keys of each tile reach candidates int32 [B, K, G, 16, Q]: [B, K, tiles, G, 16, Q]."""
            inputs = [*attention, ("b k g c q", candidates)]
            return each_tile(_counts_kernel, queries, pairs, inputs, ["b k t g c q"], interpret)[0].astype(jnp.int32)

        threshold = _find_threshold(lambda x: reaching(x).sum(2), count, peak)
        found = reaching(_candidates(threshold, 1))
        ties, wanted = found[..., 0, :] - found[..., 1, :], count - found[..., 1, :].sum(2)
        allowed = wanted[:, :, None] - (jnp.cumsum(ties, axis=2) - ties)
        inputs = [*attention, ("b k g q", threshold), ("b k t g q", allowed)]
        sums = each_tile(_sums_kernel, queries, pairs, inputs, ["b k t g q"] * 3, interpret)
        number, high, low = (x.astype(jnp.int32).sum(2) for x in sums)  # exact at any length
        return ((high * 1024.0 + low) / jnp.maximum(number, 1))[..., : queries.vectors.shape[3]]

    return on_devices(alone, queries, pairs)


def _find_threshold(count_reaching: Callable[[Array], Array], count: int, like: Array) -> Array:
    """The largest number that at least `count` reach, of each query of `like` [B, K, G, Q]; 0 where fewer are seen."""

    def add_digit(i: Array, threshold: Array) -> Array:
        unit = 1 << (BITS - BITS % DIGIT - DIGIT * i)
        enough = count_reaching(_candidates(threshold, unit))[..., 1:, :] >= count
        return threshold + unit * enough.sum(-2, dtype=jnp.int32)

    return jax.lax.fori_loop(0, -(-BITS // DIGIT), add_digit, jnp.zeros(like.shape, jnp.int32))


def _candidates(threshold: Array, unit: Array | int) -> Array:
    """A threshold and those up to 15 units above: int32 [B, K, G, 16, Q]."""
    steps = jnp.arange(CANDIDATES, dtype=jnp.int32)[:, None]
    fits = steps <= ((1 << BITS) - threshold[..., None, :]) // unit  # no probability is above, nor is int32's range
    return jnp.where(fits, threshold[..., None, :] + steps * jnp.where(fits, unit, 0), 1 << BITS)


def _numbers(static: Static, *blocks: Ref) -> list[Array]:
    """In a kernel: every query head's probabilities as integers, int32 [w, n], -1 where a key is not seen."""
    *of_logits, peak, total = blocks

    def of_head(head: int, logits: Array) -> Array:
        attention = jnp.exp(logits - peak[head][:, None]) / total[head][:, None]
        return jnp.where(logits > UNSEEN, jax.lax.bitcast_convert_type(attention, jnp.int32), -1)

    return [of_head(*x) for x in enumerate(logits_of_heads(static, *of_logits))]


def _counts_kernel(static: Static, *blocks: Ref) -> None:
    *attention, candidates, counts = blocks
    for head, numbers in enumerate(_numbers(static, *attention)):
        for i in range(candidates.shape[1]):
            counts[head, i] = (numbers >= candidates[head, i][:, None]).astype(jnp.float32).sum(1)


def _sums_kernel(static: Static, *blocks: Ref) -> None:
    """How many keys of a tile are among the largest, and their positions, in two parts."""
    *attention, threshold, allowed, number, high, low = blocks
    positions = load(static, attention[4], empty=-1)[None]
    order = jnp.arange(static.tile)
    before = (order[:, None] <= order[None]).astype(jnp.bfloat16)
    for head, numbers in enumerate(_numbers(static, *attention)):
        ties = numbers == threshold[head][:, None]
        rank = jnp.dot(ties.astype(jnp.bfloat16), before, preferred_element_type=jnp.float32)
        top = (numbers > threshold[head][:, None]) | (ties & (rank <= allowed[head].astype(jnp.float32)[:, None]))
        number[head] = top.astype(jnp.float32).sum(1)
        high[head] = jnp.where(top, positions >> 10, 0).astype(jnp.float32).sum(1)
        low[head] = jnp.where(top, positions & 1023, 0).astype(jnp.float32).sum(1)
