"""Generation: prefill, then decode on the small cache."""

import functools
import itertools
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from restkv_jax.caches.axes import laid_out
from restkv_jax.caches.base import Cache, join_rows, split_rows, that_join
from restkv_jax.caches.side_by_side import line_up
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.checks import CacheDType, check_decoding, check_eos, check_sampling
from restkv_jax.generation.decoding import Decoding, advance, begin, feed, run_from
from restkv_jax.generation.passes import Plan, read_prompt
from restkv_jax.generation.reading import CHUNK_SIZE, Prompt, check_and_pad, read_each
from restkv_jax.generation.sampling import Sampling, row_keys
from restkv_jax.kernels.partition import mesh_sizes
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.key_groups import Sharing
from restkv_jax.models.mesh import beside, mesh_of
from restkv_jax.models.rules import with_usual_promotion

Steps = Generator[Decoding, Array | np.ndarray | None, Decoding]
"""States between steps, to which rows that go on, bool [B], may be sent; it returns the last state."""


class Generation(NamedTuple):
    """What `generate` returns.

    `tokens` int32 [B, max_new_tokens], padding after the end; `lengths` int32 [B], generated tokens of each row, its
    end-of-sequence token included; `cache`, the final state, without the last token of each row, which was not fed
    back.
    """

    tokens: Array
    lengths: Array
    cache: Cache


@with_usual_promotion
def decode_step(
    model: Decoder,
    params: Any,
    token: ArrayLike,
    cache: Cache,
    policy: EvictionPolicy | None = None,
    sharing: Sharing | None = None,
) -> tuple[Array, Cache]:
    """Feeds one token per row and returns what the model says next.

    The cache is donated: its buffers are rewritten in place, and the one passed in must not be used again. A full
    cache is refused; under the caller's own `jax.jit`, where that cannot be seen, it drops the new pair.

    Args:
      model: a `Decoder`.
      params: its parameters.
      token: int32 [B].
      cache: from `prefill` or the step before.
      policy: the policy of the prefill; not needed, the cache has all of it, and one that clashes is refused.
      sharing: that of the prefill; not needed either, and another one is refused.

    Returns:
      logits, float32 [B, vocabulary], and the next cache.

    Raises:
      ValueError, TypeError: a token of another shape or kind; a cache that is full, was donated to an earlier step, or
        is of another model or sharing.
    """
    token = check_decoding(model, params, token, cache, policy, sharing)
    cache = laid_out(cache, mesh_of(params))
    with beside(params) as params:
        return feed(model, params, token, cache, jnp.ones(token.shape, bool))


@with_usual_promotion
def generate(
    model: Decoder,
    params: Any,
    tokens: ArrayLike,
    mask: ArrayLike | None = None,
    policy: EvictionPolicy | None = None,
    max_new_tokens: int = 64,
    *,
    key: Array | None = None,
    temperature: Array | float | None = None,
    top_k: Array | int | None = None,
    top_p: Array | float | None = None,
    min_p: Array | float | None = None,
    eos_token_ids: tuple[int, ...] | None = None,
    chunk_size: int = CHUNK_SIZE,
    sharing: Sharing | None = None,
    cache: Cache | None = None,
    segment_size: int | None = None,
    cache_dtype: CacheDType = None,
) -> Generation:
    """Generates from prompts on a small cache, prefill and the whole decode loop in one compiled program.

    Greedy without a `key`. Works under the caller's own `jax.jit` with
    `static_argnames=("model", "policy", "max_new_tokens", "sharing")`.

    Args:
      model: a `Decoder`.
      params: its parameters.
      tokens: int32 [B, T], padded on the left.
      mask: bool [B, T], False on padding; None if there is none.
      policy: what to keep of the prompt; everything by default.
      max_new_tokens: upper bound on the tokens generated.
      key: a JAX random key, folded with the row's index, or keys [B], one per row; None decodes greedily.
      temperature: divides the logits; 1 by default.
      top_k: draw among the `k` best tokens.
      top_p: draw among the best tokens that hold this probability mass.
      min_p: draw among the tokens that are at least this times as probable as the best.
      eos_token_ids: tokens that end a row; the model's own by default.
      chunk_size: bound on the prompt tokens whose activations exist at one time.
      sharing: whose keys each layer reads distant tokens by; see `prefill`.
      cache: what was read before, from `prefill`, `extend`, `generate` or `load_cache`: the tokens are read onto it, as
        `extend` says; it stays as it is.
      segment_size: reads the prompt in segments; see `prefill`.
      cache_dtype: what keys and values are stored in, as they are by default; see `prefill`.

    Returns:
      a `Generation`.

    Raises:
      ValueError, TypeError: arguments that make no sense, each named.
    """
    options = max_new_tokens, chunk_size, sharing, cache, segment_size, cache_dtype
    prompt = check_and_pad(model, params, tokens, mask, (policy,), *options)
    sampling = make_sampling(model, prompt.tokens.shape[0], key, temperature, top_k, top_p, min_p, eos_token_ids)
    with beside(params) as params:
        return _generate(prompt.model, params, *prompt.arrays, sampling, prompt.plan)


@with_usual_promotion
def generate_each(
    model: Decoder,
    params: Any,
    tokens: ArrayLike,
    mask: ArrayLike | None = None,
    policies: tuple[EvictionPolicy, ...] = (),
    max_new_tokens: int = 64,
    *,
    eos_token_ids: tuple[int, ...] | None = None,
    chunk_size: int = CHUNK_SIZE,
    sharing: Sharing | None = None,
    cache: Cache | None = None,
    cache_dtype: CacheDType = None,
) -> tuple[Generation, ...]:
    """Generates greedily with every policy from one reading of the prompts: for comparisons.

    The layers run once; after each, every policy keeps what it chooses. Policies that differ in their budgets share
    their scores, and all caches are decoded as the rows of one batch. Each gives what `generate` gives. The caches of
    all policies exist together.

    Args:
      model: a `Decoder`.
      params: its parameters.
      tokens: int32 [B, T], padded on the left.
      mask: bool [B, T], False on padding; None if there is none.
      policies: what to keep of the prompt.
      max_new_tokens: upper bound on the tokens generated.
      eos_token_ids: tokens that end a row; the model's own by default.
      chunk_size: bound on the prompt tokens whose activations exist at one time.
      sharing: whose keys each layer reads distant tokens by; see `prefill`.
      cache: what was read before, from `prefill`, `extend`, `generate` or `load_cache`: the tokens are read onto it, as
        `extend` says; it stays as it is.
      cache_dtype: what keys and values are stored in, as they are by default; see `prefill`.

    Raises:
      ValueError, TypeError: arguments that make no sense, each named.
    """
    options = max_new_tokens, chunk_size, sharing, cache
    prompt = check_and_pad(model, params, tokens, mask, policies, *options, cache_dtype=cache_dtype)
    logits, caches = read_each(params, prompt)
    return decode_each(prompt.model, params, [logits] * len(caches), caches, max_new_tokens, eos_token_ids)


def decode_each(
    model: Decoder,
    params: Any,
    logits: Sequence[Array],
    caches: Sequence[Cache],
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...] | None = None,
) -> tuple[Generation, ...]:
    """Generates greedily from several readings, decoded as the rows of one batch; on a mesh, those of one size.

    Args:
      model: a `Decoder`, with the sharing of the caches.
      params: its parameters.
      logits: of the next token, float32 [B, V] for every cache.
      caches: what was read.
      max_new_tokens: upper bound on the tokens generated.
      eos_token_ids: tokens that end a row; the model's own by default.
    """
    sampling = make_sampling(model, logits[0].shape[0], eos_token_ids=eos_token_ids)
    groups, outs = that_join(caches), {}
    with beside(params) as params:
        # each cache's rows are divided over a mesh by themselves, and would cross it to stand beside others
        for batch in [[group] for group in groups] if mesh_sizes() else [groups]:
            chosen = [[caches[i] for i in group] for group in batch]
            rows = jnp.concatenate([logits[i] for group in batch for i in group])
            found = _generate_rows(model, params, chosen, rows, sampling, max_new_tokens)
            outs |= zip(itertools.chain(*batch), found, strict=True)
    return tuple(outs[i] for i in range(len(caches)))


def _generate_rows(
    model: Decoder, params: Any, groups: list[list[Cache]], logits: Array, sampling: Sampling, max_new_tokens: int
) -> list[Generation]:
    """Decodes from groups of caches, those of a group of one shape, as the rows of one batch."""
    joined = [join_rows(group) for group in groups]
    cache = joined[0] if len(joined) == 1 else line_up(joined)
    out = _generate_from(model, params, logits, cache, sampling, max_new_tokens)
    lasts = [out.cache] if len(joined) == 1 else out.cache.caches
    caches = list(itertools.chain(*map(split_rows, lasts, map(len, groups))))
    parts = (jnp.split(x, len(caches)) for x in (out.tokens, out.lengths))
    return [Generation(*each) for each in zip(*parts, caches, strict=True)]


@with_usual_promotion
def stream(
    model: Decoder,
    params: Any,
    tokens: ArrayLike,
    mask: ArrayLike | None = None,
    policy: EvictionPolicy | None = None,
    max_new_tokens: int = 64,
    *,
    key: Array | None = None,
    temperature: Array | float | None = None,
    top_k: Array | int | None = None,
    top_p: Array | float | None = None,
    min_p: Array | float | None = None,
    eos_token_ids: tuple[int, ...] | None = None,
    chunk_size: int = CHUNK_SIZE,
    sharing: Sharing | None = None,
    cache: Cache | None = None,
    segment_size: int | None = None,
    cache_dtype: CacheDType = None,
) -> Iterator[np.ndarray]:
    """Yields tokens as they come, for people who watch: those of `generate`, one int32 numpy array [B] per step.

    Arguments as for `generate`, checked at the call. Rows that have ended yield padding; the stream ends with the
    last of them.
    """
    options = max_new_tokens, chunk_size, sharing, cache, segment_size, cache_dtype
    prompt = check_and_pad(model, params, tokens, mask, (policy,), *options)
    sampling = make_sampling(model, prompt.tokens.shape[0], key, temperature, top_k, top_p, min_p, eos_token_ids)
    return (np.array(now.token) for now in decode_prompt(prompt, params, sampling))


def decode_prompt(prompt: Prompt, params: Any, sampling: Sampling) -> Steps:
    """The prompt's `decoding_steps`, once it is read."""
    with beside(params) as placed:
        now = _begin(prompt.model, placed, *prompt.arrays, sampling, prompt.plan)
    return (yield from decoding_steps(prompt.model, params, now, sampling, prompt.plan.max_new_tokens))


def decoding_steps(model: Decoder, params: Any, now: Decoding, sampling: Sampling, max_new_tokens: int) -> Steps:
    """Yields the state that `begin` gave and those of up to `max_new_tokens - 1` steps more; returns the last.

    A state's buffers are rewritten by the next step. Rows are ended from outside by sending which go on, bool [B]:
    `steps.send(going)` ends the others before the next step.
    """
    for step in range(1, max_new_tokens + 1):
        going = yield now
        with beside(params) as placed:
            if going is not None:
                now = now._replace(active=now.active & jnp.asarray(going))
            if step == max_new_tokens or not now.active.any():
                break
            now = advance(model, placed, now, sampling)
    return now


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def _begin(model, params, tokens, mask, past, sampling, plan: Plan):
    logits, (cache,) = read_prompt(model, params, tokens, mask, past, plan)
    return begin(logits, cache, sampling)


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def _generate(model, params, tokens, mask, past, sampling, plan: Plan) -> Generation:
    logits, (cache,) = read_prompt(model, params, tokens, mask, past, plan)
    return _generate_from(model, params, logits, cache, sampling, plan.max_new_tokens)


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def _generate_from(model, params, logits, cache, sampling, max_new_tokens) -> Generation:
    decoded = run_from(model, params, logits, cache, sampling, max_new_tokens)
    return Generation(decoded.tokens, decoded.now.lengths, decoded.now.cache)


def make_sampling(
    model: Decoder, batch: int, key=None, temperature=None, top_k=None, top_p=None, min_p=None, eos_token_ids=None
) -> Sampling:
    """How the tokens of `batch` rows are chosen: the arguments of `generate`, checked."""
    check_sampling(key, temperature, top_k, top_p, min_p)
    keys = row_keys(key, batch)
    if keys is not None and keys.shape != (batch,):
        raise ValueError(f"key has shape {keys.shape}, but there are {batch} prompts: pass one key, or one per prompt")
    eos = check_eos(model, eos_token_ids)
    ends = jnp.asarray(eos, jnp.int32).reshape(-1)
    pad = model.config.pad_token_id
    if pad is None or pad < 0:
        pad = ends[0] if ends.size else 0
    temperature = 1.0 if temperature is None else temperature
    return Sampling(keys, temperature, top_k, top_p, min_p, ends, pad)
