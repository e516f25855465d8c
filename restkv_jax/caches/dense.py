"""The dense cache: as many slots for every layer, row and KV head."""

from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.caches.base import Cache, Keeper, check_shape, check_unshared
from restkv_jax.eviction.layer import evict
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.select import score_once
from restkv_jax.kernels.pairs import Pairs
from restkv_jax.kernels.partition import on_mesh
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.decoder import Decoder, LayerView
from restkv_jax.models.memory import PairMemory


class KVCache(Cache):
    """Kept keys and values of all layers, with `N` slots per layer, row and KV head.

    Attributes:
      keys: [L, B, K, N, D], after RoPE.
      values: [L, B, K, N, D].
      positions: int32 [L, B, K, N], of the token in its sequence; -1 where a slot is empty.
      lengths: int32 [L, B, K], slots in use.
    """

    keys: Array
    values: Array
    positions: Array
    lengths: Array

    @property
    def num_slots(self) -> int:
        """`N`."""
        return self.keys.shape[3]

    def memory(self, layer: Array) -> PairMemory:
        return PairMemory(Pairs(self.keys[layer], self.values[layer], self.positions[layer]))

    def append(self, layer: Array, keys: Array, values: Array, active: Array) -> Self:
        used = self.lengths[layer]
        slots = jnp.where(active[:, None], self.next_slots(layer), self.num_slots)
        lengths = jnp.where(active[:, None], jnp.minimum(used + 1, self.num_slots), used)
        return self.replace(
            keys=put_pair(self.keys, layer, slots, keys),
            values=put_pair(self.values, layer, slots, values),
            positions=put_pair(
                self.positions, layer, slots, jnp.broadcast_to(self.next_positions[:, None], used.shape)
            ),
            lengths=jax.lax.dynamic_update_index_in_dim(self.lengths, lengths, layer, 0),
        )

    def next_slots(self, layer: Array) -> Array:
        """Where the next pair of each row and KV head goes, int32 [B, K]; `N` where there is no room."""
        return self.lengths[layer]

    def is_full(self) -> Array:
        return (self.lengths >= self.num_slots).any()

    def slot_positions(self) -> Array:
        return self.positions

    def row_axes(self) -> "KVCache | None":
        return jax.tree.map(lambda x: 0 if x.ndim == 1 else 1, self)

    def check_model(self, model: Decoder) -> None:
        num_layers, _, num_kv_heads, _, dim = self.keys.shape
        check_shape(model, num_layers, num_kv_heads, dim)
        check_unshared(model)


def put_pair(array: Array, layer: Array, slots: Array, new: Array) -> Array:
    """Writes [B, K, ...] into slots int32 [B, K] of one layer of [L, B, K, N, ...]; those beyond `N` are dropped."""
    # Rows and KV heads as batches of the scatter: as indices they would be gathered from all devices.
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(2, new.ndim)),
        inserted_window_dims=(0, 3),
        scatter_dims_to_operand_dims=(0, 3),
        operand_batching_dims=(1, 2),
        scatter_indices_batching_dims=(0, 1),
    )
    places = jnp.stack([jnp.broadcast_to(layer, slots.shape), slots], axis=-1)
    mode = jax.lax.GatherScatterMode.FILL_OR_DROP
    return jax.lax.scatter(array, places, new.astype(array.dtype), numbers, unique_indices=True, mode=mode)


def put_layer(array: Array, layer: Array | int, part: Array) -> Array:
    """Writes the first places of one layer, in place under jit: [B, K, C, ...] into [L, B, K, N, ...]."""
    return jax.lax.dynamic_update_slice(array, part[None].astype(array.dtype), (layer, *[0] * part.ndim))


def empty_cache(config: ModelConfig, prompt_lengths: Array, num_slots: int, dtype: Any) -> KVCache:
    """A cache of empty slots for prompts of the given lengths, int32 [B]."""
    shape = (config.num_hidden_layers, prompt_lengths.shape[0], config.num_key_value_heads, num_slots)
    return KVCache(
        keys=on_mesh(jnp.zeros((*shape, config.head_dim), dtype), rows=1, heads=2),
        values=on_mesh(jnp.zeros((*shape, config.head_dim), dtype), rows=1, heads=2),
        positions=on_mesh(jnp.full(shape, -1, jnp.int32), rows=1, heads=2),
        lengths=on_mesh(jnp.zeros(shape[:3], jnp.int32), rows=1, heads=2),
        prompt_lengths=prompt_lengths,
        next_positions=prompt_lengths,
    )


class DenseKeeper(Keeper):
    """Equal shares: what the policy chooses of a layer goes straight into the cache."""

    @staticmethod
    def takes(model: Decoder, policy: EvictionPolicy, length: int) -> bool:
        return True

    @property
    def evicting(self) -> EvictionPolicy:
        """The policy, without its scoring where prompts fit."""
        is_needed = self.policy.slots(self.length) < self.length
        return self.policy if is_needed else EvictionPolicy(window=self.policy.window)

    @property
    def num_queries(self) -> int:
        return self.evicting.num_queries(self.length)

    def start(self, prompt_lengths: Array, dtype: Any) -> KVCache:
        num_slots = self.policy.slots(self.length) + self.max_new_tokens
        return empty_cache(self.model.config, prompt_lengths, num_slots, dtype)

    def add(self, cache: KVCache, view: LayerView, memory: PairMemory, scored: dict) -> KVCache:
        return self.write(cache, view, self.choose(view, memory, scored))

    def choose(self, view: LayerView, memory: PairMemory, scored: dict) -> Pairs:
        """The pairs of a layer that are kept, [B, K, C]."""
        policy, pairs, view = self.evicting, memory.pairs, view.last(self.num_queries)
        scores = score_once(scored, policy, view, pairs)
        slots, num_layers = self.policy.slots(self.length), self.model.config.num_hidden_layers
        kept = evict(policy, view, pairs, slots, num_layers, scores)
        return Pairs(kept.keys, kept.values, kept.positions)

    def write(self, cache: KVCache, view: LayerView, kept: Pairs) -> KVCache:
        """Puts them into the first slots of the layer."""
        return cache.replace(
            keys=put_layer(cache.keys, view.index, kept.keys),
            values=put_layer(cache.values, view.index, kept.values),
            positions=put_layer(cache.positions, view.index, kept.positions),
            lengths=put_layer(cache.lengths, view.index, (kept.positions >= 0).sum(-1)),
        )
