"""Compactor: keep keys that are outliers among the keys, and those that their neighbours attend to."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.kernels.pairs import Pairs, Queries, take_columns, within_reach
from restkv_jax.kernels.partition import divide, each_part, parts_of_mesh, undivide
from restkv_jax.kernels.scores import einsum, fold_tiles, map_tiles
from restkv_jax.kernels.solve import solve_positive_definite
from restkv_jax.models.arguments import check_integer, check_number
from restkv_jax.models.decoder import LayerView
from restkv_jax.models.rope import undo_rope

RIDGE = 0.01
"""Added to the diagonal of the keys' Gram matrix, as in kvpress; more where float32 sums of it are rounded by more."""


@dataclasses.dataclass(frozen=True)
class LeverageAndAttention:
    """`blending` times the leverage of the keys before RoPE plus attention without causal order, both standardised.

    Each has mean 0 and standard deviation 1 over the KV heads and keys of a row that are judged: those before the
    window and beyond the first `sinks`, which score 0: who keeps them sets the policy's `sinks`. One random sketch,
    drawn from `seed`, serves all layers and heads.
    """

    sinks: int = 8
    chunk_size: int = 256
    sketch_dimension: int | None = 48
    blending: float = 0.5
    seed: int = 0
    all_queries: ClassVar[bool] = True
    additive: ClassVar[bool] = False

    def __post_init__(self):
        check_integer("sinks", self.sinks, 0, "first tokens of the prompt, which do not count")
        check_integer("chunk_size", self.chunk_size, 1, "tokens that attend to each other")
        if self.sketch_dimension is not None:
            check_integer("sketch_dimension", self.sketch_dimension, 1, "dimensions of the sketched keys")
        check_number("blending", self.blending, "the weight of the leverage, the attention's being 1")
        check_integer("seed", self.seed, 0, "of the random sketch")

    def __call__(self, view: LayerView, pairs: Pairs, window: int) -> Array:
        length, dim = pairs.keys.shape[2:]
        counted = within_reach(view.queries, pairs.positions) & (pairs.positions >= self.sinks)
        counted = jnp.broadcast_to(counted, pairs.keys.shape[:3])[..., : length - window]
        leverage = standardised(leverages(view, pairs, counted, self.sketch(dim)), counted)
        attention = standardised(non_causal_attention(view.queries, pairs, counted, self.chunk_size), counted)
        scores = self.blending * leverage + attention
        return jnp.where(counted, scores, 0.0)[:, :, None]

    def sketch(self, dim: int) -> Array:
        """float32 [D, S], normally distributed with variance `1 / S`; without a sketch the identity."""
        if self.sketch_dimension is None:
            return jnp.eye(dim)
        drawn = jax.random.normal(jax.random.key(self.seed), (dim, self.sketch_dimension))
        return drawn / math.sqrt(self.sketch_dimension)


def leverages(view: LayerView, pairs: Pairs, counted: Array, sketch: Array) -> Array:
    """`x (X^T X + r I)^-1 x^T` of every key, with `X` the centred keys before RoPE, sketched, that count.

    Args:
      view: its rope turned the keys.
      pairs: [B, K, N, D].
      counted: bool [B, K, P], of the first `P` keys.
      sketch: float32 [D, S], or [K, D, S].

    Returns:
      float32 [B, K, P].
    """
    one, prefix = view.queries.last(1), counted.shape[-1]
    batch, num_kv_heads, length, dim = pairs.keys.shape
    number = jnp.maximum(counted.sum(-1), 1)[..., None, None]
    counted = jnp.pad(counted, ((0, 0), (0, 0), (0, length - prefix)))

    def undone(tile: Pairs) -> Array:
        return undo_rope(tile.keys, tile.positions, view.rope)

    def masked(x: Array, is_new: Array, start: Array) -> Array:
        counts = take_columns(counted, start, x.shape[2], axis=2) & is_new
        return jnp.where(counts[..., None], x, 0.0)

    def add(total: Array, tile: Pairs, is_new: Array, start: Array) -> Array:
        return total + masked(undone(tile), is_new, start).sum(2, keepdims=True)

    total = fold_tiles(add, jnp.zeros((batch, num_kv_heads, 1, dim)), one, pairs)
    mean = total / number

    def add_square(total: Array, tile: Pairs, is_new: Array, start: Array) -> Array:
        x = masked(undone(tile) - mean, is_new, start)
        return total + einsum("bknd,bkne->bkde", x, x)

    gram = fold_tiles(add_square, jnp.zeros((batch, num_kv_heads, dim, dim)), one, pairs)
    inverse = _sketched_inverse(gram, jnp.broadcast_to(sketch, (num_kv_heads, *sketch.shape[-2:])))

    def of_tile(tile: Pairs, _) -> Array:
        x = undone(tile) - mean
        return jnp.maximum(einsum("bknd,bkde,bkne->bkn", x, inverse, x), 0.0)

    return map_tiles(of_tile, one, pairs)[..., :prefix]


def _sketched_inverse(gram: Array, sketch: Array) -> Array:
    """`S (S^T G S + r I)^-1 S^T` [B, K, D, D] of Gram matrices [B, K, D, D] and sketches [K, D, S]."""
    sketched = einsum("kds,bkde,ket->bkst", sketch, gram, sketch)
    rounding = jnp.finfo(jnp.float32).eps * jnp.trace(sketched, axis1=2, axis2=3)
    system = sketched + jnp.maximum(RIDGE, rounding)[..., None, None] * jnp.eye(sketch.shape[-1])
    targets = jnp.broadcast_to(jnp.swapaxes(sketch, 1, 2), (*gram.shape[:2], sketch.shape[2], sketch.shape[1]))
    parts = parts_of_mesh(*gram.shape[:2])
    solve = jax.vmap(jax.vmap(solve_positive_definite))
    solved = undivide(each_part(solve, *(divide(x, parts) for x in (system, targets))))
    return einsum("kds,bkse->bkde", sketch, solved)


def non_causal_attention(queries: Queries, pairs: Pairs, counted: Array, chunk_size: int) -> Array:
    """Attention received within chunks of consecutive keys, times the values' norms, mean of three neighbours.

    The queries of a chunk's tokens look at all its keys, later ones too; keys whose queries are gone, left by an
    earlier eviction, are judged by the first queries there are. As in kvpress, logits are not divided by the square
    root of `D`, and the last chunk is filled up with vectors of zeros that take part like all others.

    Args:
      queries: [B, K, G, T, D], of the last tokens.
      pairs: [B, K, N, D].
      counted: bool [B, K, P], of the first `P` keys; from the first to the last that counts, all do.
      chunk_size: keys of a chunk.

    Returns:
      float32 [B, K, P], mean over the query heads, 0 where not counted.
    """
    prefix, (length, dim) = counted.shape[-1], queries.vectors.shape[3:]
    ahead = pairs.keys.shape[2] - length
    first_key = prefix - counted.sum(-1)  # [B, K]
    first_query = (queries.positions < 0).sum(-1)[:, None]

    def chunk(start: Array) -> Array:
        keys = _take_from(pairs.keys, first_key + start, chunk_size, prefix)
        first = jnp.maximum(first_key + start - ahead, first_query)
        vectors = _take_from(queries.vectors, first, chunk_size, prefix - ahead)
        logits = einsum("bkgqd,bknd->bkgqn", vectors * math.sqrt(dim), keys)
        return jax.nn.softmax(logits).sum(3).mean(2)

    received = jax.lax.map(chunk, jnp.arange(0, prefix, chunk_size))
    received = jnp.moveaxis(received, 0, 2).reshape(*counted.shape[:2], -1)
    received = jnp.take_along_axis(received, jnp.maximum(jnp.arange(prefix) - first_key[..., None], 0), axis=2)
    norms = jnp.linalg.norm(pairs.values.astype(jnp.float32), axis=-1)[..., :prefix]
    scores = jnp.pad(jnp.where(counted, received * norms, 0.0), ((0, 0), (0, 0), (1, 1)))
    return (scores[..., :-2] + scores[..., 1:-1] + scores[..., 2:]) / 3


def _take_from(x: Array, start: Array, size: int, end: int) -> Array:
    """`size` places of `x` [B, K, ..., N, D] from `start`, int32 [B, K], on, as float32; zeros from `end` on."""
    places = start[..., None] + jnp.arange(size)
    places = jnp.where(places < end, places, x.shape[-2])
    places = jnp.expand_dims(places, (*range(2, x.ndim - 2), x.ndim - 1))
    return jnp.take_along_axis(x, places, axis=x.ndim - 2, mode="fill", fill_value=0).astype(jnp.float32)


def standardised(scores: Array, counted: Array) -> Array:
    """Scores [B, K, P] less their mean and over their standard deviation, of those that count in a row."""
    number = counted.sum((1, 2), keepdims=True)
    total = jnp.where(counted, scores, 0.0).sum((1, 2), keepdims=True)
    moved = jnp.where(counted, scores - total / jnp.maximum(number, 1), 0.0)
    variance = (moved**2).sum((1, 2), keepdims=True) / jnp.maximum(number - 1, 1)
    return moved / jnp.maximum(jnp.sqrt(variance), 1e-6)


def compactor(
    budget: int = 128,
    window: int = 4,
    sinks: int = 8,
    chunk_size: int = 256,
    sketch_dimension: int | None = 48,
    blending: float = 0.5,
    seed: int = 0,
) -> EvictionPolicy:
    """Compactor: leverage scores of keys, blended with attention without causal order (arXiv 2507.08143).

    kvpress weighs the leverage by the part of the pairs that it evicts, 0.5 at half of them; the authors' engine by
    0.5, as here. Budgets that differ by head are `replace(allocation=AdaptiveHeads(normalize=False))`: scores of both
    signs cannot be divided by their sum.

    Args:
      budget: slots kept per layer and KV head, the window included.
      window: last tokens of the prompt, always kept.
      sinks: first tokens of the prompt, always kept.
      chunk_size: tokens that attend to each other.
      sketch_dimension: dimensions that keys are projected to at random for their leverage; None computes it exactly.
      blending: weight of the leverage, the attention's being 1.
      seed: of the random projection.
    """
    scorer = LeverageAndAttention(sinks, chunk_size, sketch_dimension, blending, seed)
    return EvictionPolicy(budget=budget, window=window, scorer=scorer, sinks=sinks)
