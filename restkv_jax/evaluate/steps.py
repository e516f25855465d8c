"""The compiled steps of a sweep: a batch is read once for many policies, and answered from what each of them keeps.

Every device does its own rows. What one step leaves to the next, a `Reading`, has an axis of devices in front of every
array, as caches are not all divided along their rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from restkv_jax.caches.base import Cache
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.generating import decode_each
from restkv_jax.generation.reading import prefill_each
from restkv_jax.models.decoder import Decoder

ROWS = P("rows")


class Reading(NamedTuple):
    """The next token's logits, float32 [B, V], and the cache of every policy; a pytree."""

    logits: tuple[Array, ...]
    caches: tuple[Cache, ...]


@functools.partial(jax.jit, static_argnames=("model", "policies", "max_new_tokens", "mesh"))
def read_batch(
    model: Decoder,
    params: Any,
    tokens: Array,
    mask: Array,
    policies: tuple[EvictionPolicy, ...],
    max_new_tokens: int,
    mesh: Mesh,
) -> Reading:
    """Reads prompts, int32 [B, T] with their mask, once for all policies."""

    def alone(params: Any, tokens: Array, mask: Array) -> Reading:
        logits, caches = prefill_each(model, params, tokens, mask, policies, max_new_tokens)
        return _boxed(Reading((logits,) * len(caches), caches))

    return _divided(alone, mesh, 1)(params, tokens, mask)


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "mesh"))
def answer_reading(model: Decoder, params: Any, reading: Reading, max_new_tokens: int, mesh: Mesh) -> Array:
    """What is said after each of the readings, int32 [P, B, max_new_tokens]."""

    def alone(params: Any, reading: Reading) -> Array:
        outs = decode_each(model, params, *_unboxed(reading), max_new_tokens)
        return jnp.stack([out.tokens for out in outs])

    return _divided(alone, mesh, 1, P(None, *ROWS))(params, reading)


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
