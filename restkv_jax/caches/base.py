"""What generation asks of a cache, and prefill of what builds one."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.kernels.pairs import Pairs, join_pairs
from restkv_jax.kernels.quantised import Quantisation
from restkv_jax.models.arguments import check_integer
from restkv_jax.models.decoder import Decoder, LayerView
from restkv_jax.models.key_groups import Sharing
from restkv_jax.models.memory import Memory, PairMemory

C = TypeVar("C", bound="Cache")

WHOLE = -1
"""In `row_axes`: the array belongs to all rows."""


class Cache(flax.struct.PyTreeNode):
    """The state of generation, a pytree with all that decoding needs. Nothing mutates: functions return the next one.

    Attributes:
      prompt_lengths: int32 [B], tokens of each sequence when it was last read from, the rest was generated.
      next_positions: int32 [B], position of the next token.
    """

    prompt_lengths: Array
    next_positions: Array

    @property
    def num_slots(self) -> int:
        """Slots per layer, row and KV head, on average and rounded up."""
        raise NotImplementedError

    @property
    def num_places(self) -> int:
        """Most pairs that a layer, row and KV head can hold."""
        return self.num_slots

    @property
    def dtype(self) -> Any:
        """Of keys and values."""
        raise NotImplementedError

    @property
    def quantisation(self) -> Quantisation | None:
        """How pairs are stored; None: as they are."""
        return None

    @property
    def own_sharing(self) -> Sharing | None:
        """How the layers share keys; None where each has its own."""
        return None

    def memory(self, layer: Array) -> Memory:
        """What the queries of a layer, int32 scalar, attend to once `append` has put their own pairs there."""
        raise NotImplementedError

    def append(self, layer: Array, new: Pairs) -> Self:
        """Puts new pairs into a layer, in place under jit.

        Args:
          layer: int32 scalar.
          new: [B, K, T, D], at positions int32 [B, 1, T] that go on from `next_positions`, -1 on padding; what has no
            room is dropped. Caches that overwrite or displace pairs take one at a time, `T = 1`.
        """
        raise NotImplementedError

    def enter(self, layer: Array, new: Pairs) -> tuple[Memory, Self]:
        """Puts new pairs into a layer, and what its queries attend to: these and what was there."""
        cache = self.append(layer, new)
        return cache.memory(layer), cache

    def observe(self, view: LayerView, memory: Any) -> Self:
        """Takes note of what new tokens' queries, those not at position -1, saw in a layer: of nothing."""
        return self

    def advance(self, count: Array) -> Self:
        """The same behind `count` more tokens of each row, int32 [B]."""
        return self.replace(next_positions=self.next_positions + count)

    def room(self) -> Array:
        """int32 scalar: how many more pairs every layer, row and KV head can take."""
        raise NotImplementedError

    def with_room(self, count: int) -> Self:
        """The same with room for `count` more pairs in every layer, row and KV head."""
        raise NotImplementedError(f"{type(self).__name__} does not grow")

    @property
    def extending_policy(self) -> EvictionPolicy | None:
        """What is kept of further tokens where nobody says; None: they are all appended."""
        return None

    def held(self, layer: Array) -> Pairs:
        """All pairs of a layer, [B, K, num_places, D], at positions int32 [B, K, num_places], -1 where empty."""
        raise NotImplementedError(f"{type(self).__name__} cannot be read further into")

    def start_reading(self, num_new: int) -> Any:
        """What `memory_beside` carries through the layers while `num_new` tokens, padding included, are read."""
        return None

    def memory_beside(self, layer: Array, new: Pairs, carry: Any) -> tuple[Memory, Any]:
        """What new tokens attend to in a layer: what is held and, causally, each other; and what is carried on.

        The pairs of the memory are ordered as those of a prompt that is padded on the left: empty places first.
        """
        return PairMemory(join_pairs(self.held(layer), new)), carry

    def slot_positions(self) -> Array:
        """int32 [L, B, K, N], position of every slot, -1 where empty."""
        raise NotImplementedError

    def most_held(self) -> Array:
        """int32 scalar: the most pairs that any layer, row and KV head holds."""
        return (self.slot_positions() >= 0).sum(-1).max()

    def row_axes(self) -> Self | None:
        """The axis of the rows in every array, `WHOLE` where it has none; None if rows cannot be taken apart."""
        return None

    def repeat_rows(self, count: int) -> Self:
        """Every row `count` times, one copy after the other."""
        axes = self.row_axes()
        if axes is None:
            raise NotImplementedError(f"the rows of a {type(self).__name__} cannot be repeated")
        return jax.tree.map(lambda axis, x: x if axis == WHOLE else jnp.repeat(x, count, axis), axes, self)

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
    """Builds a cache while tokens are read; static under jit.

    Attributes:
      model: whose layers are read.
      policy: what to keep.
      length: pairs that every layer shows, those held before and the new ones, empty places and padding included.
      total: bound on the pairs of a sequence once all is read, which sizes follow; at least `length` unless the cache
        that is read onto has empty places.
      max_new_tokens: slots to reserve.
      quantisation: how the cache stores pairs; None leaves them as they are.
    """

    model: Decoder
    policy: EvictionPolicy
    length: int
    total: int
    max_new_tokens: int
    quantisation: Quantisation | None = None

    @staticmethod
    def takes(model: Decoder, policy: EvictionPolicy, length: int) -> bool:
        """Whether this keeper is for a model and a policy at sequences of `length` tokens."""
        raise NotImplementedError

    @property
    def num_queries(self) -> int:
        """How many of each layer's last queries it asks for; it is shown as many as there are new tokens."""
        return self.policy.num_queries(self.length)

    def start(self, past: Cache | None, lengths: Array, dtype: Any) -> Any:
        """What is carried through the layers, before the first.

        Args:
          past: the cache that is read onto.
          lengths: int32 [B], tokens of each sequence, those read before included.
          dtype: of keys and values.
        """
        raise NotImplementedError

    def add(self, state: Any, view: LayerView, memory: Any, known: dict) -> Any:
        """Enters a layer: what its queries attended to, and what other policies know of it, as `judge` does.

        The memory's pairs are ordered by their positions, int32 [B, 1 or K, length], empty places first.
        """
        raise NotImplementedError

    def finish(self, state: Any) -> Cache:
        """The cache, once all layers are in."""
        return state


def kept_positions(cache: Cache) -> Array:
    """Prompt positions still held in every layer and KV head.

    Args:
      cache: as `prefill`, `extend`, `decode_step` or `generate` return it; all that was there when it was last extended
        counts as the prompt.

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


def that_join(caches: Sequence[Cache]) -> list[list[int]]:
    """Indices of caches, those whose rows can be those of one batch together."""
    groups: list[list[int]] = []
    for i, cache in enumerate(caches):
        group = next((group for group in groups if joins(caches[group[0]], cache)), None)
        groups.append([i]) if group is None else group.append(i)
    return groups


def join_rows(caches: Sequence[C]) -> C:
    """The rows of caches that join, as one batch; one alone stays as it is."""
    if len(caches) == 1:
        return caches[0]

    def join(axis: int, *arrays: Array) -> Array:
        return arrays[0] if axis == WHOLE else jnp.concatenate(arrays, axis)

    return jax.tree.map(join, caches[0].row_axes(), *caches)


def repeat_rows(cache: C, count: int) -> C:
    """Copies every row of a cache, to ask several questions about what it holds as one batch.

    Args:
      cache: of `B` rows.
      count: how many of each row there will be.

    Returns:
      a cache of `B * count` rows, in the order of `jnp.repeat`; the one given stays as it is.

    Raises:
      TypeError, ValueError: a count that is not an integer from 1 on.
    """
    check_integer("count", count, 1, "copies of every row")
    return cache.repeat_rows(count)


def split_rows(cache: C, count: int) -> list[C]:
    """The caches that `join_rows` joined."""
    if count == 1:
        return [cache]

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
