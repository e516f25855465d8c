"""Attention of some queries over keys that carry their own positions."""

import functools

import einops
import jax
import jax.numpy as jnp
from jax import Array

BLOCK = 512
"""Keys whose probabilities exist at one time."""


def attention(
    queries: Array,
    keys: Array,
    values: Array,
    query_positions: Array,
    key_positions: Array,
    sliding_window: Array | int,
) -> Array:
    """Causal softmax attention where order is given by positions, not by places in the arrays.

    A key at position `p` is seen by a query at `q` if `0 <= p <= q < p + sliding_window`. Keys are read in blocks
    with a running maximum and normaliser (online softmax), and blocks that no query sees are skipped, so temporaries
    stay at `B * H * T * BLOCK`. A single query reads all keys at once. Differentiable; the backward pass recomputes
    a block's probabilities.

    Args:
      queries: [B, H, T, D].
      keys: [B, K, N, D] with `H` a multiple of `K`.
      values: [B, K, N, D].
      query_positions: int32 [B, T].
      key_positions: int32 [B, N], or [B, K, N] where heads hold different keys; -1 marks an empty place.
      sliding_window: int32 scalar, in tokens.

    Returns:
      [B, H, T, D] in the dtype of `queries`; zeros where a query sees nothing. Softmax in float32.
    """
    num_kv_heads, num_keys = keys.shape[1], keys.shape[2]
    grouped = einops.rearrange(queries, "b (k g) t d -> b k g t d", k=num_kv_heads)
    if key_positions.ndim == 2:
        key_positions = key_positions[:, None, :]
    block = num_keys if queries.shape[2] == 1 else largest_divisor(num_keys, BLOCK)
    if block < min(num_keys, BLOCK // 4):
        keys, values, key_positions = _pad_keys(keys, values, key_positions, -num_keys % BLOCK)
        num_keys, block = keys.shape[2], BLOCK
    visible = functools.partial(_visible, query_positions=query_positions, sliding_window=sliding_window)

    def attend(carry, start):
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block, axis=2)
        mask = visible(part(key_positions))
        step = functools.partial(_online_softmax_step, grouped)
        return jax.lax.cond(
            mask.any(), lambda: step(carry, part(keys), part(values), mask[:, :, None]), lambda: carry
        ), None

    peak = jnp.full(grouped.shape[:-1], -1e30, jnp.float32)
    carry = peak, jnp.zeros_like(peak), jnp.zeros(grouped.shape, jnp.float32)
    if block == num_keys:
        mask = visible(key_positions)[:, :, None]
        _, total, context = _online_softmax_step(grouped, carry, keys, values, mask)
    else:
        (_, total, context), _ = jax.lax.scan(jax.checkpoint(attend), carry, jnp.arange(0, num_keys, block))
    context = context / jnp.where(total > 0, total, 1.0)[..., None]
    return einops.rearrange(context, "b k g t d -> b (k g) t d").astype(queries.dtype)


def _pad_keys(keys: Array, values: Array, key_positions: Array, count: int) -> tuple[Array, Array, Array]:
    """Adds keys that nobody sees, for lengths that few blocks divide."""
    wide = ((0, 0), (0, 0), (0, count))
    padded = (jnp.pad(x, (*wide, (0, 0))) for x in (keys, values))
    return *padded, jnp.pad(key_positions, wide, constant_values=-1)


def _visible(key_positions: Array, query_positions: Array, sliding_window: Array | int) -> Array:
    """bool [B, K or 1, T, N]."""
    past = query_positions[:, None, :, None] - key_positions[:, :, None, :]
    return (past >= 0) & (past < sliding_window) & (key_positions >= 0)[:, :, None, :]


def _online_softmax_step(queries, carry, keys, values, mask):
    """One block of keys: `queries` [B, K, G, T, D], `keys` and `values` [B, K, n, D], `mask` [B, K or 1, 1, T, n]."""
    peak, total, context = carry
    logits = jnp.einsum("bkgtd,bknd->bkgtn", queries, keys, preferred_element_type=jnp.float32)
    logits = jnp.where(mask, logits * queries.shape[-1] ** -0.5, -1e30)
    new_peak = jnp.maximum(peak, logits.max(-1))
    weights = jnp.where(mask, jnp.exp(logits - new_peak[..., None]), 0.0)
    decay = jnp.exp(peak - new_peak)
    update = jnp.einsum("bkgtn,bknd->bkgtd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return new_peak, total * decay + weights.sum(-1), context * decay[..., None] + update


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)
