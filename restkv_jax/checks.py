"""Checks of what users pass in, at the border and before anything is compiled."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from restkv_jax.models import Decoder
from restkv_jax.policy import EvictionPolicy


def check_prompt(
    model: Decoder, tokens: Any, mask: Any | None, policy: EvictionPolicy, max_new_tokens: int, chunk_size: int = 1
) -> tuple[Array, Array]:
    """Checks a batch of prompts; values are looked at where they are known, that is outside of `jax.jit`.

    Args:
      model: whose vocabulary and context the prompts must fit.
      tokens: int [B, T], padded on the left.
      mask: bool or int [B, T], False on padding; None if there is none.
      policy: an `EvictionPolicy`.
      max_new_tokens: at least 1.
      chunk_size: at least 1.

    Returns:
      tokens int32 [B, T] and mask bool [B, T].

    Raises:
      TypeError: tokens that are no integers, a policy that is no `EvictionPolicy`.
      ValueError: everything else, naming the argument and its value.
    """
    if not isinstance(policy, EvictionPolicy):
        raise TypeError(f"policy={policy!r} must be an EvictionPolicy, such as restkv_jax.restkv(budget=1024)")
    if not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} must be an integer of at least 1")
    if not isinstance(chunk_size, (int, np.integer)) or chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size!r} must be an integer of at least 1")
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens has shape {tokens.shape}, but must be [batch, length]; one prompt is tokens[None]")
    if 0 in tokens.shape:
        raise ValueError(f"tokens has shape {tokens.shape}: the prompt is empty")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens has dtype {tokens.dtype}, but must hold integers")
    mask = np.ones(tokens.shape, bool) if mask is None else mask
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if mask.shape != tokens.shape:
        raise ValueError(f"mask has shape {mask.shape}, but tokens has shape {tokens.shape}")
    if not isinstance(tokens, jax.core.Tracer) and not isinstance(mask, jax.core.Tracer):
        _check_values(model, np.asarray(tokens), np.asarray(mask).astype(bool))
    _warn_beyond_context(model, mask, max_new_tokens)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask, bool)


def _check_values(model: Decoder, tokens: np.ndarray, mask: np.ndarray) -> None:
    vocabulary = model.config.vocab_size
    outside = ((tokens < 0) | (tokens >= vocabulary)) & mask
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise ValueError(
            f"tokens[{row}, {column}]={tokens[row, column]} is out of the vocabulary of {vocabulary} tokens; "
            "was the prompt encoded with another model's tokenizer?"
        )
    if not mask.any(axis=1).all():
        raise ValueError(f"mask has no True in row {np.argmin(mask.any(axis=1))}: the row is all padding")
    ends_early = mask[:, :-1] & ~mask[:, 1:]
    if ends_early.any():
        row = np.argmax(ends_early.any(axis=1))
        raise ValueError(
            f"mask has padding after real tokens in row {row}; pad on the left (tokenizer.padding_side = 'left')"
        )


def _warn_beyond_context(model: Decoder, mask: Any, max_new_tokens: int) -> None:
    length = mask.shape[1] if isinstance(mask, jax.core.Tracer) else int(np.asarray(mask).astype(bool).sum(1).max())
    limit = model.config.max_position_embeddings
    if length + max_new_tokens > limit:
        warnings.warn(
            f"the prompt's {length} tokens and max_new_tokens={max_new_tokens} exceed the model's maximum of {limit} "
            "positions (max_position_embeddings); expect the quality to fall",
            stacklevel=4,
        )


def check_token(model: Decoder, token: Any, cache: Any) -> Array:
    """Checks the token that `decode_step` takes, int [B], against the batch and the room in the cache.

    Raises:
      ValueError: another shape, or a cache without a free slot that does not evict while generating.
    """
    token = token if isinstance(token, jax.Array) else np.asarray(token)
    batch = cache.next_positions.shape[0]
    if token.shape != (batch,):
        raise ValueError(f"token has shape {token.shape}, but the cache holds {batch} rows: expected {(batch,)}")
    full = cache.importance is None and not isinstance(cache.lengths, jax.core.Tracer)
    if full and int(cache.lengths.max()) >= cache.num_slots:
        raise ValueError(
            f"the cache is full: all its {cache.num_slots} slots are in use; prefill with a larger max_new_tokens "
            "or with a policy that has while_generating=True"
        )
    return jnp.asarray(token, jnp.int32)


def check_sampling(key: Any, temperature: Any, top_k: Any, top_p: Any) -> None:
    """Checks sampling options.

    Raises:
      ValueError: options that need a random key without one, or values out of range.
    """
    if key is None and not (temperature is None and top_k is None and top_p is None):
        raise ValueError("key=None decodes greedily; pass key=jax.random.key(seed) to sample with temperature etc.")
    known = lambda x: x is not None and not isinstance(x, jax.core.Tracer)  # noqa: E731
    if known(temperature) and not temperature >= 0:
        raise ValueError(f"temperature={temperature} must not be negative")
    if known(top_k) and not top_k >= 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if known(top_p) and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")
