"""The compiled steps of a sweep: a batch is read once for many policies, and answered from what each of them keeps."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.caches.base import Cache, join_rows, split_rows, that_join
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.generating import decode_each
from restkv_jax.generation.passes import append_all
from restkv_jax.generation.reading import CHUNK_SIZE, extend, prefill_each
from restkv_jax.models.decoder import Decoder, logits
from restkv_jax.models.mesh import beside

T = TypeVar("T")


class Reading(NamedTuple):
    """The next token's logits, float32 [B, V], and the cache of every policy; a pytree."""

    logits: tuple[Array, ...]
    caches: tuple[Cache, ...]

    def beside(self, others: "Reading") -> "Reading":
        """That of these policies and others."""
        return Reading(self.logits + others.logits, self.caches + others.caches)

    def after(self, count: int) -> "Reading":
        """Without the first `count` policies."""
        return Reading(self.logits[count:], self.caches[count:])


def read_batch(
    model: Decoder,
    params: Any,
    tokens: Array,
    mask: Array,
    policies: tuple[EvictionPolicy, ...],
    max_new_tokens: int,
    cache_dtype: str | None = None,
) -> Reading:
    """Reads prompts, int32 [B, T] with their mask, once for all policies."""
    logits, caches = prefill_each(model, params, tokens, mask, policies, max_new_tokens, cache_dtype=cache_dtype)
    return Reading((logits,) * len(caches), caches)


def answer_reading(model: Decoder, params: Any, reading: Reading, max_new_tokens: int) -> Array:
    """What is said after each of the readings, int32 [P, B, max_new_tokens]."""
    with beside(params) as params:
        return _answer_reading(model, params, reading, max_new_tokens)


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def _answer_reading(model: Decoder, params: Any, reading: Reading, max_new_tokens: int) -> Array:
    return jnp.stack([out.tokens for out in decode_each(model, params, *reading, max_new_tokens)])


def extend_reading(
    model: Decoder, params: Any, tokens: Array, mask: Array, reading: Reading, max_new_tokens: int
) -> Reading:
    """Reads further tokens, int32 [B, T] with their mask, onto all caches, as `extend` does."""
    with beside(params) as params:
        return _extend_reading(model, params, tokens, mask, reading, max_new_tokens)


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def _extend_reading(
    model: Decoder, params: Any, tokens: Array, mask: Array, reading: Reading, max_new_tokens: int
) -> Reading:
    def step(cache: Cache, count: int) -> list[tuple[Array, Cache]]:
        of_all, mask_of_all = jnp.tile(tokens, (count, 1)), jnp.tile(mask, (count, 1))
        logits, cache = extend(model, params, of_all, mask_of_all, cache, None, max_new_tokens)
        return list(zip(jnp.split(logits, count), split_rows(cache, count), strict=True))

    return Reading(*map(tuple, zip(*_by_group(reading.caches, step), strict=True)))


def divergences_of_reading(model: Decoder, params: Any, tokens: Array, reading: Reading) -> Array:
    """How far what is said after further tokens diverges from the first reading's, float32 [P, B] in nats per token.

    The mean over the tokens, int32 [B, T], of `KL(p_0 || p)`, where `p` is the distribution of the next token once a
    token and those before it were read onto a cache, and `p_0` that of the first cache.
    """
    with beside(params) as params:
        return _divergences_of_reading(model, params, tokens, reading)


@functools.partial(jax.jit, static_argnames="model")
def _divergences_of_reading(model: Decoder, params: Any, tokens: Array, reading: Reading) -> Array:
    def step(cache: Cache, count: int) -> list[Array]:
        return jnp.split(_hidden_after(model, params, jnp.tile(tokens, (count, 1)), cache), count)

    hidden = jnp.stack(_by_group(reading.caches, step))

    def of_token(hidden: Array) -> Array:
        said = jax.nn.log_softmax(logits(model, params, hidden))
        return (jnp.exp(said[0]) * (said[0] - said)).sum(-1)

    return jax.lax.map(of_token, jnp.moveaxis(hidden, 2, 0)).mean(0)


def _hidden_after(model: Decoder, params: Any, tokens: Array, cache: Cache) -> Array:
    """The last hidden states of tokens int32 [B, T] that are read onto a cache as decoding would, [B, T, M]."""
    if cache.extending_policy is None and cache.quantisation is None:
        return append_all(model, params, tokens, jnp.ones(tokens.shape, bool), cache, CHUNK_SIZE)[0]

    def step(cache: Cache, token: Array) -> tuple[Cache, Array]:
        hidden, cache = append_all(model, params, token[:, None], jnp.ones((token.size, 1), bool), cache)
        return cache, hidden[:, 0]

    return jnp.moveaxis(jax.lax.scan(step, cache, tokens.T)[1], 0, 1)


def _by_group(caches: Sequence[Cache], step: Callable[[Cache, int], list[T]]) -> list[T]:
    """What a step gives for every cache; those that join are one, of the rows of as many caches as the step is told."""
    found: dict[int, T] = {}
    for members in that_join(caches):
        chosen = [caches[i] for i in members]
        found |= zip(members, step(join_rows(chosen), len(chosen)), strict=True)
    return [found[i] for i in range(len(caches))]
