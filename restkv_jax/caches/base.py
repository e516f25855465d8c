"""What generation asks of a cache, and prefill of what builds one."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.models.decoder import Decoder, LayerView
from restkv_jax.models.memory import Memory

C = TypeVar("C", bound="Cache")

WHOLE = -1
"""In `row_axes`: the array belongs to all rows."""


class Cache(flax.struct.PyTreeNode):
    """The state of generation, a pytree with all that decoding needs. Nothing mutates: functions return the next one.

    Attributes:
      prompt_lengths: int32 [B], tokens of each prompt.
      next_positions: int32 [B], position of the next token.
    """

    prompt_lengths: Array
    next_positions: Array

    @property
    def num_slots(self) -> int:
        """Slots per layer, row and KV head, on average and rounded up."""
        raise NotImplementedError

    def memory(self, layer: Array) -> Memory:
        """What the queries of a layer, int32 scalar, attend to once `append` has put their own pair there."""
        raise NotImplementedError

    def append(self, layer: Array, keys: Array, values: Array, active: Array) -> Self:
        """Puts one new pair per row and KV head into a layer, in place under jit.

        Args:
          layer: int32 scalar.
          keys: [B, K, D].
          values: [B, K, D].
          active: bool [B]; rows that are not, or that have no room, stay as they are.
        """
        raise NotImplementedError

    def observe(self, view: LayerView, memory: Any, active: Array) -> Self:
        """Takes note of what a new token's queries, in rows that are `active`, bool [B], saw in a layer: of nothing."""
        return self

    def is_full(self) -> Array:
        """bool scalar: some layer, row and KV head has no place for another pair."""
        raise NotImplementedError

    def slot_positions(self) -> Array:
        """int32 [L, B, K, N], position of every slot, -1 where empty."""
        raise NotImplementedError

    def row_axes(self) -> Self | None:
        """The axis of the rows in every array, `WHOLE` where it has none; None if rows cannot be taken apart."""
        return None

    def check_model(self, model: Decoder) -> None:
        """Refuses a model that the cache cannot be of, by a `ValueError` that says what differs."""
        raise NotImplementedError

    def check_policy(self, policy: EvictionPolicy) -> None:
        """Refuses a policy that decoding would have to know of and that the cache was not made with."""
        if policy.while_generating:
            raise ValueError(
                "policy.while_generating=True, but the cache was made without it; prefill with this policy, or leave "
                "it out"
            )


@dataclasses.dataclass(frozen=True)
class Keeper:
    """Builds a cache while prompts of `length` tokens, padding included, are read; static under jit."""

    model: Decoder
    policy: EvictionPolicy
    length: int
    max_new_tokens: int

    @staticmethod
    def takes(model: Decoder, policy: EvictionPolicy, length: int) -> bool:
        """Whether this keeper is for a model and a policy at prompts of `length` tokens."""
        raise NotImplementedError

    @property
    def num_queries(self) -> int:
        """How many of each layer's last queries are shown to it."""
        return self.policy.num_queries(self.length)

    def start(self, prompt_lengths: Array, dtype: Any) -> Any:
        """What is carried through the layers, before the first; `prompt_lengths` int32 [B]."""
        raise NotImplementedError

    def add(self, state: Any, view: LayerView, memory: Any, scored: dict) -> Any:
        """Enters a layer: what its queries attended to, and raw scores that policies of one scorer share."""
        raise NotImplementedError

    def finish(self, state: Any) -> Cache:
        """The cache, once all layers are in."""
        return state


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


def check_shape(model: Decoder, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
    """Refuses a model of another shape than a cache's, by a `ValueError` that says what differs."""
    ours = {"num_hidden_layers": num_layers, "num_key_value_heads": num_kv_heads, "head_dim": head_dim}
    for name, value in ours.items():
        if getattr(model.config, name) != value:
            raise ValueError(
                f"the cache is not of this model: it has {name}={value}, the model {getattr(model.config, name)}; "
                "prefill with the model that decodes"
            )


def check_unshared(model: Decoder) -> None:
    """Refuses a model that shares keys, for caches that do not."""
    if model.sharing is not None:
        raise ValueError(
            "the cache was made without the model's sharing; prefill with this model, or decode with "
            "model.clone(sharing=None)"
        )
