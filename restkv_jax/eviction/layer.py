"""Eviction of one layer's keys and values: score, smooth, select, gather."""

import functools
from typing import NamedTuple

import chex
import einops
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax import kernels
from restkv_jax.eviction.observation import Observation
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.refit import window_outputs
from restkv_jax.generation.checks import check_mask

UNREACHABLE = float(jnp.finfo(jnp.float32).min)
"""Score of keys that no later token can see: kept only where there is room for all."""


class Eviction(NamedTuple):
    """One layer after eviction.

    `scores` float32 [B, K, T - w], -inf on padding; `positions` int32 [B, K, C], prompt positions ascending, -1 where
    empty; `lengths` int32 [B, K]; `keys`, `values` [B, K, C, D].
    """

    scores: Array
    positions: Array
    lengths: Array
    keys: Array
    values: Array


def evict_layer(
    policy: EvictionPolicy,
    queries: Array,
    keys: Array,
    values: Array,
    output_projection: Array,
    mask: Array | None = None,
    layer: int = 0,
    num_layers: int = 1,
) -> Eviction:
    """Applies a policy to one layer of a prompt.

    Args:
      policy: what to keep.
      queries: [B, H, w, D], after RoPE, those of the last `w` tokens: at least the policy's window (of more, the
        last count), the whole prompt's for scorers that judge by all queries.
      keys: [B, K, T, D], after RoPE.
      values: [B, K, T, D].
      output_projection: [H, D, M], the block of the output projection that each head's output multiplies.
      mask: bool [B, T], False on left padding.
      layer: which layer it is; for budgets that differ by layer.
      num_layers: of the model; for budgets that differ by layer.

    Returns:
      an `Eviction` with `C = budget` slots (`T` without a budget, and where KV heads share one: see `lengths`); scores
      are always computed, also where the budget holds the whole prompt. A budget for the whole model is shared among
      the heads of this layer.

    Raises:
      AssertionError: shapes that do not agree.
      ValueError: fewer queries than the policy's window, a mask of another shape or with padding on the right.
    """
    arrays = dict(queries=queries, keys=keys, values=values, output_projection=output_projection)
    queries, keys, values, output_projection = arrays = [_as_array(name, x) for name, x in arrays.items()]
    batch, num_kv_heads, length, dim = keys.shape
    num_heads = queries.shape[1]
    mask = jnp.ones((batch, length), bool) if mask is None else jnp.asarray(mask, bool)
    expected = [(batch, num_heads, None, dim), keys.shape, keys.shape, (num_heads, dim, None)]
    for name, array, shape in zip(("queries", "keys", "values", "output_projection"), arrays, expected, strict=True):
        chex.assert_shape(array, shape, custom_message=f"{name} must have shape {shape} to agree with the others")
    chex.assert_is_divisible(num_heads, num_kv_heads)
    check_mask(mask, (batch, length))
    queries = _judging_queries(policy, queries, length)
    positions = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1).astype(jnp.int32)
    observation = Observation(queries, keys, values, output_projection, positions)
    slots = length if policy.budget is None or not policy.allocation.uniform else policy.budget
    return evict(policy, observation, slots, layer, num_layers)


def _as_array(name: str, array: Array) -> Array:
    array = jnp.asarray(array)
    rank = 3 if name == "output_projection" else 4
    chex.assert_rank(array, rank, custom_message=f"{name} has shape {array.shape}, but must have {rank} axes")
    return array


def _judging_queries(policy: EvictionPolicy, queries: Array, length: int) -> Array:
    window = policy.window_of(length)
    if queries.shape[2] < window:
        raise ValueError(
            f"queries has shape {queries.shape}: {queries.shape[2]} queries, but policy.window={policy.window} of a "
            f"prompt of {length} tokens needs {window}"
        )
    return queries[:, :, -policy.num_queries(length) :]


@functools.partial(jax.jit, static_argnames=("policy", "slots", "num_layers"))
def evict(
    policy: EvictionPolicy,
    observation: Observation,
    slots: int,
    layer: Array | int = 0,
    num_layers: int = 1,
    judged: Array | None = None,
) -> Eviction:
    """Scores, selects, gathers and refits one layer's pairs in `slots` places per KV head.

    `judged` are the scorer's own scores where they are at hand; see `judge`.
    """
    window = policy.window_of(observation.keys.shape[2])
    scores = score_prefix(policy, observation, window, judged)
    indices = select(scores, observation.positions, window, slots)
    if not policy.allocation.uniform:
        places = weighed_scores(policy, scores, observation.positions, indices)[None]
        prefix_lengths = (observation.positions[:, : scores.shape[-1]] >= 0).sum(-1)
        keep = keep_shares(policy, places, prefix_lengths, jnp.asarray(layer)[None], num_layers)[0]
        indices = jnp.sort(jnp.where(keep, indices, observation.keys.shape[2]), axis=-1)
    kept = take(observation, scores, indices)
    if policy.refit is None:
        return kept
    shown = observation._replace(queries=observation.queries[:, :, -window:])
    arrays = kept.keys, kept.values, shown.query_positions, kept.positions, shown.sliding_window
    return kept._replace(values=policy.refit(shown.queries, window_outputs(*shown.attention_arguments), *arrays))


def take(observation: Observation, scores: Array, indices: Array) -> Eviction:
    """The pairs at `indices`, int32 [B, K, C], `T` where a slot stays empty."""
    keys, values = kernels.gather_pairs(observation.keys, observation.values, indices)
    padded = jnp.pad(observation.positions, ((0, 0), (0, 1)), constant_values=-1)
    positions = jnp.take_along_axis(padded[:, None], indices, axis=2)
    return Eviction(scores, positions, (positions >= 0).sum(-1, dtype=jnp.int32), keys, values)


def weighed_scores(policy: EvictionPolicy, scores: Array, positions: Array, indices: Array) -> Array:
    """What the allocation compares of the keys at `indices`, int32 [B, K, N].

    Args:
      policy: its allocation weighs.
      scores: float32 [B, K, T - w] of the prefix.
      positions: int32 [B, T], -1 on padding.
      indices: int32 [B, K, N], `T` where a place is empty.

    Returns:
      float32 [B, K, N]: inf in the window, -inf on padding and where empty.
    """
    quota = policy.budget - policy.window
    scores = policy.allocation.weigh(scores, scores > UNREACHABLE, quota)
    window = jnp.where(positions[:, scores.shape[-1] :] >= 0, jnp.inf, -jnp.inf)
    window = jnp.broadcast_to(window[:, None], (*scores.shape[:2], window.shape[-1]))
    padded = jnp.pad(jnp.concatenate([scores, window], axis=-1), ((0, 0), (0, 0), (0, 1)), constant_values=-jnp.inf)
    return jnp.take_along_axis(padded, indices, axis=-1)


def keep_shares(policy: EvictionPolicy, scores: Array, prefix_lengths: Array, layers: Array, num_layers: int) -> Array:
    """Marks the window and every KV head's best keys, as many as the policy's allocation gives it.

    Args:
      policy: its allocation, budget and window count.
      scores: float32 [L, B, K, N], inf in the window and -inf where a place is empty.
      prefix_lengths: int32 [B], keys before the window of each prompt.
      layers: int32 [L], which layers these are.
      num_layers: of the model.

    Returns:
      bool [L, B, K, N].
    """
    in_window = jnp.isposinf(scores)
    candidates = jnp.where(in_window, -jnp.inf, scores)
    counts = policy.allocation.counts(candidates, prefix_lengths, policy.budget, policy.window, layers, num_layers)
    best_first = jnp.argsort(-candidates, axis=-1, stable=True)
    rank = jnp.argsort(best_first, axis=-1)
    return in_window | ((rank < counts[..., None]) & (candidates > -jnp.inf))


def judge(policy: EvictionPolicy, observation: Observation, window: int) -> Array | None:
    """The scorer's own scores, float32 [B, H, T - w], the same for every budget; None where nothing is judged."""
    if policy.scorer is None or observation.keys.shape[2] == window:
        return None
    return policy.scorer(observation, window)


def score_prefix(policy: EvictionPolicy, observation: Observation, window: int, judged: Array | None = None) -> Array:
    """The smoothed scores, reduced over each KV head's query heads: float32 [B, K, T - w], -inf on padding."""
    batch, num_kv_heads, length, _ = observation.keys.shape
    valid = observation.positions[:, None, : length - window] >= 0
    scores = judge(policy, observation, window) if judged is None else judged
    if scores is None:
        return jnp.where(valid, jnp.zeros((batch, num_kv_heads, length - window)), -jnp.inf)
    budget = length if policy.budget is None else policy.budget
    count = min(max(budget - window, 1), length)
    scores = policy.pooling(scores, observation, window, count)
    grouped = einops.rearrange(scores, "b (k g) p -> b k g p", k=num_kv_heads)
    reduced = grouped.mean(axis=2) if policy.group_reduce == "mean" else grouped.max(axis=2)
    seen = _within_reach(observation, window)
    return jnp.where(valid, jnp.where(seen, reduced, UNREACHABLE), -jnp.inf)


def _within_reach(observation: Observation, window: int) -> Array:
    """bool [B, 1, T - w]: whether the sliding window lets any later token see a key."""
    positions = observation.positions
    return (positions[:, -1:] + 1 - positions[:, : positions.shape[1] - window] < observation.sliding_window)[:, None]


def select(scores: Array, positions: Array, window: int, slots: int) -> Array:
    """Indices of the best `slots - window` keys before the window and of the window, ascending.

    Args:
      scores: float32 [B, K, T - w], -inf on padding.
      positions: int32 [B, T], -1 on padding.
      window: `w`.
      slots: `C`, places per KV head; more than `T` leaves the rest empty.

    Returns:
      int32 [B, K, C]; `T` marks an empty slot, and those come last.
    """
    batch, num_kv_heads, prefix = scores.shape
    length = prefix + window
    best, indices = jax.lax.top_k(scores, min(slots - window, prefix))
    chosen = jnp.where(best > -jnp.inf, indices, length)
    recent = jnp.where(positions[:, prefix:] >= 0, jnp.arange(prefix, length), length)
    recent = jnp.broadcast_to(recent[:, None], (batch, num_kv_heads, window))
    ascending = jnp.sort(jnp.concatenate([chosen, recent], axis=-1), axis=-1)
    missing = slots - ascending.shape[-1]
    return jnp.pad(ascending, ((0, 0), (0, 0), (0, missing)), constant_values=length).astype(jnp.int32)
