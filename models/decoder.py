"""One decoder for Llama and its relatives; what differs between them is configuration."""

from collections.abc import Callable
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.key_groups import Sharing
from restkv_jax.models.memory import Memory, PairMemory, SharedMemory, follow
from restkv_jax.models.rope import apply_rope, rope_frequencies, sequence_lengths
from restkv_jax.models.rules import with_usual_promotion


class LayerView(NamedTuple):
    """What a layer shows of itself to those who keep its state or score its keys.

    `index` int32 scalar; `queries`, those of the last tokens; `output_projection` [K, G, D, M]; `aux`, what the
    memory's `attend` returned besides the context for the last chunk.
    """

    index: Array | int
    queries: Queries
    output_projection: Array
    aux: Any = None

    def last(self, count: int) -> "LayerView":
        """The same with the last `count` queries only."""
        return self._replace(queries=self.queries.last(count))


class Hooks(NamedTuple):
    """How a state goes through the layers: pure functions that the decoder calls once per layer.

    `make_memory(index, pairs, state) -> (memory, state)` takes the new tokens' pairs and says what the queries attend
    to; without it, these pairs, as the model's sharing has it. `observe(view, memory, state) -> state` runs after the
    layer's attention; `num_queries` of the last tokens are shown to it.
    """

    make_memory: Callable[[Array, Pairs, Any], tuple[Memory, Any]] | None = None
    observe: Callable[[LayerView, Any, Any], Any] = lambda view, memory, state: state
    num_queries: int = 1


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, computed in float32 (Zhang & Sennrich 2019)."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return weight * (wide * scale).astype(x.dtype)


class DecoderLayer(nn.Module):
    """Pre-norm attention and gated MLP. Parameters carry their axes: `output_projection` is [H, D, M]."""

    config: ModelConfig

    def setup(self):
        c = self.config
        init, ones, zeros = nn.initializers.normal(c.initializer_range), nn.initializers.ones, nn.initializers.zeros
        hidden, heads, kv_heads, dim = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.input_norm = self.param("input_norm", ones, (hidden,))
        self.query_projection = self.param("query_projection", init, (hidden, heads, dim))
        self.key_projection = self.param("key_projection", init, (hidden, kv_heads, dim))
        self.value_projection = self.param("value_projection", init, (hidden, kv_heads, dim))
        self.output_projection = self.param("output_projection", init, (heads, dim, hidden))
        self.post_attention_norm = self.param("post_attention_norm", ones, (hidden,))
        self.gate_projection = self.param("gate_projection", init, (hidden, c.intermediate_size))
        self.up_projection = self.param("up_projection", init, (hidden, c.intermediate_size))
        self.down_projection = self.param("down_projection", init, (c.intermediate_size, hidden))
        self.query_bias = self.param("query_bias", zeros, (heads, dim)) if c.qkv_bias else 0
        self.key_bias = self.param("key_bias", zeros, (kv_heads, dim)) if c.qkv_bias else 0
        self.value_bias = self.param("value_bias", zeros, (kv_heads, dim)) if c.qkv_bias else 0
        self.output_bias = self.param("output_bias", zeros, (hidden,)) if c.output_bias else 0
        self.gate_bias = self.param("gate_bias", zeros, (c.intermediate_size,)) if c.mlp_bias else 0
        self.up_bias = self.param("up_bias", zeros, (c.intermediate_size,)) if c.mlp_bias else 0
        self.down_bias = self.param("down_bias", zeros, (hidden,)) if c.mlp_bias else 0
        self.query_norm = self.param("query_norm", ones, (dim,)) if c.query_key_norm else None
        self.key_norm = self.param("key_norm", ones, (dim,)) if c.query_key_norm else None

    def queries(self, hidden: Array, positions: Array, rope: tuple[Array, float]) -> Array:
        """[B, T, M] to [B, K, G, T, D], turned by RoPE and times the scale of the logits, `1 / sqrt(D)`."""
        projection, bias = (self._grouped(x, "d") for x in (self.query_projection, self.query_bias))
        x = jnp.einsum("btm,mkgd->btkgd", self._normed(hidden), projection) + bias
        x = einops.rearrange(self._head_norm(x, self.query_norm), "b t k g d -> b k g t d")
        frequencies, factor = rope
        return apply_rope(x, positions, frequencies, factor * self.config.head_dim**-0.5)

    def keys(self, hidden: Array, positions: Array, rope: tuple[Array, float]) -> Array:
        """[B, T, M] to [B, K, T, D], turned by RoPE."""
        x = jnp.einsum("btm,mkd->btkd", self._normed(hidden), self.key_projection) + self.key_bias
        return apply_rope(einops.rearrange(self._head_norm(x, self.key_norm), "b t k d -> b k t d"), positions, *rope)

    def values(self, hidden: Array) -> Array:
        """[B, T, M] to [B, K, T, D]."""
        values = jnp.einsum("btm,mkd->btkd", self._normed(hidden), self.value_projection) + self.value_bias
        return einops.rearrange(values, "b t k d -> b k t d")

    def grouped_output_projection(self) -> Array:
        """[K, G, D, M]."""
        return self._grouped(self.output_projection, "d m")

    def finish(self, hidden: Array, context: Array) -> Array:
        """Adds the projected context [B, K, G, T, D], and the MLP, to the residual stream [B, T, M]."""
        projected = jnp.einsum("bkgtd,kgdm->btm", context, self.grouped_output_projection())
        hidden = hidden + projected + self.output_bias
        x = rms_norm(hidden, self.post_attention_norm, self.config.rms_norm_eps)
        gate = nn.silu(x @ self.gate_projection + self.gate_bias)
        return hidden + (gate * (x @ self.up_projection + self.up_bias)) @ self.down_projection + self.down_bias

    def _normed(self, hidden: Array) -> Array:
        return rms_norm(hidden, self.input_norm, self.config.rms_norm_eps)

    def _head_norm(self, x: Array, weight: Array | None) -> Array:
        return x if weight is None else rms_norm(x, weight, self.config.rms_norm_eps)

    def _grouped(self, x: Any, after: str) -> Any:
        """Divides the axis of the query heads by KV heads; a bias that is not there stays so."""
        if isinstance(x, int):
            return x
        pattern = f"... (k g) {after} -> ... k g {after}"
        return einops.rearrange(x, pattern, k=self.config.num_key_value_heads)


class Decoder(nn.Module):
    """The decoder stack: embedding, `num_hidden_layers` scanned `DecoderLayer`s, final norm, unembedding."""

    config: ModelConfig
    sharing: Sharing | None = None

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        self.embedding = self.param("embedding", init, (c.vocab_size, c.hidden_size))
        self.layers = DecoderLayer(c)
        self.final_norm = self.param("final_norm", nn.initializers.ones, (c.hidden_size,))
        if not c.tie_word_embeddings:
            self.unembedding = self.param("unembedding", init, (c.vocab_size, c.hidden_size))

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        hooks: Hooks = Hooks(),  # noqa: B008
        state: Any = None,
        chunk_size: int | None = None,
        checkpoint: bool = False,
    ) -> tuple[Array, Any]:
        """Runs the layers over the tokens.

        Layers are scanned, and within a layer the tokens go through in chunks: keys and values of all chunks first,
        then queries, attention and MLP chunk by chunk. So besides the residual stream only one layer's keys and
        values exist for the whole prompt, and with a sharing those of the leaders.

        Args:
          tokens: int32 [B, T].
          positions: int32 [B, T], -1 for padding.
          hooks: how `state` is read and written in each layer.
          state: any pytree, carried through the layers.
          chunk_size: tokens per chunk, a divisor of `T`; None takes the whole sequence at once.
          checkpoint: whether a backward pass recomputes each layer from its input instead of storing what is in it.

        Returns:
          the residual stream before the final norm, [B, T, M], and the next state.
        """
        c = self.config
        rope = rope_frequencies(c, sequence_lengths(positions))
        batch, length = tokens.shape
        heads = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads

        def layer_step(layer, carry, scanned):
            hidden, leader_keys, state = carry
            index, sliding_window = scanned

            def project(layer, pairs, take, put):
                part, places = take(hidden), take(positions)
                return put(pairs, (layer.keys(part, places, rope), layer.values(part)), axis=2), None

            def attend(layer, carry, take, put):
                hidden, last = carry
                part, places = take(hidden), take(positions)
                vectors = layer.queries(part, places, rope)
                context, aux = memory.attend(Queries(vectors, places, sliding_window))
                if hooks.num_queries == length:
                    last = put(last, vectors, axis=3)
                else:
                    last = jnp.concatenate([last, vectors], axis=3)[:, :, :, -hooks.num_queries :]
                return (put(hidden, layer.finish(part, context), axis=1), last), aux

            empty = jnp.zeros((batch, heads[0], length, c.head_dim), hidden.dtype)
            (keys, values), _ = _over_chunks(project, layer, (empty, empty), length, chunk_size)
            pairs = Pairs(keys, values, positions[:, None])
            if hooks.make_memory is not None:
                memory, state = hooks.make_memory(index, pairs, state)
            else:
                memory, leader_keys = self._own_memory(index, pairs, leader_keys)
            last = jnp.zeros((batch, *heads, hooks.num_queries, c.head_dim), hidden.dtype)
            (hidden, last), aux = _over_chunks(attend, layer, (hidden, last), length, chunk_size)
            queries = Queries(last, positions[:, -hooks.num_queries :], sliding_window)
            view = LayerView(index, queries, layer.grouped_output_projection(), aux)
            return (hidden, leader_keys, hooks.observe(view, memory, state)), None

        scan = nn.scan(
            nn.checkpoint(layer_step, prevent_cse=False) if checkpoint else layer_step,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.num_hidden_layers,
        )
        hidden = self.embedding[tokens]
        leader_keys = None
        if self.sharing is not None and hooks.make_memory is None:
            leader_keys = jnp.zeros((batch, heads[0], length, c.head_dim), hidden.dtype)
        scanned = jnp.arange(c.num_hidden_layers), jnp.asarray(c.sliding_windows, jnp.int32)
        (hidden, _, state), _ = scan(self.layers, (hidden, leader_keys, state), scanned)
        return hidden, state

    def _own_memory(self, index: Array, pairs: Pairs, leader_keys: Array | None) -> tuple[Memory, Array | None]:
        """What queries attend to over the tokens given, and the leaders' keys for the next layer."""
        if self.sharing is None or leader_keys is None:
            return PairMemory(pairs), leader_keys
        leads = jnp.asarray(self.sharing.groups.is_leader)[index]
        leader_keys = follow(leads, pairs.keys, leader_keys)
        return SharedMemory(pairs, leader_keys, self.sharing.sink, self.sharing.recent), leader_keys

    def logits(self, hidden: Array) -> Array:
        """Logits of the next token from the residual stream, normed here: [..., M] to float32 [..., V]."""
        hidden = rms_norm(hidden, self.final_norm, self.config.rms_norm_eps)
        unembedding = self.embedding if self.config.tie_word_embeddings else self.unembedding
        return jnp.einsum("...m,vm->...v", hidden, unembedding, preferred_element_type=jnp.float32)


def _over_chunks(function, layer: DecoderLayer, carry: Any, length: int, chunk_size: int | None) -> tuple[Any, Any]:
    """Takes a carry through the chunks of a sequence, in place where it is only overwritten.

    `function(layer, carry, take, put)` returns the next carry and a note; `take(x)` is the current chunk of x, whose
    tokens are axis 1, and `put(whole, part, axis)` writes the chunk's part into arrays of the whole sequence.
    Returns the last carry and the last note.
    """
    if chunk_size is None or chunk_size >= length:
        return function(layer, carry, lambda x: x, lambda whole, part, axis: part)

    def step(layer, carry, start):
        def take(x):
            return jax.lax.dynamic_slice_in_dim(x, start, chunk_size, axis=1)

        def put(whole, part, axis):
            return jax.tree.map(lambda w, p: jax.lax.dynamic_update_slice_in_dim(w, p, start, axis), whole, part)

        return function(layer, carry, take, put)

    scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
    carry, notes = scan(layer, carry, jnp.arange(0, length, chunk_size))
    return carry, jax.tree.map(lambda note: note[-1], notes)


@with_usual_promotion
def read(
    model: Decoder,
    params: Any,
    tokens: Array,
    mask: Array | None = None,
    hooks: Hooks = Hooks(),  # noqa: B008
    state: Any = None,
    *,
    positions: Array | None = None,
    chunk_size: int | None = None,
    checkpoint: bool = False,
) -> tuple[Array, Any]:
    """Runs the layers over whole sequences with the model's own attention, that of its sharing if it has one.

    Differentiable. With `checkpoint` a backward pass stores a layer's input, and the leaders' keys, and recomputes what
    is in the layer; attention within it stores no probabilities.

    Args:
      model: a `Decoder`.
      params: its parameters.
      tokens: int32 [B, T].
      mask: bool [B, T], False on left padding; None if there is none.
      hooks: what to do with a `state` in each layer; nothing by default.
      state: any pytree.
      positions: int32 [B, T] for RoPE and order, ascending in each row; from the mask if not given.
      chunk_size: tokens whose activations exist at one time, a divisor of `T`; all by default.
      checkpoint: whether a backward pass recomputes each layer.

    Returns:
      the residual stream before the final norm, [B, T, M], for `logits`; and the state.

    Raises:
      ValueError: groups of a model of another shape.
    """
    if model.sharing is not None:
        model.sharing.groups.check_model(model.config)
    if positions is None:
        positions = positions_of(mask if mask is not None else jnp.ones(tokens.shape, bool))
    arguments: Any = positions, hooks, state, chunk_size, checkpoint
    found: Any = model.apply({"params": params}, tokens, *arguments)
    return found


@with_usual_promotion
def logits(model: Decoder, params: Any, hidden: Array) -> Array:
    """Logits of the next token from the residual stream, [..., M] to float32 [..., V]."""
    found: Any = model.apply({"params": params}, hidden, method=Decoder.logits)
    return found


def positions_of(mask: Array) -> Array:
    """Prompt positions of a left-padded bool mask [B, T]: int32, -1 on padding."""
    return jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1).astype(jnp.int32)
