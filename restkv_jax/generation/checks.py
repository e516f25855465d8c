"""Checks of what users pass in, at the border and before anything is compiled."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from restkv_jax.eviction.policy import EvictionPolicy, check_integer
from restkv_jax.models import Decoder
from restkv_jax.models.shared_attention import Sharing


def check_prompt(
    model: Decoder,
    tokens: Any,
    mask: Any | None,
    policy: EvictionPolicy,
    max_new_tokens: int,
    chunk_size: int = 1,
    sharing: Sharing | None = None,
) -> tuple[Array, Array]:
    """Checks a batch of prompts; values are looked at where they are known, that is outside of `jax.jit`.

    Args:
      model: whose vocabulary and context the prompts must fit.
      tokens: int [B, T], padded on the left.
      mask: bool or int [B, T], False on padding; None if there is none.
      policy: an `EvictionPolicy`.
      max_new_tokens: at least 1.
      chunk_size: at least 1.
      sharing: a `Sharing` with groups of this model and a policy that goes with it, or None.

    Returns:
      tokens int32 [B, T] and mask bool [B, T].

    Raises:
      TypeError: tokens that are no integers, a policy that is no `EvictionPolicy`, a sharing that is no `Sharing`.
      ValueError: everything else, naming the argument and its value.
    """
    if not isinstance(policy, EvictionPolicy):
        raise TypeError(f"policy={policy!r} must be an EvictionPolicy, such as restkv_jax.restkv(budget=1024)")
    if sharing is not None:
        check_sharing(model, sharing, policy)
    check_integer("max_new_tokens", max_new_tokens, 1, "the prefill alone gives the first token")
    check_integer("chunk_size", chunk_size, 1, "prompt tokens per chunk")
    tokens, mask = check_tokens(model, tokens, mask)
    _warn_beyond_context(model, mask, max_new_tokens)
    return tokens, mask


def check_tokens(model: Decoder, tokens: Any, mask: Any | None) -> tuple[Array, Array]:
    """Checks texts for a model: `tokens` int [B, T], padded on the left, and `mask` bool or int [B, T] or None.

    Returns:
      tokens int32 [B, T] and mask bool [B, T].

    Raises:
      TypeError: tokens that are no integers.
      ValueError: everything else, naming the argument and its value.
    """
    tokens = _as_array("tokens", tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens has shape {tokens.shape}, but must be [batch, length]; one prompt is tokens[None]")
    if 0 in tokens.shape:
        raise ValueError(f"tokens has shape {tokens.shape}: the prompt is empty")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens has dtype {tokens.dtype}, but must hold integers")
    mask = np.ones(tokens.shape, bool) if mask is None else _as_array("mask", mask)
    check_mask(mask, tokens.shape)
    if _is_known(tokens) and _is_known(mask):
        _check_vocabulary(model, "tokens", np.asarray(tokens), np.asarray(mask).astype(bool))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask, bool)


def check_sharing(model: Decoder, sharing: Any, policy: EvictionPolicy) -> None:
    """Checks that groups are the model's and that the policy chooses the same tokens for all layers of a block.

    Raises:
      TypeError: no `Sharing`.
      ValueError: groups of a model of another shape, or a policy that needs a set of tokens per layer.
    """
    if not isinstance(sharing, Sharing):
        raise TypeError(f"sharing={sharing!r} must be a restkv_jax.pod.Sharing(groups)")
    sharing.groups.check_model(model.config)
    for name, clashes in (
        ("allocation", not policy.allocation.uniform),
        ("while_generating", policy.while_generating),
        ("refit", policy.refit is not None),
    ):
        if clashes:
            raise ValueError(
                f"policy.{name}={getattr(policy, name)!r} does not go with sharing: the layers of a block keep one set "
                "of distant tokens, equally many each, and their values as they are"
            )


def check_mask(mask: Any, shape: tuple[int, int]) -> None:
    """Checks the mask of prompts that are padded on the left, bool [B, T]; its values where they are known.

    Raises:
      ValueError: another shape, a row that is all padding, padding after real tokens.
    """
    if mask.shape != shape:
        raise ValueError(f"mask has shape {mask.shape}, but the prompts have shape {shape}")
    if not _is_known(mask):
        return
    mask = np.asarray(mask).astype(bool)
    if not mask.any(axis=1).all():
        raise ValueError(f"mask has no True in row {np.argmin(mask.any(axis=1))}: the row is all padding")
    ends_early = mask[:, :-1] & ~mask[:, 1:]
    if ends_early.any():
        row = np.argmax(ends_early.any(axis=1))
        raise ValueError(
            f"mask has padding after real tokens in row {row}; pad on the left (tokenizer.padding_side = 'left')"
        )


def _as_array(name: str, value: Any) -> Any:
    if isinstance(value, jax.Array):
        return value
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is no array: rows of different lengths? Pad them on the left ({error})") from error


def _is_known(array: Any) -> bool:
    return not isinstance(array, jax.core.Tracer)


def _check_vocabulary(model: Decoder, name: str, tokens: np.ndarray, mask: np.ndarray) -> None:
    vocabulary = model.config.vocab_size
    outside = ((tokens < 0) | (tokens >= vocabulary)) & mask
    if outside.any():
        place = tuple(int(i) for i in np.argwhere(outside)[0])
        raise ValueError(
            f"{name}[{', '.join(map(str, place))}]={tokens[place]} is out of the vocabulary of {vocabulary} tokens; "
            "was the prompt encoded with another model's tokenizer?"
        )


def _warn_beyond_context(model: Decoder, mask: Any, max_new_tokens: int) -> None:
    length = int(np.asarray(mask).astype(bool).sum(1).max()) if _is_known(mask) else mask.shape[1]
    limit = model.config.context_length
    if length + max_new_tokens > limit:
        warnings.warn(
            f"the prompt's {length} tokens and max_new_tokens={max_new_tokens} exceed the model's maximum of {limit} "
            "positions (max_position_embeddings and RoPE scaling); expect the quality to fall",
            stacklevel=4,
        )


def check_token(model: Decoder, token: Any, cache: Any) -> Array:
    """Checks the token that `decode_step` takes, int [B], against the batch and the room in the cache.

    Outside of `jax.jit` this waits for the device; inside, values are not looked at.

    Raises:
      TypeError: no integers.
      ValueError: another shape, a token out of the vocabulary, or a cache without a free slot that does not evict
        while generating.
    """
    token = _as_array("token", token)
    batch = cache.next_positions.shape[0]
    if token.shape != (batch,):
        raise ValueError(f"token has shape {token.shape}, but the cache holds {batch} rows: expected {(batch,)}")
    if not jnp.issubdtype(token.dtype, jnp.integer):
        raise TypeError(f"token has dtype {token.dtype}, but must hold integers")
    if _is_known(token):
        _check_vocabulary(model, "token", np.asarray(token), np.ones(batch, bool))
    if _is_known(cache.next_positions) and bool(cache.is_full()):
        raise ValueError(
            f"the cache is full: all its {cache.num_slots} slots are in use; prefill with a larger max_new_tokens "
            "or with a policy that has while_generating=True"
        )
    return jnp.asarray(token, jnp.int32)


def check_sampling(key: Any, temperature: Any, top_k: Any, top_p: Any) -> None:
    """Checks sampling options.

    Raises:
      TypeError: a key that is no JAX key, a `top_k` that is no integer.
      ValueError: options that need a random key without one, or values out of range.
    """
    known = lambda x: x is not None and _is_known(x)  # noqa: E731
    greedy = temperature is None or (known(temperature) and temperature == 0)
    if key is None and not (greedy and top_k is None and top_p is None):
        raise ValueError("key=None decodes greedily; pass key=jax.random.key(seed) to sample with temperature etc.")
    if key is not None and not isinstance(key, jax.Array):
        raise TypeError(f"key={key!r} must be a JAX random key, such as jax.random.key(0)")
    if known(temperature) and not temperature >= 0:
        raise ValueError(f"temperature={temperature} must not be negative")
    if known(top_k):
        check_integer("top_k", top_k if isinstance(top_k, (int, float)) else np.asarray(top_k)[()], 1, "tokens to keep")
    if known(top_p) and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")


def check_eos(model: Decoder, eos_token_ids: Any) -> tuple[int, ...]:
    """End-of-sequence ids as a tuple, the model's own for None.

    Raises:
      ValueError: an id out of the vocabulary.
    """
    if eos_token_ids is None:
        return model.config.eos_token_ids
    ids = np.atleast_1d(np.asarray(eos_token_ids, np.int64))
    _check_vocabulary(model, "eos_token_ids", ids, np.ones(ids.shape, bool))
    return tuple(ids.tolist())
