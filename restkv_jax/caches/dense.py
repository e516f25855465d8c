"""The key-value cache: a pytree of arrays, the only state of generation."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.caches.paged import PagedCache
from restkv_jax.models import Memory
from restkv_jax.models.config import ModelConfig


@flax.struct.dataclass
class Importance:
    """What a cache needs to evict while generating.

    Attributes:
      scores: float32 [L, B, K, N], moving average of each slot's removal error; NaN until the slot is first seen.
      gram: float32 [L, H, D, D], Gram matrices of the output projection.
    """

    scores: Array
    gram: Array


@flax.struct.dataclass
class KVCache:
    """Kept keys and values of all layers, with `N` slots per layer, row and KV head.

    Attributes:
      keys: [L, B, K, N, D], after RoPE.
      values: [L, B, K, N, D].
      positions: int32 [L, B, K, N], of the token in its sequence; -1 where a slot is empty.
      lengths: int32 [L, B, K], slots in use.
      prompt_lengths: int32 [B], tokens of each prompt.
      next_positions: int32 [B], position of the next token.
      importance: where the cache evicts while generating, else None.
    """

    keys: Array
    values: Array
    positions: Array
    lengths: Array
    prompt_lengths: Array
    next_positions: Array
    importance: Importance | None = None

    @property
    def num_slots(self) -> int:
        """`N`."""
        return self.keys.shape[3]

    def is_full(self) -> Array:
        """bool scalar: some layer, row and KV head has no place for another pair."""
        return (self.lengths >= self.num_slots).any() & (self.importance is None)

    def memory(self, layer: Array) -> Memory:
        """What the queries of a layer, int32 scalar, attend to."""
        return Memory(self.keys[layer], self.values[layer], self.positions[layer])

    def slot_positions(self) -> Array:
        """int32 [L, B, K, N], position of every slot, -1 where empty."""
        return self.positions

    def append(self, layer: Array, keys: Array, values: Array, active: Array, window: int) -> "KVCache":
        """Puts one new pair per row and KV head into a layer, in place under jit.

        The pair takes the first free slot; a full cache that evicts while generating gives it the slot of least
        importance outside the last `window` positions.

        Args:
          layer: int32 scalar.
          keys: [B, K, D].
          values: [B, K, D].
          active: bool [B]; rows that are not stay as they are.
          window: positions that are never overwritten, counted back from the new one.

        Returns:
          the next state.
        """
        used = self.lengths[layer]
        slots = used
        if self.importance is not None:
            positions = self.positions[layer]
            recent = positions > self.next_positions[:, None, None] - window
            candidates = jnp.where(recent, jnp.inf, self.importance.scores[layer])
            slots = jnp.where(used < self.num_slots, used, jnp.argmin(candidates, axis=-1))
        slots = jnp.where(active[:, None], slots, self.num_slots)
        batch, num_kv_heads = slots.shape
        place = layer, jnp.arange(batch)[:, None], jnp.arange(num_kv_heads)[None, :], slots

        def put(array, new):
            return array.at[place].set(new.astype(array.dtype), mode="drop", unique_indices=True)

        importance = self.importance
        if importance is not None:
            importance = importance.replace(scores=put(importance.scores, jnp.full(used.shape, jnp.nan)))
        positions = jnp.broadcast_to(self.next_positions[:, None], used.shape)
        lengths = jnp.where(active[:, None], jnp.minimum(used + 1, self.num_slots), used)
        return self.replace(
            keys=put(self.keys, keys),
            values=put(self.values, values),
            positions=put(self.positions, positions),
            lengths=jax.lax.dynamic_update_index_in_dim(self.lengths, lengths, layer, 0),
            importance=importance,
        )


def empty_cache(config: ModelConfig, prompt_lengths: Array, num_slots: int, dtype, evicts: bool = False) -> KVCache:
    """A cache of empty slots for prompts of the given lengths, int32 [B]; `evicts` gives it an `Importance`."""
    shape = (config.num_hidden_layers, prompt_lengths.shape[0], config.num_key_value_heads, num_slots)
    return KVCache(
        keys=jnp.zeros((*shape, config.head_dim), dtype),
        values=jnp.zeros((*shape, config.head_dim), dtype),
        positions=jnp.full(shape, -1, jnp.int32),
        lengths=jnp.zeros(shape[:3], jnp.int32),
        prompt_lengths=prompt_lengths,
        next_positions=prompt_lengths,
        importance=_empty_importance(config, shape) if evicts else None,
    )


def _empty_importance(config: ModelConfig, shape: tuple[int, ...]) -> Importance:
    gram_shape = config.num_hidden_layers, config.num_attention_heads, config.head_dim, config.head_dim
    return Importance(jnp.full(shape, jnp.nan, jnp.float32), jnp.zeros(gram_shape, jnp.float32))


def write_layer(cache: KVCache, layer: Array, keys: Array, values: Array, positions: Array) -> KVCache:
    """Fills the first `C` slots of one layer: keys and values [B, K, C, D], positions int32 [B, K, C]."""

    def put(array, part):
        return jax.lax.dynamic_update_slice(array, part[None].astype(array.dtype), (layer, *[0] * part.ndim))

    return cache.replace(
        keys=put(cache.keys, keys),
        values=put(cache.values, values),
        positions=put(cache.positions, positions),
        lengths=put(cache.lengths, (positions >= 0).sum(-1)),
    )


ROW_AXIS = {"keys": 1, "values": 1, "positions": 1, "lengths": 1, "prompt_lengths": 0, "next_positions": 0}
"""Where the rows of a batch lie in the arrays of a `KVCache`."""


def join_rows(caches: Sequence[KVCache]) -> KVCache:
    """The rows of caches of one shape, none of which evicts while generating, as one batch."""
    return KVCache(
        **{name: jnp.concatenate([getattr(c, name) for c in caches], axis) for name, axis in ROW_AXIS.items()}
    )


def split_rows(cache: KVCache, count: int) -> list[KVCache]:
    """The caches that `join_rows` joined."""
    parts = {name: jnp.split(getattr(cache, name), count, axis) for name, axis in ROW_AXIS.items()}
    return [KVCache(**dict(zip(parts, each, strict=True))) for each in zip(*parts.values(), strict=True)]


def kept_positions(cache: KVCache | PagedCache) -> Array:
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


def cache_bytes(cache: KVCache | PagedCache) -> int:
    """Bytes of all arrays of the cache; also for the shapes that `jax.eval_shape` returns."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
