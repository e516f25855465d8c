"""Reading: prompts, and further tokens, go through the layers once and leave a cache."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from restkv_jax.caches.axes import laid_out
from restkv_jax.caches.base import Cache
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.checks import (
    CacheDType,
    check_cache,
    check_cache_dtype,
    check_extending,
    check_model,
    check_policies,
    check_prompt,
    check_residual,
    check_segments,
)
from restkv_jax.generation.passes import Plan, read_prompt
from restkv_jax.models.arguments import is_known
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.key_groups import Sharing
from restkv_jax.models.mesh import beside, check_rows, mesh_of
from restkv_jax.models.rules import with_usual_promotion

CHUNK_SIZE = 1024
"""Prompt tokens whose queries and MLP activations exist at one time."""


def bucket_length(length: int) -> int:
    """The padded length of a prompt: 64, then quarter steps between powers of two (80, 96, 112, 128, 160, ...).

    Prompts are padded to it on the left, so at most four programs are compiled per doubling of the length, and
    at most a fifth of a padded prompt is padding.
    """
    return max(64, _rounded_up(length))


def _rounded_up(number: int) -> int:
    """The next number in quarter steps between powers of two."""
    step = max(1, (1 << (number - 1).bit_length()) // 8)
    return -(-number // step) * step


def pad_left(tokens: Array, mask: Array, length: int) -> tuple[Array, Array]:
    """Padded before anything is compiled for their length, so that lengths of one bucket share programs."""
    tokens, mask = (jnp.pad(x, ((0, 0), (length - x.shape[1], 0))) for x in (tokens, mask))
    return tokens, mask


@with_usual_promotion
def prefill(
    model: Decoder,
    params: Any,
    tokens: ArrayLike,
    mask: ArrayLike | None = None,
    policy: EvictionPolicy | None = None,
    max_new_tokens: int = 64,
    chunk_size: int = CHUNK_SIZE,
    sharing: Sharing | None = None,
    segment_size: int | None = None,
    cache_dtype: CacheDType = None,
) -> tuple[Array, Cache]:
    """Reads prompts and keeps what the policy chooses of their keys and values.

    Layers are scanned; a layer's full keys and values are dropped as soon as they are scored. Within a layer the
    tokens go through in chunks, so that besides the residual stream only one chunk's activations exist. Prompts are
    padded to `bucket_length`, so that new lengths seldom compile anew.

    Args:
      model: a `Decoder`.
      params: its parameters.
      tokens: int32 [B, T], padded on the left.
      mask: bool [B, T], False on padding; None if there is none.
      policy: what to keep; everything by default. A budget in percent is of `bucket_length(T)`.
      max_new_tokens: slots to reserve for tokens to come.
      chunk_size: bound on the tokens of a chunk; the result is the same to rounding.
      sharing: whose keys each layer reads distant tokens by; its own by default. The policy's budget then counts
        distant tokens, of which a block and KV head keeps one set, by the sum of its layers' scores; in percent it is
        of the bucket all the same.
      segment_size: reads the prompt in segments of so many tokens and evicts after each, so that memory follows the
        segment and the budget, not the prompt; later segments see what was kept of earlier ones. Chunks are the
        largest divisor of it that `chunk_size` allows, so that a prime number is slow. None reads all at once.
      cache_dtype: what keys and values are stored in: "int8", "int4" or "float8_e4m3fn", or with the sizes of groups
        and residual window "int4(group_size=32, residual=64)", or a `Quantisation`; None stores them as they are. They
        are judged in full precision, before.

    Returns:
      the next token's logits, float32 [B, vocabulary], and the cache.

    Raises:
      ValueError, TypeError: arguments that make no sense, each named.
    """
    options = max_new_tokens, chunk_size, sharing
    stored = {"segment_size": segment_size, "cache_dtype": cache_dtype}
    prompt = check_and_pad(model, params, tokens, mask, (policy,), *options, **stored)
    logits, (cache,) = read_each(params, prompt)
    return logits, cache


@with_usual_promotion
def extend(
    model: Decoder,
    params: Any,
    tokens: ArrayLike,
    mask: ArrayLike | None,
    cache: Cache,
    policy: EvictionPolicy | None = None,
    max_new_tokens: int = 64,
    chunk_size: int = CHUNK_SIZE,
    sharing: Sharing | None = None,
    cache_dtype: CacheDType = None,
) -> tuple[Array, Cache]:
    """Reads further tokens onto what a cache holds.

    They see what is kept and, causally, each other; their positions go on from `cache.next_positions`. `prefill` is
    this on a cache of nothing. The cache stays as it is and may be extended again, by another question.

    Args:
      model: a `Decoder`.
      params: its parameters.
      tokens: int32 [B, T], padded on the left; `rk.repeat_rows` makes several rows of one.
      mask: bool [B, T], False on padding; None if there is none.
      cache: from `prefill`, `extend`, `decode_step`, `generate` or `load_cache`, of `B` rows.
      policy: judges what is held and the new tokens together, by the queries of the new ones; its window is the last
        tokens of the sequence. Without one all new tokens are kept, in a cache that evicts while generating what its
        own policy says.
      max_new_tokens: slots to reserve for tokens to come.
      chunk_size: bound on the tokens of a chunk; the result is the same to rounding.
      sharing: that of the cache; not needed, and another one is refused.
      cache_dtype: that of the cache; likewise.

    Returns:
      the next token's logits, float32 [B, vocabulary], and the next cache. Outside of `jax.jit` a cache without policy
      grows in steps of `bucket_length` when it has to; inside, where its use is not known, by `T + max_new_tokens`.

    Raises:
      ValueError, TypeError: arguments that make no sense, each named.
    """
    options = max_new_tokens, chunk_size, sharing
    prompt = check_and_pad(model, params, tokens, mask, (policy,), *options, cache=cache, cache_dtype=cache_dtype)
    logits, (cache,) = read_each(params, prompt)
    return logits, cache


@with_usual_promotion
def prefill_each(
    model: Decoder,
    params: Any,
    tokens: ArrayLike,
    mask: ArrayLike | None = None,
    policies: Sequence[EvictionPolicy | None] = (),
    max_new_tokens: int = 64,
    chunk_size: int = CHUNK_SIZE,
    sharing: Sharing | None = None,
    cache_dtype: CacheDType = None,
) -> tuple[Array, tuple[Cache, ...]]:
    """Reads prompts once and keeps what each of several policies chooses; arguments as for `prefill`.

    Policies that differ in their budgets alone share their scores. The caches of all policies exist together.

    Returns:
      the next token's logits, float32 [B, vocabulary], and a cache for every policy.

    Raises:
      ValueError, TypeError: arguments that make no sense, each named.
    """
    options = max_new_tokens, chunk_size, sharing
    return read_each(params, check_and_pad(model, params, tokens, mask, policies, *options, cache_dtype=cache_dtype))


def read_each(params: Any, prompt: "Prompt") -> tuple[Array, tuple[Cache, ...]]:
    """The next token's logits, float32 [B, V], and a cache for every policy."""
    with beside(params) as params:
        return read_prompt(prompt.model, params, *prompt.arrays, prompt.plan)


class Prompt(NamedTuple):
    """Checked arguments of a reading: tokens int32 [B, T] and mask bool [B, T] of one bucket, and a cache below."""

    model: Decoder
    tokens: Array
    mask: Array
    cache: Cache | None
    plan: Plan

    @property
    def arrays(self) -> tuple[Array, Array, Cache | None]:
        """Tokens, mask and cache."""
        return self.tokens, self.mask, self.cache


def check_and_pad(
    model: Decoder,
    params: Any,
    tokens: Any,
    mask: Any,
    policies: Sequence[EvictionPolicy | None],
    max_new_tokens: int,
    chunk_size: int,
    sharing: Sharing | None,
    cache: Cache | None = None,
    segment_size: int | None = None,
    cache_dtype: CacheDType = None,
) -> Prompt:
    """Checks what users pass, before anything is compiled; tokens are padded to their bucket, budgets become slots."""
    if cache is not None:
        model, sharing = check_cache(model, params, cache, sharing), None
        cache = laid_out(cache, mesh_of(params))
        policies = [cache.extending_policy if policy is None else policy for policy in policies]
    appends = cache is not None and tuple(policies) == (None,)
    kept = check_policies(policies)
    model = check_model(model, params, sharing, kept)
    tokens, mask = check_prompt(model, tokens, mask, max_new_tokens, chunk_size, cache)
    check_rows(tokens.shape[0], mesh_of(params))
    quantisation = check_cache_dtype(cache_dtype, model, cache)
    if segment_size is not None:
        check_segments(segment_size, cache, kept)
    length = bucket = bucket_length(tokens.shape[1])
    if segment_size is not None and segment_size < length:
        length = segment_size * _rounded_up(-(-tokens.shape[1] // segment_size))
    else:
        segment_size = None
    if cache is None:
        kept = tuple(policy.resolved(bucket) for policy in kept)
        check_residual(quantisation, kept, model.sharing)
        plan = Plan(kept, max_new_tokens, chunk_size, length, segment_size=segment_size, quantisation=quantisation)
        return Prompt(model, *pad_left(tokens, mask, length), None, plan)
    check_extending(kept)
    check_residual(quantisation, kept, model.sharing)
    longest = int(np.asarray(mask).sum(1).max()) if is_known(mask) else mask.shape[1]
    length = bucket_length(max(length, *(policy.window for policy in kept)))  # the queries of a whole window
    total = _total(cache, kept, longest, length)
    plan = Plan(kept, max_new_tokens, chunk_size, total, quantisation=quantisation)
    if appends:
        plan = plan._replace(policies=(None,), room=_room(cache, longest, length, max_new_tokens))
    return Prompt(model, *pad_left(tokens, mask, length), cache, plan)


def _total(cache: Cache, policies: Sequence[EvictionPolicy], longest: int, length: int) -> int:
    """Bound on the pairs of a sequence once tokens are read onto a cache, `longest` at most, padded to `length`."""
    places = cache.num_places + length
    if is_known(cache.next_positions) and any(policy.budget is None for policy in policies):
        return min(places, bucket_length(int(cache.most_held()) + longest))
    return places


def _room(cache: Cache, longest: int, length: int, max_new_tokens: int) -> int:
    """Slots that a cache lacks, for each layer, row and KV head."""
    if not is_known(cache.next_positions):
        return length + max_new_tokens
    missing = longest + max_new_tokens - int(cache.room())
    return 0 if missing <= 0 else bucket_length(cache.num_slots + missing) - cache.num_slots


def cache_shapes(
    model: Decoder,
    params: Any,
    tokens: ArrayLike,
    mask: ArrayLike | None = None,
    policy: EvictionPolicy | None = None,
    max_new_tokens: int = 64,
    segment_size: int | None = None,
    cache_dtype: CacheDType = None,
) -> Cache:
    """The cache that `prefill` would return, as shapes and dtypes: nothing is computed or allocated."""

    def shapes(params, tokens, mask):
        stored = {"segment_size": segment_size, "cache_dtype": cache_dtype}
        return prefill(model, params, tokens, mask, policy, max_new_tokens, **stored)[1]

    with warnings.catch_warnings(action="ignore"):
        return jax.eval_shape(shapes, params, tokens, mask)
