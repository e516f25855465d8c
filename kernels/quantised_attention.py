"""Attention of one query per row over pairs in 8 or 4 bits, dequantised a tile at a time."""

import einops
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.dispatch import Dispatched, Implementation
from restkv_jax.kernels.one_query import read_layer, refusal
from restkv_jax.kernels.pairs import Pairs, Queries, take_columns, visible
from restkv_jax.kernels.quantised import QuantisedPairs
from restkv_jax.kernels.scores import fold_places
from restkv_jax.kernels.softmax import Softmax, empty_softmax, join, read_keys, weights_of, wide_einsum

SLOTS_AT_ONCE = 1024
"""Slots of every row and KV head that are in full precision at one time."""


def _read_quantised(queries: Queries, stored: QuantisedPairs, layer: Array, positions: Array) -> Softmax:
    """The softmax of one query per row over the quantised pairs of one layer.

    Args:
      queries: [B, K, G, 1, D].
      stored: of all layers, with axes [L, B, K] before its groups, read where they stand.
      layer: int32 scalar.
      positions: int32 [B, K, G * S], -1 where a slot is empty.
    """
    num_groups, group = stored.num_groups, stored.quantisation.group_size
    state = empty_softmax(queries.vectors)
    if not num_groups:
        return state
    size = min(num_groups, max(1, SLOTS_AT_ONCE // group))

    def read(state: Softmax, start: Array, is_new: Array) -> Softmax:
        where = take_columns(positions, start * group, size * group, axis=2)
        seen = visible(queries, where)[:, :, None] & jnp.repeat(is_new, group)
        return join(state, read_codes(queries, stored.tile(layer, start, size), seen))

    return fold_places(read, state, num_groups, size)


read_quantised = Dispatched(
    _read_quantised,
    pallas_tpu=Implementation(read_layer, "tpu", lambda queries, stored, *_: refusal(queries, stored.keys)),
)


def read_codes(queries: Queries, stored: QuantisedPairs, seen: Array) -> Softmax:
    """The softmax of one block of quantised pairs: `read_keys` of the dequantised ones, to rounding.

    The weights are multiplied by the scales of the values, which lie along the same axis, instead of the values: by
    each one's part of the largest, since small products are nothing in float16.
    """
    dtype = queries.vectors.dtype
    peak, weights = weights_of(queries, stored.keys.dequantised(dtype), seen)
    codes, scales = stored.values.by_part(dtype)
    largest = jnp.maximum(scales.max(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)[..., None, None]
    scaled = (weights[..., None, :, :, :] * (scales[..., None, None, :] / largest)).astype(dtype)
    weighted = wide_einsum("...cgtn,...cnd->...cgtd", scaled, codes) * largest
    return Softmax(peak, weights.sum(-1), einops.rearrange(weighted, "... c g t d -> ... g t (c d)"))


def read_pairs(state: Softmax, queries: Queries, pairs: Pairs) -> Softmax:
    """Adds pairs in full precision to the softmax of the queries, all at once."""
    seen = visible(queries, pairs.positions)[:, :, None]
    return join(state, read_keys(queries, pairs.keys, pairs.values, seen))
