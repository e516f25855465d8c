"""A cache whose layers and KV heads hold different numbers of pairs, in pages of one pool."""

import math
from typing import Any, ClassVar, NamedTuple, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.caches.base import Cache, check_shape, check_unshared
from restkv_jax.kernels.attention import attend
from restkv_jax.kernels.paged import Pages, attend_pages, pairs_of_pages
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.partition import Parts, divide, each_part, undivide
from restkv_jax.models.decoder import Decoder


class PagedMemory(NamedTuple):
    """The whole pool and which pages are a layer's; `is_windowed`, static: whether any layer has a sliding window."""

    pages: Pages
    is_windowed: bool

    def attend(self, queries: Queries) -> tuple[Array, None]:
        if queries.vectors.shape[3] > 1:
            return attend(queries, pairs_of_pages(self.pages, queries.vectors.dtype)), None
        return attend_pages(queries, self.pages, is_windowed=self.is_windowed), None


class InPages(Cache):
    """What caches in pages have in common; fields as those of `PagedCache`.

    `POOL` names the fields in pages, [A, M, pages, ...], `BY_HEAD` those of axes [L, B, K, ...].
    """

    POOL: ClassVar[tuple[str, ...]]
    BY_HEAD: ClassVar[tuple[str, ...]]

    positions: Array
    page_table: Array
    lengths: Array
    is_windowed: bool = flax.struct.field(pytree_node=False)

    @property
    def parts(self) -> Parts:
        """How the pool is cut."""
        return Parts(*self.positions.shape[:2])

    @property
    def num_pages(self) -> int:
        """Pages of a part."""
        return self.positions.shape[2]

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.positions.shape[3]

    def with_room(self, count: int) -> Self:
        """The same with `count` slots more, rounded up to whole pages, for every layer, row and KV head."""
        if not count:
            return self
        more = -(-count // self.page_size)
        in_part = self.lengths.size // math.prod(self.parts) * more

        def longer(name: str) -> Any:
            empty = -1 if name == "positions" else 0

            def pad(pool: Array) -> Array:
                widths = [(0, in_part if axis == 2 else 0) for axis in range(pool.ndim)]
                return jnp.pad(pool, widths, constant_values=empty)

            return jax.tree.map(pad, getattr(self, name))

        table = jnp.where(self.page_table < self.num_pages, self.page_table, self.num_pages + in_part)
        table = jnp.pad(table, [(0, 0)] * 3 + [(0, more)], constant_values=self.num_pages + in_part)
        steps = jnp.arange(table.shape[-1]) - self._pages_held()[..., None]
        added = jnp.take_along_axis(self._numbered(more), jnp.clip(steps, 0, more - 1), axis=-1)
        return self.replace(
            **{name: longer(name) for name in self.POOL},
            page_table=jnp.where((steps >= 0) & (steps < more), added, table),
        )

    def _numbered(self, more: int) -> Array:
        """Numbers of pages behind those of the pool, `more` for each layer, row and KV head: int32 [L, B, K, more]."""
        layers, batch, num_kv_heads = self.lengths.shape
        rows, heads = self.parts
        shape = layers, batch // rows, num_kv_heads // heads, more
        of_part = self.num_pages + jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)
        return undivide(jnp.broadcast_to(of_part, (rows, heads, *shape)), "l")

    def _pages_held(self) -> Array:
        """int32 [L, B, K]."""
        return (self.page_table < self.num_pages).sum(-1, dtype=jnp.int32)

    def slot_positions(self) -> Array:
        def one_part(positions, table):
            return positions.at[table].get(mode="fill", fill_value=-1)

        by_page = undivide(each_part(one_part, self.positions, divide(self.page_table, self.parts, "l")), "l")
        return by_page.reshape(*self.lengths.shape, -1)

    def repeat_rows(self, count: int) -> Self:
        """Every row `count` times: copies of a page lie one after the other."""
        copies = jnp.tile(jnp.arange(count, dtype=jnp.int32), self.lengths.shape[1])[:, None, None]
        axes = {"prompt_lengths": 0, "next_positions": 0}
        axes |= dict.fromkeys(self.BY_HEAD, 1) | dict.fromkeys(self.POOL, 2)
        repeated = {
            name: jax.tree.map(lambda x, axis=axis: jnp.repeat(x, count, axis), getattr(self, name))
            for name, axis in axes.items()
        }
        table = repeated.pop("page_table")
        is_page = table < self.num_pages
        return self.replace(**repeated, page_table=jnp.where(is_page, table * count + copies, self.num_pages * count))

    def _page_of(self, page_table: Array, slots: Array) -> Array:
        """The pages of slots int32 [B, K, T], `pages` where there is none."""
        wide = jnp.pad(page_table, [(0, 0)] * (page_table.ndim - 1) + [(0, 1)], constant_values=self.num_pages)
        place = jnp.minimum(slots // self.page_size, page_table.shape[-1])
        return jnp.take_along_axis(wide, place, axis=-1)

    def _put(self, pool: Array, pages: Array, slots: Array, new: Array) -> Array:
        """Writes new [B, K, T, ...] into places of pages, both int32 [B, K, T]; pages beyond the pool drop."""

        def one_part(pool, pages, slots, new):
            return pool.at[pages, slots].set(new.astype(pool.dtype), mode="drop")

        return each_part(one_part, pool, *(divide(x, self.parts) for x in (pages, slots, new)))


class PagedCache(InPages):
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

    POOL = "keys", "values", "positions"
    BY_HEAD = "page_table", "lengths"

    keys: Array
    values: Array

    @property
    def num_slots(self) -> int:
        return -(-self.positions.size // self.lengths.size)

    @property
    def num_places(self) -> int:
        return self.page_table.shape[-1] * self.page_size

    @property
    def dtype(self) -> Any:
        return self.keys.dtype

    def _pages(self, layer: Array) -> Pages:
        return Pages(self.keys, self.values, self.positions, self.page_table[layer], self.lengths[layer])

    def memory(self, layer: Array) -> PagedMemory:
        return PagedMemory(self._pages(layer), self.is_windowed)

    def held(self, layer: Array) -> Pairs:
        return pairs_of_pages(self._pages(layer), self.dtype)

    def append(self, layer: Array, new: Pairs) -> Self:
        is_new = jnp.broadcast_to(new.positions >= 0, new.keys.shape[:3])
        slots = self.lengths[layer][..., None] + jnp.cumsum(is_new, axis=-1, dtype=jnp.int32) - 1
        pages = jnp.where(is_new, self._page_of(self.page_table[layer], slots), self.num_pages)

        def put(pool: Array, new: Array) -> Array:
            return self._put(pool, pages, slots % self.page_size, new)

        entered = (pages < self.num_pages).sum(-1, dtype=jnp.int32)
        return self.replace(
            keys=put(self.keys, new.keys),
            values=put(self.values, new.values),
            positions=put(self.positions, jnp.broadcast_to(new.positions, is_new.shape)),
            lengths=self.lengths.at[layer].add(entered),
        )

    def room(self) -> Array:
        return (self._pages_held() * self.page_size - self.lengths).min()

    def check_model(self, model: Decoder) -> None:
        num_layers, _, num_kv_heads = self.lengths.shape
        check_shape(model, num_layers, num_kv_heads, self.keys.shape[-1])
        check_unshared(model)


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
