"""Selection: scores are smoothed, reduced over query heads, and the best keys taken."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.allocation import ranks
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.refit import Asked
from restkv_jax.kernels.pairs import Pairs, within_reach
from restkv_jax.kernels.top import places, top_mask
from restkv_jax.models.decoder import LayerView

UNREACHABLE = float(jnp.finfo(jnp.float32).min)
"""Score of keys that no later token can see: kept only where there is room for all."""

LARGEST = 1e30
"""Score of keys whose scores overflowed, less than that of the policy's sinks; sums of them do not overflow."""


class Scores(NamedTuple):
    """Scores of a layer's keys before they are smoothed, the same for every budget.

    `own` are the scorer's, float32 [B, K, G or 1, T - w]; `foreseen` those of queries to come, float32
    [B, K, G, T - w], which are not smoothed, None if none are asked.
    """

    own: Array
    foreseen: Array | None


class Judged(NamedTuple):
    """What a policy needs to know of a layer's whole prompt, the same for every budget.

    `scores` is None if nothing is scored; `asked` is what a refit asks, None if nothing is corrected.
    """

    scores: Scores | None
    asked: Asked | None


def score(policy: EvictionPolicy, view: LayerView, pairs: Pairs) -> Scores | None:
    """The scores of a layer's keys; None if nothing is scored.

    Args:
      policy: its scorer and foresight score.
      view: with the policy's `num_queries`, or more.
      pairs: [B, K, T, D] of the prompt.
    """
    length = pairs.keys.shape[2]
    window = policy.window_of(length)
    if policy.scorer is None or length == window:
        return None
    own = policy.scorer(view.last(policy.num_scoring_queries(length)), pairs, window)
    return Scores(own, None if policy.foresight is None else policy.foresight(view, pairs, window))


def judge(policy: EvictionPolicy, view: LayerView, pairs: Pairs, known: dict) -> Judged:
    """What a policy needs to know of a layer's whole prompt.

    Args:
      policy: with a budget that is resolved.
      view: with the policy's `num_queries`, or more.
      pairs: [B, K, T, D] of the prompt.
      known: what other policies have found in this layer; what they share with this one is not computed again.
    """
    window = policy.window_of(pairs.keys.shape[2])
    scored = policy.scorer, policy.foresight, window
    if scored not in known:
        known[scored] = score(policy, view, pairs)
    if policy.refit is None:
        return Judged(known[scored], None)
    asked = policy.refit.future, window
    if asked not in known:
        known[asked] = policy.refit.ask(view, pairs, window)
    return Judged(known[scored], known[asked])


def prefix_scores(policy: EvictionPolicy, view: LayerView, pairs: Pairs, scores: Scores | None) -> Array:
    """The smoothed scores, reduced over each KV head's query heads: float32 [B, K, T - w], -inf on padding.

    The policy's sinks have more than `LARGEST`, the earlier the more: where heads share a budget that has no room for
    all, each keeps as many.

    Args:
      policy: its pooling smooths.
      view: with the window's queries, or more.
      pairs: [B, K, T, D] of the prompt.
      scores: of `score`.
    """
    batch, num_kv_heads, length, _ = pairs.keys.shape
    window = policy.window_of(length)
    positions = pairs.positions[:, :, : length - window]
    is_token = positions >= 0
    if scores is None:
        return jnp.where(is_token, jnp.zeros((batch, num_kv_heads, length - window)), -jnp.inf)
    budget = length if policy.budget is None else policy.slots_given
    pooled = policy.pooling(scores.own, view, pairs, min(max(budget - window, 1), length))
    if scores.foreseen is not None:
        pooled = pooled + scores.foreseen
    reduced = pooled.mean(axis=2) if policy.group_reduce == "mean" else pooled.max(axis=2)
    is_seen = within_reach(view.queries, positions)
    reduced = jnp.nan_to_num(reduced, nan=0.0, posinf=LARGEST, neginf=-LARGEST)
    reduced = jnp.where(positions < policy.sinks, LARGEST * (2 - positions / max(policy.sinks, 1)), reduced)
    return jnp.where(is_token, jnp.where(is_seen, reduced, UNREACHABLE), -jnp.inf)


def prefix_lengths(scores: Array) -> Array:
    """How many pairs there are before the window, from their `prefix_scores` [..., T - w]: int32 [...]."""
    return (scores > -jnp.inf).sum(-1, dtype=jnp.int32)


def places_to_keep(scores: Array, positions: Array, window: int, slots: int) -> Array:
    """Indices of the best `slots - window` keys before the window and of the window, ascending.

    Args:
      scores: float32 [B, K, T - w], -inf on padding.
      positions: int32 [B, 1, T], -1 on padding.
      window: `w`.
      slots: `C`, places per KV head; more than `T` leaves the rest empty.

    Returns:
      int32 [B, K, C]; `T` marks an empty slot, and those come last.
    """
    batch, num_kv_heads, prefix = scores.shape
    chosen = best_mask(scores, slots - window)
    recent = jnp.broadcast_to(positions[:, :, prefix:] >= 0, (batch, num_kv_heads, window))
    return places(jnp.concatenate([chosen, recent], axis=-1), slots)


def best_mask(scores: Array, count: int) -> Array:
    """Marks the `count` best of scores float32 [B, K, N], those of -inf never: bool [B, K, N]."""
    return top_mask(scores, count) & (scores > -jnp.inf)


def weighed_scores(policy: EvictionPolicy, scores: Array, positions: Array, indices: Array) -> Array:
    """What the allocation compares of the keys at `indices`, int32 [B, K, N].

    Args:
      policy: its allocation weighs.
      scores: float32 [B, K, T - w] of the prefix.
      positions: int32 [B, 1, T], -1 on padding.
      indices: int32 [B, K, N], `T` where a place is empty.

    Returns:
      float32 [B, K, N]: inf in the window, -inf on padding and where empty.
    """
    quota = policy.slots_given - policy.window
    scores = policy.allocation.weigh(scores, (scores > UNREACHABLE) & (scores < LARGEST), quota)
    window = jnp.where(positions[:, :, scores.shape[-1] :] >= 0, jnp.inf, -jnp.inf)
    window = jnp.broadcast_to(window, (*scores.shape[:2], window.shape[-1]))
    padded = jnp.pad(jnp.concatenate([scores, window], axis=-1), ((0, 0), (0, 0), (0, 1)), constant_values=-jnp.inf)
    return jnp.take_along_axis(padded, indices, axis=-1)


def keep_shares(policy: EvictionPolicy, scores: Array, prefix_lengths: Array, layers: Array, num_layers: int) -> Array:
    """Marks the window and every KV head's best keys, as many as the policy's allocation gives it.

    Args:
      policy: its allocation, budget and window count.
      scores: float32 [L, B, K, N], inf in the window and -inf where a place is empty.
      prefix_lengths: int32 [L, B, K], keys before the window.
      layers: int32 [L], which layers these are.
      num_layers: of the model.

    Returns:
      bool [L, B, K, N].
    """
    in_window = jnp.isposinf(scores)
    candidates = jnp.where(in_window, -jnp.inf, scores)
    shares = policy.slots_given, policy.window, layers, num_layers
    counts = policy.allocation.counts(candidates, prefix_lengths, *shares)
    return in_window | ((ranks(candidates) < counts[..., None]) & (candidates > -jnp.inf))
