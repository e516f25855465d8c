"""A softmax over keys that come in blocks, with a running maximum and normaliser (Milakov & Gimelshein 2018)."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

HIDDEN = -1e30
"""Logit of a key that is not seen: finite, so that differences of two are no NaN."""

wide_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
"""`einsum` with sums and results in float32."""


class Softmax(NamedTuple):
    """An online softmax of queries [..., T, D]: maximum and normaliser [..., T], weighted sum of values [..., T, D]."""

    peak: Array
    total: Array
    weighted: Array

    def context(self) -> Array:
        """The attention output, float32; zeros where nothing was seen."""
        return self.weighted / jnp.where(self.total > 0, self.total, 1.0)[..., None]

    def normaliser(self) -> Array:
        """The logarithm of the sum of all exponentials, float32; `-HIDDEN` where nothing was seen."""
        return jnp.where(self.total > 0, self.peak + jnp.log(jnp.maximum(self.total, 1e-38)), -HIDDEN)


def empty_softmax(queries: Array) -> Softmax:
    """Nothing read yet, for queries [..., T, D]."""
    peak = jnp.full(queries.shape[:-1], HIDDEN, jnp.float32)
    return Softmax(peak, jnp.zeros_like(peak), jnp.zeros(queries.shape, jnp.float32))


def add_keys(state: Softmax, queries: Array, keys: Array, values: Array, seen: Array) -> Softmax:
    """Reads a block of keys.

    Args:
      state: what has been read so far.
      queries: [B, K, G, T, D].
      keys: [B, K, n, D].
      values: [B, K, n, D].
      seen: bool, broadcast to [B, K, G, T, n].
    """
    peak, total, weighted = state
    logits = jnp.where(seen, logits_of(queries, keys), HIDDEN)
    new_peak = jnp.maximum(peak, logits.max(-1))
    weights = jnp.where(seen, jnp.exp(logits - new_peak[..., None]), 0.0)
    decay = jnp.exp(peak - new_peak)
    update = wide_einsum("bkgtn,bknd->bkgtd", weights.astype(values.dtype), values)
    return Softmax(new_peak, total * decay + weights.sum(-1), weighted * decay[..., None] + update)


def logits_of(queries: Array, keys: Array) -> Array:
    """Scaled products of queries [B, K, G, T, D] and keys [B, K, n, D]: float32 [B, K, G, T, n]."""
    return wide_einsum("bkgtd,bknd->bkgtn", queries, keys) * queries.shape[-1] ** -0.5
