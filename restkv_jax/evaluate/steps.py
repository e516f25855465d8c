"""The compiled steps of a sweep: a batch is read once for many policies, and answered from what each of them keeps.

Every device does its own rows. What one step leaves to the next, a `Reading`, has an axis of devices in front of every
array, as caches are not all divided along their rows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from restkv_jax.caches.base import Cache, join_rows, split_rows, that_join
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.generating import decode_each
from restkv_jax.generation.passes import append_all
from restkv_jax.generation.reading import CHUNK_SIZE, extend, prefill_each
from restkv_jax.models.decoder import Decoder, logits

T = TypeVar("T")

ROWS = P("rows")


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


@functools.partial(jax.jit, static_argnames=("model", "policies", "max_new_tokens", "mesh", "cache_dtype"))
def read_batch(
    model: Decoder,
    params: Any,
    tokens: Array,
    mask: Array,
    policies: tuple[EvictionPolicy, ...],
    max_new_tokens: int,
    mesh: Mesh,
    cache_dtype: str | None = None,
) -> Reading:
    """Reads prompts, int32 [B, T] with their mask, once for all policies."""

    def alone(params: Any, tokens: Array, mask: Array) -> Reading:
        logits, caches = prefill_each(model, params, tokens, mask, policies, max_new_tokens, cache_dtype=cache_dtype)
        return _boxed(Reading((logits,) * len(caches), caches))

    return _divided(alone, mesh, 1)(params, tokens, mask)


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "mesh"))
def answer_reading(model: Decoder, params: Any, reading: Reading, max_new_tokens: int, mesh: Mesh) -> Array:
    """What is said after each of the readings, int32 [P, B, max_new_tokens]."""

    def alone(params: Any, reading: Reading) -> Array:
        outs = decode_each(model, params, *_unboxed(reading), max_new_tokens)
        return jnp.stack([out.tokens for out in outs])

    return _divided(alone, mesh, 1, P(None, *ROWS))(params, reading)


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "mesh"))
def extend_reading(
    model: Decoder, params: Any, tokens: Array, mask: Array, reading: Reading, max_new_tokens: int, mesh: Mesh
) -> Reading:
    """Reads further tokens, int32 [B, T] with their mask, onto all caches, as `extend` does."""

    def alone(params: Any, tokens: Array, mask: Array, reading: Reading) -> Reading:
        def step(cache: Cache, count: int) -> list[tuple[Array, Cache]]:
            of_all, mask_of_all = jnp.tile(tokens, (count, 1)), jnp.tile(mask, (count, 1))
            logits, cache = extend(model, params, of_all, mask_of_all, cache, None, max_new_tokens)
            caches = [cache] if count == 1 else split_rows(cache, count)
            return list(zip(jnp.split(logits, count), caches, strict=True))

        found = _by_group(_unboxed(reading).caches, step)
        return _boxed(Reading(*map(tuple, zip(*found, strict=True))))

    return _divided(alone, mesh, 1)(params, tokens, mask, reading)


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def divergences_of_reading(model: Decoder, params: Any, tokens: Array, reading: Reading, mesh: Mesh) -> Array:
    """How far what is said after further tokens diverges from the first reading's, float32 [P, B] in nats per token.

    The mean over the tokens, int32 [B, T], of `KL(p_0 || p)`, where `p` is the distribution of the next token once a
    token and those before it were read onto a cache, and `p_0` that of the first cache.
    """

    def alone(params: Any, tokens: Array, reading: Reading) -> Array:
        def step(cache: Cache, count: int) -> list[Array]:
            return jnp.split(_hidden_after(model, params, jnp.tile(tokens, (count, 1)), cache), count)

        hidden = jnp.stack(_by_group(_unboxed(reading).caches, step))

        def of_token(hidden: Array) -> Array:
            said = jax.nn.log_softmax(logits(model, params, hidden))
            return (jnp.exp(said[0]) * (said[0] - said)).sum(-1)

        return jax.lax.map(of_token, jnp.moveaxis(hidden, 2, 0)).mean(0)

    return _divided(alone, mesh, 1, P(None, *ROWS))(params, tokens, reading)


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
        joined = chosen[0] if len(chosen) == 1 else join_rows(chosen)
        found |= zip(members, step(joined, len(chosen)), strict=True)
    return [found[i] for i in range(len(caches))]


def cache_of_first(reading: Reading, index: int) -> Cache:
    """The cache of a policy as the first device has it."""
    return jax.tree.map(lambda x: x[0], reading.caches[index])


def _divided(alone: Callable[..., Any], mesh: Mesh, num_whole: int, out_specs: P = ROWS) -> Callable[..., Any]:
    """A step that every device does with its rows of all but the first `num_whole` arguments."""

    def divided(*args: Any) -> Any:
        in_specs = (P(),) * num_whole + (ROWS,) * (len(args) - num_whole)
        return jax.shard_map(alone, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)

    return divided


def _boxed(reading: Reading) -> Reading:
    return jax.tree.map(lambda x: x[None], reading)


def _unboxed(reading: Reading) -> Reading:
    return jax.tree.map(lambda x: x[0], reading)
