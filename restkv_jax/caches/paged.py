"""A cache whose layers and KV heads hold different numbers of pairs, in pages of one pool."""

from typing import NamedTuple

import flax.struct
import jax.numpy as jnp
from jax import Array

from restkv_jax import kernels


class PagedMemory(NamedTuple):
    """What the queries of one layer attend to: the whole pool, and which pages are the layer's.

    `keys`, `values` [pages, page_size, D], `positions` int32 [pages, page_size], `page_table` int32 [B, K, J],
    `lengths` int32 [B, K]; `windowed`, static, whether any layer of the model has a sliding window.
    """

    keys: Array
    values: Array
    positions: Array
    page_table: Array
    lengths: Array
    windowed: bool

    def attend(self, queries: Array, query_positions: Array, sliding_window: Array) -> tuple[Array, None]:
        """Causal attention of one query per row, [B, H, 1, D], and nothing to note."""
        arrays = self.keys, self.values, self.positions, self.page_table, self.lengths
        return kernels.paged_attention(queries, *arrays, query_positions, sliding_window, windowed=self.windowed), None


@flax.struct.dataclass
class PagedCache:
    """Kept keys and values of all layers in one pool of pages: memory follows their sum, not the longest head.

    Slot `i` of a layer, row and KV head is place `i % page_size` of page `page_table[..., i // page_size]`. The pages
    for tokens to come are given out with the rest, so decoding allocates nothing.

    Attributes:
      keys: [pages, page_size, D], after RoPE.
      values: [pages, page_size, D].
      positions: int32 [pages, page_size], of the token in its sequence; -1 where a slot is empty.
      page_table: int32 [L, B, K, J]; `pages` where there is no further page.
      lengths: int32 [L, B, K], slots in use.
      prompt_lengths: int32 [B], tokens of each prompt.
      next_positions: int32 [B], position of the next token.
      windowed: static; whether any layer of the model has a sliding window.
    """

    keys: Array
    values: Array
    positions: Array
    page_table: Array
    lengths: Array
    prompt_lengths: Array
    next_positions: Array
    windowed: bool = flax.struct.field(pytree_node=False, default=False)

    importance = None

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.keys.shape[1]

    @property
    def num_slots(self) -> int:
        """Slots per layer, row and KV head, on average and rounded up."""
        return -(-self.positions.size // self.lengths.size)

    def is_full(self) -> Array:
        """bool scalar: some layer, row and KV head has no place for another pair."""
        return (self._page_of(self.page_table, self.lengths) >= len(self.keys)).any()

    def memory(self, layer: Array) -> PagedMemory:
        """What the queries of a layer, int32 scalar, attend to."""
        return PagedMemory(
            self.keys, self.values, self.positions, self.page_table[layer], self.lengths[layer], self.windowed
        )

    def append(self, layer: Array, keys: Array, values: Array, active: Array, window: int) -> "PagedCache":
        """Puts one new pair per row and KV head into a layer; arguments as for `KVCache.append`."""
        used = self.lengths[layer]
        pages = jnp.where(active[:, None], self._page_of(self.page_table[layer], used), len(self.keys))

        def put(array, new):
            return array.at[pages, used % self.page_size].set(new.astype(array.dtype), mode="drop")

        positions = jnp.broadcast_to(self.next_positions[:, None], used.shape)
        return self.replace(
            keys=put(self.keys, keys),
            values=put(self.values, values),
            positions=put(self.positions, positions),
            lengths=self.lengths.at[layer].set(used + (pages < len(self.keys))),
        )

    def slot_positions(self) -> Array:
        """int32 [L, B, K, N], position of every slot, -1 where empty."""
        by_page = self.positions.at[self.page_table].get(mode="fill", fill_value=-1)
        return by_page.reshape(*self.lengths.shape, -1)

    def _page_of(self, page_table: Array, slots: Array) -> Array:
        """The page of a slot, `pages` where there is none."""
        wide = jnp.pad(page_table, [(0, 0)] * (page_table.ndim - 1) + [(0, 1)], constant_values=len(self.keys))
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
    """Packs the pairs to keep into pages, in their order.

    Args:
      shape: of the pool.
      keys: [L, B, K, N, D].
      values: [L, B, K, N, D].
      positions: int32 [L, B, K, N].
      keep: bool [L, B, K, N].
      max_new_tokens: further slots for every layer, row and KV head.

    Returns:
      the fields `keys`, `values`, `positions`, `page_table` and `lengths` of a `PagedCache`, as a dict.
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
