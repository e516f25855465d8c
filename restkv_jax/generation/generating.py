"""Generation: prefill, then decode on the small cache."""

import collections
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from restkv_jax.caches.dense import KVCache, join_rows, split_rows
from restkv_jax.caches.importance import observe_token
from restkv_jax.caches.shared import SharedCache
from restkv_jax.eviction.methods import full
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.checks import check_eos, check_prompt, check_sampling, check_token
from restkv_jax.generation.reading import CHUNK_SIZE, Cache, pad_to_bucket, prefill_each, prefill_padded
from restkv_jax.generation.sampling import row_keys, sample
from restkv_jax.models import Decoder, Layer, Memory, StateFunctions, logits
from restkv_jax.models.shared_attention import Sharing


class Generation(NamedTuple):
    """What `generate` returns.

    `tokens` int32 [B, max_new_tokens], padding after the end; `lengths` int32 [B], generated tokens of each row, its
    end-of-sequence token included; `cache`, the final state, without the last token of each row, which was not fed
    back.
    """

    tokens: Array
    lengths: Array
    cache: Cache


class Decoding(NamedTuple):
    """Between two steps: the newest token int32 [B], rows that go on bool [B], the number of steps, the cache."""

    token: Array
    active: Array
    step: Array
    cache: Cache


class Sampling(NamedTuple):
    """How tokens are drawn: random keys [B] (None is greedy), temperature, top_k, top_p, eos ids int32 [E], pad id."""

    keys: Array | None
    temperature: Array | float
    top_k: Array | int | None
    top_p: Array | float | None
    eos_token_ids: Array
    pad_token_id: Array | int


def decode_step(
    model: Decoder,
    params: Any,
    token: Array,
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
      cache: from `prefill` or the step before, made with the same policy.
      policy: the policy of the prefill.
      sharing: that of the prefill; the cache has it, and another one is refused.

    Returns:
      logits, float32 [B, vocabulary], and the next cache.

    Raises:
      ValueError, TypeError: a token of another shape or kind, a full cache, or one made with another sharing.
    """
    policy = full() if policy is None else policy
    token = check_token(model, token, cache)
    if sharing is not None and sharing != getattr(cache, "sharing", None):
        raise ValueError("sharing is not the one that the cache was made with; pass the prefill's, or none")
    return _decode_step(model, params, token, cache, jnp.ones(token.shape, bool), policy)


def generate(
    model: Decoder,
    params: Any,
    tokens: Array,
    mask: Array | None = None,
    policy: EvictionPolicy | None = None,
    max_new_tokens: int = 64,
    *,
    key: Array | None = None,
    temperature: Array | float | None = None,
    top_k: Array | int | None = None,
    top_p: Array | float | None = None,
    eos_token_ids: tuple[int, ...] | None = None,
    chunk_size: int = CHUNK_SIZE,
    sharing: Sharing | None = None,
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
      eos_token_ids: tokens that end a row; the model's own by default.
      chunk_size: bound on the prompt tokens whose activations exist at one time.
      sharing: whose keys each layer reads distant tokens by; see `prefill`.

    Returns:
      a `Generation`.

    Raises:
      ValueError, TypeError: arguments that make no sense, each named.
    """
    policy = full() if policy is None else policy
    tokens, mask = pad_to_bucket(*check_prompt(model, tokens, mask, policy, max_new_tokens, chunk_size, sharing))
    sampling = _sampling(model, tokens.shape[0], key, temperature, top_k, top_p, eos_token_ids)
    return _generate(model, params, tokens, mask, sampling, policy, max_new_tokens, chunk_size, sharing)


def generate_each(
    model: Decoder,
    params: Any,
    tokens: Array,
    mask: Array | None = None,
    policies: tuple[EvictionPolicy, ...] = (),
    max_new_tokens: int = 64,
    *,
    eos_token_ids: tuple[int, ...] | None = None,
    chunk_size: int = CHUNK_SIZE,
    sharing: Sharing | None = None,
) -> tuple[Generation, ...]:
    """Generates greedily with every policy from one reading of the prompts: for comparisons.

    The layers run once; after each, every policy keeps what it chooses. Policies that differ in their budgets share
    their scores, and caches of one size are decoded as the rows of one batch. Each gives what `generate` gives. The
    caches of all policies exist together.

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

    Raises:
      ValueError, TypeError: arguments that make no sense, each named.
    """
    scores, caches = prefill_each(model, params, tokens, mask, policies, max_new_tokens, chunk_size, sharing)
    sampling = _sampling(model, scores.shape[0], None, None, None, None, eos_token_ids)
    together = collections.defaultdict(list)
    for i, (policy, cache) in enumerate(zip(policies, caches, strict=True)):
        joins = isinstance(cache, KVCache) and cache.importance is None
        together[(full(), cache.num_slots) if joins else (policy, i)].append(i)
    outs: list[Any] = [None] * len(policies)
    for (policy, _), members in together.items():
        out = _generate_rows(model, params, scores, [caches[i] for i in members], sampling, policy, max_new_tokens)
        for i, part in zip(members, out, strict=True):
            outs[i] = part
    return tuple(outs)


def _generate_rows(model, params, scores, caches, sampling, policy, max_new_tokens) -> list[Generation]:
    """Decodes from several caches of one shape as the rows of one batch."""
    if len(caches) == 1:
        return [_generate_from(model, params, scores, caches[0], sampling, policy, max_new_tokens)]
    scores = jnp.tile(scores, (len(caches), 1))
    tokens, lengths, cache = _generate_from(model, params, scores, join_rows(caches), sampling, policy, max_new_tokens)
    parts = (jnp.split(x, len(caches)) for x in (tokens, lengths))
    return [Generation(*each) for each in zip(*parts, split_rows(cache, len(caches)), strict=True)]


def stream(
    model: Decoder,
    params: Any,
    tokens: Array,
    mask: Array | None = None,
    policy: EvictionPolicy | None = None,
    max_new_tokens: int = 64,
    *,
    key: Array | None = None,
    temperature: Array | float | None = None,
    top_k: Array | int | None = None,
    top_p: Array | float | None = None,
    eos_token_ids: tuple[int, ...] | None = None,
    chunk_size: int = CHUNK_SIZE,
    sharing: Sharing | None = None,
) -> Iterator[np.ndarray]:
    """Yields tokens as they come, for people who watch: those of `generate`, one int32 numpy array [B] per step.

    Arguments as for `generate`, checked at the call. Rows that have ended yield padding; the stream ends with the
    last of them.
    """
    policy = full() if policy is None else policy
    tokens, mask = pad_to_bucket(*check_prompt(model, tokens, mask, policy, max_new_tokens, chunk_size, sharing))
    sampling = _sampling(model, tokens.shape[0], key, temperature, top_k, top_p, eos_token_ids)

    def steps():
        now = _begin(model, params, tokens, mask, sampling, policy, max_new_tokens, chunk_size, sharing)
        yield np.array(now.token)
        for _ in range(max_new_tokens - 1):
            if not now.active.any():
                return
            now = _advance(model, params, now, sampling, policy)
            yield np.array(now.token)

    return steps()


@functools.partial(jax.jit, static_argnames=("model", "policy"), donate_argnames="cache")
def _decode_step(model, params, token, cache, active, policy):
    positions = cache.next_positions[:, None]
    functions = _decode_functions(policy, active)
    hidden, cache = model.apply({"params": params}, token[:, None], positions, functions, cache)
    cache = cache.replace(next_positions=cache.next_positions + active)
    return logits(model, params, hidden[:, -1]), cache


def _decode_functions(policy: EvictionPolicy, active: Array) -> StateFunctions:
    """The new pair goes into the cache, and the query attends to the cache."""

    def remember(index: Array, new: Memory, cache: Cache):
        cache = cache.append(index, new.keys[:, :, 0], new.values[:, :, 0], active, policy.window)
        return cache.memory(index), cache

    def revise(layer: Layer, memory: Memory, cache: Cache) -> Cache:
        if isinstance(cache, SharedCache):
            return cache.note(layer, active)
        return cache if cache.importance is None else observe_token(cache, layer, memory, active, policy)

    return StateFunctions(remember, revise)


@functools.partial(jax.jit, static_argnames=("model", "policy", "max_new_tokens", "chunk_size", "sharing"))
def _begin(model, params, tokens, mask, sampling, policy, max_new_tokens, chunk_size, sharing) -> Decoding:
    scores, (cache,) = prefill_padded(model, params, tokens, mask, (policy,), max_new_tokens, chunk_size, sharing)
    return _first(scores, cache, sampling)


def _first(scores: Array, cache: Cache, sampling: Sampling) -> Decoding:
    batch = scores.shape[0]
    return _choose(scores, Decoding(jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool), jnp.int32(0), cache), sampling)


@functools.partial(jax.jit, static_argnames=("model", "policy", "max_new_tokens"))
def _generate_from(model, params, scores, cache, sampling, policy, max_new_tokens) -> Generation:
    return _go_on(model, params, _first(scores, cache, sampling), sampling, policy, max_new_tokens)


@functools.partial(jax.jit, static_argnames=("model", "policy"), donate_argnames="now")
def _advance(model, params, now: Decoding, sampling: Sampling, policy) -> Decoding:
    scores, cache = _decode_step(model, params, now.token, now.cache, now.active, policy)
    return _choose(scores, now._replace(cache=cache), sampling)


def _choose(scores: Array, now: Decoding, sampling: Sampling) -> Decoding:
    """Draws the next tokens and ends the rows whose newest token is an end of sequence."""
    keys = sampling.keys
    if keys is not None:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, now.step))(keys)
    chosen = sample(scores, keys, sampling.temperature, sampling.top_k, sampling.top_p)
    token = jnp.where(now.active, chosen, sampling.pad_token_id)
    ended = (chosen[:, None] == sampling.eos_token_ids).any(axis=1)
    return Decoding(token, now.active & ~ended, now.step + 1, now.cache)


@functools.partial(jax.jit, static_argnames=("model", "policy", "max_new_tokens", "chunk_size", "sharing"))
def _generate(model, params, tokens, mask, sampling, policy, max_new_tokens, chunk_size, sharing) -> Generation:
    now = _begin(model, params, tokens, mask, sampling, policy, max_new_tokens, chunk_size, sharing)
    return _go_on(model, params, now, sampling, policy, max_new_tokens)


def _go_on(model, params, now: Decoding, sampling: Sampling, policy, max_new_tokens) -> Generation:
    """Decodes until every row has ended or has `max_new_tokens`, from the state after the first token."""
    batch = now.token.shape[0]
    generated = jnp.full((batch, max_new_tokens), sampling.pad_token_id, jnp.int32).at[:, 0].set(now.token)
    lengths = jnp.ones(batch, jnp.int32)

    def unfinished(carry):
        now, _, _ = carry
        return (now.step < max_new_tokens) & now.active.any()

    def step(carry):
        now, generated, lengths = carry
        lengths = lengths + now.active
        now = _advance(model, params, now, sampling, policy)
        return now, generated.at[:, now.step - 1].set(now.token), lengths

    now, generated, lengths = jax.lax.while_loop(unfinished, step, (now, generated, lengths))
    return Generation(generated, lengths, now.cache)


def _sampling(model, batch, key, temperature, top_k, top_p, eos_token_ids) -> Sampling:
    check_sampling(key, temperature, top_k, top_p)
    keys = row_keys(key, batch)
    if keys is not None and keys.shape != (batch,):
        raise ValueError(f"key has shape {keys.shape}, but there are {batch} prompts: pass one key, or one per prompt")
    eos = check_eos(model, eos_token_ids)
    pad = model.config.pad_token_id
    if pad is None or pad < 0:
        pad = eos[0] if eos else 0
    temperature = 1.0 if temperature is None else temperature
    return Sampling(keys, temperature, top_k, top_p, jnp.asarray(eos, jnp.int32).reshape(-1), pad)
