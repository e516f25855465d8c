"""Prefill: prompts are read layer by layer, and every layer's pairs go through the policy."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax import kernels
from restkv_jax.caches.blocks import RunningBlocks, empty_shared_state, shared_prefill_functions
from restkv_jax.caches.candidates import Candidates, empty_candidates, offer_layer, share_budget
from restkv_jax.caches.dense import KVCache, empty_cache, write_layer
from restkv_jax.caches.importance import observe_prompt
from restkv_jax.caches.paged import PagedCache
from restkv_jax.caches.shared import SharedCache
from restkv_jax.eviction.layer import evict, judge
from restkv_jax.eviction.methods import full
from restkv_jax.eviction.observation import Observation
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.checks import check_prompt
from restkv_jax.models import STATELESS, Decoder, Layer, Memory, StateFunctions, logits, positions_of
from restkv_jax.models.shared_attention import Sharing, no_leader_keys, with_leaders

CHUNK_SIZE = 1024
"""Prompt tokens whose queries and MLP activations exist at one time."""


Cache = KVCache | PagedCache | SharedCache


def bucket_length(length: int) -> int:
    """The padded length of a prompt: 64, then quarter steps between powers of two (80, 96, 112, 128, 160, ...).

    Prompts are padded to it on the left, so at most four programs are compiled per doubling of the length, and
    at most a fifth of a padded prompt is padding.
    """
    if length <= 64:
        return 64
    step = (1 << (length - 1).bit_length()) // 8
    return -(-length // step) * step


def pad_to_bucket(tokens: Array, mask: Array) -> tuple[Array, Array]:
    """Padded on the left before anything is compiled for their length, so that lengths of one bucket share programs."""
    missing = bucket_length(tokens.shape[1]) - tokens.shape[1]
    tokens, mask = (jnp.pad(x, ((0, 0), (missing, 0))) for x in (tokens, mask))
    return tokens, mask


def prefill(
    model: Decoder,
    params: Any,
    tokens: Array,
    mask: Array | None = None,
    policy: EvictionPolicy | None = None,
    max_new_tokens: int = 64,
    chunk_size: int = CHUNK_SIZE,
    sharing: Sharing | None = None,
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
      policy: what to keep; everything by default.
      max_new_tokens: slots to reserve for tokens to come.
      chunk_size: bound on the tokens of a chunk; the result is the same to rounding.
      sharing: whose keys each layer reads distant tokens by; its own by default. The policy's budget then counts
        distant tokens, of which a block and KV head keeps one set, by the sum of its layers' scores.

    Returns:
      the next token's logits, float32 [B, vocabulary], and the cache.

    Raises:
      ValueError, TypeError: arguments that make no sense, each named.
    """
    policy = full() if policy is None else policy
    tokens, mask = pad_to_bucket(*check_prompt(model, tokens, mask, policy, max_new_tokens, chunk_size, sharing))
    scores, (cache,) = prefill_padded(model, params, tokens, mask, (policy,), max_new_tokens, chunk_size, sharing)
    return scores, cache


def prefill_each(
    model: Decoder,
    params: Any,
    tokens: Array,
    mask: Array | None = None,
    policies: tuple[EvictionPolicy, ...] = (),
    max_new_tokens: int = 64,
    chunk_size: int = CHUNK_SIZE,
    sharing: Sharing | None = None,
) -> tuple[Array, tuple[Cache, ...]]:
    """Reads prompts once and keeps what each of several policies chooses; arguments as for `prefill`.

    Policies that differ in their budgets alone share their scores. The caches of all policies exist together.

    Returns:
      the next token's logits, float32 [B, vocabulary], and a cache for every policy.

    Raises:
      ValueError, TypeError: arguments that make no sense, each named.
    """
    if not policies:
        raise ValueError("policies is empty; pass at least one, such as restkv_jax.full()")
    for policy in policies:
        tokens, mask = check_prompt(model, tokens, mask, policy, max_new_tokens, chunk_size, sharing)
    tokens, mask = pad_to_bucket(tokens, mask)
    return prefill_padded(model, params, tokens, mask, tuple(policies), max_new_tokens, chunk_size, sharing)


def cache_shapes(
    model: Decoder,
    params: Any,
    tokens: Array,
    mask: Array | None = None,
    policy: EvictionPolicy | None = None,
    max_new_tokens: int = 64,
) -> Cache:
    """The cache that `prefill` would return, as shapes and dtypes: nothing is computed or allocated."""

    def shapes(params, tokens, mask):
        return prefill(model, params, tokens, mask, policy, max_new_tokens)[1]

    with warnings.catch_warnings(action="ignore"):
        return jax.eval_shape(shapes, params, tokens, mask)


@functools.partial(jax.jit, static_argnames=("model", "policies", "max_new_tokens", "chunk_size", "sharing"))
def prefill_padded(model, params, tokens, mask, policies, max_new_tokens, chunk_size, sharing=None):
    """The next token's logits, and a cache for every policy."""
    length, dtype = tokens.shape[1], params["embedding"].dtype
    room = mask.sum(1, dtype=jnp.int32), length, max_new_tokens, dtype
    states = tuple(empty_state(model.config, policy, *room, sharing) for policy in policies)
    if sharing is None:
        functions = prefill_functions(policies, length)
    else:
        functions = _shared_functions(sharing, policies, length)
        states = no_leader_keys(model.config, *tokens.shape, dtype), states
    chunk_size = kernels.largest_divisor(length, chunk_size)
    hidden, states = model.apply({"params": params}, tokens, positions_of(mask), functions, states, chunk_size)
    if sharing is not None:
        _, states = states
    each = zip(policies, states, strict=True)
    caches = tuple(finish_state(model.config, policy, state, length, max_new_tokens) for policy, state in each)
    return logits(model, params, hidden[:, -1]), caches


def prefill_functions(policies: tuple[EvictionPolicy, ...], length: int) -> StateFunctions:
    """Queries attend to the whole prompt; then the layer's pairs go through every policy into its state.

    Policies whose scorers and windows agree share their scores, whatever their budgets.
    """
    evicting = [p if p.slots(length) < length else full().replace(window=p.window) for p in policies]

    def revise(layer: Layer, memory: Memory, states: tuple) -> tuple:
        judged = {}

        def keep(policy: EvictionPolicy, applied: EvictionPolicy, state: KVCache | Candidates):
            seen, window = layer.last(applied.num_queries(length)), applied.window_of(length)
            observation = Observation(
                seen.queries, memory.keys, memory.values,
                seen.output_projection, memory.positions, seen.sliding_window, seen.index,
            )  # fmt: skip
            if (applied.scorer, window) not in judged:
                judged[applied.scorer, window] = judge(applied, observation, window)
            if isinstance(state, Candidates):
                return offer_layer(state, applied, observation, judged[applied.scorer, window])
            kept = evict(applied, observation, policy.slots(length), judged=judged[applied.scorer, window])
            state = write_layer(state, layer.index, kept.keys, kept.values, kept.positions)
            if policy.while_generating:
                state = observe_prompt(state, seen, Memory(kept.keys, kept.values, kept.positions), policy)
            return state

        return tuple(map(keep, policies, evicting, states))

    return StateFunctions(STATELESS.remember, revise, max(p.num_queries(length) for p in evicting))


def _shared_functions(sharing: Sharing, policies: tuple[EvictionPolicy, ...], length: int) -> StateFunctions:
    """The functions of `shared_prefill_functions` for a tuple of states, one per policy."""
    functions = [shared_prefill_functions(sharing, policy, length) for policy in policies]

    def revise(layer, memory, states):
        return tuple(each.revise(layer, memory, state) for each, state in zip(functions, states, strict=True))

    most_queries = max(each.num_queries for each in functions)
    return with_leaders(sharing, StateFunctions(STATELESS.remember, revise, most_queries))


def empty_state(
    config, policy: EvictionPolicy, prompt_lengths: Array, length: int, max_new_tokens: int, dtype, sharing=None
):
    """What a prefill of prompts of `length` tokens carries through the layers: the cache, or candidates for it."""
    if sharing is not None:
        return empty_shared_state(config, sharing, policy, prompt_lengths, length, max_new_tokens, dtype)
    if policy.is_ragged(length):
        return empty_candidates(config, policy, prompt_lengths, length, dtype)
    num_slots = policy.slots(length) + max_new_tokens
    if policy.while_generating:
        num_slots = min(num_slots, policy.budget)
    return empty_cache(config, prompt_lengths, num_slots, dtype, policy.while_generating)


def finish_state(config, policy: EvictionPolicy, state: Any, length: int, max_new_tokens: int) -> Cache:
    """The cache that a prefill's state comes to once all layers are done."""
    if isinstance(state, RunningBlocks):
        return state.cache
    if isinstance(state, Candidates):
        return share_budget(state, policy, config, length, max_new_tokens)
    return state
