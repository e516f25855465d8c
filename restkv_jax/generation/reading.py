"""Reading: prompts go through the layers once, and keepers build a cache from every layer's pairs."""

import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from restkv_jax.caches.base import Cache
from restkv_jax.caches.keepers import keeper_of
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.checks import check_model, check_policies, check_prompt
from restkv_jax.kernels.pairs import largest_divisor
from restkv_jax.models.decoder import Decoder, Hooks, LayerView, logits, read
from restkv_jax.models.key_groups import Sharing
from restkv_jax.models.memory import Memory
from restkv_jax.models.mesh import beside
from restkv_jax.models.rules import with_usual_promotion

CHUNK_SIZE = 1024
"""Prompt tokens whose queries and MLP activations exist at one time."""


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

    Returns:
      the next token's logits, float32 [B, vocabulary], and the cache.

    Raises:
      ValueError, TypeError: arguments that make no sense, each named.
    """
    each = prefill_each(model, params, tokens, mask, (policy,), max_new_tokens, chunk_size, sharing)
    logits, (cache,) = each
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
) -> tuple[Array, tuple[Cache, ...]]:
    """Reads prompts once and keeps what each of several policies chooses; arguments as for `prefill`.

    Policies that differ in their budgets alone share their scores. The caches of all policies exist together.

    Returns:
      the next token's logits, float32 [B, vocabulary], and a cache for every policy.

    Raises:
      ValueError, TypeError: arguments that make no sense, each named.
    """
    prompt = check_and_pad(model, params, tokens, mask, policies, max_new_tokens, chunk_size, sharing)
    with beside(params) as params:
        return read_prompt(prompt.model, params, prompt.tokens, prompt.mask, *prompt.options)


class Prompt(NamedTuple):
    """Checked arguments of a reading: tokens int32 [B, T] and mask bool [B, T] of one bucket, and what is static."""

    model: Decoder
    tokens: Array
    mask: Array
    policies: tuple[EvictionPolicy, ...]
    max_new_tokens: int
    chunk_size: int

    @property
    def options(self) -> tuple[tuple[EvictionPolicy, ...], int, int]:
        """Policies, `max_new_tokens` and `chunk_size`."""
        return self[3:]


def check_and_pad(
    model: Decoder,
    params: Any,
    tokens: Any,
    mask: Any,
    policies: Sequence[EvictionPolicy | None],
    max_new_tokens: int,
    chunk_size: int,
    sharing: Sharing | None,
) -> Prompt:
    """Checks what users pass, before anything is compiled; prompts are padded to their bucket, budgets become slots."""
    policies = check_policies(policies)
    model = check_model(model, params, sharing, policies)
    tokens, mask = check_prompt(model, tokens, mask, max_new_tokens, chunk_size)
    tokens, mask = pad_to_bucket(tokens, mask)
    policies = tuple(policy.resolved(tokens.shape[1]) for policy in policies)
    return Prompt(model, tokens, mask, policies, max_new_tokens, chunk_size)


def cache_shapes(
    model: Decoder,
    params: Any,
    tokens: ArrayLike,
    mask: ArrayLike | None = None,
    policy: EvictionPolicy | None = None,
    max_new_tokens: int = 64,
) -> Cache:
    """The cache that `prefill` would return, as shapes and dtypes: nothing is computed or allocated."""

    def shapes(params, tokens, mask):
        return prefill(model, params, tokens, mask, policy, max_new_tokens)[1]

    with warnings.catch_warnings(action="ignore"):
        return jax.eval_shape(shapes, params, tokens, mask)


@functools.partial(jax.jit, static_argnames=("model", "policies", "max_new_tokens", "chunk_size"))
def read_prompt(
    model: Decoder,
    params: Any,
    tokens: Array,
    mask: Array,
    policies: tuple[EvictionPolicy, ...],
    max_new_tokens: int,
    chunk_size: int,
) -> tuple[Array, tuple[Cache, ...]]:
    """The next token's logits, float32 [B, V], and a cache for every policy."""
    length, dtype = tokens.shape[1], params["embedding"].dtype
    keepers = [keeper_of(model, policy, length, max_new_tokens) for policy in policies]

    def observe(view: LayerView, memory: Memory, states: tuple[Any, ...]) -> tuple[Any, ...]:
        scored: dict = {}
        return tuple(k.add(state, view, memory, scored) for k, state in zip(keepers, states, strict=True))

    hooks = Hooks(observe=observe, num_queries=max(keeper.num_queries for keeper in keepers))
    states = tuple(keeper.start(mask.sum(1, dtype=jnp.int32), dtype) for keeper in keepers)
    chunk_size = largest_divisor(length, chunk_size)
    hidden, states = read(model, params, tokens, mask, hooks, states, chunk_size=chunk_size)
    caches = tuple(keeper.finish(state) for keeper, state in zip(keepers, states, strict=True))
    return logits(model, params, hidden[:, -1]), caches
