"""Pairs in 8 or 4 bits: keys per channel in groups of tokens, values per token (KIVI, arXiv 2402.02750).

With the largest magnitude `m` of a group and the largest code `c`, 127, 7 or 448: `scale = m / c` and
`code = round(x / scale)`, so that an integer code is at most half a scale away. Scales are bfloat16, of the range of
float32: where float16's would overflow, they do not.
"""

import dataclasses
import re
from typing import Any, Self, TypeVar

import einops
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

LARGEST_CODES = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}
"""By the names of the types that pairs are stored in."""

N = TypeVar("N", Array, int)


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
        if self.group_size % self.in_word:
            raise ValueError(
                f"group_size={self.group_size} does not fill words of {self.in_word} codes of {self.dtype}; choose a "
                f"multiple of {self.in_word}, such as {-(-self.group_size // self.in_word) * self.in_word}"
            )

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4 if self.dtype == "int4" else 8

    @property
    def in_word(self) -> int:
        """Codes of a word, `P`."""
        return 32 // self.bits

    def num_grouped(self, length: N) -> N:
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
        """Refuses a head dimension whose channels groups do not divide."""
        if dim % self.channels(dim):
            fits = ", ".join(str(x) for x in range(2, dim + 1) if dim % x == 0 and x >= 8) or str(dim)
            raise ValueError(
                f"group_size={self.group_size} does not divide the head dimension {dim}, whose channels it groups; "
                f"choose from {fits}, or more"
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


class QuantisedKeys(flax.struct.PyTreeNode):
    """Keys of `G` groups of `S` tokens, a scale per group and channel, with axes `...` before.

    `codes` uint32 [..., G, S / P, D], those of `P` tokens in a word; `scales` bfloat16 [..., G, D]; `quantisation`
    static.
    """

    codes: Array
    scales: Array
    quantisation: Quantisation = flax.struct.field(pytree_node=False)

    def dequantised(self, dtype: Any) -> Array:
        """[..., G * S, D]."""
        return einops.rearrange(self._wide(), "... g s d -> ... (g s) d").astype(dtype)

    def put(self, member: Array, key: Array) -> Self:
        """Puts one key [..., D] into each group, `G` among the axes before, at its place int32 [...].

        A channel's scale grows where the key exceeds it, and the other codes follow.
        """
        q, key = self.quantisation, key[..., None, :].astype(jnp.float32)
        scales = jnp.maximum(self.scales[..., None, :], scales_of(key, -2, q))
        is_member = (jnp.arange(q.group_size) == member[..., None])[..., None]
        keys = jnp.where(is_member, key, self._wide())
        return self.replace(codes=pack(encode(keys, scales, q), q), scales=scales[..., 0, :])

    def _wide(self) -> Array:
        return decode(self.codes, self.quantisation) * self.scales[..., None, :].astype(jnp.float32)


class QuantisedValues(flax.struct.PyTreeNode):
    """Values of `G` groups of `S` tokens, a scale per token and each of `C` parts of the channels.

    `codes` as those of `QuantisedKeys`; `scales` bfloat16 [..., G, C * S], one axis since a TPU stores the last one in
    steps of 128; `quantisation` static.
    """

    codes: Array
    scales: Array
    quantisation: Quantisation = flax.struct.field(pytree_node=False)

    def dequantised(self, dtype: Any) -> Array:
        """[..., G * S, D]."""
        scales = jnp.swapaxes(self._scales_by_part(), -1, -2).astype(jnp.float32)
        by_part = einops.rearrange(
            decode(self.codes, self.quantisation), "... g s (c d) -> ... g s c d", c=scales.shape[-1]
        )
        return einops.rearrange(by_part * scales[..., None], "... g s c d -> ... (g s) (c d)").astype(dtype)

    def put(self, member: Array, value: Array) -> Self:
        """Puts one value [..., D] into each group, `G` among the axes before, at its place int32 [...]."""
        q = self.quantisation
        codes, scales = _encode_values(value[..., None, :], q)
        is_member = jnp.arange(q.group_size) == member[..., None]
        codes = jnp.where(is_member[..., None], codes.astype(jnp.float32), decode(self.codes, q)).astype(codes.dtype)
        scales = jnp.where(is_member[..., None, :], scales, self._scales_by_part())
        return self.replace(codes=pack(codes, q), scales=einops.rearrange(scales, "... c s -> ... (c s)"))

    def by_part(self, dtype: Any) -> tuple[Array, Array]:
        """Codes [..., C, G * S, D / C], exact in bfloat16, and their scales, float32 [..., C, G * S]."""
        scales = jnp.moveaxis(self._scales_by_part(), -3, -2).astype(jnp.float32)
        # in two steps: in one a TPU turns the codes, which takes it as long as all the rest of a decoding step
        codes = einops.rearrange(decode(self.codes, self.quantisation), "... g s d -> ... (g s) d").astype(dtype)
        codes = einops.rearrange(codes, "... n (c d) -> ... c n d", c=scales.shape[-3])
        return codes, einops.rearrange(scales, "... c g s -> ... c (g s)")

    def _scales_by_part(self) -> Array:
        """[..., G, C, S]."""
        return einops.rearrange(self.scales, "... (c s) -> ... c s", s=self.quantisation.group_size)


class QuantisedPairs(flax.struct.PyTreeNode):
    """Keys and values of the same groups."""

    keys: QuantisedKeys
    values: QuantisedValues

    @property
    def quantisation(self) -> Quantisation:
        return self.keys.quantisation

    @property
    def num_groups(self) -> int:
        """`G`."""
        return self.keys.codes.shape[-3]

    def dequantised(self, dtype: Any) -> tuple[Array, Array]:
        """Keys and values, [..., G * S, D]."""
        return self.keys.dequantised(dtype), self.values.dequantised(dtype)

    def put(self, member: Array, key: Array, value: Array) -> Self:
        """Puts one pair into each group; see `QuantisedKeys.put`."""
        return self.replace(keys=self.keys.put(member, key), values=self.values.put(member, value))

    def tile(self, layer: Array, start: Array, size: int) -> Self:
        """`size` groups of one layer from `start` on, of axes [L, B, K, G, ...]."""

        def take(x: Array) -> Array:
            sizes = (1, *x.shape[1:3], size, *x.shape[4:])
            return jax.lax.dynamic_slice(x, (layer, 0, 0, start, *[0] * (x.ndim - 4)), sizes)[0]

        return jax.tree.map(take, self)


def quantise(keys: Array, values: Array, quantisation: Quantisation) -> QuantisedPairs:
    """Keys and values [..., G * S, D] as codes and scales."""
    return QuantisedPairs(quantise_keys(keys, quantisation), quantise_values(values, quantisation))


def quantise_keys(keys: Array, quantisation: Quantisation) -> QuantisedKeys:
    """Keys [..., G * S, D] as codes and scales."""
    q = quantisation
    keys = einops.rearrange(keys.astype(jnp.float32), "... (g s) d -> ... g s d", s=q.group_size)
    scales = scales_of(keys, -2, q)
    return QuantisedKeys(pack(encode(keys, scales, q), q), scales[..., 0, :], q)


def quantise_values(values: Array, quantisation: Quantisation) -> QuantisedValues:
    """Values [..., G * S, D] as codes and scales."""
    values = einops.rearrange(values, "... (g s) d -> ... g s d", s=quantisation.group_size)
    codes, scales = _encode_values(values, quantisation)
    scales = einops.rearrange(scales, "... c s -> ... (c s)")
    return QuantisedValues(pack(codes, quantisation), scales, quantisation)


def _encode_values(values: Array, quantisation: Quantisation) -> tuple[Array, Array]:
    """Codes of values [..., S, D], and scales [..., C, S]."""
    q, dim = quantisation, values.shape[-1]
    by_channels = einops.rearrange(values.astype(jnp.float32), "... (c d) -> ... c d", d=q.channels(dim))
    scales = scales_of(by_channels, -1, q)
    return einops.rearrange(encode(by_channels, scales, q), "... c d -> ... (c d)"), jnp.swapaxes(
        scales[..., 0], -1, -2
    )


def empty_keys(shape: tuple[int, ...], quantisation: Quantisation) -> QuantisedKeys:
    """Zeros for keys of a shape [..., G * S, D]."""
    *before, length, dim = shape
    groups = (*before, length // quantisation.group_size)
    return QuantisedKeys(_empty_codes(groups, dim, quantisation), jnp.zeros((*groups, dim), jnp.bfloat16), quantisation)


def empty_values(shape: tuple[int, ...], quantisation: Quantisation) -> QuantisedValues:
    """Zeros for values of a shape [..., G * S, D]."""
    *before, length, dim = shape
    size = quantisation.group_size
    groups = (*before, length // size)
    scales = jnp.zeros((*groups, dim // quantisation.channels(dim) * size), jnp.bfloat16)
    return QuantisedValues(_empty_codes(groups, dim, quantisation), scales, quantisation)


def empty_pairs(shape: tuple[int, ...], quantisation: Quantisation) -> QuantisedPairs:
    """Zeros for keys and values of a shape [..., G * S, D]."""
    return QuantisedPairs(empty_keys(shape, quantisation), empty_values(shape, quantisation))


def _empty_codes(groups: tuple[int, ...], dim: int, quantisation: Quantisation) -> Array:
    return jnp.zeros((*groups, quantisation.group_size // quantisation.in_word, dim), jnp.uint32)


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
    """Codes [..., S, D] in words, uint32 [..., S / P, D]: token `i` is part `i // (S / P)` of word `i % (S / P)`.

    Words rather than bytes: a TPU lays them out in whole tiles, and a CPU has vectors of them.
    """
    bits, parts = quantisation.bits, einops.rearrange(codes, "... (p n) d -> ... p n d", p=quantisation.in_word)
    if codes.dtype == jnp.float8_e4m3fn:
        parts = jax.lax.bitcast_convert_type(parts, jnp.uint8)
    shifts = bits * jnp.arange(quantisation.in_word, dtype=jnp.uint32)[:, None, None]
    return ((parts.astype(jnp.uint32) & (2**bits - 1)) << shifts).sum(-3, dtype=jnp.uint32)


def decode(words: Array, quantisation: Quantisation) -> Array:
    """The codes in words uint32 [..., S / P, D], as float32 numbers [..., S, D]."""
    bits, steps = quantisation.bits, jnp.arange(quantisation.in_word, dtype=jnp.uint32)[:, None, None]
    if quantisation.dtype == "float8_e4m3fn":
        parts = (words[..., None, :, :] >> (bits * steps)).astype(jnp.uint8)
        parts = jax.lax.bitcast_convert_type(parts, jnp.float8_e4m3fn)
        return einops.rearrange(parts.astype(jnp.float32), "... p n d -> ... (p n) d")
    # to the top of the word and back down, so that the sign follows
    signed = (words[..., None, :, :] << (32 - bits * (steps + 1))).astype(jnp.int32) >> (32 - bits)
    return einops.rearrange(signed.astype(jnp.float32), "... p n d -> ... (p n) d")
