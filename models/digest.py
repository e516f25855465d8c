"""A number that tells weights apart, whatever the devices they are on."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.models.tensors import flatten


def checksum(params: Any) -> str:
    """A hash of names, shapes, dtypes and all bits of parameters, 16 hexadecimal digits."""
    flat = flatten(params)
    sums = jax.jit(lambda leaves: jax.tree.map(_sum, leaves))(flat)
    found = [(name, flat[name].shape, str(flat[name].dtype), int(sums[name])) for name in sorted(flat)]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def _sum(leaf: Array) -> Array:
    """uint32 sum of the elements' bits, each mixed with its place (MurmurHash3's finaliser); in any order the same."""
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").reshape(-1).astype(jnp.uint32)
    bits ^= jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)
