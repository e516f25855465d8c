"""What generation asks of a cache, and prefill of what builds one."""

from collections.abc import Sequence
from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.decoder import Decoder, LayerView
from restkv_jax.models.memory import Memory

C = TypeVar("C", bound="Cache")

WHOLE = -1
"""In `row_axes`: the array belongs to all rows."""


class Cache(Protocol):
    """The state of generation: a pytree, and all that decoding needs. Nothing mutates."""

    @property
    def prompt_lengths(self) -> Array:
        """int32 [B], tokens of each prompt."""
        ...

    @property
    def next_positions(self) -> Array:
        """int32 [B], position of the next token."""
        ...

    @property
    def num_slots(self) -> int:
        """Slots per layer, row and KV head, on average and rounded up."""
        ...

    def memory(self, layer: Array) -> Memory:
        """What the queries of a layer, int32 scalar, attend to once `append` has put their own pair there."""
        ...

    def append(self, layer: Array, keys: Array, values: Array, active: Array) -> Self:
        """Puts one new pair per row and KV head into a layer, in place under jit.

        Args:
          layer: int32 scalar.
          keys: [B, K, D].
          values: [B, K, D].
          active: bool [B]; rows that are not, or that have no room, stay as they are.
        """
        ...

    def observe(self, view: LayerView, memory: Any, active: Array) -> Self:
        """Takes note of what the queries of a new token, in rows that are `active`, bool [B], saw in a layer."""
        ...

    def is_full(self) -> Array:
        """bool scalar: some layer, row and KV head has no place for another pair."""
        ...

    def slot_positions(self) -> Array:
        """int32 [L, B, K, N], position of every slot, -1 where empty."""
        ...

    def row_axes(self) -> Self | None:
        """The axis of the rows in every array, `WHOLE` where it has none; None if rows cannot be taken apart."""
        ...

    def check_model(self, model: Decoder) -> None:
        """Refuses a model that the cache cannot be of.

        Raises:
          ValueError: says what differs.
        """
        ...

    def check_policy(self, policy: EvictionPolicy) -> None:
        """Refuses a policy that decoding would need to know of and that the cache was not made with.

        Raises:
          ValueError: says what to do.
        """
        ...

    def replace(self, **changes: Any) -> Self:
        """The cache with some fields changed."""
        ...


class Keeper(Protocol):
    """Builds a cache while prompts are read; a frozen dataclass, static under jit.

    `num_queries` of the last tokens of each layer are shown to it.
    """

    def __init__(self, model: Decoder, policy: EvictionPolicy, length: int, max_new_tokens: int): ...

    @staticmethod
    def takes(model: Decoder, policy: EvictionPolicy, length: int) -> bool:
        """Whether this keeper is for a model and a policy at prompts of `length` tokens, padding included."""
        ...

    @property
    def num_queries(self) -> int: ...

    def start(self, prompt_lengths: Array, dtype: Any) -> Any:
        """What is carried through the layers, before the first; `prompt_lengths` int32 [B]."""
        ...

    def add(self, state: Any, view: LayerView, memory: Any, scored: dict) -> Any:
        """Enters a layer: what its queries attended to, and raw scores that policies of one scorer share."""
        ...

    def finish(self, state: Any) -> Cache:
        """The cache, once all layers are in."""
        ...


def kept_positions(cache: Cache) -> Array:
    """Prompt positions still held in every layer and KV head.

    Args:
      cache: as `prefill`, `decode_step` or `generate` return it.

    Returns:
      int32 [L, B, K, N], ascending, then -1 where a slot is empty or holds a generated token.
    """
    positions = cache.slot_positions()
    of_prompt = (positions >= 0) & (positions < cache.prompt_lengths[:, None, None])
    last = jnp.iinfo(jnp.int32).max
    ascending = jnp.sort(jnp.where(of_prompt, positions, last), axis=-1)
    return jnp.where(ascending == last, -1, ascending)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all arrays of the cache; also for the shapes that `jax.eval_shape` returns."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def joins(first: Cache, second: Cache) -> bool:
    """Whether the rows of two caches can be those of one batch: caches of one kind and shape whose rows come apart."""
    return (
        first.row_axes() is not None
        and jax.tree.structure(first) == jax.tree.structure(second)
        and [x.shape for x in jax.tree.leaves(first)] == [x.shape for x in jax.tree.leaves(second)]
    )


def join_rows(caches: Sequence[C]) -> C:
    """The rows of caches that join, as one batch."""

    def join(axis: int, *arrays: Array) -> Array:
        return arrays[0] if axis == WHOLE else jnp.concatenate(arrays, axis)

    return jax.tree.map(join, caches[0].row_axes(), *caches)


def split_rows(cache: C, count: int) -> list[C]:
    """The caches that `join_rows` joined."""

    def part(axis: int, array: Array, i: int) -> Array:
        return array if axis == WHOLE else jnp.split(array, count, axis)[i]

    return [jax.tree.map(lambda axis, x, i=i: part(axis, x, i), cache.row_axes(), cache) for i in range(count)]


def check_shape(config: ModelConfig, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
    """Refuses a model of another shape than a cache's.

    Raises:
      ValueError: says what differs.
    """
    ours = {"num_hidden_layers": num_layers, "num_key_value_heads": num_kv_heads, "head_dim": head_dim}
    for name, value in ours.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"the cache is not of this model: it has {name}={value}, the model {getattr(config, name)}; prefill "
                "with the model that decodes"
            )


def check_unshared(model: Decoder) -> None:
    """Refuses a model that shares keys, for caches that do not.

    Raises:
      ValueError: it does.
    """
    if model.sharing is not None:
        raise ValueError(
            "the cache was made without the model's sharing; prefill with this model, or decode with "
            "model.clone(sharing=None)"
        )


def check_grows(policy: EvictionPolicy) -> None:
    """Refuses a policy that evicts while generating, for caches that do not.

    Raises:
      ValueError: it does.
    """
    if policy.while_generating:
        raise ValueError(
            "policy.while_generating=True, but the cache was made without it; prefill with this policy, or leave it out"
        )
