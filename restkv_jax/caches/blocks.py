"""Reading prompts into a shared cache, with or without eviction of distant tokens."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax import kernels
from restkv_jax.caches.shared import SharedCache, empty_shared_cache
from restkv_jax.eviction.layer import score_prefix
from restkv_jax.eviction.observation import Observation
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.decoder import Layer, StateFunctions
from restkv_jax.models.shared_attention import SharedMemory, Sharing


@flax.struct.dataclass
class RunningBlocks:
    """A prefill that evicts: what waits until a block is complete, since only then its distant tokens are chosen.

    Attributes:
      cache: what has been chosen.
      scores: float32 [B, K, T], the sum over the block's layers so far; -inf on what is not distant.
      values: [S, B, K, T, D], those of the block's layers, its leader first; `S` layers in the longest block.
    """

    cache: SharedCache
    scores: Array
    values: Array


def evicts(sharing: Sharing, policy: EvictionPolicy, length: int) -> bool:
    """Whether distant tokens of prompts of `length` tokens have to be chosen from."""
    return policy.budget is not None and policy.budget < sharing.distant(length)


def empty_shared_state(
    config: ModelConfig,
    sharing: Sharing,
    policy: EvictionPolicy,
    prompt_lengths: Array,
    length: int,
    max_new_tokens: int,
    dtype: Any,
) -> SharedCache | RunningBlocks:
    """What a prefill of prompts of `length` tokens carries through the layers."""
    choosing = evicts(sharing, policy, length)
    num_kept = policy.budget if choosing else sharing.distant(length)
    cache = empty_shared_cache(config, sharing, prompt_lengths, length, num_kept, max_new_tokens, dtype)
    if not choosing:
        return cache
    pairs = prompt_lengths.shape[0], config.num_key_value_heads, length
    values = jnp.zeros((sharing.groups.longest_block, *pairs, config.head_dim), dtype)
    return RunningBlocks(cache, jnp.zeros(pairs, jnp.float32), values)


def shared_prefill_functions(sharing: Sharing, policy: EvictionPolicy, length: int) -> StateFunctions:
    """Puts what a layer keeps into the state; what its queries attend to has been settled by `follow_leaders`."""
    choosing = evicts(sharing, policy, length)

    def revise(layer: Layer, memory: SharedMemory, state: SharedCache | RunningBlocks):
        if choosing:
            return _score_layer(state, layer.last(policy.num_queries(length)), memory, policy)
        return _keep_layer(state, layer.index, memory)

    def remember(index, memory, state):
        return memory, state

    return StateFunctions(remember, revise, policy.num_queries(length) if choosing else 1)


def _keep_layer(cache: SharedCache, layer: Array, memory: SharedMemory) -> SharedCache:
    """Puts all of a layer into the cache."""
    sharing, lengths = memory.sharing, cache.prompt_lengths
    batch, num_kv_heads, length, _ = memory.keys.shape
    cache = store_proximal(cache, layer, memory.keys, memory.values)
    slots = jnp.arange(sharing.distant(length))
    indices = sharing.sink + slots + (length - lengths)[:, None]
    indices = jnp.where(slots < lengths[:, None] - sharing.proximal, indices, length)
    indices = jnp.broadcast_to(indices[:, None], (batch, num_kv_heads, len(slots)))
    cache = _store_keys(cache, layer, jnp.asarray(sharing.groups.is_leader)[layer], memory, indices)
    return store_distant_values(cache, jnp.full((1, num_kv_heads), layer), memory.values[None], indices)


def _score_layer(state: RunningBlocks, layer: Layer, memory: SharedMemory, policy: EvictionPolicy) -> RunningBlocks:
    """Adds a layer's scores to its block's, and where it is the block's last, chooses the distant tokens."""
    groups = memory.sharing.groups
    num_kv_heads = groups.num_kv_heads
    cache = store_proximal(state.cache, layer.index, memory.keys, memory.values)
    leader = jnp.asarray(groups.leader)[layer.index]  # [K]
    scores = distant_scores(layer, memory, cache.prompt_lengths, policy)
    scores = jnp.where((leader == layer.index)[:, None], scores, state.scores + scores)
    values = state.values.at[layer.index - leader, :, jnp.arange(num_kv_heads)].set(jnp.swapaxes(memory.values, 0, 1))

    # Layers below the last one of a block choose too, which is cheaper than to copy the cache through a branch.
    following = jnp.asarray((*groups.leader[1:], (groups.num_layers,) * num_kv_heads))[layer.index]
    is_last = following > layer.index
    indices = best_tokens(scores, policy.budget)
    cache = _store_keys(cache, layer.index, is_last, memory, indices)
    layers = leader + jnp.arange(len(values))[:, None]
    layers = jnp.where(is_last & (layers <= layer.index), layers, groups.num_layers)
    return RunningBlocks(store_distant_values(cache, layers, values, indices), scores, values)


def _store_keys(cache: SharedCache, layer: Array, heads: Array, memory: SharedMemory, indices: Array) -> SharedCache:
    """Stores the leaders' distant keys in the blocks of some KV heads, bool [K]."""
    groups = memory.sharing.groups
    blocks = jnp.where(heads, jnp.asarray(groups.blocks)[layer], groups.num_blocks)
    return store_distant_keys(cache, blocks, memory.leader_keys, memory.positions, indices)


def distant_scores(layer: Layer, memory: SharedMemory, prompt_lengths: Array, policy: EvictionPolicy) -> Array:
    """A policy's scores of distant tokens in one layer.

    Every token is judged by the key that decoding will read it by: its own where it is proximal to the prompt's last
    token, else the leader's. The policy's window counts as best where it reaches beyond the recent tokens.

    Args:
      layer: with the queries that judge.
      memory: the layer's and the leaders' keys, values.
      prompt_lengths: int32 [B].
      policy: its scorer and pooling judge.

    Returns:
      float32 [B, K, T], -inf on what is not distant.
    """
    sharing, positions = memory.sharing, memory.positions
    distant = (positions >= sharing.sink) & (positions < (prompt_lengths - sharing.recent)[:, None])
    keys = jnp.where(distant[:, None, :, None], memory.leader_keys, memory.keys)
    seen = layer.queries, keys, memory.values, layer.output_projection, positions, layer.sliding_window, layer.index
    window = policy.window_of(positions.shape[1])
    scores = score_prefix(policy, Observation(*seen), window)
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, window)), constant_values=jnp.inf)
    return jnp.where(distant[:, None], scores, -jnp.inf)


def best_tokens(scores: Array, count: int) -> Array:
    """Indices of the `count` best of scores float32 [B, K, T], ascending; int32 [B, K, count], `T` for missing ones."""
    best, indices = jax.lax.top_k(scores, count)
    return jnp.sort(jnp.where(best > -jnp.inf, indices, scores.shape[-1]), axis=-1).astype(jnp.int32)


def store_proximal(cache: SharedCache, layer: Array, keys: Array, values: Array) -> SharedCache:
    """Fills one layer's proximal slots from the pairs of left-padded prompts, [B, K, T, D]."""
    batch, num_kv_heads, length, _ = keys.shape
    positions = cache.proximal_positions(cache.prompt_lengths - 1)
    indices = jnp.where(positions >= 0, positions + (length - cache.prompt_lengths)[:, None], length)
    indices = jnp.broadcast_to(indices[:, None], (batch, num_kv_heads, positions.shape[1]))
    keys, values = kernels.gather_pairs(keys, values, indices)

    def put(array, new):
        return jax.lax.dynamic_update_slice(array, new[None].astype(array.dtype), (layer, 0, 0, 0, 0))

    return cache.replace(keys=put(cache.keys, keys), values=put(cache.values, values))


def store_distant_keys(cache: SharedCache, blocks: Array, keys: Array, positions: Array, indices: Array) -> SharedCache:
    """Fills the first `C` distant slots of some blocks.

    Args:
      cache: the state.
      blocks: int32 [K], which block each KV head's keys belong to; `R` writes nothing.
      keys: [B, K, T, D].
      positions: int32 [B, T].
      indices: int32 [B, K, C] of the tokens to keep; `T` where a slot stays empty.
    """
    kept, kept_positions = _take(keys, indices), _take(positions[:, None, :, None], indices, empty=-1)[..., 0]

    def put(array, new):
        new = jnp.swapaxes(new, 0, 1).astype(array.dtype)
        return array.at[blocks, :, : indices.shape[-1]].set(new, mode="drop")

    return cache.replace(
        distant_keys=put(cache.distant_keys, kept), distant_positions=put(cache.distant_positions, kept_positions)
    )


def store_distant_values(cache: SharedCache, layers: Array, values: Array, indices: Array) -> SharedCache:
    """Fills the first `C` distant slots of several layers, the same tokens in all.

    Args:
      cache: the state.
      layers: int32 [S, K], where each KV head's values belong; `L` writes nothing.
      values: [S, B, K, T, D].
      indices: int32 [B, K, C] of the tokens to keep; `T` where a slot stays empty.
    """
    kept = jax.vmap(lambda x: _take(x, indices))(values).astype(cache.distant_values.dtype)  # [S, B, K, C, D]
    heads = jnp.arange(layers.shape[1])
    place = layers, slice(None), heads, slice(indices.shape[-1])
    return cache.replace(distant_values=cache.distant_values.at[place].set(jnp.moveaxis(kept, 2, 1), mode="drop"))


def _take(x: Array, indices: Array, empty: int = 0) -> Array:
    """[B, K or 1, T, D] to [B, K, C, D]."""
    return jnp.take_along_axis(x, indices[..., None], axis=2, mode="fill", fill_value=empty)
