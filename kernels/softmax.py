"""A softmax over keys that come in blocks, with a running maximum and normaliser (Milakov & Gimelshein 2018)."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import Queries

HIDDEN = -1e30
"""Logit of a key that is not seen: finite, so that differences of two are never NaN."""

wide_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
"""`einsum` with sums and results in float32."""


class Softmax(NamedTuple):
    """What queries [..., T, D] have read so far, float32.

    `peak` [..., T], the largest logit; `total` [..., T], the sum of `exp(logit - peak)`; `weighted` [..., T, D], the
    sum of the values with these weights.
    """

    peak: Array
    total: Array
    weighted: Array

    def context(self) -> Array:
        """The attention output; zeros where nothing was seen."""
        return self.weighted / jnp.where(self.total > 0, self.total, 1.0)[..., None]

    def normaliser(self) -> Array:
        """The logarithm of the sum of all exponentials; `-HIDDEN` where nothing was seen."""
        return jnp.where(self.total > 0, self.peak + jnp.log(jnp.maximum(self.total, 1e-38)), -HIDDEN)


def empty_softmax(vectors: Array) -> Softmax:
    """Nothing read yet, for queries [..., T, D]."""
    peak = jnp.full(vectors.shape[:-1], HIDDEN, jnp.float32)
    return Softmax(peak, jnp.zeros_like(peak), jnp.zeros(vectors.shape, jnp.float32))


def normalised(normaliser: Array, context: Array) -> Softmax:
    """What was read by a kernel that returns the attention output and the logarithm of the sum of all exponentials.

    Args:
      normaliser: float32 [..., T], `HIDDEN` where nothing was seen.
      context: [..., T, D], zeros there.
    """
    return Softmax(normaliser, (normaliser > HIDDEN).astype(jnp.float32), context.astype(jnp.float32))


def logits_of(queries: Queries, keys: Array) -> Array:
    """Logits of queries [..., G, T, D] and keys [..., N, D], capped as the queries say: float32 [..., G, T, N]."""
    products = wide_einsum("...gtd,...nd->...gtn", queries.vectors, keys)
    return cap_logits(products, queries.soft_cap)


def cap_logits(logits: Array, cap: float | None) -> Array:
    """`cap tanh(logits / cap)`, or the logits without a cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def cap_gradient(queries: Queries, logits: Array) -> Array:
    """The gradient of the products `q k` from that of the logits is this times it: `1 - tanh^2` of the soft cap."""
    cap = queries.soft_cap
    return jnp.ones((), logits.dtype) if cap is None else 1 - (logits / cap) ** 2


def read_keys(queries: Queries, keys: Array, values: Array, seen: Array) -> Softmax:
    """The softmax of one block of keys.

    Args:
      queries: [..., G, T, D].
      keys: [..., N, D].
      values: [..., N, D].
      seen: bool, broadcast to [..., G, T, N].
    """
    peak, weights = weights_of(queries, keys, seen)
    weighted = wide_einsum("...gtn,...nd->...gtd", weights.astype(values.dtype), values)
    return Softmax(peak, weights.sum(-1), weighted)


def weights_of(queries: Queries, keys: Array, seen: Array) -> tuple[Array, Array]:
    """The largest logit, float32 [..., G, T], and `exp(logit - peak)`, [..., G, T, N]; arguments as for `read_keys`."""
    logits = jnp.where(seen, logits_of(queries, keys), HIDDEN)
    peak = logits.max(-1)
    return peak, jnp.where(seen, jnp.exp(logits - peak[..., None]), 0.0)


def join(first: Softmax, second: Softmax) -> Softmax:
    """The softmax over the keys of both."""
    peak = jnp.maximum(first.peak, second.peak)
    (total, weighted), (more_total, more_weighted) = _at(first, peak), _at(second, peak)
    return Softmax(peak, total + more_total, weighted + more_weighted)


def join_by_owner(state: Softmax, parts: Softmax, owner: Array) -> Softmax:
    """Adds blocks to the queries that they are of.

    Args:
      state: of `S` sets of queries, [S, ...].
      parts: of `n` blocks of keys, [n, ...].
      owner: int32 [n], which set each block was read by.
    """
    peak = state.peak.at[owner].max(parts.peak)
    before, new = _at(state, peak), _at(parts, peak[owner])
    return Softmax(peak, *(x.at[owner].add(y) for x, y in zip(before, new, strict=True)))


def _at(state: Softmax, peak: Array) -> tuple[Array, Array]:
    """Total and weighted sum relative to another peak."""
    decay = jnp.exp(state.peak - peak)
    return state.total * decay, state.weighted * decay[..., None]
