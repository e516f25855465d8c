"""Attention of one query per row over keys in pages, as many as each KV head holds."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.dispatch import Dispatched, Implementation
from restkv_jax.kernels.one_query import read_table, refusal
from restkv_jax.kernels.pairs import Pairs, Queries, visible
from restkv_jax.kernels.partition import Parts, divide, each_part, undivide
from restkv_jax.kernels.quantised import QuantisedPairs
from restkv_jax.kernels.quantised_attention import read_codes
from restkv_jax.kernels.softmax import Softmax, empty_softmax, join_by_owner, read_keys

SLOTS_AT_ONCE = 1024
"""Slots whose keys and values are taken out of their pages at one time."""

MIN_PAGE_SIZE = 8
"""A page is a tile of the TPU's memory, eight rows at least."""

LANES = 128
"""The TPU's kernel copies rows of whole vector registers."""

SCALAR_BYTES = 2**19
"""Largest table of pages that a TPU kernel is given: half of the scalar memory, where other numbers are too."""


class Pages(NamedTuple):
    """The pool of pages of one layer's pairs, in `A x M` parts as `partition` says, and which pages are whose.

    `keys`, `values` [A, M, pages, page_size, D]; `positions` int32 [A, M, pages, page_size]; `table` int32 [B, K, J],
    the pages of each row and KV head in order, numbered within their part, `pages` or more where there is none;
    `lengths` int32 [B, K], slots in use.
    """

    keys: Array
    values: Array
    positions: Array
    table: Array
    lengths: Array

    def take(self, page: Array, dtype: Any) -> tuple[Array, Array]:
        """Keys and values of some pages of a part, [..., page_size, D]; of another one for pages that there are not."""
        return self.keys[page].astype(dtype), self.values[page].astype(dtype)

    def read(self, queries: Queries, page: Array, seen: Array) -> Softmax:
        """The softmax of `n` sets of queries, each over a page int32 [n] of its own."""
        return read_keys(queries, *self.take(page, queries.vectors.dtype), seen)


class QuantisedPages(NamedTuple):
    """As `Pages`, each page a group of `stored`, with axes [A, M] before them."""

    stored: QuantisedPairs
    positions: Array
    table: Array
    lengths: Array

    def take(self, page: Array, dtype: Any) -> tuple[Array, Array]:
        """As `Pages.take`, dequantised."""
        return self._groups(page).dequantised(dtype)

    def read(self, queries: Queries, page: Array, seen: Array) -> Softmax:
        """As `Pages.read`."""
        return read_codes(queries, self._groups(page), seen)

    def _groups(self, page: Array) -> QuantisedPairs:
        """Some pages, each with its group alone."""
        return jax.tree.map(lambda x: jnp.expand_dims(x[page], page.ndim), self.stored)


AnyPages = Pages | QuantisedPages


def pairs_of_pages(pages: AnyPages, dtype: Any) -> Pairs:
    """All pairs, taken out of their pages: [B, K, J * page_size, D], at position -1 where empty."""

    def one_part(pages: AnyPages) -> tuple[Array, ...]:
        positions = pages.positions.at[pages.table].get(mode="fill", fill_value=-1)
        is_page = (pages.table < len(pages.positions))[..., None, None]
        pairs = (jnp.where(is_page, x, 0) for x in pages.take(pages.table, dtype))
        taken = *pairs, positions
        return tuple(x.reshape(*pages.table.shape[:2], -1, *x.shape[4:]) for x in taken)

    return Pairs(*(undivide(x) for x in each_part(one_part, _divided(pages))))


def _divided(pages: AnyPages) -> AnyPages:
    parts = Parts(*pages.positions.shape[:2])
    return pages._replace(table=divide(pages.table, parts), lengths=divide(pages.lengths, parts))


def _attend_pages(queries: Queries, pages: Pages, *, is_windowed: bool) -> Array:
    """Causal softmax attention of one query per row, where each row's KV heads hold different numbers of pairs.

    The used pages of all heads of a part stand one after the other and are read in chunks, each page as a block of the
    online softmax of its head, so time and temporaries follow the pairs there are, not the longest head.

    Args:
      queries: [B, K, G, 1, D].
      pages: of the layer.
      is_windowed: whether the sliding window can hide anything; without, all slots in use are seen.

    Returns:
      [B, K, G, 1, D] in the dtype of the queries; zeros where a query sees nothing. Softmax in float32.
    """

    return _read_pages(queries, pages, is_windowed=is_windowed).context().astype(queries.vectors.dtype)


def _read_pages(queries: Queries, pages: AnyPages, *, is_windowed: bool) -> Softmax:
    """The softmax of one query per row over the pairs in its pages; see `attend_pages`."""
    return _over_parts(lambda queries, pages: _read_part(queries, pages, is_windowed), queries, pages)


def _over_parts(function: Callable[[Queries, Any], Any], queries: Queries, pages: AnyPages) -> Any:
    """Applies a function of one part's queries, whose positions are int32 [b, k], and pages to all parts."""
    parts = Parts(*pages.positions.shape[:2])
    positions = jnp.broadcast_to(queries.positions, pages.lengths.shape)
    divided = queries.replace(
        vectors=divide(queries.vectors, parts),
        positions=divide(positions, parts),
        sliding_window=_of_all(queries.sliding_window, parts),
    )
    return jax.tree.map(undivide, each_part(function, divided, _divided(pages)))


def _of_all(scalar: Array | int, parts: Parts) -> Array:
    return jnp.broadcast_to(jnp.asarray(scalar, jnp.int32), parts)


def _read_part(queries: Queries, pages: AnyPages, is_windowed: bool) -> Softmax:
    """`_read_pages` of one part, of queries [b, k, G, 1, D]; their positions are int32 [b, k]."""
    batch, num_kv_heads, num_places = pages.table.shape
    page_size, heads = pages.positions.shape[1], batch * num_kv_heads
    vectors = einops.rearrange(queries.vectors, "b k g t d -> (b k) g t d")
    table, lengths, positions = (
        x.reshape(heads, *x.shape[2:]) for x in (pages.table, pages.lengths, queries.positions)
    )
    last = jnp.cumsum(-(-lengths // page_size))
    at_once = max(1, min(SLOTS_AT_ONCE // page_size, table.size))

    def read(step, state: Softmax) -> Softmax:
        order = step * at_once + jnp.arange(at_once)
        owner = jnp.minimum(jnp.searchsorted(last, order, side="right"), heads - 1)
        before = jnp.where(owner > 0, last[owner - 1], 0)
        page = table[owner, jnp.clip(order - before, 0, num_places - 1)]
        seen = ((order - before)[:, None] * page_size + jnp.arange(page_size) < lengths[owner, None])[:, None]
        one = queries.replace(vectors=vectors[owner], positions=positions[owner, None])
        if is_windowed:
            seen &= visible(one, pages.positions[page][:, None])[:, 0]
        return join_by_owner(state, pages.read(one, page, seen[:, None]), owner)

    state = jax.lax.fori_loop(0, -(-last[-1] // at_once), read, empty_softmax(vectors))
    return jax.tree.map(lambda x: x.reshape(batch, num_kv_heads, *x.shape[1:]), state)


def _attend_pages_tpu(queries: Queries, pages: Pages, *, is_windowed: bool) -> Array:
    """`attend_pages` by JAX's Pallas kernel for TPU."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as kernel

    block = max(1, 512 // pages.keys.shape[3])

    def one_part(queries: Queries, pages: Pages) -> Array:
        vectors, table, lengths = _as_sequences(queries, pages, block)
        context = kernel(  # which adds up in the dtype of the queries
            vectors.astype(jnp.float32), pages.keys[None], pages.values[None], lengths, table,
            pages_per_compute_block=block, attn_logits_soft_cap=queries.soft_cap,
        )  # fmt: skip
        return _as_heads(context, lengths, queries)

    return _over_parts(one_part, queries, pages)


def _attend_pages_gpu(queries: Queries, pages: Pages, *, is_windowed: bool, interpret: bool = False) -> Array:
    """`attend_pages` by JAX's Pallas kernel for GPU."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as kernel

    block, splits = max(1, 128 // pages.keys.shape[3]), 4

    def one_part(queries: Queries, pages: Pages) -> Array:
        vectors, table, lengths = _as_sequences(queries, pages, block * splits)
        context = kernel(
            vectors, pages.keys[None], pages.values[None], table, lengths,
            pages_per_compute_block=block, k_splits=splits, interpret=interpret, attn_logits_soft_cap=queries.soft_cap,
        )  # fmt: skip
        return _as_heads(context, lengths, queries)

    return _over_parts(one_part, queries, pages)


def _refusal_tpu(queries: Queries, pages: Pages, *, is_windowed: bool) -> str | None:
    if is_windowed:
        return "the kernel knows no sliding window"
    dim = pages.keys.shape[-1]
    if dim % LANES:
        return f"the head dimension {dim} does not fill registers of {LANES}"
    return _refusal_of_table(pages)


def _refusal_of_table(pages: AnyPages) -> str | None:
    """Why the kernels for TPU cannot take a table of pages: they hold that of a part in scalar memory."""
    size = pages.table.size * pages.table.dtype.itemsize // math.prod(pages.positions.shape[:2])
    return f"a table of {size:,} bytes does not fit into scalar memory" if size > SCALAR_BYTES else None


def _refusal_gpu(queries: Queries, pages: Pages, *, is_windowed: bool, interpret: bool = False) -> str | None:
    if is_windowed:
        return "the kernel knows no sliding window"
    if queries.vectors.dtype == jnp.float16:
        return "the kernel keeps sums of values in the dtype of the queries, which float16 may not hold"
    page_size, dim = pages.keys.shape[3:]
    if dim & (dim - 1) or dim < 16:
        return f"the head dimension {dim} is not a power of two from 16 on"
    return f"pages of {page_size} slots are less than 16" if page_size < 16 else None


def _as_sequences(queries: Queries, pages: Pages, multiple: int) -> tuple[Array, Array, Array]:
    """Every row and KV head of a part as a sequence of one KV head: queries [b k, G, D], its pages, its length.

    The kernels read `multiple` pages at a time, and may touch pages beyond the length.
    """
    vectors = einops.rearrange(queries.vectors, "b k g 1 d -> (b k) g d")
    table = einops.rearrange(pages.table, "b k j -> (b k) j")
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % multiple)))
    return vectors, jnp.where(table < len(pages.keys), table, 0), pages.lengths.reshape(-1)


def _as_heads(context: Array, lengths: Array, queries: Queries) -> Array:
    """[b k, G, D] to the shape and dtype of the queries; the kernels leave rows without keys undefined."""
    context = jnp.where((lengths > 0)[:, None, None], context, 0)
    return context.reshape(queries.vectors.shape).astype(queries.vectors.dtype)


def _read_quantised_pages_tpu(
    queries: Queries, pages: QuantisedPages, *, is_windowed: bool, interpret: bool = False
) -> Softmax:
    """`read_quantised_pages` by a Pallas kernel for TPU."""

    def one_part(queries: Queries, pages: QuantisedPages) -> Softmax:
        table = pages.table
        positions = pages.positions[table].reshape(*table.shape[:2], -1) if is_windowed else None
        return read_table(queries, pages.stored, table, pages.lengths, positions, interpret=interpret)

    return _over_parts(one_part, queries, pages)


attend_pages = Dispatched(
    _attend_pages,
    pallas_tpu=Implementation(_attend_pages_tpu, "tpu", _refusal_tpu),
    pallas_gpu=Implementation(_attend_pages_gpu, "cuda", _refusal_gpu),
)

read_quantised_pages = Dispatched(
    _read_pages,
    pallas_tpu=Implementation(
        _read_quantised_pages_tpu,
        "tpu",
        lambda queries, pages, **_: refusal(queries, pages.stored.keys) or _refusal_of_table(pages),
    ),
)


def page_size_within(slots: int, page_size: int) -> int:
    """The largest allowed page of at most `slots` slots, at least the smallest page and at most `page_size`."""
    return max(MIN_PAGE_SIZE, min(page_size, 1 << (slots.bit_length() - 1)))


def check_page_size(page_size: int) -> None:
    """Refuses pages that the kernels cannot take.

    Raises:
      ValueError: not a power of two, or fewer than 8 slots.
    """
    if page_size < MIN_PAGE_SIZE or page_size & (page_size - 1):
        raise ValueError(
            f"page_size={page_size} does not fit the kernels; take a power of two from {MIN_PAGE_SIZE} on, such as 16"
        )
