"""The dense cache: as many slots for every layer, row and KV head."""

from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.caches.base import Cache, Keeper, check_shape, check_unshared
from restkv_jax.eviction.layer import evict
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.select import judge
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

    @property
    def dtype(self) -> Any:
        return self.keys.dtype

    def held(self, layer: Array) -> Pairs:
        return Pairs(self.keys[layer], self.values[layer], self.positions[layer])

    def memory(self, layer: Array) -> PairMemory:
        return PairMemory(self.held(layer))

    def append(self, layer: Array, new: Pairs) -> Self:
        is_new = jnp.broadcast_to(new.positions >= 0, new.keys.shape[:3])
        rank = jnp.cumsum(is_new, axis=-1, dtype=jnp.int32) - 1
        num_new = is_new.shape[-1]
        dropped = self.num_slots + num_new + jnp.arange(num_new)  # one place each: a scatter wants them unique
        slots = jnp.where(is_new, self.next_slots(layer)[..., None] + rank, dropped)
        lengths = jnp.minimum(self.lengths[layer] + is_new.sum(-1, dtype=jnp.int32), self.num_slots)
        return self.replace(
            keys=put_pairs(self.keys, layer, slots, new.keys),
            values=put_pairs(self.values, layer, slots, new.values),
            positions=put_pairs(self.positions, layer, slots, jnp.broadcast_to(new.positions, is_new.shape)),
            lengths=jax.lax.dynamic_update_index_in_dim(self.lengths, lengths, layer, 0),
        )

    def next_slots(self, layer: Array) -> Array:
        """Where the next pair of each row and KV head goes, int32 [B, K]; `N` where there is no room."""
        return self.lengths[layer]

    def room(self) -> Array:
        return self.num_slots - self.lengths.max()

    def with_room(self, count: int) -> Self:
        def wider(x: Array, empty: int) -> Array:
            return jnp.pad(x, [(0, count if axis == 3 else 0) for axis in range(x.ndim)], constant_values=empty)

        positions = wider(self.positions, -1)
        return self.replace(keys=wider(self.keys, 0), values=wider(self.values, 0), positions=positions)

    def slot_positions(self) -> Array:
        return self.positions

    def row_axes(self) -> "KVCache | None":
        return jax.tree.map(lambda x: 0 if x.ndim == 1 else 1, self)

    def check_model(self, model: Decoder) -> None:
        num_layers, _, num_kv_heads, _, dim = self.keys.shape
        check_shape(model, num_layers, num_kv_heads, dim)
        check_unshared(model)


def put_pairs(array: Array, layer: Array, slots: Array, new: Array) -> Array:
    """Writes [B, K, T, ...] into unique slots int32 [B, K, T] of one layer of [L, B, K, N, ...]; others drop."""
    # Rows and KV heads as batches of the scatter: as indices they would be gathered from all devices.
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(3, new.ndim)),
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


def empty_cache(config: ModelConfig, lengths: Array, num_slots: int, dtype: Any) -> KVCache:
    """A cache of empty slots for sequences of the given lengths, int32 [B]."""
    shape = (config.num_hidden_layers, lengths.shape[0], config.num_key_value_heads, num_slots)
    return KVCache(
        keys=on_mesh(jnp.zeros((*shape, config.head_dim), dtype), "l b k n d"),
        values=on_mesh(jnp.zeros((*shape, config.head_dim), dtype), "l b k n d"),
        positions=on_mesh(jnp.full(shape, -1, jnp.int32), "l b k n"),
        lengths=on_mesh(jnp.zeros(shape[:3], jnp.int32), "l b k"),
        prompt_lengths=lengths,
        next_positions=lengths,
    )


class DenseKeeper(Keeper):
    """Equal shares: what the policy chooses of a layer goes straight into the cache."""

    @staticmethod
    def takes(model: Decoder, policy: EvictionPolicy, length: int) -> bool:
        return True

    @property
    def evicting(self) -> EvictionPolicy:
        """The policy, without its scoring where prompts fit."""
        is_needed = self.policy.slots(self.total) < self.total
        return self.policy if is_needed else EvictionPolicy(window=self.policy.window)

    @property
    def num_queries(self) -> int:
        return self.evicting.num_queries(self.length)

    def start(self, past: Cache | None, lengths: Array, dtype: Any) -> KVCache:
        num_slots = self.policy.slots(self.total) + self.max_new_tokens
        return empty_cache(self.model.config, lengths, num_slots, dtype)

    def add(self, cache: KVCache, view: LayerView, memory: PairMemory, known: dict) -> KVCache:
        return self.write(cache, view, self.choose(view, memory.pairs, known))

    def choose(self, view: LayerView, pairs: Pairs, known: dict) -> Pairs:
        """The pairs of a layer that are kept, [B, K, C]."""
        policy, view = self.evicting, view.last(self.num_queries)
        slots, num_layers = self.policy.slots(self.total), self.model.config.num_hidden_layers
        kept = evict(policy, view, pairs, slots, num_layers, judge(policy, view, pairs, known))
        return Pairs(kept.keys, kept.values, kept.positions)

    def write(self, cache: KVCache, view: LayerView, kept: Pairs) -> KVCache:
        """Puts them into the first slots of the layer."""
        return cache.replace(
            keys=put_layer(cache.keys, view.index, kept.keys),
            values=put_layer(cache.values, view.index, kept.values),
            positions=put_layer(cache.positions, view.index, kept.positions),
            lengths=put_layer(cache.lengths, view.index, (kept.positions >= 0).sum(-1)),
        )
