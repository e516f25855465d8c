"""Matrix products of float32 numbers as sums of two of bfloat16, in as few passes of the matrix unit as that takes."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array


def split(x: Array) -> tuple[Array, ...]:
    """The bfloat16 numbers that `x` is the sum of: itself, or two that keep 17 bits of float32.

    Rounded by integers: a compiler may leave out a conversion to bfloat16 and back.
    """
    if x.dtype == jnp.bfloat16:
        return (x,)
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    high = jax.lax.bitcast_convert_type((bits + jnp.uint32(0x8000)) & jnp.uint32(0xFFFF0000), jnp.float32)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def product(x: Sequence[Array], y: Sequence[Array], over: tuple[int, int] = (1, 0)) -> Array:
    """The float32 product of two matrices that are `split`, without that of both small parts.

    One pass of the matrix unit for bfloat16, where it is exact, two with a float32 matrix, three for float32.

    Args:
      x: parts of a matrix.
      y: parts of another.
      over: the axis of each that is summed over.
    """
    dimensions = ((over[0],), (over[1],)), ((), ())
    multiply = functools.partial(
        jax.lax.dot_general, dimension_numbers=dimensions, precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    terms = [multiply(a, b) for i, a in enumerate(x) for j, b in enumerate(y) if i + j < 2]
    return functools.reduce(jnp.add, reversed(terms))


def split_gram(gram: Array) -> Array:
    """Gram matrices float32 [K, G, D, D] in two parts, bfloat16 [K, 2, G, D, D].

    Behind a barrier, so that what is computed of their sum is of the same numbers that kernels read.
    """
    return jax.lax.optimization_barrier(jnp.stack(split(gram), axis=1))
