"""A cache whose layers and KV heads hold different numbers of pairs, in pages of one pool."""

from typing import NamedTuple

import flax.struct
import jax.numpy as jnp
from jax import Array

from restkv_jax.caches.base import Cache, check_shape, check_unshared
from restkv_jax.kernels.paged import Pages, attend_pages
from restkv_jax.kernels.pairs import Queries
from restkv_jax.kernels.partition import Parts, divide, each_part, undivide
from restkv_jax.models.decoder import Decoder


class PagedMemory(NamedTuple):
    """The whole pool and which pages are a layer's; `is_windowed`, static: whether any layer has a sliding window."""

    pages: Pages
    is_windowed: bool

    def attend(self, queries: Queries) -> tuple[Array, None]:
        return attend_pages(queries, self.pages, is_windowed=self.is_windowed), None


class PagedCache(Cache):
    """Kept keys and values of all layers in one pool of pages: memory follows their sum, not the longest head.

    Slot `i` of a layer, row and KV head is place `i % page_size` of page `page_table[..., i // page_size]`. The pages
    for tokens to come are given out with the rest, so decoding allocates nothing. On a mesh the pool is in `A x M`
    parts, one per place along `data` and `model`, for the rows and KV heads that are there.

    Attributes:
      keys: [A, M, pages, page_size, D], after RoPE.
      values: [A, M, pages, page_size, D].
      positions: int32 [A, M, pages, page_size], of the token in its sequence; -1 where a slot is empty.
      page_table: int32 [L, B, K, J], numbered within the part; `pages` where there is no further page.
      lengths: int32 [L, B, K], slots in use.
      is_windowed: static; whether any layer of the model has a sliding window.
    """

    keys: Array
    values: Array
    positions: Array
    page_table: Array
    lengths: Array
    is_windowed: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def parts(self) -> Parts:
        """How the pool is cut."""
        return Parts(*self.keys.shape[:2])

    @property
    def num_pages(self) -> int:
        """Pages of a part."""
        return self.keys.shape[2]

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.keys.shape[3]

    @property
    def num_slots(self) -> int:
        return -(-self.positions.size // self.lengths.size)

    def memory(self, layer: Array) -> PagedMemory:
        pages = Pages(self.keys, self.values, self.positions, self.page_table[layer], self.lengths[layer])
        return PagedMemory(pages, self.is_windowed)

    def append(self, layer: Array, keys: Array, values: Array, active: Array) -> "PagedCache":
        used = self.lengths[layer]
        pages = jnp.where(active[:, None], self._page_of(self.page_table[layer], used), self.num_pages)
        positions = jnp.broadcast_to(self.next_positions[:, None], used.shape)

        def put(pool: Array, new: Array) -> Array:
            def one_part(pool, pages, slots, new):
                return pool.at[pages, slots].set(new.astype(pool.dtype), mode="drop")

            return each_part(one_part, pool, *(divide(x, self.parts) for x in (pages, used % self.page_size, new)))

        return self.replace(
            keys=put(self.keys, keys),
            values=put(self.values, values),
            positions=put(self.positions, positions),
            lengths=self.lengths.at[layer].set(used + (pages < self.num_pages)),
        )

    def is_full(self) -> Array:
        return (self._page_of(self.page_table, self.lengths) >= self.num_pages).any()

    def slot_positions(self) -> Array:
        def one_part(positions, table):
            return positions.at[table].get(mode="fill", fill_value=-1)

        by_page = undivide(each_part(one_part, self.positions, divide(self.page_table, self.parts, "l")), "l")
        return by_page.reshape(*self.lengths.shape, -1)

    def check_model(self, model: Decoder) -> None:
        num_layers, _, num_kv_heads = self.lengths.shape
        check_shape(model, num_layers, num_kv_heads, self.keys.shape[-1])
        check_unshared(model)

    def _page_of(self, page_table: Array, slots: Array) -> Array:
        """The page of a slot, `pages` where there is none."""
        wide = jnp.pad(page_table, [(0, 0)] * (page_table.ndim - 1) + [(0, 1)], constant_values=self.num_pages)
        place = jnp.minimum(slots // self.page_size, page_table.shape[-1])
        return jnp.take_along_axis(wide, place[..., None], axis=-1)[..., 0]


class PoolShape(NamedTuple):
    """Static sizes of a pool: `num_pages` of `page_size` slots, at most `pages_per_head` for a layer, row and head."""

    num_pages: int
    page_size: int
    pages_per_head: int


def pool_shape(total: int, most: int, heads: int, max_new_tokens: int, page_size: int) -> PoolShape:
    """The pool that `total` pairs and the tokens to come need, however the pairs are shared.

    Args:
      total: bound on the pairs of all layers, rows and KV heads.
      most: bound on those of one.
      heads: layers times rows times KV heads.
      max_new_tokens: slots that each reserves.
      page_size: slots of a page.
    """
    num_pages = (total + heads * (max_new_tokens + page_size - 1)) // page_size
    return PoolShape(num_pages, page_size, -(-(most + max_new_tokens) // page_size))


def fill_pages(shape: PoolShape, keys: Array, values: Array, positions: Array, keep: Array, max_new_tokens: int):
    """Packs the pairs to keep into the pages of one part, in their order.

    Args:
      shape: of the pool.
      keys: [L, b, k, N, D].
      values: [L, b, k, N, D].
      positions: int32 [L, b, k, N].
      keep: bool [L, b, k, N].
      max_new_tokens: further slots for every layer, row and KV head.

    Returns:
      the fields `keys`, `values` [pages, page_size, D], `positions`, `page_table` and `lengths` of a `PagedCache`, as a
      dict.
    """
    num_pages, page_size, pages_per_head = shape
    lengths = keep.sum(-1, dtype=jnp.int32)
    needed = -(-(lengths.reshape(-1) + max_new_tokens) // page_size)
    last = jnp.cumsum(needed)
    first = last - needed
    pages = jnp.arange(num_pages)
    owner = jnp.minimum(jnp.searchsorted(last, pages, side="right"), lengths.size - 1)
    slots = (pages - first[owner])[:, None] * page_size + jnp.arange(page_size)
    used = slots < lengths.reshape(-1)[owner, None]
    order = jnp.argsort(~keep, axis=-1, stable=True).reshape(lengths.size, -1)
    source = order[owner[:, None], jnp.minimum(slots, order.shape[-1] - 1)]

    def take(x, empty):
        x = x.reshape(lengths.size, *x.shape[3:])[owner[:, None], source]
        return jnp.where(used.reshape(used.shape + (1,) * (x.ndim - 2)), x, empty)

    steps = jnp.arange(pages_per_head)
    table = jnp.where(steps < needed[:, None], first[:, None] + steps, num_pages)
    return {
        "keys": take(keys, 0),
        "values": take(values, 0),
        "positions": take(positions, -1),
        "page_table": table.reshape(*lengths.shape, -1).astype(jnp.int32),
        "lengths": lengths,
    }
