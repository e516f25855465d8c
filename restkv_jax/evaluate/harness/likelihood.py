"""Log-probabilities of given tokens, after an evicted context or under plain attention."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax import kernels
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.generating import decode_step
from restkv_jax.generation.reading import CHUNK_SIZE, prefill
from restkv_jax.models import Decoder, logits, positions_of

SCORED_AT_ONCE = 128
"""Positions whose scores over the whole vocabulary exist at one time."""


class TokenScores(NamedTuple):
    """Natural log-probability of each token, float32 [B, T], and whether greedy decoding gives it, bool [B, T]."""

    log_probabilities: Array
    is_greedy: Array


def score_continuation(
    model: Decoder, params: Any, tokens: Array, mask: Array, continuation: Array, policy: EvictionPolicy
) -> TokenScores:
    """Scores continuations fed token by token to the cache that the policy leaves of their contexts.

    Args:
      model: a `Decoder`.
      params: its parameters.
      tokens: the contexts, int32 [B, T], padded on the left.
      mask: bool [B, T], False on padding.
      continuation: int32 [B, C], padded on the right; the scores of padding mean nothing.
      policy: what to keep of the contexts.

    Returns:
      `TokenScores` [B, C].
    """
    max_new_tokens = max(1, continuation.shape[1] - 1)
    scores, cache = prefill(model, params, tokens, mask, policy=policy, max_new_tokens=max_new_tokens)
    return _feed(model, params, scores, cache, jnp.asarray(continuation, jnp.int32), policy)


@functools.partial(jax.jit, static_argnames=("model", "policy"), donate_argnames="cache")
def _feed(model, params, scores, cache, continuation, policy) -> TokenScores:
    def step(carry, token):
        scores, cache = carry
        return decode_step(model, params, token, cache, policy=policy), _judge(scores, token)

    # the last token is judged but not fed: nothing comes after it
    (scores, _), judged = jax.lax.scan(step, (scores, cache), continuation[:, :-1].T)
    last = _judge(scores, continuation[:, -1])
    return jax.tree.map(lambda rest, end: jnp.concatenate([rest.T, end[:, None]], axis=1), judged, last)


@functools.partial(jax.jit, static_argnames="model")
def score_text(model: Decoder, params: Any, tokens: Array, mask: Array, targets: Array) -> TokenScores:
    """Scores the token after each position under plain causal attention; nothing is evicted.

    Args:
      model: a `Decoder`.
      params: its parameters.
      tokens: int32 [B, T], padded on the left.
      mask: bool [B, T], False on padding.
      targets: int32 [B, T], the token that comes after each position.

    Returns:
      `TokenScores` [B, T].
    """
    batch, length = tokens.shape
    chunk_size = kernels.largest_divisor(length, CHUNK_SIZE)
    hidden, _ = model.apply({"params": params}, tokens, positions_of(mask), chunk_size=chunk_size)
    part = kernels.largest_divisor(length, SCORED_AT_ONCE)
    parts = tuple(jnp.moveaxis(x.reshape(batch, -1, part, *x.shape[2:]), 1, 0) for x in (hidden, targets))
    judged = jax.lax.map(lambda pair: _judge(logits(model, params, pair[0]), pair[1]), parts)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, length), judged)


def _judge(scores: Array, tokens: Array) -> TokenScores:
    """From scores [..., V] and tokens [...]."""
    best = jnp.argmax(scores, axis=-1)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), tokens[..., None], axis=-1)
    return TokenScores(chosen[..., 0], best == tokens)
