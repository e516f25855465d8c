"""Reading of distant tokens by one query per row, where layers share the keys."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.dispatch import Dispatched, Implementation
from restkv_jax.kernels.one_query import read_blocks, refusal
from restkv_jax.kernels.pairs import Pairs, Queries, visible
from restkv_jax.kernels.partition import Parts, divide, each_part, undivide
from restkv_jax.kernels.quantised import QuantisedKeys, QuantisedValues
from restkv_jax.kernels.softmax import Softmax, join, read_keys

SLOTS_AT_ONCE = 4096
"""Slots of one row and KV head that are read at one time."""


def _read_distant(
    state: Softmax,
    queries: Queries,
    keys: Array | QuantisedKeys,
    values: Array | QuantisedValues,
    positions: Array,
    layer: Array,
    blocks: Array,
    lengths: Array,
    is_read: Array,
) -> Softmax:
    """Adds the distant tokens of one layer to the softmax of its queries, for those rows and KV heads that read them.

    The pieces of all rows and heads of a part that read theirs stand one after the other and are read in a loop of as
    many steps, so time follows the tokens that are read: neither skipped heads nor empty slots cost anything. Keys and
    values are read where they stand, no layer is copied.

    Args:
      state: of [B, K, G, 1] queries, what has been read so far.
      queries: one per row.
      keys: [A, M, b, R, N, D] of all blocks, in `A x M` parts as `partition` says, `b` rows in each.
      values: [L, B, K, N, D] of all layers; quantised ones are dequantised piece by piece.
      positions: int32 [A, M, b, R, N] of the keys.
      layer: int32 scalar.
      blocks: int32 [K], the block of each KV head in this layer, numbered within its part.
      lengths: int32 [B], slots in use.
      is_read: bool [B, K].
    """
    arrays = state, queries, keys, values, positions, layer, blocks, lengths, is_read
    return _over_parts(_read_part, *arrays)


def _over_parts(
    read: Callable[..., Softmax], state, queries, keys, values, positions, layer, blocks, lengths, is_read
) -> Softmax:
    """Applies a function of one part, as `_read_part`, to all parts."""
    batch, num_kv_heads = is_read.shape
    parts = Parts(*positions.shape[:2])

    def of_heads(x: Array) -> Array:
        return divide(jnp.broadcast_to(x, (batch, num_kv_heads)), parts)

    divided = (
        jax.tree.map(lambda x: divide(x, parts), state),
        divide(queries.vectors, parts),
        (keys, jax.tree.map(lambda x: divide(x, parts, "l"), values), positions),
        of_heads(blocks),
        of_heads(jnp.where(is_read, lengths[:, None], 0)),
        of_heads(queries.positions),
    )
    return jax.tree.map(undivide, each_part(functools.partial(read, layer=layer, like=queries), *divided))


def _read_part(state, vectors, stores, blocks, lengths, positions, *, layer, like: Queries) -> Softmax:
    """`read_distant` of one part's rows and KV heads: `blocks`, `lengths` and `positions` int32 [b, k].

    Window and soft cap are those of the queries `like`.
    """
    num_kv_heads = blocks.shape[1]
    keys, values, held = stores
    num_slots, group = held.shape[-1], 1 if isinstance(keys, Array) else keys.quantisation.group_size
    size = min(max(SLOTS_AT_ONCE // group, 1) * group, num_slots)
    pieces = -(-lengths // size).reshape(-1)
    last = jnp.cumsum(pieces)

    def read(step, state):
        owner = jnp.searchsorted(last, step, side="right").astype(jnp.int32)
        row, head = owner // num_kv_heads, owner % num_kv_heads
        block, length = blocks[row, head], lengths[row, head]
        first = (step - (last[owner] - pieces[owner])) * size
        # The last piece of a full store would reach beyond it: it starts earlier and leaves out what was read.
        start = jnp.minimum(first, num_slots - size)
        slots = start + jnp.arange(size)
        piece = Pairs(
            _piece(keys, (row, block), start, size, vectors.dtype),
            _piece(values, (layer, row, head), start, size, vectors.dtype)[0],
            jax.lax.dynamic_slice(held, (row, block, start), (1, 1, size)),
        )
        one = like.replace(vectors=vectors[row, head][None, None], positions=positions[row, head][None, None])
        seen = visible(one, piece.positions) & (slots >= first) & (slots < length)
        before = jax.tree.map(lambda x: x[row, head][None, None], state)
        after = join(before, read_keys(one, piece.keys, piece.values, seen[:, :, None]))
        return jax.tree.map(lambda whole, part: whole.at[row, head].set(part[0, 0]), state, after)

    return jax.lax.fori_loop(0, last[-1], read, state)


def _piece(store: Any, index: tuple[Array, ...], start: Array, size: int, dtype: Any) -> Array:
    """`size` slots of an entry of [..., N, D], the axes before as they are, of length one."""
    group = 1 if isinstance(store, Array) else store.quantisation.group_size

    def take(x: Array) -> Array:
        rest = x.shape[len(index) + 1 :]
        starts = *index, start // group, *[0] * len(rest)
        return jax.lax.dynamic_slice(x, starts, (*[1] * len(index), size // group, *rest))

    taken = jax.tree.map(take, store)
    return taken if isinstance(taken, Array) else taken.dequantised(dtype)


def _read_distant_tpu(*arrays: Any, interpret: bool = False) -> Softmax:
    """`read_distant` by a Pallas kernel for TPU."""

    def read(state, vectors, stores, blocks, lengths, positions, *, layer, like: Queries) -> Softmax:
        keys, values, held = stores
        own = like.replace(vectors=vectors, positions=positions)
        return join(state, read_blocks(own, keys, values, held, layer, blocks, lengths, interpret=interpret))

    return _over_parts(read, *arrays)


read_distant = Dispatched(
    _read_distant,
    pallas_tpu=Implementation(_read_distant_tpu, "tpu", lambda state, queries, keys, *_: refusal(queries, keys)),
)
