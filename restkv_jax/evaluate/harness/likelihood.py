"""Log-probabilities of given tokens, after an evicted context or under plain attention."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.decoding import run_from
from restkv_jax.generation.reading import CHUNK_SIZE, prefill
from restkv_jax.generation.sampling import Forced, TokenScores, score_tokens
from restkv_jax.kernels.pairs import largest_divisor
from restkv_jax.models.decoder import Decoder, logits, read
from restkv_jax.models.mesh import beside

SCORED_AT_ONCE = 128
"""Positions whose logits over the whole vocabulary exist at one time."""


def score_continuation(
    model: Decoder,
    params: Any,
    tokens: Array,
    mask: Array,
    continuation: Array,
    policy: EvictionPolicy,
    cache_dtype: str | None = None,
) -> TokenScores:
    """Scores continuations fed token by token to the cache that the policy leaves of their contexts.

    Args:
      model: a `Decoder`.
      params: its parameters.
      tokens: the contexts, int32 [B, T], padded on the left.
      mask: bool [B, T], False on padding.
      continuation: int32 [B, C], padded on the right; the scores of padding mean nothing.
      policy: what to keep of the contexts.
      cache_dtype: what keys and values are stored in; see `prefill`.

    Returns:
      `TokenScores` [B, C].
    """
    continuation = jnp.asarray(continuation, jnp.int32)
    max_new_tokens = max(1, continuation.shape[1] - 1)
    logits, cache = prefill(model, params, tokens, mask, policy, max_new_tokens, cache_dtype=cache_dtype)
    with beside(params) as params:
        return run_from(model, params, logits, cache, Forced(continuation), continuation.shape[1]).notes


def score_text(model: Decoder, params: Any, tokens: Array, mask: Array, targets: Array) -> TokenScores:
    """Scores the token after each position under the model's own attention; nothing is evicted.

    Args:
      model: a `Decoder`.
      params: its parameters.
      tokens: int32 [B, T], padded on the left.
      mask: bool [B, T], False on padding.
      targets: int32 [B, T], the token that comes after each position.

    Returns:
      `TokenScores` [B, T].
    """
    with beside(params) as params:
        return _score_text(model, params, tokens, mask, targets)


@functools.partial(jax.jit, static_argnames="model")
def _score_text(model: Decoder, params: Any, tokens: Array, mask: Array, targets: Array) -> TokenScores:
    batch, length = tokens.shape
    hidden, _ = read(model, params, tokens, mask, chunk_size=largest_divisor(length, CHUNK_SIZE))
    part = largest_divisor(length, SCORED_AT_ONCE)
    parts = tuple(jnp.moveaxis(x.reshape(batch, -1, part, *x.shape[2:]), 1, 0) for x in (hidden, targets))
    scored = jax.lax.map(lambda pair: score_tokens(logits(model, params, pair[0]), pair[1]), parts)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, length), scored)
