"""One pass of tokens through the layers, and what it leaves in a cache."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.caches.base import Cache
from restkv_jax.caches.keepers import keeper_of
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.kernels.pairs import Pairs, largest_divisor
from restkv_jax.kernels.quantised import Quantisation
from restkv_jax.models.config import UNLIMITED
from restkv_jax.models.decoder import Decoder, Hooks, LayerView, logits, positions_of, read
from restkv_jax.models.memory import Memory


class Plan(NamedTuple):
    """What is static about a reading.

    Attributes:
      policies: what to keep, one cache for each; None appends all to the cache that is read onto.
      max_new_tokens: slots to reserve.
      chunk_size: bound on the tokens whose activations exist at one time.
      total: bound on the pairs of a sequence once all is read, which the sizes of new caches follow.
      room: slots that a cache which is appended to has to be given first.
      segment_size: tokens that are read before the next eviction; None reads all at once.
      quantisation: how new caches store pairs; None: as they are.
    """

    policies: tuple[EvictionPolicy | None, ...]
    max_new_tokens: int
    chunk_size: int
    total: int
    room: int = 0
    segment_size: int | None = None
    quantisation: Quantisation | None = None


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def read_prompt(
    model: Decoder, params: Any, tokens: Array, mask: Array, past: Cache | None, plan: Plan
) -> tuple[Array, tuple[Cache, ...]]:
    """Reads tokens as a plan says.

    Args:
      model: a `Decoder`, with the sharing of the cache.
      params: its parameters.
      tokens: int32 [B, T], padded on the left.
      mask: bool [B, T].
      past: what was read before; it stays as it is.
      plan: static.

    Returns:
      the next token's logits, float32 [B, V], and a cache for every policy.
    """
    if plan.segment_size is not None:
        return _read_segments(model, params, tokens, mask, plan)
    if plan.policies == (None,):
        assert past is not None
        logits, cache = append(model, params, tokens, mask, past.with_room(plan.room), plan.chunk_size)
        return logits, (cache.replace(prompt_lengths=cache.next_positions),)
    return _read_whole(model, params, tokens, mask, past, plan)


def _read_whole(
    model: Decoder, params: Any, tokens: Array, mask: Array, past: Cache | None, plan: Plan
) -> tuple[Array, tuple[Cache, ...]]:
    """All tokens at once: keepers build a cache from every layer's pairs, those held and the new ones."""
    batch, num_new = tokens.shape
    before = jnp.zeros(batch, jnp.int32) if past is None else past.next_positions
    length = num_new if past is None else past.num_places + num_new
    sizes = length, plan.total, plan.max_new_tokens, plan.quantisation
    keepers = [keeper_of(model, policy or EvictionPolicy(), *sizes) for policy in plan.policies]

    def make_memory(index: Array, new: Pairs, state: Any) -> tuple[Memory, Any]:
        assert past is not None
        memory, carry = past.memory_beside(index, new, state[0])
        return memory, (carry, state[1])

    def observe(view: LayerView, memory: Memory, state: Any) -> Any:
        known: dict = {}
        return state[0], tuple(k.add(kept, view, memory, known) for k, kept in zip(keepers, state[1], strict=True))

    num_queries = min(max(keeper.num_queries for keeper in keepers), num_new)
    hooks = Hooks(None if past is None else make_memory, observe, num_queries)
    lengths = before + mask.sum(1, dtype=jnp.int32)
    kept = tuple(keeper.start(past, lengths, params["embedding"].dtype) for keeper in keepers)
    state = None if past is None else past.start_reading(num_new), kept
    positions, chunk_size = positions_of(mask, before), largest_divisor(num_new, plan.chunk_size)
    how = {"positions": positions, "chunk_size": chunk_size, "num_last": 1}
    hidden, state = read(model, params, tokens, None, hooks, state, **how)
    caches = tuple(keeper.finish(kept) for keeper, kept in zip(keepers, state[1], strict=True))
    return logits(model, params, hidden[:, -1]), caches


def _read_segments(
    model: Decoder, params: Any, tokens: Array, mask: Array, plan: Plan
) -> tuple[Array, tuple[Cache, ...]]:
    """One segment after the other onto a cache of one shape, so that memory follows the segment and not the prompt."""
    (policy,), size = plan.policies, plan.segment_size
    assert size is not None and policy is not None
    batch, length = tokens.shape
    sizes = plan.total, plan.max_new_tokens, batch, plan.quantisation
    empty = empty_cache(model, params["embedding"].dtype, policy, *sizes)
    appends = policy.budget is None and empty.extending_policy is None
    of_segment = plan._replace(segment_size=None, policies=(None if appends else policy,))

    def step(index: Array, state: tuple[Array, Cache]) -> tuple[Array, Cache]:
        part = [jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1) for x in (tokens, mask)]
        logits, (cache,) = read_prompt(model, params, *part, state[1], of_segment)
        return logits, cache

    first = jnp.argmax(mask.any(0)) // size  # those before are padding in all rows
    nothing = jnp.zeros((batch, model.config.vocab_size), jnp.float32)
    logits, cache = jax.lax.fori_loop(first, length // size, step, (nothing, empty))
    return logits, (cache,)


@functools.partial(
    jax.jit, static_argnames=("model", "dtype", "policy", "total", "max_new_tokens", "batch", "quantisation")
)
def empty_cache(
    model: Decoder,
    dtype: Any,
    policy: EvictionPolicy,
    total: int | None,
    max_new_tokens: int,
    batch: int,
    quantisation: Quantisation | None = None,
) -> Cache:
    """A cache of no tokens, of the kind and size that a policy keeps of sequences of `total` tokens.

    Args:
      model: whose layers it is of.
      dtype: of keys and values.
      policy: with a number of slots for a budget where `total` is None, sequences without end.
      total: bound on the tokens of a sequence.
      max_new_tokens: slots to reserve.
      batch: rows.
      quantisation: how it stores pairs.
    """
    bound = UNLIMITED if total is None else total
    keeper = keeper_of(model, policy, policy.window, bound, max_new_tokens, quantisation)
    return keeper.finish(keeper.start(None, jnp.zeros(batch, jnp.int32), dtype))


def append(
    model: Decoder, params: Any, tokens: Array, mask: Array, cache: Cache, chunk_size: int = 1
) -> tuple[Array, Cache]:
    """Puts tokens int32 [B, T], padded on the left, into a cache: the next logits, float32 [B, V], and the cache."""
    hidden, cache = append_all(model, params, tokens, mask, cache, chunk_size, num_last=1)
    return logits(model, params, hidden[:, -1]), cache


def append_all(
    model: Decoder,
    params: Any,
    tokens: Array,
    mask: Array,
    cache: Cache,
    chunk_size: int = 1,
    num_last: int | None = None,
) -> tuple[Array, Cache]:
    """As `append`, with the last hidden states of the last tokens or all, [B, T, M], for the logits after each."""

    def make_memory(index: Array, new: Pairs, cache: Cache) -> tuple[Memory, Cache]:
        return cache.enter(index, new)

    def observe(view: LayerView, memory: Memory, cache: Cache) -> Cache:
        return cache.observe(view, memory)

    positions, chunk_size = positions_of(mask, cache.next_positions), largest_divisor(tokens.shape[1], chunk_size)
    hooks = Hooks(make_memory, observe)
    how = {"positions": positions, "chunk_size": chunk_size, "num_last": num_last}
    hidden, cache = read(model, params, tokens, None, hooks, cache, **how)
    return hidden, cache.advance(mask.sum(1, dtype=jnp.int32))
