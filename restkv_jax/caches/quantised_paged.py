"""The cache in pages, quantised: a page is a group."""

from typing import NamedTuple, Self

import einops
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.caches.base import check_shape, check_unshared
from restkv_jax.caches.candidates import Candidates, PagedKeeper
from restkv_jax.caches.dense import put_pairs
from restkv_jax.caches.paged import InPages
from restkv_jax.caches.quantised import WithNewest, ring_slots, unless, whole_groups
from restkv_jax.kernels.attention import attend
from restkv_jax.kernels.gather import gather_pairs
from restkv_jax.kernels.paged import QuantisedPages, pairs_of_pages, read_quantised_pages
from restkv_jax.kernels.pairs import Pairs, Queries, concatenate, take_places
from restkv_jax.kernels.partition import divide, each_part
from restkv_jax.kernels.quantised import quantise
from restkv_jax.kernels.quantised_attention import read_pairs
from restkv_jax.models.decoder import Decoder


class QuantisedPagedCache(WithNewest, InPages):
    """As `PagedCache`, in pages of `quantisation.group_size` slots, and the newest pairs as in `QuantisedCache`.

    Attributes:
      stored: a group per page, with axes [A, M] before them.
      positions: int32 [A, M, pages, page_size], -1 where a slot is empty.
      page_table: int32 [L, B, K, J], as in `PagedCache`.
      lengths: int32 [L, B, K], pairs held, those in the ring included.
      recent_keys: [L, B, K, W, D], the ring, after RoPE.
      recent_values: [L, B, K, W, D].
      recent_positions: int32 [L, B, K, W].
      is_windowed: static.
    """

    POOL = "stored", "positions"
    BY_HEAD = "page_table", "lengths", "recent_keys", "recent_values", "recent_positions"

    recent_positions: Array

    @property
    def num_slots(self) -> int:
        return -(-self.positions.size // self.lengths.size) + self.num_recent

    @property
    def num_places(self) -> int:
        return self.page_table.shape[-1] * self.page_size + self.num_recent

    def pages(self, layer: Array) -> QuantisedPages:
        """The pool, and which pages are a layer's."""
        grouped = self.quantisation.num_grouped(self.lengths[layer])
        return QuantisedPages(self.stored, self.positions, self.page_table[layer], grouped)

    def recent(self, layer: Array) -> Pairs:
        """The pairs in the ring, [B, K, W, D], at position -1 where a place is not in use."""
        positions = jnp.where(self._in_ring()[layer], self.recent_positions[layer], -1)
        return Pairs(self.recent_keys[layer], self.recent_values[layer], positions)

    def _in_ring(self) -> Array:
        """Which places of the rings are in use, bool [L, B, K, W]."""
        return ring_slots(self.lengths, self.num_recent) >= self.quantisation.num_grouped(self.lengths)[..., None]

    def memory(self, layer: Array) -> "QuantisedPagedMemory":
        return QuantisedPagedMemory(self, layer)

    def held(self, layer: Array) -> Pairs:
        return concatenate(pairs_of_pages(self.pages(layer), self.dtype), self.recent(layer))

    def append(self, layer: Array, new: Pairs) -> Self:
        q, before = self.quantisation, self.lengths[layer]
        is_new = jnp.broadcast_to(new.positions >= 0, new.keys.shape[:3])
        most = self._pages_held()[layer] * self.page_size + self.num_recent
        after = jnp.minimum(before + is_new.sum(-1, dtype=jnp.int32), most)
        slots = before[..., None] + jnp.cumsum(is_new, axis=-1, dtype=jnp.int32) - 1
        in_ring = is_new & (slots < after[..., None]) & (slots >= q.num_grouped(after)[..., None])
        places = unless(in_ring, slots % self.num_recent, self.num_recent)
        new = new._replace(positions=jnp.broadcast_to(new.positions, is_new.shape))
        cache = self._quantise_pages(layer, new, before, after)
        return cache.replace(
            recent_keys=put_pairs(cache.recent_keys, layer, places, new.keys),
            recent_values=put_pairs(cache.recent_values, layer, places, new.values),
            recent_positions=put_pairs(cache.recent_positions, layer, places, new.positions),
            lengths=jax.lax.dynamic_update_index_in_dim(cache.lengths, after, layer, 0),
        )

    def _quantise_pages(self, layer: Array, new: Pairs, before: Array, after: Array) -> Self:
        """Quantises the pages that `new` pairs complete; int32 [B, K] pairs held before and after."""
        size, grouped = self.page_size, self.page_table.shape[-1] * self.page_size
        slots, is_whole, places = whole_groups(self.quantisation, before, after, new, self.num_recent, grouped)
        if not slots.shape[-1]:
            return self
        recent = Pairs(self.recent_keys[layer], self.recent_values[layer], self.recent_positions[layer])
        both = zip(recent, new, strict=True)
        keys, values, positions = (take_places(jnp.concatenate(x, axis=2), places) for x in both)
        pages = jnp.where(is_whole, self._page_of(self.page_table[layer], slots), self.num_pages)[..., ::size]

        def put(pool: Array, new: Array) -> Array:
            def one_part(pool, pages, new):
                return pool.at[pages].set(new.astype(pool.dtype), mode="drop")

            return each_part(one_part, pool, divide(pages, self.parts), divide(new, self.parts))

        codes = quantise(keys, values, self.quantisation)
        return self.replace(
            stored=jax.tree.map(put, self.stored, codes),
            positions=put(self.positions, positions.reshape(*pages.shape, size)),
        )

    def room(self) -> Array:
        return (self._pages_held() * self.page_size + self.num_recent - self.lengths).min()

    def slot_positions(self) -> Array:
        in_ring = jnp.where(self._in_ring(), self.recent_positions, -1)
        return jnp.concatenate([super().slot_positions(), in_ring], axis=-1)

    def check_model(self, model: Decoder) -> None:
        num_layers, _, num_kv_heads = self.lengths.shape
        check_shape(model, num_layers, num_kv_heads, self.recent_keys.shape[-1])
        check_unshared(model)


class QuantisedPagedMemory(NamedTuple):
    """What the queries of a layer attend to, read some pages at a time."""

    cache: QuantisedPagedCache
    layer: Array

    def attend(self, queries: Queries) -> tuple[Array, None]:
        cache, layer = self.cache, self.layer
        if queries.vectors.shape[3] > 1:
            return attend(queries, cache.held(layer)), None
        state = read_quantised_pages(queries, cache.pages(layer), is_windowed=cache.is_windowed)
        state = read_pairs(state, queries, cache.recent(layer))
        return state.context().astype(queries.vectors.dtype), None


class QuantisedPagedKeeper(PagedKeeper):
    """Once the budget is shared out, the newest pairs of each layer and KV head go into its ring, others into pages."""

    def finish(self, candidates: Candidates) -> QuantisedPagedCache:
        q = self.quantisation
        assert q is not None
        candidates, keep = self.choose(candidates)
        lengths, ranks = keep.sum(-1, dtype=jnp.int32), jnp.cumsum(keep, axis=-1) - 1
        filled = self.fill(candidates, keep & (ranks < q.num_grouped(lengths)[..., None]), q.group_size)
        keys, values = (einops.rearrange(filled.pop(name), "a m p s d -> a m (p s) d") for name in ("keys", "values"))
        ring = jnp.maximum(ring_slots(lengths, q.residual + q.group_size - 1), 0)
        places = jnp.argsort(~keep, axis=-1, stable=True)  # of the kept ones, in their order
        places = jnp.take_along_axis(places, jnp.minimum(ring, places.shape[-1] - 1), axis=-1)
        recent = jax.vmap(gather_pairs)(Pairs(candidates.keys, candidates.values, candidates.positions), places)
        return QuantisedPagedCache(
            **filled | {"lengths": lengths},
            stored=quantise(keys, values, q),
            recent_keys=recent.keys,
            recent_values=recent.values,
            recent_positions=recent.positions,
            **self.of_sequences(candidates),
        )
