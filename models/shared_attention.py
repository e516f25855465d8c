"""Attention in which distant tokens are read by another layer's keys (PoD, arXiv 2412.02252)."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.policy import check_integer
from restkv_jax.kernels import shared_key_attention
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.decoder import STATELESS, Decoder, Memory, StateFunctions, positions_of
from restkv_jax.models.key_groups import LayerGroups


@dataclasses.dataclass(frozen=True)
class Sharing:
    """How a model shares keys, static under `jax.jit`.

    For a query at position `q`, proximal are the first `sink` tokens and the last `recent`, `q - recent < p <= q`: the
    layer reads them by its own keys. The rest of the past is distant and read by the leader's. Values are always the
    layer's own, and one softmax goes over both.

    Attributes:
      groups: who leads whom.
      sink: tokens at the beginning whose keys each layer keeps.
      recent: tokens at the end, the newest included, whose keys each layer keeps.
      skip_threshold: while decoding, leaves a layer's distant tokens out where its leader found them unimportant: for
        each row and KV head that is not a leader, if in its leader the proximal tokens held at least this share of
        the attention of every query head of the group. Leaders, and prompts, are read whole. The leader stands for
        the layer because a layer's own share is known only after the distant keys were read, which is what skipping
        saves; blocks are made of layers that attend alike. None never skips.
    """

    groups: LayerGroups
    sink: int = 16
    recent: int = 4080
    skip_threshold: float | None = None

    def __post_init__(self):
        if not isinstance(self.groups, LayerGroups):
            raise TypeError(f"groups={self.groups!r} must be LayerGroups, such as LayerGroups.load(directory) gives")
        check_integer("sink", self.sink, 0, "tokens at the beginning")
        check_integer("recent", self.recent, 1, "a token reads itself by its own layer's key")
        if self.skip_threshold is not None and not 0 <= self.skip_threshold <= 1:
            raise ValueError(f"skip_threshold={self.skip_threshold} must be a share of attention, from 0 to 1")

    @property
    def proximal(self) -> int:
        """Tokens that each layer reads by its own keys, at most."""
        return self.sink + self.recent

    def distant(self, length: int) -> int:
        """Distant tokens of a sequence of `length` as its last token sees them."""
        return max(length - self.proximal, 0)


class SharedMemory(NamedTuple):
    """What the queries of a layer attend to over whole sequences.

    `keys`, `leader_keys`, `values` [B, K, T, D], `positions` int32 [B, T], and the static `sharing`.
    """

    keys: Array
    leader_keys: Array
    values: Array
    positions: Array
    sharing: Sharing

    def attend(self, queries: Array, query_positions: Array, sliding_window: Array) -> tuple[Array, None]:
        """Causal attention of queries [B, H, T, D] at positions int32 [B, T]: [B, H, T, D], and nothing to note."""
        pairs = self.keys, self.leader_keys, self.values
        reach = {"sink": self.sharing.sink, "recent": self.sharing.recent}
        return shared_key_attention(queries, *pairs, query_positions, self.positions, sliding_window, **reach), None


def follow_leaders(sharing: Sharing, index: Array, memory: Memory, leader_keys: Array) -> tuple[SharedMemory, Array]:
    """Gives a layer its leaders' keys, and where it leads, puts its own in their place.

    Args:
      sharing: says who leads.
      index: int32 scalar, the layer.
      memory: its own keys and values.
      leader_keys: [B, K, T, D], those of the running block of every KV head.

    Returns:
      what the layer attends to, and the leaders' keys for the next layer.
    """
    return lead(sharing, jnp.asarray(sharing.groups.is_leader)[index], memory, leader_keys)


def lead(sharing: Sharing, leads: Array, memory: Memory, leader_keys: Array) -> tuple[SharedMemory, Array]:
    """`follow_leaders` with the KV heads that a layer leads given, bool [K]; of `sharing` only the sizes count."""
    leader_keys = jnp.where(leads[None, :, None, None], memory.keys, leader_keys)
    return SharedMemory(memory.keys, leader_keys, memory.values, memory.positions, sharing), leader_keys


def with_leaders(sharing: Sharing, functions: StateFunctions) -> StateFunctions:
    """Takes the leaders' keys through the layers beside a state: for the pair of `no_leader_keys` and the state."""

    def remember(index, memory, carry):
        leader_keys, state = carry
        memory, leader_keys = follow_leaders(sharing, index, memory, leader_keys)
        return memory, (leader_keys, state)

    def revise(layer, memory, carry):
        leader_keys, state = carry
        return leader_keys, functions.revise(layer, memory, state)

    return StateFunctions(remember, revise, functions.num_queries)


def no_leader_keys(config: ModelConfig, batch: int, length: int, dtype: Any) -> Array:
    """The `leader_keys` before the first layer, which leads all."""
    return jnp.zeros((batch, config.num_key_value_heads, length, config.head_dim), dtype)


def hidden_states(
    model: Decoder,
    params: Any,
    tokens: Array,
    sharing: Sharing | None,
    mask: Array | None = None,
    positions: Array | None = None,
    chunk_size: int | None = None,
) -> Array:
    """Hidden states of every token with shared keys, for training: differentiable, layers are recomputed.

    A backward pass stores a layer's input and the leaders' keys, `B T (M + K D)` numbers, and recomputes what is in
    the layer; attention within it stores no probabilities.

    Args:
      model: a `Decoder`.
      params: its parameters.
      tokens: int32 [B, T].
      sharing: who shares; None is plain attention, the reference to compare with.
      mask: bool [B, T], False on left padding.
      positions: int32 [B, T] for RoPE and order, ascending in each row; from the mask if not given.
      chunk_size: tokens per chunk of a layer, a divisor of `T`; None, best for training, takes all at once.

    Returns:
      [B, T, M].

    Raises:
      ValueError: groups of a model of another shape.
    """
    if positions is None:
        positions = positions_of(mask if mask is not None else jnp.ones(tokens.shape, bool))
    functions, state = STATELESS, None
    if sharing is not None:
        sharing.groups.check_model(model.config)
        functions = with_leaders(sharing, functions)
        state = no_leader_keys(model.config, *tokens.shape, params["embedding"].dtype), None
    return model.apply({"params": params}, tokens, positions, functions, state, chunk_size, checkpoint=True)[0]
