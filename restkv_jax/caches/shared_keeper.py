"""Reading prompts into a shared cache, with or without eviction of distant tokens."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.caches.base import Cache, Keeper
from restkv_jax.caches.dense import put_layer
from restkv_jax.caches.shared import SharedCache, empty_shared_cache
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.select import UNREACHABLE, best_mask, prefix_scores, score
from restkv_jax.kernels.gather import gather_pairs
from restkv_jax.kernels.pairs import Pairs
from restkv_jax.kernels.partition import divide, each_part
from restkv_jax.kernels.top import places
from restkv_jax.models.decoder import Decoder, LayerView
from restkv_jax.models.key_groups import Sharing
from restkv_jax.models.memory import SharedMemory


class RunningBlocks(flax.struct.PyTreeNode):
    """A prefill that evicts: what waits until a block is complete, since only then its distant tokens are chosen.

    Attributes:
      cache: what has been chosen.
      scores: float32 [B, K, T], the sum over the block's layers so far; -inf on what is not distant.
      values: [S, B, K, T, D], those of the block's layers, its leader first; `S` layers in the longest block.
    """

    cache: SharedCache
    scores: Array
    values: Array


class SharedKeeper(Keeper):
    """Layers that share keys: distant tokens are kept once per block, chosen when the block is complete."""

    @staticmethod
    def takes(model: Decoder, policy: EvictionPolicy, length: int) -> bool:
        return model.sharing is not None

    @property
    def sharing(self) -> Sharing:
        """The model's."""
        assert self.model.sharing is not None
        return self.model.sharing

    @property
    def evicts(self) -> bool:
        """Whether distant tokens have to be chosen from."""
        return self.policy.slots(self.num_distant) < self.num_distant

    @property
    def num_distant(self) -> int:
        """Distant tokens of the longest sequence."""
        return self.sharing.distant(self.total)

    @property
    def num_queries(self) -> int:
        return self.policy.num_queries(self.length) if self.evicts else 1

    def start(self, past: Cache | None, lengths: Array, dtype: Any) -> SharedCache | RunningBlocks:
        config, sharing = self.model.config, self.sharing
        num_tokens = lengths
        if past is not None:
            assert isinstance(past, SharedCache)
            num_tokens = past.num_tokens + lengths - past.next_positions
        cache = self.empty(lengths, num_tokens, dtype)
        if past is not None:
            cache = cache.replace(skips=past.skips)
        if not self.evicts:
            return cache
        pairs = lengths.shape[0], config.num_key_value_heads, self.length
        values = jnp.zeros((sharing.groups.longest_block, *pairs, config.head_dim), dtype)
        return RunningBlocks(cache=cache, scores=jnp.zeros(pairs, jnp.float32), values=values)

    def empty(self, lengths: Array, num_tokens: Array, dtype: Any) -> SharedCache:
        """A cache for sequences of the given lengths, of which `num_tokens` are to keep, both int32 [B]."""
        counts = lengths, num_tokens, self.total, self.policy.slots(self.num_distant), self.max_new_tokens
        return empty_shared_cache(self.model.config, self.sharing, *counts, dtype)

    def add(self, state: Any, view: LayerView, memory: SharedMemory, known: dict) -> SharedCache | RunningBlocks:
        if self.evicts:
            return _score_layer(state, view.last(self.num_queries), memory, self.policy)
        return _keep_layer(state, view.index, memory)

    def finish(self, state: Any) -> SharedCache:
        return state.cache if self.evicts else state


def _keep_layer(cache: SharedCache, layer: Array | int, memory: SharedMemory) -> SharedCache:
    """Puts all of a layer into the cache."""
    sharing, heads = cache.sharing, memory.pairs.keys.shape[:2]
    cache = _store_proximal(cache, layer, memory.pairs)
    first, num_tokens = _held(memory.pairs)
    slots = jnp.arange(min(sharing.distant(memory.pairs.keys.shape[2]), cache.num_distant))
    indices = sharing.sink + slots + first[:, None]
    indices = jnp.where(slots < num_tokens[:, None] - sharing.proximal, indices, memory.pairs.keys.shape[2])
    indices = jnp.broadcast_to(indices[:, None], (*heads, len(slots)))
    cache = _store_keys(cache, layer, jnp.asarray(sharing.groups.is_leader)[layer], memory, indices)
    return _store_values(cache, jnp.full((1, heads[1]), layer), memory.pairs.values[None], indices)


def _held(pairs: Pairs) -> tuple[Array, Array]:
    """The place of the first token, and how many there are, int32 [B]; as many for every KV head."""
    num_tokens = (pairs.positions[:, 0] >= 0).sum(-1, dtype=jnp.int32)
    return pairs.positions.shape[-1] - num_tokens, num_tokens


def _score_layer(state: RunningBlocks, view: LayerView, memory: SharedMemory, policy: EvictionPolicy) -> RunningBlocks:
    """Adds a layer's scores to its block's, and where it is the block's last, chooses the distant tokens."""
    groups = state.cache.sharing.groups
    num_kv_heads = groups.num_kv_heads
    cache = _store_proximal(state.cache, view.index, memory.pairs)
    leader = jnp.asarray(groups.leader)[view.index]  # [K]
    scores = distant_scores(view, memory, cache.prompt_lengths, policy)
    scores = jnp.where((leader == view.index)[:, None], scores, _add_reachable(state.scores, scores))
    of_block = jnp.arange(len(state.values))[:, None, None, None, None] == (view.index - leader)[:, None, None]
    values = jnp.where(of_block, memory.pairs.values, state.values)

    # Layers below the last one of a block choose too, which is cheaper than to copy the cache through a branch.
    following = jnp.asarray((*groups.leader[1:], (groups.num_layers,) * num_kv_heads))[view.index]
    is_last = following > view.index
    indices = places(best_mask(scores, policy.slots_given), policy.slots_given)
    cache = _store_keys(cache, view.index, is_last, memory, indices)
    layers = leader + jnp.arange(len(values))[:, None]
    layers = jnp.where(is_last & (layers <= view.index), layers, groups.num_layers)
    return RunningBlocks(cache=_store_values(cache, layers, values, indices), scores=scores, values=values)


def _add_reachable(first: Array, second: Array) -> Array:
    """Sums of scores; a key that a layer's sliding window hides from later tokens adds nothing there."""
    both = jnp.where(second <= UNREACHABLE, first, first + second)
    return jnp.where(first <= UNREACHABLE, second, both)


def distant_scores(view: LayerView, memory: SharedMemory, prompt_lengths: Array, policy: EvictionPolicy) -> Array:
    """A policy's scores of distant tokens in one layer.

    Every token is scored by the key that decoding will read it by: its own where it is proximal to the prompt's last
    token, else the leader's. The policy's window counts as best where it reaches beyond the recent tokens.

    Args:
      view: with the queries that score.
      memory: the layer's pairs and the leaders' keys.
      prompt_lengths: int32 [B].
      policy: its scorer and pooling score.

    Returns:
      float32 [B, K, T], -inf on what is not distant.
    """
    positions = memory.pairs.positions
    distant = (positions >= memory.sink) & (positions < (prompt_lengths - memory.recent)[:, None, None])
    keys = jnp.where(distant[..., None], memory.leader_keys, memory.pairs.keys)
    pairs = memory.pairs._replace(keys=keys)
    scores = prefix_scores(policy, view, pairs, score(policy, view, pairs))
    window = keys.shape[2] - scores.shape[2]
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, window)), constant_values=jnp.inf)
    return jnp.where(distant, scores, -jnp.inf)


def _store_proximal(cache: SharedCache, layer: Array | int, pairs: Pairs) -> SharedCache:
    """Fills one layer's proximal slots from pairs [B, K, T, D] that are padded on the left.

    The first and the last tokens are there without gaps; between them some may have been evicted.
    """
    batch, num_kv_heads, length, _ = pairs.keys.shape
    positions = cache.proximal_positions(cache.prompt_lengths - 1)
    first, _ = _held(pairs)
    from_front, from_behind = positions + first[:, None], positions + (length - cache.prompt_lengths)[:, None]
    indices = jnp.where(positions < cache.sharing.sink, from_front, from_behind)
    indices = jnp.where(positions >= 0, indices, length)
    kept = gather_pairs(pairs, jnp.broadcast_to(indices[:, None], (batch, num_kv_heads, positions.shape[1])))
    return cache.replace(
        keys=put_layer(cache.keys, layer, kept.keys), values=put_layer(cache.values, layer, kept.values)
    )


def _store_keys(
    cache: SharedCache, layer: Array | int, heads: Array, memory: SharedMemory, indices: Array
) -> SharedCache:
    """Fills the first `C` distant slots of the blocks of some KV heads with their leaders' keys.

    Args:
      cache: the state.
      layer: int32 scalar.
      heads: bool [K].
      memory: the leaders' keys, [B, K, T, D].
      indices: int32 [B, K, C] of the tokens to keep; `T` where a slot stays empty.
    """
    kept = gather_pairs(memory.pairs._replace(keys=memory.leader_keys), indices)
    blocks = jnp.where(heads, cache._blocks(layer)[0], cache.num_blocks)
    blocks = jnp.broadcast_to(blocks, indices.shape[:2])

    def put(stores, blocks, new):
        def first(store: Array, new: Array) -> Array:
            return store.at[:, blocks[0], : new.shape[2]].set(new, mode="drop")

        return jax.tree.map(first, stores, new)

    stores, new = (cache.distant_keys, cache.distant_positions), (cache.stored_keys(kept.keys), kept.positions)
    keys, positions = each_part(put, stores, *jax.tree.map(lambda x: divide(x, cache.parts), (blocks, new)))
    return cache.replace(distant_keys=keys, distant_positions=positions)


def _store_values(cache: SharedCache, layers: Array, values: Array, indices: Array) -> SharedCache:
    """Fills the first `C` distant slots of several layers, the same tokens in all.

    Args:
      cache: the state.
      layers: int32 [S, K], where each KV head's values belong; `L` writes nothing.
      values: [S, B, K, T, D].
      indices: int32 [B, K, C] of the tokens to keep; `T` where a slot stays empty.
    """
    places = indices[..., None]
    kept = jax.vmap(lambda x: jnp.take_along_axis(x, places, axis=2, mode="fill", fill_value=0))(values)

    def of_head(store: Array, layers: Array, new: Array) -> Array:
        return store.at[layers, :, : new.shape[2]].set(new, mode="drop")

    put = jax.vmap(of_head, in_axes=(2, 1, 2), out_axes=2)
    new = cache.stored_values(kept)  # [S, B, K, C, D]
    return cache.replace(distant_values=jax.tree.map(lambda x, y: put(x, layers, y), cache.distant_values, new))
