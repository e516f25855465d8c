"""Eviction while generating: one importance per slot, updated by every new query."""

import einops
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax import kernels
from restkv_jax.caches.dense import KVCache
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.models import Layer, Memory


def observe_prompt(cache: KVCache, layer: Layer, kept: Memory, policy: EvictionPolicy) -> KVCache:
    """Gives the kept slots of one layer the importance that the window's queries, one after the other, see in them.

    Args:
      cache: the state, whose layer `layer.index` holds `kept` in its first `C` slots.
      layer: with the window's `queries` [B, H, w, D].
      kept: keys and values [B, K, C, D], positions int32 [B, K, C].
      policy: its scorer measures the errors.

    Returns:
      the state with scores and Gram matrices of this layer.
    """
    gram = policy.scorer.gram(layer.output_projection)
    unseen = jnp.full(kept.positions.shape, jnp.nan, jnp.float32)
    return _store(cache, layer.index, _observe(unseen, layer, kept, gram, policy), gram)


def observe_token(cache: KVCache, layer: Layer, memory: Memory, active: Array, policy: EvictionPolicy) -> KVCache:
    """Updates the importance of one layer's slots from a generated token's query, [B, H, 1, D].

    Rows that are not `active`, bool [B], stay as they are.
    """
    gram, before = cache.importance.gram[layer.index], cache.importance.scores[layer.index]
    scores = _observe(before, layer, memory, gram, policy)
    return _store(cache, layer.index, jnp.where(active[:, None, None], scores, before), gram)


def _observe(scores: Array, layer: Layer, memory: Memory, gram: Array, policy: EvictionPolicy) -> Array:
    """`e <- alpha x + (1 - alpha) e` over the queries, oldest first; the first sight of a slot sets `e = x`."""
    positions = layer.positions, memory.positions
    errors = kernels.removal_errors(layer.queries, memory.keys, memory.values, *positions, layer.sliding_window, gram)
    errors = einops.reduce(errors, "b (k g) w n -> w b k n", policy.group_reduce, k=memory.keys.shape[1])
    alpha = policy.scorer.alpha

    def step(scores, seen_by):
        errors, position = seen_by
        visible = (memory.positions >= 0) & (memory.positions <= position[:, None, None])
        smoothed = jnp.where(jnp.isnan(scores), errors, alpha * errors + (1 - alpha) * scores)
        return jnp.where(visible, smoothed, scores), None

    return jax.lax.scan(step, scores, (errors, layer.positions.T))[0]


def _store(cache: KVCache, index: Array, scores: Array, gram: Array) -> KVCache:
    importance = cache.importance
    put = jax.lax.dynamic_update_slice
    return cache.replace(
        importance=importance.replace(
            scores=put(importance.scores, scores[None], (index, 0, 0, 0)),
            gram=put(importance.gram, gram[None], (index, 0, 0, 0)),
        )
    )
