"""Attention of one query per row over keys in pages, as many as each KV head holds."""

import einops
import jax
import jax.numpy as jnp
from jax import Array

SLOTS_AT_ONCE = 1024
"""Slots whose keys and values are taken out of their pages at one time."""

MIN_PAGE_SIZE = 8
"""A page is a tile of the TPU's memory, eight rows at least."""

LANES = 128
"""The TPU's kernel copies rows of whole vector registers."""


def paged_attention(
    queries: Array,
    key_pages: Array,
    value_pages: Array,
    page_positions: Array,
    page_table: Array,
    lengths: Array,
    query_positions: Array,
    sliding_window: Array | int,
    *,
    windowed: bool,
) -> Array:
    """Causal softmax attention of one query per row, where each row's KV heads hold different numbers of pairs.

    The used pages of all heads stand one after the other and are read in chunks with a running maximum and normaliser
    per head, so time and temporaries follow the pairs there are, not the longest head.

    Args:
      queries: [B, H, 1, D].
      key_pages: [pages, page_size, D].
      value_pages: [pages, page_size, D].
      page_positions: int32 [pages, page_size], positions of the keys.
      page_table: int32 [B, K, J], the pages of each row and KV head in order; `pages` or more where there is none.
      lengths: int32 [B, K], slots in use.
      query_positions: int32 [B, 1].
      sliding_window: int32 scalar, in tokens.
      windowed: whether `sliding_window` can hide anything; without, all slots in use are seen.

    Returns:
      [B, H, 1, D] in the dtype of `queries`; zeros where a query sees nothing. Softmax in float32.
    """
    batch, num_kv_heads, _ = page_table.shape
    page_size, dim = key_pages.shape[1:]
    heads = batch * num_kv_heads
    grouped = einops.rearrange(queries, "b (k g) 1 d -> (b k) g d", k=num_kv_heads)
    table, lengths = page_table.reshape(heads, -1), lengths.reshape(-1)
    places = jnp.repeat(query_positions[:, 0], num_kv_heads)
    last = jnp.cumsum(-(-lengths // page_size))
    at_once = max(1, min(SLOTS_AT_ONCE // page_size, table.size))

    def attend(step, carry):
        peak, total, context = carry
        order = step * at_once + jnp.arange(at_once)
        owner = jnp.minimum(jnp.searchsorted(last, order, side="right"), heads - 1)
        before = jnp.where(owner > 0, last[owner - 1], 0)
        page = table[owner, jnp.clip(order - before, 0, table.shape[1] - 1)]
        slots = (order - before)[:, None] * page_size + jnp.arange(page_size)
        seen = slots < lengths[owner, None]
        if windowed:
            past = places[owner, None] - page_positions[page]
            seen &= (past >= 0) & (past < sliding_window)
        logits = jnp.einsum("pgd,psd->pgs", grouped[owner], key_pages[page], preferred_element_type=jnp.float32)
        logits = jnp.where(seen[:, None], logits * dim**-0.5, -1e30)
        new_peak = peak.at[owner].max(logits.max(-1))
        weights = jnp.where(seen[:, None], jnp.exp(logits - new_peak[owner, :, None]), 0.0)
        weighted = jnp.einsum(
            "pgs,psd->pgd", weights.astype(value_pages.dtype), value_pages[page], preferred_element_type=jnp.float32
        )
        decay = jnp.exp(peak - new_peak)
        total = (total * decay).at[owner].add(weights.sum(-1))
        return new_peak, total, (context * decay[..., None]).at[owner].add(weighted)

    peak = jnp.full(grouped.shape[:2], -1e30, jnp.float32)
    carry = peak, jnp.zeros_like(peak), jnp.zeros(grouped.shape, jnp.float32)
    _, total, context = jax.lax.fori_loop(0, -(-last[-1] // at_once), attend, carry)
    context = context / jnp.where(total > 0, total, 1.0)[..., None]
    return einops.rearrange(context, "(b k) g d -> b (k g) 1 d", b=batch).astype(queries.dtype)


def paged_attention_tpu(
    queries, key_pages, value_pages, page_positions, page_table, lengths, query_positions, sliding_window, *, windowed
) -> Array:
    """`paged_attention` by JAX's Pallas kernel for TPU, where there is no sliding window and rows fill registers."""
    arrays = queries, key_pages, value_pages, page_positions, page_table, lengths, query_positions, sliding_window
    page_size, dim = key_pages.shape[1:]
    if windowed or dim % LANES:
        return paged_attention(*arrays, windowed=windowed)
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as kernel

    block = max(1, 512 // page_size)
    sequences = _as_sequences(queries, key_pages, page_table, lengths, block)
    scaled, table, lengths = sequences
    context = kernel(scaled, key_pages[None], value_pages[None], lengths, table, pages_per_compute_block=block)
    return _as_heads(context, lengths, queries)


def paged_attention_cuda(
    queries, key_pages, value_pages, page_positions, page_table, lengths, query_positions, sliding_window, *, windowed,
    interpret: bool = False,
) -> Array:  # fmt: skip
    """`paged_attention` by JAX's Pallas kernel for GPU, where there is no sliding window and `D` is a power of two."""
    arrays = queries, key_pages, value_pages, page_positions, page_table, lengths, query_positions, sliding_window
    page_size, dim = key_pages.shape[1:]
    if windowed or dim & (dim - 1) or dim < 16 or page_size < 16:
        return paged_attention(*arrays, windowed=windowed)
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as kernel

    block, splits = max(1, 128 // page_size), 4
    scaled, table, lengths = _as_sequences(queries, key_pages, page_table, lengths, block * splits)
    context = kernel(
        scaled, key_pages[None], value_pages[None], table, lengths,
        pages_per_compute_block=block, k_splits=splits, interpret=interpret,
    )  # fmt: skip
    return _as_heads(context, lengths, queries)


def _as_sequences(queries, key_pages, page_table, lengths, multiple: int) -> tuple[Array, Array, Array]:
    """Every row and KV head as a sequence of one KV head: scaled queries [B K, G, D], its pages, its length.

    The kernels do not scale, read `multiple` pages at a time, and may touch pages beyond the length.
    """
    num_pages, _, dim = key_pages.shape
    num_kv_heads = page_table.shape[1]
    scaled = einops.rearrange(queries * dim**-0.5, "b (k g) 1 d -> (b k) g d", k=num_kv_heads)
    table = einops.rearrange(page_table, "b k j -> (b k) j")
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % multiple)))
    return scaled, jnp.where(table < num_pages, table, 0), lengths.reshape(-1)


def _as_heads(context: Array, lengths: Array, queries: Array) -> Array:
    """[B K, G, D] to the shape and dtype of the queries; the kernels leave rows without keys undefined."""
    context = jnp.where((lengths > 0)[:, None, None], context, 0)
    return einops.rearrange(context, "(b k) g d -> b (k g) 1 d", b=queries.shape[0]).astype(queries.dtype)


def check_page_size(page_size: int) -> None:
    """Refuses pages that the kernels cannot take.

    Raises:
      ValueError: no power of two, or fewer than 8 slots.
    """
    if page_size < MIN_PAGE_SIZE or page_size & (page_size - 1):
        raise ValueError(
            f"page_size={page_size} does not fit the kernels; take a power of two from {MIN_PAGE_SIZE} on, such as 16"
        )
