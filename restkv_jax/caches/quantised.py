"""The dense cache in 8 or 4 bits, but for the newest tokens."""

from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.caches.base import Cache, check_shape, check_unshared
from restkv_jax.caches.dense import DenseKeeper, put_layer, put_pairs
from restkv_jax.kernels.attention import attend
from restkv_jax.kernels.pairs import Pairs, Queries, take_places
from restkv_jax.kernels.partition import on_mesh
from restkv_jax.kernels.quantised import (
    Quantisation,
    QuantisedPairs,
    QuantisedValues,
    empty_pairs,
    quantise,
)
from restkv_jax.kernels.quantised_attention import read_pairs, read_quantised
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.decoder import Decoder, LayerView
from restkv_jax.models.memory import Memory

Q = TypeVar("Q", QuantisedValues, QuantisedPairs)


class WithNewest(Cache):
    """What caches of groups have in common whose newest pairs, [L, B, K, W, D], are in full precision."""

    stored: QuantisedPairs
    recent_keys: Array
    recent_values: Array

    @property
    def quantisation(self) -> Quantisation:
        return self.stored.quantisation

    @property
    def num_recent(self) -> int:
        """`W`."""
        return self.recent_keys.shape[3]

    @property
    def dtype(self) -> Any:
        return self.recent_keys.dtype

    def enter(self, layer: Array, new: Pairs) -> tuple[Memory, Self]:
        if new.keys.shape[2] == 1:
            return super().enter(layer, new)
        memory, _ = self.memory_beside(layer, new, None)  # new tokens see each other in full precision
        return memory, self.append(layer, new)


class QuantisedCache(WithNewest):
    """As `KVCache`, whose `S` slots per layer, row and KV head hold pairs in the order of their tokens.

    Of `n` pairs the first `quantisation.num_grouped(n)` are in whole groups of codes, the others, the newest, in a ring
    in full precision: the pair of slot `i` is at its place `i % W`. A token that comes enters the ring; once a whole
    group is older than the residual window, the group is quantised.

    Attributes:
      stored: of `G` groups of `S` tokens, with axes [L, B, K] before them; `Q = G * S` are their slots.
      recent_keys: [L, B, K, W, D], after RoPE.
      recent_values: [L, B, K, W, D].
      positions: int32 [L, B, K, S], of the token in its sequence; -1 where a slot is empty.
      lengths: int32 [L, B, K], slots in use.
    """

    positions: Array
    lengths: Array

    @property
    def num_slots(self) -> int:
        """`S`."""
        return self.positions.shape[3]

    @property
    def num_grouped(self) -> int:
        """`Q`."""
        return self.stored.num_groups * self.quantisation.group_size

    @staticmethod
    def layout(quantisation: Quantisation, slots: int) -> tuple[int, int]:
        """`Q` and `W` of caches of `slots`."""
        return quantisation.num_grouped(slots), quantisation.num_recent(slots)

    def held(self, layer: Array) -> Pairs:
        stored = jax.tree.map(lambda x: x[layer], self.stored).dequantised(self.dtype)
        slots = jnp.arange(self.num_slots)
        is_recent = (slots >= self.quantisation.num_grouped(self.lengths[layer])[..., None])[..., None]
        rest = [(0, 0), (0, 0), (0, self.num_slots - self.num_grouped), (0, 0)]

        def join(recent: Array, grouped: Array) -> Array:
            return jnp.where(is_recent, recent[layer][:, :, slots % self.num_recent], jnp.pad(grouped, rest))

        recent = self.recent_keys, self.recent_values
        keys, values = (join(*both) for both in zip(recent, stored, strict=True))
        return Pairs(keys, values, self.positions[layer])

    def memory(self, layer: Array) -> "QuantisedMemory":
        return QuantisedMemory(self, layer)

    def recent(self, layer: Array) -> Pairs:
        """The pairs in the ring, [B, K, W, D], at position -1 where a place is not in use."""
        slots = ring_slots(self.lengths[layer], self.num_recent)
        in_use = slots >= self.quantisation.num_grouped(self.lengths[layer])[..., None]
        positions = jnp.where(in_use, take_places(self.positions[layer], jnp.maximum(slots, 0)), -1)
        return Pairs(self.recent_keys[layer], self.recent_values[layer], positions)

    def grouped_positions(self, layer: Array) -> Array:
        """int32 [B, K, Q], -1 where no whole group is."""
        in_use = jnp.arange(self.num_grouped) < self.quantisation.num_grouped(self.lengths[layer])[..., None]
        return jnp.where(in_use, self.positions[layer][:, :, : self.num_grouped], -1)

    def append(self, layer: Array, new: Pairs) -> Self:
        is_new = jnp.broadcast_to(new.positions >= 0, new.keys.shape[:3])
        before = self.lengths[layer]
        after = jnp.minimum(before + is_new.sum(-1, dtype=jnp.int32), self.num_slots)
        slots = before[..., None] + jnp.cumsum(is_new, axis=-1, dtype=jnp.int32) - 1
        enters = is_new & (slots < self.num_slots)
        cache = self._quantise_groups(layer, new, before, after)
        in_ring = enters & (slots >= self.quantisation.num_grouped(after)[..., None])
        places = unless(in_ring, slots % self.num_recent, self.num_recent)
        slots = unless(enters, slots, self.num_slots)
        return cache.replace(
            recent_keys=put_pairs(cache.recent_keys, layer, places, new.keys),
            recent_values=put_pairs(cache.recent_values, layer, places, new.values),
            positions=put_pairs(cache.positions, layer, slots, jnp.broadcast_to(new.positions, is_new.shape)),
            lengths=jax.lax.dynamic_update_index_in_dim(cache.lengths, after, layer, 0),
        )

    def _quantise_groups(self, layer: Array, new: Pairs, before: Array, after: Array) -> Self:
        """Quantises the groups that `new` pairs complete; int32 [B, K] slots in use before and after."""
        q = self.quantisation
        slots, is_whole, places = whole_groups(q, before, after, new, self.num_recent, self.num_grouped)
        if not slots.shape[-1]:
            return self
        both = (self.recent_keys[layer], new.keys), (self.recent_values[layer], new.values)
        keys, values = (take_places(jnp.concatenate(x, axis=2), places) for x in both)
        codes = quantise(keys, values, q)
        groups, is_whole = (x[..., :: q.group_size] for x in (slots // q.group_size, is_whole))
        groups = unless(is_whole, groups, self.stored.num_groups)
        return self.replace(
            stored=jax.tree.map(lambda whole, part: put_pairs(whole, layer, groups, part), self.stored, codes)
        )

    def room(self) -> Array:
        return self.num_slots - self.lengths.max()

    def with_room(self, count: int) -> Self:
        return self.resized(self.num_slots + count)

    def resized(self, slots: int) -> Self:
        """The same with another number of slots, the first of which hold all that is there."""
        q = self.quantisation

        def fitted(x: Array, size: int, empty: int = 0) -> Array:
            widths = [(0, max(0, size - x.shape[3]) if axis == 3 else 0) for axis in range(x.ndim)]
            return jnp.pad(x[:, :, :, :size], widths, constant_values=empty)

        grouped, recent = self.layout(q, slots)
        return self.replace(
            stored=jax.tree.map(lambda x: fitted(x, grouped // q.group_size), self.stored),
            # a ring of another size has not come round, so slot and place are the same
            recent_keys=fitted(self.recent_keys, recent),
            recent_values=fitted(self.recent_values, recent),
            positions=fitted(self.positions, slots, -1),
        )

    def slot_positions(self) -> Array:
        return self.positions

    def row_axes(self) -> "QuantisedCache | None":
        return jax.tree.map(lambda x: 0 if x.ndim == 1 else 1, self)

    def check_model(self, model: Decoder) -> None:
        num_layers, _, num_kv_heads, _, dim = self.recent_keys.shape
        check_shape(model, num_layers, num_kv_heads, dim)
        check_unshared(model)


class QuantisedMemory(NamedTuple):
    """What the queries of a layer attend to, read by tiles."""

    cache: QuantisedCache
    layer: Array

    def attend(self, queries: Queries) -> tuple[Array, None]:
        cache, layer = self.cache, self.layer
        if queries.vectors.shape[3] > 1:
            return attend(queries, cache.held(layer)), None
        positions = cache.grouped_positions(layer)
        state = read_quantised(queries, cache.stored, layer, positions)
        state = read_pairs(state, queries, cache.recent(layer))
        return state.context().astype(queries.vectors.dtype), None


def ring_slots(lengths: Array, size: int) -> Array:
    """Whose pair is at each place of a ring once `lengths` int32 [B, K] are in use: int32 [B, K, size], or below 0."""
    newest = lengths[..., None] - 1
    return newest - (newest - jnp.arange(size)) % size


class WholeGroups(NamedTuple):
    """Slots that new pairs may complete groups of, int32 [B, K, n], whether they do, and where their pairs come from.

    `places` are among those of a ring and, behind them, of the new pairs.
    """

    slots: Array
    is_whole: Array
    places: Array


def whole_groups(
    quantisation: Quantisation, before: Array, after: Array, new: Pairs, num_recent: int, num_grouped: int
) -> WholeGroups:
    """The groups that are quantised once there are `after` pairs instead of `before`, int32 [B, K].

    Args:
      quantisation: says how many are.
      before: as above.
      after: as above.
      new: [B, K, T], padded on the left.
      num_recent: places of the ring.
      num_grouped: slots of groups that there are.
    """
    q, num_new = quantisation, new.keys.shape[2]
    most = min((q.group_size - 1 + num_new) // q.group_size * q.group_size, num_grouped)
    slots = q.num_grouped(before)[..., None] + jnp.arange(most)
    rank = slots - before[..., None] + num_new - (new.positions >= 0).sum(-1)[..., None]
    places = jnp.where(slots < before[..., None], slots % num_recent, num_recent + rank)
    return WholeGroups(slots, slots < q.num_grouped(after)[..., None], jnp.clip(places, 0, num_recent + num_new - 1))


def unless(condition: Array, slots: Array, size: int) -> Array:
    """Slots int32 [B, K, T], and where the condition fails such as `put_pairs` drops, one each: they must be unique."""
    return jnp.where(condition, slots, size + jnp.arange(slots.shape[-1]))


class QuantisedKeeper(DenseKeeper):
    """What the policy chooses of a layer is quantised as it is kept, from full precision."""

    def start(self, past: Cache | None, lengths: Array, dtype: Any) -> QuantisedCache:
        assert self.quantisation is not None
        config, q = self.model.config, self.quantisation
        slots = self.policy.slots(self.total) + self.max_new_tokens
        return QuantisedCache(**empty_fields(config, q, lengths, slots, QuantisedCache.layout(q, slots), dtype))

    def write(self, cache: QuantisedCache, view: LayerView, kept: Pairs) -> QuantisedCache:
        layer, lengths = view.index, (kept.positions >= 0).sum(-1, dtype=jnp.int32)
        slots = jnp.maximum(ring_slots(lengths, cache.num_recent), 0)
        recent = (take_places(x, jnp.minimum(slots, x.shape[2] - 1)) for x in (kept.keys, kept.values))
        arrays = dict(zip(("recent_keys", "recent_values"), recent, strict=True))
        arrays |= {"positions": kept.positions, "lengths": lengths}
        parts = {name: put_layer(getattr(cache, name), layer, part) for name, part in arrays.items()}
        return cache.replace(stored=put_groups(cache.stored, layer, kept), **parts)


def empty_fields(
    config: ModelConfig, quantisation: Quantisation, lengths: Array, slots: int, layout: tuple[int, int], dtype: Any
) -> dict[str, Any]:
    """The fields of a `QuantisedCache` of empty slots, for sequences of the given lengths, int32 [B]."""
    heads = config.num_hidden_layers, lengths.shape[0], config.num_key_value_heads
    grouped, num_recent = layout

    def laid(x: Array) -> Array:
        return on_mesh(x, "l b k")

    recent = laid(jnp.zeros((*heads, num_recent, config.head_dim), dtype))
    return {
        "stored": jax.tree.map(laid, empty_pairs((*heads, grouped, config.head_dim), quantisation)),
        "recent_keys": recent,
        "recent_values": recent,
        "positions": laid(jnp.full((*heads, slots), -1, jnp.int32)),
        "lengths": laid(jnp.zeros(heads, jnp.int32)),
        "prompt_lengths": lengths,
        "next_positions": lengths,
    }


def put_groups(stored: QuantisedPairs, layer: Array | int, kept: Pairs) -> QuantisedPairs:
    """Quantises pairs [B, K, C, D] into the first slots of a layer, as far as these reach."""
    q, length = stored.quantisation, kept.keys.shape[2]
    count = min(stored.num_groups, -(-length // q.group_size)) * q.group_size
    if not count:
        return stored

    def fitted(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, max(0, count - length)), (0, 0)))[:, :, :count]

    codes = quantise(fitted(kept.keys), fitted(kept.values), q)
    return jax.tree.map(lambda whole, part: put_layer(whole, layer, part), stored, codes)


def take_groups(stored: Q, layer: Array, groups: Array) -> Q:
    """Some groups, int32 [B, K, T], of one layer of quantised keys, values or both."""

    def take(x: Array) -> Array:  # in place, scales would be turned round, all layers' at every layer
        return _take_codes(x, layer, groups) if x.dtype == jnp.uint32 else take_places(x[layer], groups)

    return jax.tree.map(take, stored)


def _take_codes(codes: Array, layer: Array, groups: Array) -> Array:
    """Entries [B, K, T, ...] at places int32 [B, K, T] of one layer of [L, B, K, G, ...], which is not copied first."""
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=tuple(range(3, codes.ndim - 1)),
        collapsed_slice_dims=(0, 3),
        start_index_map=(0, 3),
        operand_batching_dims=(1, 2),
        start_indices_batching_dims=(0, 1),
    )
    places = jnp.stack([jnp.broadcast_to(layer, groups.shape), groups], axis=-1)
    sizes = (1, 1, 1, 1, *codes.shape[4:])
    return jax.lax.gather(codes, places, numbers, sizes, mode=jax.lax.GatherScatterMode.CLIP)
