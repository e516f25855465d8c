"""The cache of a model that shares keys: proximal tokens per layer, distant keys once per block."""

from typing import Any, NamedTuple

import einops
import flax.struct
import jax.numpy as jnp
from jax import Array

from restkv_jax import kernels
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.decoder import Layer
from restkv_jax.models.shared_attention import Sharing


@flax.struct.dataclass
class Skips:
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


@flax.struct.dataclass
class SharedCache:
    """Keys and values of a model whose layers share the keys of distant tokens (PoD).

    A token at position `p < sink` has proximal slot `p`, later ones share the other slots as a ring, `recent` long. The
    token that leaves the ring goes over into the distant store: its value in every layer, its key in leaders only.
    Positions of proximal slots follow from the newest one's, so only those of the distant store are kept.

    Attributes:
      keys: [L, B, K, P, D], proximal, after RoPE; `P = sink + recent`, less where no sequence gets that long.
      values: [L, B, K, P, D].
      distant_keys: [R, B, N, D], once per block.
      distant_values: [L, B, K, N, D].
      distant_positions: int32 [R, B, N], -1 where empty.
      kept: int32 [B], distant tokens of the prompt that are held.
      prompt_lengths: int32 [B], tokens of each prompt.
      next_positions: int32 [B], position of the next token.
      skips: where distant tokens may be skipped, else None.
      sharing: static.
    """

    keys: Array
    values: Array
    distant_keys: Array
    distant_values: Array
    distant_positions: Array
    kept: Array
    prompt_lengths: Array
    next_positions: Array
    skips: Skips | None
    sharing: Sharing = flax.struct.field(pytree_node=False)

    importance = None

    @property
    def num_slots(self) -> int:
        """`P + N`."""
        return self.keys.shape[3] + self.distant_keys.shape[2]

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

    def is_full(self) -> Array:
        """bool scalar: some row has no place for another token."""
        return self._is_row_full().any()

    def memory(self, layer: Array) -> "DecodingMemory":
        """What the queries of a layer, int32 scalar, attend to once `append` has put their own pair there."""
        return DecodingMemory(self, layer)

    def slot_positions(self) -> Array:
        """int32 [L, B, K, P + N], position of every slot, -1 where empty."""
        distant = self.distant_positions[jnp.asarray(self.sharing.groups.blocks)]  # [L, K, B, N]
        proximal = self.proximal_positions(self.next_positions - 1)
        proximal = jnp.broadcast_to(proximal[None, :, None], self.keys.shape[:4])
        return jnp.concatenate([proximal, jnp.swapaxes(distant, 1, 2)], axis=-1)

    def proximal_positions(self, newest: Array) -> Array:
        """int32 [B, P], position in every proximal slot once the token at `newest`, int32 [B], is there; else -1."""
        slots = jnp.arange(self.keys.shape[3])
        in_ring = newest[:, None] - (newest[:, None] - slots) % self._ring
        positions = jnp.where(slots < self.sharing.sink, slots, in_ring)
        held = (positions <= newest[:, None]) & (positions >= jnp.minimum(slots, self.sharing.sink))
        return jnp.where(held, positions, -1)

    def append(self, layer: Array, keys: Array, values: Array, active: Array, window: int) -> "SharedCache":
        """Puts one new pair per row and KV head into a layer, in place under jit; the one it displaces goes over.

        Args:
          layer: int32 scalar.
          keys: [B, K, D].
          values: [B, K, D].
          active: bool [B]; rows that are not, or that are full, stay as they are.
          window: not used: nothing is overwritten.

        Returns:
          the next state.
        """
        blocks, leads = self._blocks(layer)
        num_blocks, batch, num_distant, _ = self.distant_keys.shape
        num_kv_heads, proximal = self.keys.shape[2:4]
        newest = self.next_positions
        enters = active & ~self._is_row_full()
        leaves = enters & (newest >= proximal)
        sink = self.sharing.sink
        slot = jnp.where(newest < sink, newest, sink + (newest - sink) % self._ring)
        rows, heads = jnp.arange(batch)[:, None], jnp.arange(num_kv_heads)
        goes_to = jnp.where(leaves, self.distant_lengths, num_distant)[:, None]
        comes_to = jnp.where(enters, slot, proximal)[:, None]
        block = jnp.where(leads, blocks, num_blocks)
        oldest = jnp.broadcast_to((newest - self._ring)[:, None], (batch, num_kv_heads))

        def leaving(array):
            return array[layer, rows, heads, slot[:, None]]

        def put(array, place, new):
            return array.at[place].set(new.astype(array.dtype), mode="drop")

        return self.replace(
            keys=put(self.keys, (layer, rows, heads, comes_to), keys),
            values=put(self.values, (layer, rows, heads, comes_to), values),
            distant_keys=put(self.distant_keys, (block, rows, goes_to), leaving(self.keys)),
            distant_values=put(self.distant_values, (layer, rows, heads, goes_to), leaving(self.values)),
            distant_positions=put(self.distant_positions, (block, rows, goes_to), oldest),
        )

    def note(self, layer: Layer, active: Array) -> "SharedCache":
        """Takes note of what a layer's `DecodingMemory.attend` saw and skipped, in rows that are `active`, bool [B]."""
        if self.skips is None:
            return self
        gates, wanted = layer.noted
        _, leads = self._blocks(layer.index)
        has_distant = active & (self._lengths_after_append() > 0)
        skips = self.skips
        return self.replace(
            skips=Skips(
                gates=jnp.where(leads, gates, skips.gates),
                skipped=skips.skipped + jnp.where(has_distant, (~wanted).sum(-1), 0),
                total=skips.total + jnp.where(has_distant, wanted.shape[-1], 0),
            )
        )

    def wanted(self, layer: Array) -> Array:
        """bool [B, K], whether a layer reads the distant tokens."""
        _, leads = self._blocks(layer)
        if self.skips is None:
            return jnp.ones((self.kept.shape[0], leads.shape[0]), bool)
        return leads | (self.skips.gates < self.sharing.skip_threshold)

    @property
    def _ring(self) -> int:
        return max(self.keys.shape[3] - self.sharing.sink, 1)

    def _blocks(self, layer: Array) -> tuple[Array, Array]:
        """The block of each KV head in a layer, int32 [K], and whether the layer leads it, bool [K]."""
        groups = self.sharing.groups
        return jnp.asarray(groups.blocks)[layer], jnp.asarray(groups.is_leader)[layer]

    def _is_row_full(self) -> Array:
        return (self.next_positions >= self.keys.shape[3]) & (self.distant_lengths >= self.distant_keys.shape[2])

    def _lengths_after_append(self) -> Array:
        return self.distant_lengths + ((self.next_positions >= self.keys.shape[3]) & ~self._is_row_full())


class DecodingMemory(NamedTuple):
    """What one query per row attends to in a layer: its own pair is the newest in the cache."""

    cache: SharedCache
    layer: Array

    def attend(self, queries: Array, query_positions: Array, sliding_window: Array) -> tuple[Array, Any]:
        """Attention of queries [B, H, 1, D] at int32 [B, 1] over proximal tokens, then the distant ones if wanted.

        Returns the output [B, H, 1, D], and for `SharedCache.note` the proximal tokens' share of the attention, the
        least of each group, float32 [B, K], and whether the distant ones were read, bool [B, K].
        """
        cache, layer = self.cache, self.layer
        newest = query_positions[:, 0]
        grouped = einops.rearrange(queries, "b (k g) t d -> b k g t d", k=cache.keys.shape[2])
        positions = cache.proximal_positions(newest)
        seen = (positions >= 0) & (newest[:, None] - positions < sliding_window)
        pairs = cache.keys[layer], cache.values[layer]
        state = kernels.add_keys(kernels.empty_softmax(grouped), grouped, *pairs, seen[:, None, None, None])
        proximal, wanted = state.normaliser(), cache.wanted(layer)
        if cache.distant_keys.shape[2]:
            stores = cache.distant_keys, cache.distant_values, cache.distant_positions
            blocks, lengths = cache._blocks(layer)[0], cache._lengths_after_append()
            state = kernels.read_distant(
                state, grouped, *stores, layer, blocks, lengths, wanted, newest, sliding_window
            )
        gates = jnp.exp(proximal - state.normaliser()).min(axis=(2, 3))
        context = einops.rearrange(state.context(), "b k g t d -> b (k g) t d").astype(queries.dtype)
        return context, (gates, wanted)


def empty_shared_cache(
    config: ModelConfig,
    sharing: Sharing,
    prompt_lengths: Array,
    length: int,
    num_kept: int,
    max_new_tokens: int,
    dtype: Any,
) -> SharedCache:
    """A cache of empty slots, for a prefill to fill.

    Args:
      config: of the model.
      sharing: how its layers share keys.
      prompt_lengths: int32 [B].
      length: tokens of the padded prompts.
      num_kept: slots for distant tokens of the prompt; each row uses as many as it has distant tokens.
      max_new_tokens: slots to reserve for tokens to come.
      dtype: of keys and values.
    """
    layers, heads, dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    batch, blocks = prompt_lengths.shape[0], sharing.groups.num_blocks
    num_proximal = min(sharing.proximal, length + max_new_tokens)
    num_distant = num_kept + min(max_new_tokens, sharing.distant(length + max_new_tokens))
    counts = [jnp.zeros(batch, jnp.int32) for _ in range(2)]
    return SharedCache(
        keys=jnp.zeros((layers, batch, heads, num_proximal, dim), dtype),
        values=jnp.zeros((layers, batch, heads, num_proximal, dim), dtype),
        distant_keys=jnp.zeros((blocks, batch, num_distant, dim), dtype),
        distant_values=jnp.zeros((layers, batch, heads, num_distant, dim), dtype),
        distant_positions=jnp.full((blocks, batch, num_distant), -1, jnp.int32),
        kept=jnp.clip(prompt_lengths - sharing.proximal, 0, num_kept),
        prompt_lengths=prompt_lengths,
        next_positions=prompt_lengths,
        skips=None if sharing.skip_threshold is None else Skips(jnp.zeros((batch, heads), jnp.float32), *counts),
        sharing=sharing,
    )
