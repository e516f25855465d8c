"""The cache of a model that shares keys: proximal tokens per layer, distant keys once per block."""

from typing import Any, NamedTuple, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.caches.base import Cache, check_shape
from restkv_jax.caches.dense import put_pairs
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.kernels.distant import read_distant
from restkv_jax.kernels.pairs import Pairs, Queries, ascending, concatenate, take_places, visible
from restkv_jax.kernels.partition import Parts, divide, each_part, on_mesh, parts_of_mesh, undivide
from restkv_jax.kernels.softmax import read_keys
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.decoder import Decoder, LayerView
from restkv_jax.models.key_groups import Sharing
from restkv_jax.models.memory import SharedMemory, follow


class Skips(flax.struct.PyTreeNode):
    """What skipping needs to know and to report.

    Attributes:
      gates: float32 [B, K], of the running block's leader: the proximal tokens' share of the attention, the least of
        the group's query heads.
      skipped: int32 [B], how often the distant tokens of a layer and KV head were left out.
      total: int32 [B], how often there were any.
    """

    gates: Array
    skipped: Array
    total: Array


class SharedCache(Cache):
    """Keys and values of a model whose layers share the keys of distant tokens (PoD).

    A token at position `p < sink` has proximal slot `p`, later ones share the other slots as a ring, `recent` long. The
    token that leaves the ring goes over into the distant store: its value in every layer, its key in leaders only.
    Positions of proximal slots follow from the newest one's, so only those of the distant store are kept.

    Attributes:
      keys: [L, B, K, P, D], proximal, after RoPE; `P = sink + recent`, less where no sequence gets that long.
      values: [L, B, K, P, D].
      distant_keys: [A, M, B / A, R, N, D], once per block: on a mesh in parts, of the rows at each of `A` places along
        `data` and of the KV heads at each of `M` along `model`, with at most `R` blocks each.
      distant_values: [L, B, K, N, D].
      distant_positions: int32 [A, M, B / A, R, N], -1 where empty.
      kept: int32 [B], distant tokens of the prompt that are held.
      skips: where distant tokens may be skipped, else None.
      sharing: static.
    """

    keys: Array
    values: Array
    distant_keys: Any
    distant_values: Any
    distant_positions: Array
    kept: Array
    skips: Skips | None
    sharing: Sharing = flax.struct.field(pytree_node=False)

    @property
    def num_slots(self) -> int:
        """`P + N`."""
        return self.keys.shape[3] + self.num_distant

    @property
    def num_distant(self) -> int:
        """`N`."""
        return self.distant_positions.shape[4]

    @property
    def num_blocks(self) -> int:
        """`R`."""
        return self.distant_positions.shape[3]

    @property
    def parts(self) -> Parts:
        """How the distant keys are cut."""
        return Parts(*self.distant_positions.shape[:2])

    @property
    def skipped_share(self) -> Array:
        """float32 [B], how often a layer's KV head left its distant tokens out, of all times that it had any."""
        if self.skips is None:
            return jnp.zeros(self.kept.shape, jnp.float32)
        return self.skips.skipped / jnp.maximum(self.skips.total, 1)

    @property
    def distant_lengths(self) -> Array:
        """int32 [B], distant slots in use before the next token comes."""
        proximal = self.keys.shape[3]
        left_ring = jnp.maximum(self.next_positions - proximal, 0) - jnp.maximum(self.prompt_lengths - proximal, 0)
        return self.kept + left_ring

    @property
    def num_places(self) -> int:
        return self.num_slots

    @property
    def dtype(self) -> Any:
        return self.keys.dtype

    @property
    def own_sharing(self) -> Sharing:
        return self.sharing

    @property
    def extending_policy(self) -> EvictionPolicy:
        return EvictionPolicy()

    @property
    def num_tokens(self) -> Array:
        """int32 [B], tokens that are held."""
        return jnp.minimum(self.next_positions, self.keys.shape[3]) + self.distant_lengths

    def room(self) -> Array:
        in_ring = jnp.maximum(self.keys.shape[3] - self.next_positions, 0)
        return (in_ring + self.num_distant - self.distant_lengths).min()

    def start_reading(self, num_new: int) -> Array:
        """The leaders' keys, [B, K, num_places + num_new, D]."""
        *heads, _, dim = self.keys.shape[1:]
        return jnp.zeros((*heads, self.num_places + num_new, dim), self.keys.dtype)

    def memory_beside(self, layer: Array, new: Pairs, carry: Array) -> tuple[SharedMemory, Array]:
        newest = self.next_positions - 1
        ring = Pairs(self.keys[layer], self.values[layer], self.proximal_positions(newest)[:, None])
        together = concatenate(concatenate(self._distant_pairs(layer), ring), new)
        places = ascending(together.positions)
        pairs = Pairs(*(take_places(x, places) for x in together))
        leader_keys = follow(self._blocks(layer)[1], pairs.keys, carry)
        return SharedMemory(pairs, leader_keys, self.sharing.sink, self.sharing.recent), leader_keys

    def _distant_pairs(self, layer: Array) -> Pairs:
        """A layer's values of distant tokens with its leaders' keys, [B, K, N, D]."""

        def of_heads(stores: Any, blocks: Array) -> Any:
            rows = jnp.arange(blocks.shape[0])[:, None]
            return jax.tree.map(lambda store: store[rows, blocks], stores)

        shape = self.kept.shape[0], self.keys.shape[2]
        blocks = divide(jnp.broadcast_to(self._blocks(layer)[0], shape), self.parts)
        stores = each_part(of_heads, (self.distant_keys, self.distant_positions), blocks)
        keys, positions = jax.tree.map(undivide, stores)
        values = jax.tree.map(lambda x: x[layer], self.distant_values)
        return Pairs(self.wide(keys), self.wide(values), positions)

    def memory(self, layer: Array) -> "DecodingMemory":
        return DecodingMemory(self, layer)

    def slot_positions(self) -> Array:
        """int32 [L, B, K, P + N], position of every slot, -1 where empty."""
        groups, parts = self.sharing.groups, self.parts
        part = jnp.arange(groups.num_kv_heads) // (groups.num_kv_heads // parts.heads)
        blocks = jnp.asarray(groups.in_parts(parts.heads)[0])
        distant = self.distant_positions[:, part, :, blocks]  # [L, K, A, b, N]
        distant = jnp.moveaxis(distant.reshape(*blocks.shape, -1, distant.shape[-1]), 1, 2)
        proximal = self.proximal_positions(self.next_positions - 1)
        proximal = jnp.broadcast_to(proximal[None, :, None], self.keys.shape[:4])
        return jnp.concatenate([proximal, distant], axis=-1)

    def row_axes(self) -> "SharedCache | None":
        return None if self.parts.rows > 1 else self._row_axes()

    def _row_axes(self) -> "SharedCache":
        distant_keys = jax.tree.map(lambda x: 2, self.distant_keys)
        axes = jax.tree.map(lambda x: 0 if x.ndim == 1 else 1, self)
        axes = axes.replace(distant_keys=distant_keys, distant_positions=2)
        return axes if self.skips is None else axes.replace(skips=jax.tree.map(lambda x: 0, self.skips))

    def repeat_rows(self, count: int) -> Self:
        return jax.tree.map(lambda axis, x: jnp.repeat(x, count, axis), self._row_axes(), self)

    def check_model(self, model: Decoder) -> None:
        num_layers, _, num_kv_heads, _, dim = self.keys.shape
        check_shape(model, num_layers, num_kv_heads, dim)
        if model.sharing is not None and model.sharing != self.sharing:
            raise ValueError(
                "sharing is not the one that the cache was made with; pass the prefill's, or none: the cache has it"
            )

    def proximal_positions(self, newest: Array) -> Array:
        """int32 [B, P], position in every proximal slot once the token at `newest`, int32 [B], is there; else -1."""
        slots = jnp.arange(self.keys.shape[3])
        in_ring = newest[:, None] - (newest[:, None] - slots) % self._ring
        positions = jnp.where(slots < self.sharing.sink, slots, in_ring)
        held = (positions <= newest[:, None]) & (positions >= jnp.minimum(slots, self.sharing.sink))
        return jnp.where(held, positions, -1)

    def append(self, layer: Array, new: Pairs) -> Self:
        """Puts one new pair per row and KV head into a layer, `T = 1`; the one it displaces goes over."""
        num_kv_heads, num_proximal = self.keys.shape[2:4]
        newest, sink = self.next_positions, self.sharing.sink
        enters = (new.positions[:, 0, 0] >= 0) & ~self._is_row_full()
        leaves = enters & (newest >= num_proximal)
        slot = jnp.where(newest < sink, newest, sink + (newest - sink) % self._ring)

        def of_heads(x: Array) -> Array:
            return jnp.broadcast_to(x[:, None, None], (x.shape[0], num_kv_heads, 1))

        def leaving(array: Array) -> Array:
            return take_places(array[layer], of_heads(slot))

        comes_to = of_heads(jnp.where(enters, slot, num_proximal))
        goes_to = of_heads(jnp.where(leaves, self.distant_lengths, self.num_distant))
        leaves_at = newest - self._ring
        distant_keys, distant_positions = self._put_leaders(layer, goes_to, leaving(self.keys), leaves_at)
        return self.replace(
            keys=put_pairs(self.keys, layer, comes_to, new.keys),
            values=put_pairs(self.values, layer, comes_to, new.values),
            distant_keys=distant_keys,
            distant_values=self.put_values(layer, goes_to, leaving(self.values)),
            distant_positions=distant_positions,
        )

    def _put_leaders(self, layer: Array, slots: Array, keys: Array, positions: Array) -> tuple[Array, Array]:
        """The distant keys and positions with one more, [B, K, 1, D] and int32 [B], where the layer leads."""
        blocks, leads = self._blocks(layer)
        blocks = jnp.broadcast_to(jnp.where(leads, blocks, self.num_blocks), slots.shape[:2])
        positions = jnp.broadcast_to(positions[:, None], slots.shape[:2])
        slots, keys = slots[:, :, 0], keys[:, :, 0]

        def put(stores, blocks, slots, keys, positions):
            where = jnp.arange(slots.shape[0])[:, None], blocks, slots
            return self.put_keys(stores[0], *where, keys), stores[1].at[where].set(positions, mode="drop")

        stores = self.distant_keys, self.distant_positions
        return tuple(each_part(put, stores, *(divide(x, self.parts) for x in (blocks, slots, keys, positions))))

    def observe(self, view: LayerView, memory: "DecodingMemory") -> Self:
        """Takes note of what a layer's `DecodingMemory.attend` saw and skipped."""
        if self.skips is None:
            return self
        gates, is_read = view.aux
        _, leads = self._blocks(view.index)
        has_distant = (view.queries.positions[:, 0] >= 0) & (self._lengths_after_append() > 0)
        skips = self.skips
        return self.replace(
            skips=Skips(
                gates=jnp.where(leads, gates, skips.gates),
                skipped=skips.skipped + jnp.where(has_distant, (~is_read).sum(-1), 0),
                total=skips.total + jnp.where(has_distant, is_read.shape[-1], 0),
            )
        )

    def reads_distant(self, layer: Array) -> Array:
        """bool [B, K], whether a layer reads the distant tokens."""
        _, leads = self._blocks(layer)
        if self.skips is None or self.sharing.skip_threshold is None:
            return jnp.ones((self.kept.shape[0], leads.shape[0]), bool)
        return leads | (self.skips.gates < self.sharing.skip_threshold)

    def wide(self, store: Any) -> Array:
        """Distant keys or values [..., N, D] as they are attended to."""
        return store

    def stored_keys(self, keys: Array) -> Any:
        """Distant keys [..., C, D] of the first slots as they are stored."""
        return keys.astype(self.dtype)

    def stored_values(self, values: Array) -> Any:
        """Distant values [..., C, D] of the first slots as they are stored."""
        return values.astype(self.dtype)

    @staticmethod
    def put_keys(store: Any, rows: Array, blocks: Array, slots: Array, keys: Array) -> Any:
        """One part's distant keys with others, [b, k, D], in slots of blocks, int32 [b, k]; those beyond drop."""
        return store.at[rows, blocks, slots].set(keys.astype(store.dtype), mode="drop")

    def put_values(self, layer: Array, slots: Array, values: Array) -> Any:
        """The distant values with others of a layer, [B, K, 1, D], in slots int32 [B, K, 1]; those beyond drop."""
        return put_pairs(self.distant_values, layer, slots, values)

    @property
    def _ring(self) -> int:
        return max(self.keys.shape[3] - self.sharing.sink, 1)

    def _blocks(self, layer: Array | int) -> tuple[Array, Array]:
        """The block of each KV head in a layer, numbered within its part, int32 [K], and whether the layer leads it."""
        groups = self.sharing.groups
        return jnp.asarray(groups.in_parts(self.parts.heads)[0])[layer], jnp.asarray(groups.is_leader)[layer]

    def _is_row_full(self) -> Array:
        return (self.next_positions >= self.keys.shape[3]) & (self.distant_lengths >= self.num_distant)

    def _lengths_after_append(self) -> Array:
        return self.distant_lengths + ((self.next_positions >= self.keys.shape[3]) & ~self._is_row_full())


class DecodingMemory(NamedTuple):
    """What one query per row attends to in a layer: its own pair is the newest in the cache."""

    cache: SharedCache
    layer: Array

    def attend(self, queries: Queries) -> tuple[Array, tuple[Array, Array]]:
        """Attention of one query per row over proximal tokens, then the distant ones where they are read.

        Returns the context [B, K, G, 1, D], and for `SharedCache.observe` the proximal tokens' share of the attention,
        the least of each group, float32 [B, K], and whether the distant ones were read, bool [B, K].
        """
        cache, layer = self.cache, self.layer
        positions = cache.proximal_positions(queries.positions[:, 0])[:, None]
        seen = visible(queries, positions)[:, :, None]
        state = read_keys(queries, cache.keys[layer], cache.values[layer], seen)
        proximal, is_read = state.normaliser(), cache.reads_distant(layer)
        if cache.num_distant:
            stores = cache.distant_keys, cache.distant_values, cache.distant_positions
            blocks, lengths = cache._blocks(layer)[0], cache._lengths_after_append()
            state = read_distant(state, queries, *stores, layer, blocks, lengths, is_read)
        gates = jnp.exp(proximal - state.normaliser()).min(axis=(2, 3))
        return state.context().astype(queries.vectors.dtype), (gates, is_read)


def empty_shared_cache(
    config: ModelConfig,
    sharing: Sharing,
    lengths: Array,
    num_tokens: Array,
    total: int,
    num_kept: int,
    max_new_tokens: int,
    dtype: Any,
) -> SharedCache:
    """A cache of empty slots, for a reading to fill.

    Args:
      config: of the model.
      sharing: how its layers share keys.
      lengths: int32 [B], tokens of each sequence.
      num_tokens: int32 [B], how many of them there are to keep.
      total: bound on these.
      num_kept: slots for distant tokens that are read; each row uses as many as it has distant tokens.
      max_new_tokens: slots to reserve for tokens to come.
      dtype: of keys and values.
    """
    layers, heads, dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    batch = lengths.shape[0]
    parts = parts_of_mesh(batch, heads)
    _, blocks = sharing.groups.in_parts(parts.heads)
    num_proximal = min(sharing.proximal, total + max_new_tokens)
    num_distant = num_kept + min(max_new_tokens, sharing.distant(total + max_new_tokens))
    counts = [jnp.zeros(batch, jnp.int32) for _ in range(2)]
    in_parts = *parts, batch // parts.rows, blocks, num_distant

    def pairs(slots: int) -> Array:
        return on_mesh(jnp.zeros((layers, batch, heads, slots, dim), dtype), "l b k n d")

    return SharedCache(
        keys=pairs(num_proximal),
        values=pairs(num_proximal),
        distant_keys=on_mesh(jnp.zeros((*in_parts, dim), dtype), "A M o r n d"),
        distant_values=pairs(num_distant),
        distant_positions=on_mesh(jnp.full(in_parts, -1, jnp.int32), "A M o r n"),
        kept=jnp.clip(num_tokens - sharing.proximal, 0, num_kept),
        prompt_lengths=lengths,
        next_positions=lengths,
        skips=None if sharing.skip_threshold is None else Skips(jnp.zeros((batch, heads), jnp.float32), *counts),
        sharing=sharing,
    )
