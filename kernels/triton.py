"""Attention of many queries on GPUs, as a Triton kernel that masks by ranges of places (FlashAttention-2).

A program of the grid takes a block of queries of one head through the blocks of keys that any of them sees, with a
running maximum and normaliser (arXiv 2307.08691, section 3.1).
"""

import functools
import math
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from restkv_jax.kernels.pairs import Pairs, Queries, lengthen
from restkv_jax.kernels.ranges import Ranges, Span, over_ranges
from restkv_jax.kernels.softmax import HIDDEN, Softmax, cap_logits, normalised

LEAST = 16
"""The smallest block that the matrix units of a GPU take."""


def refusal(queries: Queries, parts: tuple[Pairs, ...], *_: Any, spans: tuple[Span | None, ...]) -> str | None:
    """Why the kernel cannot take these arguments; None where it can."""
    num_queries, dim = queries.vectors.shape[3:]
    if num_queries < LEAST:
        return f"{num_queries} queries are less than a block of {LEAST}"
    return f"the head dimension {dim} is over 256" if dim > 256 else None


def read_parts(
    queries: Queries, parts: tuple[Pairs, ...], *, spans: tuple[Span | None, ...], interpret: bool = False
) -> tuple[Array, Array]:
    """The context [B, K, G, T, D] and the normaliser float32 [B, K, G, T] over the union of sets of pairs."""
    return over_ranges(functools.partial(_read, interpret=interpret), queries, parts, spans)


def _read(ranges: Ranges, queries: Queries, pairs: Pairs, interpret: bool) -> Softmax:
    """The softmax of one range of places."""
    batch, kv_heads, group, length, dim = queries.vectors.shape
    block_q, block_kv = _blocks(queries.vectors)
    vectors = lengthen(einops.rearrange(queries.vectors, "b k g t d -> b (k g) t d"), 2, block_q)
    keys, values = (lengthen(x, 2, block_kv) for x in (pairs.keys, pairs.values))
    first, end = (lengthen(x, 2, block_q) for x in (ranges.first, ranges.end))
    places, padded = ranges.first.shape[1], pl.next_power_of_2(dim)
    of_queries = pl.BlockSpec((None, None, block_q, padded), lambda i, b, h: (b, h, i, 0))
    of_keys = pl.BlockSpec((None, None, keys.shape[2], padded), lambda i, b, h: (b, h // group, 0, 0))
    of_ranges = pl.BlockSpec((None, None, block_q), lambda i, b, h: (b, h * places // (kv_heads * group), i))
    of_sums = pl.BlockSpec((None, None, block_q), lambda i, b, h: (b, h, i))
    context, normaliser = pl.pallas_call(
        functools.partial(_kernel, dim=dim, block_kv=block_kv, soft_cap=queries.soft_cap),
        grid=(vectors.shape[2] // block_q, batch, kv_heads * group),
        in_specs=[of_queries, of_keys, of_keys, of_ranges, of_ranges],
        out_specs=[of_queries, of_sums],
        out_shape=[
            jax.ShapeDtypeStruct(vectors.shape, vectors.dtype),
            jax.ShapeDtypeStruct(vectors.shape[:3], jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=4 if dim <= 64 else 8, num_stages=2),
        interpret=interpret,
        name="attend_ranges",
    )(vectors, keys, values, first, end)
    shape = batch, kv_heads, group, -1
    return normalised(normaliser.reshape(shape)[..., :length], context.reshape(*shape, dim)[:, :, :, :length])


def _kernel(
    queries_ref, keys_ref, values_ref, first_ref, end_ref, context_ref, normaliser_ref,
    *, dim: int, block_kv: int, soft_cap: float | None,
):  # fmt: skip
    """One block of queries [T, D] of one head; logits are in powers of 2."""
    block_q, padded = queries_ref.shape
    is_real = (jnp.arange(padded) < dim)[None]
    queries = triton.load(queries_ref, mask=is_real, other=0.0)
    first, end = first_ref[...], end_ref[...]

    def read(block, state):
        peak, total, weighted = state
        part = pl.ds(block * block_kv, block_kv)
        keys = triton.load(keys_ref.at[part, :], mask=is_real, other=0.0)
        values = triton.load(values_ref.at[part, :], mask=is_real, other=0.0)
        places = block * block_kv + jnp.arange(block_kv)[None]
        seen = (places >= first[:, None]) & (places < end[:, None])
        products = jnp.dot(queries, keys.T, preferred_element_type=jnp.float32)
        logits = jnp.where(seen, cap_logits(products, soft_cap) * math.log2(math.e), HIDDEN)
        new_peak = jnp.maximum(peak, logits.max(-1))
        weights = jnp.where(seen, jnp.exp2(logits - new_peak[:, None]), 0.0)
        decay = jnp.exp2(peak - new_peak)
        read_now = jnp.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return new_peak, total * decay + weights.sum(-1), weighted * decay[:, None] + read_now

    is_empty = first >= end
    lowest = jnp.where(is_empty, keys_ref.shape[0], first).min() // block_kv
    highest = (jnp.where(is_empty, 0, end).max() + block_kv - 1) // block_kv
    nothing = jnp.full(block_q, HIDDEN, jnp.float32), jnp.zeros(block_q, jnp.float32)
    start = *nothing, jnp.zeros((block_q, padded), jnp.float32)
    peak, total, weighted = jax.lax.fori_loop(lowest, highest, read, start)
    whole = jnp.where(total > 0, total, 1.0)
    triton.store(context_ref, (weighted / whole[:, None]).astype(context_ref.dtype), mask=is_real)
    normaliser_ref[...] = jnp.where(total > 0, (peak + jnp.log2(whole)) * math.log(2), HIDDEN)


def _blocks(vectors: Array) -> tuple[int, int]:
    """Queries and keys of a block: what fits the registers and the shared memory of one multiprocessor."""
    is_wide = vectors.shape[-1] * vectors.dtype.itemsize > 256
    return (64, 32) if is_wide else (128, 64)
