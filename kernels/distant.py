"""Reading of distant tokens by one query per row, where layers share the keys."""

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.softmax import Softmax, add_keys

SLOTS_AT_ONCE = 4096
"""Slots of one row and KV head that are read at one time."""


def read_distant(
    state: Softmax,
    queries: Array,
    keys: Array,
    values: Array,
    positions: Array,
    layer: Array,
    blocks: Array,
    lengths: Array,
    wanted: Array,
    query_positions: Array,
    sliding_window: Array | int,
) -> Softmax:
    """Adds the distant tokens of one layer to the softmax of its queries, for those rows and KV heads that want them.

    The pieces of all rows and heads that want theirs stand one after the other and are read in a loop of as many steps,
    so time follows the tokens that are read: neither skipped heads nor empty slots cost anything. Keys and values are
    read where they stand, no layer is copied.

    Args:
      state: [B, K, G, 1] and [B, K, G, 1, D], what has been read so far.
      queries: [B, K, G, 1, D].
      keys: [R, B, N, D] of all blocks.
      values: [L, B, K, N, D] of all layers.
      positions: int32 [R, B, N] of the keys.
      layer: int32 scalar.
      blocks: int32 [K], the block of each KV head in this layer.
      lengths: int32 [B], slots in use.
      wanted: bool [B, K].
      query_positions: int32 [B].
      sliding_window: int32 scalar, in tokens.
    """
    batch, num_kv_heads = queries.shape[:2]
    num_slots, dim = keys.shape[2:]
    size = min(SLOTS_AT_ONCE, num_slots)
    pieces = jnp.where(wanted, -(-lengths // size)[:, None], 0).reshape(-1)
    last = jnp.cumsum(pieces)

    def read(step, state):
        owner = jnp.searchsorted(last, step, side="right").astype(jnp.int32)
        row, head = owner // num_kv_heads, owner % num_kv_heads
        first = (step - (last[owner] - pieces[owner])) * size
        # The last piece of a full store would reach beyond it: it starts earlier and leaves out what was read.
        start = jnp.minimum(first, num_slots - size)
        slots = start + jnp.arange(size)
        block = blocks[head]
        past = query_positions[row] - jax.lax.dynamic_slice(positions, (block, row, start), (1, 1, size))[0, 0]
        seen = (slots >= first) & (slots < lengths[row]) & (past >= 0) & (past < sliding_window)
        pairs = (
            jax.lax.dynamic_slice(keys, (block, row, start, 0), (1, 1, size, dim)),
            jax.lax.dynamic_slice(values, (layer, row, head, start, 0), (1, 1, 1, size, dim))[0],
        )
        before = jax.tree.map(lambda x: x[row, head][None, None], state)
        after = add_keys(before, queries[row, head][None, None], *pairs, seen)
        return jax.tree.map(lambda whole, part: whole.at[row, head].set(part[0, 0]), state, after)

    return jax.lax.fori_loop(0, last[batch * num_kv_heads - 1], read, state)
