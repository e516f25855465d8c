"""Choosing the next token from the logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Sampling(NamedTuple):
    """How tokens are drawn: a `Chooser`.

    Random keys [B] (None is greedy) and the options of `sample`; rows end after one of `eos_token_ids`, int32 [E], and
    go on with `pad_token_id`.
    """

    keys: Array | None
    temperature: Array | float
    top_k: Array | int | None
    top_p: Array | float | None
    min_p: Array | float | None
    eos_token_ids: Array
    pad_token_id: Array | int

    def choose(self, logits: Array, step: Array) -> tuple[Array, None]:
        keys = self.keys
        if keys is not None:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
        return sample(logits, keys, self.temperature, self.top_k, self.top_p, self.min_p), None

    def ends(self, token: Array) -> Array:
        return (token[:, None] == self.eos_token_ids).any(axis=1)


class TokenScores(NamedTuple):
    """Natural log-probability of tokens, float32 [B, ...], and whether greedy decoding gives them, bool [B, ...]."""

    log_probabilities: Array
    is_greedy: Array


class Forced(NamedTuple):
    """Tokens that are given, int32 [B, N], and scored: a `Chooser` whose rows do not end."""

    tokens: Array
    pad_token_id: Array | int = 0

    def choose(self, logits: Array, step: Array) -> tuple[Array, TokenScores]:
        token = jax.lax.dynamic_index_in_dim(self.tokens, step, axis=1, keepdims=False)
        return token, score_tokens(logits, token)

    def ends(self, token: Array) -> Array:
        return jnp.zeros(token.shape, bool)


def score_tokens(logits: Array, tokens: Array) -> TokenScores:
    """Scores of tokens int32 [...] under logits [..., V]."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
    return TokenScores(chosen[..., 0], jnp.argmax(logits, axis=-1) == tokens)


def sample(
    logits: Array,
    keys: Array | None,
    temperature: Array | float = 1.0,
    top_k: Array | int | None = None,
    top_p: Array | float | None = None,
    min_p: Array | float | None = None,
) -> Array:
    """Draws one token per row from the tempered, truncated softmax; without keys, takes the best.

    `top_k` keeps the `k` best tokens; `top_p` then keeps the smallest set of best tokens whose probabilities reach `p`
    (nucleus sampling, Holtzman et al. 2020), always at least one; both keep ties. `min_p` keeps the tokens that are at
    least `p` times as probable as the best (Nguyen et al. 2024).

    Args:
      logits: float32 [B, V].
      keys: JAX random keys [B], or None for greedy decoding.
      temperature: divides the logits; 0 is greedy.
      top_k: number of tokens to keep.
      top_p: probability mass to keep, in (0, 1].
      min_p: least probability to keep, in shares of the best token's, in [0, 1].

    Returns:
      int32 [B].
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if keys is None:
        return best
    tempered = truncate(logits / jnp.maximum(temperature, 1e-6), top_k, top_p, min_p)
    drawn = jax.vmap(jax.random.categorical)(keys, tempered).astype(jnp.int32)
    return jnp.where(temperature > 0, drawn, best)


def truncate(
    logits: Array, top_k: Array | int | None, top_p: Array | float | None, min_p: Array | float | None
) -> Array:
    """Logits [B, V] with -inf for what `sample` does not draw."""
    if top_k is not None or top_p is not None:
        logits = _truncate_sorted(logits, top_k, top_p)
    if min_p is not None:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _truncate_sorted(logits: Array, top_k: Array | int | None, top_p: Array | float | None) -> Array:
    vocabulary = logits.shape[-1]
    descending = -jnp.sort(-logits, axis=-1)
    if top_k is not None:
        last = jnp.clip(jnp.asarray(top_k), 1, vocabulary) - 1
        threshold = jnp.take(descending, last, axis=-1)[:, None]
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
        descending = jnp.where(descending < threshold, -jnp.inf, descending)
    if top_p is not None:
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        count = jnp.maximum((before < top_p).sum(-1, keepdims=True), 1)
        threshold = jnp.take_along_axis(descending, count - 1, axis=-1)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits


def row_keys(key: Array | None, batch: int) -> Array | None:
    """One key per row, from a single key or from keys [B] that are given per row already."""
    if key is None:
        return None
    one: Array = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    return one if one.ndim == 1 else jax.vmap(lambda row: jax.random.fold_in(one, row))(jnp.arange(batch))
