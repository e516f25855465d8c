"""Checks of what users pass in, at the border and before anything is compiled."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from restkv_jax.caches.base import Cache
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.kernels.quantised import Quantisation, parse_quantisation
from restkv_jax.models.arguments import as_array, check_integer, check_mask, check_number, is_known
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.key_groups import Sharing
from restkv_jax.models.saving import check_params
from restkv_jax.models.tensors import flatten, parameter_shapes

CacheDType = str | Quantisation | None
"""What `cache_dtype` may be."""


def check_policies(policies: Any) -> tuple[EvictionPolicy, ...]:
    """Policies as a tuple; None among them keeps everything.

    Raises:
      TypeError: not a sequence, or something in it that is not an `EvictionPolicy`.
      ValueError: none at all.
    """
    if isinstance(policies, (str, bytes)) or not isinstance(policies, Sequence):
        raise TypeError(f"policies={policies!r} must be a tuple of policies, such as (restkv_jax.full(),)")
    if not policies:
        raise ValueError("policies is empty; pass at least one, such as restkv_jax.full()")
    return tuple(EvictionPolicy() if policy is None else check_policy(policy) for policy in policies)


def check_policy(policy: Any) -> EvictionPolicy:
    """A policy as it is.

    Raises:
      TypeError: something else.
    """
    if not isinstance(policy, EvictionPolicy):
        raise TypeError(f"policy={policy!r} must be an EvictionPolicy, such as restkv_jax.restkv(budget=1024)")
    return policy


def check_model(
    model: Any, params: Any, sharing: Sharing | None = None, policies: Sequence[EvictionPolicy] = ()
) -> Decoder:
    """Checks that model, parameters, sharing and policies belong together.

    Args:
      model: a `Decoder`.
      params: its parameters, arrays or shapes.
      sharing: to use instead of the model's own; None leaves that.
      policies: what to keep.

    Returns:
      the model, with its sharing.

    Raises:
      TypeError: not a `Decoder`, not parameters, or not a `Sharing`.
      ValueError: parameters or groups of another model, or a policy that needs a set of tokens per layer.
    """
    if not isinstance(model, Decoder):
        raise TypeError(f"model={model!r:.80} must be a Decoder, as load_model and build_model return it")
    _check_params(model, params)
    if sharing is not None:
        if not isinstance(sharing, Sharing):
            raise TypeError(f"sharing={sharing!r} must be a restkv_jax.pod.Sharing(groups)")
        model = model.clone(sharing=sharing)
    if model.sharing is not None:
        model.sharing.groups.check_model(model.config)
        for policy in policies:
            _check_shared_policy(policy)
    return model


def _check_params(model: Decoder, params: Any) -> None:
    if not isinstance(params, dict) or not params:
        raise TypeError(f"params={params!r:.80} must be the model's parameters, as load_model returns them")
    if set(params) == {"params"}:
        raise ValueError("params has the one key 'params'; pass what it holds, params['params']")
    flat = flatten(params)
    check_params(flat, parameter_shapes(model))
    for name, leaf in flat.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"params: {name!r} has dtype {leaf.dtype}, but must hold floating-point numbers")


def _check_shared_policy(policy: EvictionPolicy) -> None:
    for name, clashes in (
        ("allocation", not policy.allocation.uniform),
        ("while_generating", policy.while_generating),
        ("refit", policy.refit is not None),
    ):
        if clashes:
            raise ValueError(
                f"policy.{name}={getattr(policy, name)!r} does not go with sharing: the layers of a block keep one set "
                "of distant tokens, equally many each, and their values as they are; model.clone(sharing=None), or "
                "--dense, reads without sharing"
            )


def check_prompt(
    model: Decoder,
    tokens: Any,
    mask: Any | None,
    max_new_tokens: int,
    chunk_size: int = 1,
    cache: Cache | None = None,
) -> tuple[Array, Array]:
    """Checks a batch of prompts; values are looked at where they are known, that is outside of `jax.jit`.

    Args:
      model: whose vocabulary and context the prompts must fit.
      tokens: int [B, T], padded on the left.
      mask: bool or int [B, T], False on padding; None if there is none.
      max_new_tokens: at least 1.
      chunk_size: at least 1.
      cache: what they are read onto.

    Returns:
      tokens int32 [B, T] and mask bool [B, T].

    Raises:
      TypeError: tokens that are not integers.
      ValueError: everything else, naming the argument and its value.
    """
    check_integer("max_new_tokens", max_new_tokens, 1, "the prefill alone gives the first token", most=2**30)
    check_integer("chunk_size", chunk_size, 1, "prompt tokens per chunk")
    tokens, mask = check_tokens(model, tokens, mask)
    if cache is not None and tokens.shape[0] != cache.next_positions.shape[0]:
        rows = cache.next_positions.shape[0]
        raise ValueError(
            f"tokens has {tokens.shape[0]} rows, but the cache {rows}; restkv_jax.repeat_rows(cache, count) copies rows"
        )
    _warn_beyond_context(model, mask, max_new_tokens, cache)
    return tokens, mask


def check_tokens(model: Decoder, tokens: Any, mask: Any | None) -> tuple[Array, Array]:
    """Checks texts for a model: `tokens` int [B, T], padded on the left, and `mask` bool or int [B, T] or None.

    Returns:
      tokens int32 [B, T] and mask bool [B, T].

    Raises:
      TypeError: tokens that are not integers.
      ValueError: everything else, naming the argument and its value.
    """
    tokens = as_array("tokens", tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens has shape {tokens.shape}, but must be [batch, length]; one prompt is tokens[None]")
    if 0 in tokens.shape:
        raise ValueError(f"tokens has shape {tokens.shape}: the prompt is empty")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens has dtype {tokens.dtype}, but must hold integers")
    mask = np.ones(tokens.shape, bool) if mask is None else as_array("mask", mask)
    check_mask(mask, tokens.shape)
    if is_known(tokens) and is_known(mask):
        _check_vocabulary(model, "tokens", np.asarray(tokens), np.asarray(mask).astype(bool))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask, bool)


def _check_vocabulary(model: Decoder, name: str, tokens: np.ndarray, mask: np.ndarray) -> None:
    vocabulary = model.config.vocab_size
    outside = ((tokens < 0) | (tokens >= vocabulary)) & mask
    if outside.any():
        place = tuple(int(i) for i in np.argwhere(outside)[0])
        raise ValueError(
            f"{name}[{', '.join(map(str, place))}]={tokens[place]} is out of the vocabulary of {vocabulary} tokens; "
            "was the prompt encoded with another model's tokenizer?"
        )


def _warn_beyond_context(model: Decoder, mask: Any, max_new_tokens: int, cache: Cache | None) -> None:
    lengths = np.asarray(mask).astype(bool).sum(1) if is_known(mask) else np.full(mask.shape[0], mask.shape[1])
    if cache is not None and is_known(cache.next_positions):
        lengths = lengths + np.asarray(cache.next_positions)
    length, limit = int(lengths.max()), model.config.context_length
    if length + max_new_tokens > limit:
        warnings.warn(
            f"the prompt's {length} tokens and max_new_tokens={max_new_tokens} exceed the model's maximum of {limit} "
            "positions (max_position_embeddings and RoPE scaling); expect the quality to fall",
            stacklevel=5,
        )


def check_cache(model: Any, params: Any, cache: Any, sharing: Sharing | None) -> Decoder:
    """Checks that a cache, outside of `jax.jit` not one that was donated, belongs to a model and its parameters.

    Returns:
      the model, with the cache's sharing.

    Raises:
      TypeError: something that is not a cache, or a cache of another dtype than the parameters.
      ValueError: a cache that was donated, or does not belong to the model or sharing.
    """
    model = check_model(model, params, sharing)
    if not isinstance(cache, Cache):
        raise TypeError(f"cache is of type {type(cache).__name__}; it must be a cache, as prefill returns it")
    if any(is_known(x) and isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(cache)):
        raise ValueError(
            "the cache was used by an earlier step, which rewrote its buffers in place; go on with the cache that this "
            "step returned"
        )
    cache.check_model(model)
    held, dtype = cache.dtype, jax.tree.leaves(params["embedding"])[0].dtype
    if held != dtype:
        raise TypeError(
            f"the cache holds {held}, but the parameters are {dtype}; load the model with the dtype of the cache, or "
            "read the prompt again"
        )
    return model if cache.own_sharing is None else model.clone(sharing=cache.own_sharing)


def check_cache_dtype(cache_dtype: CacheDType, model: Decoder, cache: Cache | None = None) -> Quantisation | None:
    """How a cache stores pairs: what is asked for, and where tokens are read onto a cache, what that does.

    Raises:
      TypeError, ValueError: neither a known name nor a `Quantisation`; groups that the model's heads do not fill; a
        cache that stores its pairs in another way.
    """
    asked = parse_quantisation(cache_dtype) if isinstance(cache_dtype, str) else cache_dtype
    if not isinstance(asked, Quantisation | None):
        raise TypeError(f"cache_dtype={cache_dtype!r} must be a name such as 'int8', or a restkv_jax.Quantisation")
    if cache is not None:
        if asked is not None and asked != cache.quantisation:
            held = "pairs as they are" if cache.quantisation is None else str(cache.quantisation)
            raise ValueError(
                f"cache_dtype={cache_dtype!r}, but the cache stores {held}; leave cache_dtype out, or read the prompt "
                "again with it"
            )
        return cache.quantisation
    if asked is not None:
        asked.check_dim(model.config.head_dim)
    return asked


def check_residual(
    quantisation: Quantisation | None, policies: Sequence[EvictionPolicy], sharing: Sharing | None
) -> None:
    """Refuses resolved budgets, of distant tokens where keys are shared, of which nothing would be quantised."""
    if quantisation is None:
        return
    for policy in policies:
        residual, size = 0 if sharing is not None else quantisation.residual, quantisation.group_size
        if policy.budget is not None and policy.slots_given < residual + size:
            beside = f" beside residual={residual} in full precision" if residual else ""
            raise ValueError(
                f"budget={policy.budget} holds no whole group of group_size={size} tokens{beside}: nothing would be "
                f"{quantisation.dtype}; take a budget of at least {residual + size}, or smaller ones, such as "
                f"cache_dtype='{quantisation.dtype}(group_size=16,residual=16)'"
            )


def check_extending(policies: Sequence[EvictionPolicy]) -> None:
    """Refuses budgets that are a percentage, of which there is no length where tokens are read onto a cache."""
    for policy in policies:
        if isinstance(policy.budget, str):
            raise ValueError(
                f"budget={policy.budget!r} is a percentage of one prompt; give a number of slots where tokens are "
                "read onto a cache"
            )


def check_segments(segment_size: Any, cache: Cache | None, policies: Sequence[EvictionPolicy]) -> None:
    """Checks the size of segments.

    Raises:
      TypeError: not an integer.
      ValueError: segments onto a cache, or shorter than a window.
    """
    check_integer("segment_size", segment_size, 1, "tokens that are read before the next eviction")
    if cache is not None:
        raise ValueError(
            f"segment_size={segment_size} and a cache exclude each other; restkv_jax.extend reads onto a cache, as "
            "many tokens as it is given"
        )
    window = max(policy.window for policy in policies)
    if segment_size < window:
        raise ValueError(f"segment_size={segment_size} must be at least the policy's window={window}")


def check_decoding(
    model: Any, params: Any, token: Any, cache: Any, policy: EvictionPolicy | None, sharing: Sharing | None
) -> Array:
    """Checks what `decode_step` takes: a token int [B] per row, and a cache of this model with room for it.

    Outside of `jax.jit` this waits for the device; inside, values are not looked at.

    Returns:
      the token, int32 [B].

    Raises:
      TypeError: something that is not a cache, tokens that are not integers.
      ValueError: a cache that was donated, is full, or does not belong to the model, policy or sharing; a token of
        another shape or out of the vocabulary.
    """
    model = check_cache(model, params, cache, sharing)
    if policy is not None:
        cache.check_policy(check_policy(policy))
    return _check_token(model, token, cache)


def _check_token(model: Decoder, token: Any, cache: Cache) -> Array:
    token = as_array("token", token)
    batch = cache.next_positions.shape[0]
    if token.shape != (batch,):
        raise ValueError(f"token has shape {token.shape}, but the cache holds {batch} rows: expected {(batch,)}")
    if not jnp.issubdtype(token.dtype, jnp.integer):
        raise TypeError(f"token has dtype {token.dtype}, but must hold integers")
    if is_known(token):
        _check_vocabulary(model, "token", np.asarray(token), np.ones(batch, bool))
    if is_known(cache.next_positions) and int(cache.room()) < 1:
        raise ValueError(
            f"the cache is full: all its {cache.num_slots} slots are in use, and 1 more is needed; prefill, or "
            "extend, with a larger max_new_tokens or with a policy that has while_generating=True"
        )
    return jnp.asarray(token, jnp.int32)


def check_sampling(key: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any) -> None:
    """Checks sampling options.

    Raises:
      TypeError: a key that is not a JAX key, options that are not numbers.
      ValueError: options that need a random key without one, values out of range, one value per row.
    """
    is_greedy = temperature is None or (is_known(temperature) and np.ndim(temperature) == 0 and temperature == 0)
    if key is None and not (is_greedy and top_k is None and top_p is None and min_p is None):
        raise ValueError("key=None decodes greedily; pass key=jax.random.key(seed) to sample with temperature etc.")
    if key is not None and not isinstance(key, jax.Array):
        raise TypeError(f"key={key!r} must be a JAX random key, such as jax.random.key(0)")
    for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p), ("min_p", min_p)):
        shape = () if value is None else np.shape(value)
        if shape:
            raise ValueError(f"{name} has shape {shape}, but must be one number for all rows")
    temperature, top_k, top_p, min_p = (
        np.asarray(x)[()] if is_known(x) and isinstance(x, jax.Array) else x for x in (temperature, top_k, top_p, min_p)
    )
    if temperature is not None and is_known(temperature):
        check_number("temperature", temperature, "it divides the logits")
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must not be negative")
    if top_k is not None and is_known(top_k):
        check_integer("top_k", top_k, 1, "tokens to keep")
    if top_p is not None and is_known(top_p):
        check_number("top_p", top_p, "the probability mass to keep")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} must be in (0, 1]")
    if min_p is not None and is_known(min_p):
        check_number("min_p", min_p, "the least probability to keep, in shares of the best token's")
        if not 0 <= min_p <= 1:
            raise ValueError(f"min_p={min_p} must be in [0, 1]")


def check_eos(model: Decoder, eos_token_ids: Any) -> Any:
    """End-of-sequence ids as a tuple, the model's own for None; under a transform, the array that is given.

    Raises:
      TypeError: ids that are not integers.
      ValueError: an id out of the vocabulary.
    """
    if eos_token_ids is None:
        return model.config.eos_token_ids
    if not is_known(eos_token_ids):
        return eos_token_ids
    ids = np.atleast_1d(as_array("eos_token_ids", eos_token_ids))
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"eos_token_ids={eos_token_ids!r} must be integers")
    _check_vocabulary(model, "eos_token_ids", ids, np.ones(ids.shape, bool))
    return tuple(ids.tolist())
