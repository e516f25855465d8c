"""The quantised cache that evicts while generating."""

from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.caches.base import Cache
from restkv_jax.caches.dense import put_layer, put_pairs
from restkv_jax.caches.evicting import UNSEEN, ByImportance, EvictingKeeper, empty_importance
from restkv_jax.caches.quantised import QuantisedCache, empty_fields, put_groups, take_groups, unless
from restkv_jax.kernels.gather import gather_pairs
from restkv_jax.kernels.pairs import Pairs, concatenate, take_pairs, take_places
from restkv_jax.kernels.quantised import Quantisation, QuantisedPairs
from restkv_jax.models.decoder import LayerView


class QuantisedEvictingCache(ByImportance, QuantisedCache):
    """As `EvictingCache`, `N` slots of which the last `W`, the residual window, are in full precision.

    A new pair takes a free slot of the window. Where there is none, a slot is given up as in `EvictingCache`: the pair
    takes it over if it is in the window; else the window's oldest pair moves there, quantised into its group, and the
    new one takes its place. So the same pairs are held as without quantisation.
    """

    @staticmethod
    def layout(quantisation: Quantisation, slots: int) -> tuple[int, int]:
        recent, group = min(quantisation.residual, slots), quantisation.group_size
        return -(-(slots - recent) // group) * group, recent

    @property
    def num_old(self) -> int:
        """Slots outside the residual window; those behind them, up to a whole group, are never used."""
        return self.num_slots - self.num_recent

    def held(self, layer: Array) -> Pairs:
        keys, values = jax.tree.map(lambda x: x[layer], self.stored).dequantised(self.dtype)
        old = take_pairs(Pairs(keys, values, self.grouped_positions(layer)), 0, self.num_old)
        return concatenate(old, self.recent(layer))

    def recent(self, layer: Array) -> Pairs:
        positions = self.positions[layer][:, :, self.num_old :]
        return Pairs(self.recent_keys[layer], self.recent_values[layer], positions)

    def grouped_positions(self, layer: Array) -> Array:
        unused = (0, 0), (0, 0), (0, self.num_grouped - self.num_old)
        return jnp.pad(self.positions[layer][:, :, : self.num_old], unused, constant_values=-1)

    def append(self, layer: Array, new: Pairs) -> Self:
        """Puts one new pair per row and KV head into a layer, `T = 1`."""
        used, is_new = self.lengths[layer], jnp.broadcast_to(new.positions[..., 0] >= 0, new.keys.shape[:2])
        free = jnp.where(used < self.num_recent, self.num_old + used, used - self.num_recent)
        slot = jnp.where(used < self.num_slots, free, self.least_important(layer))
        place = jnp.where(slot < self.num_old, self._oldest(layer), slot - self.num_old)[..., None]
        cache = self._move(layer, place, jnp.where(is_new, slot, self.num_slots)[..., None])
        places = jnp.where(is_new[..., None], place, self.num_recent)
        slots = jnp.where(is_new[..., None], self.num_old + place, self.num_slots)
        lengths = jnp.minimum(used + is_new, self.num_slots)
        return cache.replace(
            recent_keys=put_pairs(cache.recent_keys, layer, places, new.keys),
            recent_values=put_pairs(cache.recent_values, layer, places, new.values),
            positions=put_pairs(cache.positions, layer, slots, jnp.broadcast_to(new.positions, slots.shape)),
            importance=put_pairs(cache.importance, layer, slots, jnp.full(slots.shape, UNSEEN)),
            lengths=jax.lax.dynamic_update_index_in_dim(cache.lengths, lengths, layer, 0),
        )

    def _oldest(self, layer: Array) -> Array:
        """The place of the residual window's oldest pair, int32 [B, K]."""
        positions = self.recent(layer).positions
        return jnp.argmin(jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions), axis=-1)

    def _move(self, layer: Array, place: Array, slot: Array) -> Self:
        """Moves a pair of the residual window to a slot outside of it, int32 [B, K, 1]; none if it is none such."""
        if not self.num_old:
            return self
        q, recent, moves = self.quantisation, self.recent(layer), slot < self.num_old
        group = jnp.minimum(slot, self.num_old - 1) // q.group_size
        before = take_groups(self.stored, layer, group)
        pair = (take_places(x, place) for x in recent[:2])
        after = before.put(slot % q.group_size, *pair)
        group = unless(moves, group, self.stored.num_groups)

        slot = unless(moves, slot, self.num_slots)
        position = take_places(recent.positions, place)
        importance = take_places(self.importance[layer], self.num_old + place)
        return self.replace(
            stored=jax.tree.map(lambda whole, part: put_pairs(whole, layer, group, part), self.stored, after),
            positions=put_pairs(self.positions, layer, slot, position),
            importance=put_pairs(self.importance, layer, slot, importance),
        )


class QuantisedEvictingKeeper(EvictingKeeper):
    """Puts the newest of the kept pairs into the residual window, the others into groups in their order."""

    def start(self, past: Cache | None, lengths: Array, dtype: Any) -> QuantisedEvictingCache:
        q = self.quantisation
        assert q is not None
        layout = QuantisedEvictingCache.layout(q, self.num_slots)
        fields = empty_fields(self.model.config, q, lengths, self.num_slots, layout, dtype)
        return QuantisedEvictingCache(**fields, **empty_importance(self.model.config, fields["positions"], self.policy))

    def choose(self, view: LayerView, pairs: Pairs, known: dict) -> Pairs:
        """The kept pairs in the order of the cache's slots."""
        assert self.quantisation is not None
        kept = super().choose(view, pairs, known)
        _, num_recent = QuantisedEvictingCache.layout(self.quantisation, self.num_slots)
        lengths = (kept.positions >= 0).sum(-1, dtype=jnp.int32)[..., None]
        slots, num_old = jnp.arange(self.num_slots), self.num_slots - num_recent
        first = jnp.maximum(lengths - num_recent, 0)  # of the newest ones
        ranks = jnp.where(slots < num_old, jnp.where(slots < first, slots, lengths), first + slots - num_old)
        return gather_pairs(kept, jnp.where(ranks < lengths, ranks, kept.keys.shape[2]))

    def write(self, cache: QuantisedEvictingCache, view: LayerView, kept: Pairs) -> QuantisedEvictingCache:
        recent = take_pairs(kept, cache.num_old, cache.num_recent)
        parts = {"recent_keys": recent.keys, "recent_values": recent.values, "positions": kept.positions}
        parts["lengths"] = (kept.positions >= 0).sum(-1, dtype=jnp.int32)
        arrays = {name: put_layer(getattr(cache, name), view.index, part) for name, part in parts.items()}
        old: QuantisedPairs = put_groups(cache.stored, view.index, take_pairs(kept, 0, cache.num_old))
        return cache.replace(stored=old, **arrays)
