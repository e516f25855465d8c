"""Pairs in 8 or 4 bits: keys per channel in groups of tokens, values per token (KIVI, arXiv 2402.02750).

With the largest magnitude `m` of a group and the largest code `c`, 127, 7 or 448: `scale = m / c` and
`code = round(x / scale)`, so that an integer code is at most half a scale away. Scales are bfloat16, of the range of
float32: where float16's would overflow, they do not.
"""

import dataclasses
import re
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from restkv_jax.kernels.pairs import Pairs, Queries, take_columns, visible
from restkv_jax.kernels.scores import fold_places
from restkv_jax.kernels.softmax import Softmax, join, read_keys

LARGEST_CODES = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}
"""By the names of the types that pairs are stored in."""

SLOTS_AT_ONCE = 1024
"""Slots of every row and KV head that are in full precision at one time."""


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """How a cache stores pairs, static under `jax.jit`.

    Attributes:
      dtype: of the codes, "int8", "int4" or "float8_e4m3fn".
      group_size: tokens whose keys share a scale per channel, and channels of a token's value that share one; at most
        the head's dimension.
      residual: the newest tokens, which stay in full precision; up to `group_size - 1` more wait with them until their
        group is whole.
    """

    dtype: str
    group_size: int = 64
    residual: int = 32

    def __post_init__(self):
        if self.dtype not in LARGEST_CODES:
            choices = ", ".join(map(repr, LARGEST_CODES))
            raise ValueError(f"cache_dtype={self.dtype!r} is unknown; choose from {choices}, or None for the model's")
        for name, least in (("group_size", 2), ("residual", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} must be an integer")
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")

    def num_grouped(self, length: Array | int) -> Array | int:
        """How many of `length` tokens are in whole groups; the others stay in full precision."""
        over = length - self.residual
        return over * (over > 0) // self.group_size * self.group_size

    def num_recent(self, slots: int) -> int:
        """Most tokens in full precision of a cache of `slots`."""
        return min(self.residual + self.group_size - 1, slots)

    def channels(self, dim: int) -> int:
        """Channels of a value that share a scale."""
        return min(self.group_size, dim)

    def check_dim(self, dim: int) -> None:
        """Refuses a head dimension that groups and bytes do not divide."""
        if dim % self.channels(dim):
            fits = ", ".join(str(x) for x in range(2, dim + 1) if dim % x == 0 and x >= 8) or str(dim)
            raise ValueError(
                f"group_size={self.group_size} does not divide the head dimension {dim}, whose channels it groups; "
                f"choose from {fits}, or more"
            )
        if self.dtype == "int4" and dim % 2:
            raise ValueError(
                f"cache_dtype='int4' puts two channels into a byte, but the head dimension is {dim}; take 'int8'"
            )


def parse_quantisation(text: str) -> Quantisation:
    """A quantisation as it is written: "int8", or with options "int8(group_size=32, residual=16)".

    Raises:
      ValueError: an unknown dtype or option, or a value that is not a number.
    """
    found = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
    if found is None:
        raise ValueError(f"cache_dtype={text!r} is not written as int8 or int8(group_size=32, residual=16)")
    options = {}
    for option in re.split("[,;]", found[2] or ""):  # the harness's own arguments have commas between them
        name, _, value = (part.strip() for part in option.partition("="))
        if not name:
            continue
        if name not in ("group_size", "residual") or not value.isdecimal():
            raise ValueError(f"cache_dtype={text!r}: {option.strip()!r} is not group_size=N or residual=N")
        options[name] = int(value)
    return Quantisation(found[1], **options)


class QuantisedPairs(flax.struct.PyTreeNode):
    """Codes and scales of pairs: of `G` groups of `S` tokens, with axes `...` before.

    `keys`, `values` [..., G, S, D] int8, the bits of float8 as uint8, or two int4 in a uint8 [..., G, S, D / 2];
    `key_scales` bfloat16 [..., G, D]; `value_scales` bfloat16 [..., G, C, S], of `C` parts of the channels, the tokens
    last since a TPU stores the last axis in steps of 128; `quantisation` static.
    """

    keys: Array
    key_scales: Array
    values: Array
    value_scales: Array
    quantisation: Quantisation = flax.struct.field(pytree_node=False)

    def dequantised(self, dtype: Any) -> tuple[Array, Array]:
        """Keys and values, [..., G * S, D]."""
        keys, values = (decode(x, self.quantisation) for x in (self.keys, self.values))
        keys = keys * self.key_scales[..., None, :].astype(jnp.float32)
        by_channels = split(values, self.value_scales.shape[-2], -1)
        value_scales = jnp.swapaxes(self.value_scales, -1, -2)[..., None].astype(jnp.float32)
        values = merge(by_channels * value_scales, -1)
        return merge(keys, -2).astype(dtype), merge(values, -2).astype(dtype)

    def tile(self, layer: Array, start: Array, size: int) -> "QuantisedPairs":
        """`size` groups of one layer from `start` on, of axes [L, B, K, G, ...]."""

        def take(x: Array) -> Array:
            sizes = (1, *x.shape[1:3], size, *x.shape[4:])
            return jax.lax.dynamic_slice(x, (layer, 0, 0, start, *[0] * (x.ndim - 4)), sizes)[0]

        return jax.tree.map(take, self)


def quantise(keys: Array, values: Array, quantisation: Quantisation) -> QuantisedPairs:
    """Keys and values [..., G * S, D] as codes and scales."""
    q, (*_, length, dim) = quantisation, keys.shape
    keys, values = (split(x.astype(jnp.float32), length // q.group_size, -2) for x in (keys, values))
    by_channels = split(values, dim // q.channels(dim), -1)
    key_scales, value_scales = scales_of(keys, -2, q), scales_of(by_channels, -1, q)
    return QuantisedPairs(
        keys=pack(encode(keys, key_scales, q), q),
        key_scales=key_scales[..., 0, :],
        values=pack(merge(encode(by_channels, value_scales, q), -1), q),
        value_scales=jnp.swapaxes(value_scales[..., 0], -1, -2),
        quantisation=q,
    )


def put_into_group(group: QuantisedPairs, member: Array, key: Array, value: Array) -> QuantisedPairs:
    """Puts one pair into each group; a channel's scale grows where the key exceeds it, and other codes follow it.

    Args:
      group: [..., S, D].
      member: int32 [...], its place.
      key: [..., D].
      value: [..., D].
    """
    q, dim, key = group.quantisation, key.shape[-1], key[..., None, :].astype(jnp.float32)
    scales = jnp.maximum(group.key_scales[..., None, :], scales_of(key, -2, q))
    is_member = (jnp.arange(q.group_size) == member[..., None])[..., None]
    keys = decode(group.keys, q) * group.key_scales[..., None, :].astype(jnp.float32)
    by_channels = split(value[..., None, :].astype(jnp.float32), dim // q.channels(dim), -1)
    value_scales = scales_of(by_channels, -1, q)
    codes = pack(merge(encode(by_channels, value_scales, q), -1), q)
    return group.replace(
        keys=pack(encode(jnp.where(is_member, key, keys), scales, q), q),
        key_scales=scales[..., 0, :],
        values=jnp.where(is_member, codes, group.values),
        value_scales=jnp.where(is_member[..., 0][..., None, :], value_scales[..., 0, :, :], group.value_scales),
    )


def empty_pairs(shape: tuple[int, ...], quantisation: Quantisation) -> QuantisedPairs:
    """Zeros for keys and values of a shape [..., G * S, D]."""
    *before, length, dim = shape
    groups = (*before, length // quantisation.group_size)
    packed = dim // 2 if quantisation.dtype == "int4" else dim
    codes = jnp.zeros((*groups, quantisation.group_size, packed), code_dtype(quantisation))
    return QuantisedPairs(
        keys=codes,
        key_scales=jnp.zeros((*groups, dim), jnp.bfloat16),
        values=codes,
        value_scales=jnp.zeros((*groups, dim // quantisation.channels(dim), quantisation.group_size), jnp.bfloat16),
        quantisation=quantisation,
    )


def code_dtype(quantisation: Quantisation) -> jnp.dtype:
    """Of the arrays that hold codes: uint8 but for int8.

    `jnp.int4` takes a whole byte on a CPU, and writing into arrays of float8 converts all of them there.
    """
    return jnp.dtype("int8" if quantisation.dtype == "int8" else "uint8")


def split(x: Array, count: int, axis: int) -> Array:
    """Cuts an axis into `count` parts: [..., N, D] to [..., count, N / count, D] or its like."""
    axis %= x.ndim
    return x.reshape(*x.shape[:axis], count, x.shape[axis] // max(count, 1), *x.shape[axis + 1 :])


def merge(x: Array, axis: int) -> Array:
    """The reverse of `split`; `axis` is that of the members."""
    axis %= x.ndim
    return x.reshape(*x.shape[: axis - 1], x.shape[axis - 1] * x.shape[axis], *x.shape[axis + 1 :])


def scales_of(x: Array, axis: int, quantisation: Quantisation) -> Array:
    """The scale of every group along an axis of float32 numbers, bfloat16, the axis kept."""
    largest = jnp.abs(x).max(axis, keepdims=True, initial=0)
    # a product, not a quotient: a compiler may turn a quotient into it, which rounds differently
    exact = largest * np.float32(1 / LARGEST_CODES[quantisation.dtype])
    return jnp.minimum(exact, largest_scale(quantisation.dtype)).astype(jnp.bfloat16)


def largest_scale(dtype: str) -> float:
    """The largest bfloat16 whose product with every code is finite in float32."""
    exact = np.finfo(np.float32).max / np.float32(LARGEST_CODES[dtype])
    return float((exact.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))


def encode(x: Array, scales: Array, quantisation: Quantisation) -> Array:
    """Codes of float32 numbers, int8 or float8; 0 where the scale is below float32's normal numbers."""
    largest, scales = LARGEST_CODES[quantisation.dtype], scales.astype(jnp.float32)
    is_normal = scales >= np.finfo(np.float32).tiny
    quotients = jnp.where(is_normal, x / jnp.where(is_normal, scales, 1), 0)
    if quantisation.dtype == "float8_e4m3fn":
        return jnp.clip(quotients, -largest, largest).astype(jnp.float8_e4m3fn)
    return jnp.clip(jnp.round(quotients), -largest, largest).astype(jnp.int8)


def pack(codes: Array, quantisation: Quantisation) -> Array:
    """Codes [..., D] as they are stored; of int4 channel `i` in the low half of byte `i`, `i + D / 2` above it."""
    if quantisation.dtype != "int4":
        return jax.lax.bitcast_convert_type(codes, code_dtype(quantisation))
    low, high = jnp.split(codes.astype(jnp.uint8), 2, axis=-1)
    return (low & 15) | (high << 4)


def decode(codes: Array, quantisation: Quantisation) -> Array:
    """Codes as they are stored, as float32 numbers [..., D]."""
    if quantisation.dtype != "int4":
        return jax.lax.bitcast_convert_type(codes, jnp.dtype(quantisation.dtype)).astype(jnp.float32)
    # both halves by one shift of 32 bits: a CPU has vectors of these, and needs none for a concatenation
    halves = (codes.astype(jnp.int32)[..., None, :] << jnp.array([28, 24])[:, None]) >> 28
    return merge(halves, -1).astype(jnp.float32)


def read_quantised(state: Softmax, queries: Queries, stored: QuantisedPairs, layer: Array, positions: Array) -> Softmax:
    """Adds the quantised pairs of one layer to the softmax of its queries, dequantised tile by tile.

    Args:
      state: of [B, K, G, T] queries, what has been read so far.
      queries: [B, K, G, T, D].
      stored: [L, B, K, G, S, D] of all layers, read where they stand.
      layer: int32 scalar.
      positions: int32 [B, K, G * S], -1 where a slot is empty.
    """
    num_groups, group = stored.keys.shape[3:5]
    if not num_groups:
        return state
    size = min(num_groups, max(1, SLOTS_AT_ONCE // group))

    def read(state: Softmax, start: Array, is_new: Array) -> Softmax:
        keys, values = stored.tile(layer, start, size).dequantised(queries.vectors.dtype)
        where = take_columns(positions, start * group, size * group, axis=2)
        seen = visible(queries, where)[:, :, None] & jnp.repeat(is_new, group)
        return join(state, read_keys(queries, keys, values, seen))

    return fold_places(read, state, num_groups, size)


def read_pairs(state: Softmax, queries: Queries, pairs: Pairs) -> Softmax:
    """Adds pairs in full precision to the softmax of the queries, all at once."""
    seen = visible(queries, pairs.positions)[:, :, None]
    return join(state, read_keys(queries, pairs.keys, pairs.values, seen))
