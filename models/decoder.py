"""One decoder for Llama and its relatives; what differs between them is configuration."""

from collections.abc import Callable
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels import attention
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.rope import apply_rope, rope_frequencies, sequence_lengths


class Memory(NamedTuple):
    """What the queries of one layer attend to: keys and values [B, K, N, D], positions int32 [B, N] or [B, K, N]."""

    keys: Array
    values: Array
    positions: Array

    def attend(self, queries: Array, query_positions: Array, sliding_window: Array) -> tuple[Array, None]:
        """Causal attention of queries [B, H, T, D] at positions int32 [B, T]: [B, H, T, D], and nothing to note."""
        return attention(queries, self.keys, self.values, query_positions, self.positions, sliding_window), None


class Layer(NamedTuple):
    """What a layer shows of itself to the functions that keep its state.

    `index` int32 scalar; `queries` [B, H, w, D] of the last tokens and their `positions` int32 [B, w];
    `output_projection` [H, D, M]; `sliding_window` int32 scalar; `noted`, what the memory's `attend` returned besides
    the context, of the last chunk.
    """

    index: Array
    queries: Array
    positions: Array
    output_projection: Array
    sliding_window: Array
    noted: Any = None

    def last(self, count: int) -> "Layer":
        """The same with the last `count` queries only."""
        return self._replace(queries=self.queries[:, :, -count:], positions=self.positions[:, -count:])


class StateFunctions(NamedTuple):
    """How a state goes through the layers: pure functions that the decoder calls once per layer.

    `remember(index, memory, state) -> (memory, state)` takes the new tokens' keys and values and says what the
    queries attend to: a `Memory`, or what else has its `attend`, which may also return arrays for `revise` to see as
    `layer.noted`. `revise(layer, memory, state) -> state` runs after the layer's attention. `num_queries` of the last
    tokens are shown to it.
    """

    remember: Callable[[Array, Memory, Any], tuple[Memory, Any]]
    revise: Callable[[Layer, Memory, Any], Any]
    num_queries: int = 1


STATELESS = StateFunctions(lambda index, memory, state: (memory, state), lambda layer, memory, state: state)
"""Plain causal attention over the tokens given."""


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
        """[B, T, M] to [B, H, T, D], turned by RoPE."""
        return self._project(hidden, self.query_projection, self.query_bias, self.query_norm, positions, rope)

    def keys(self, hidden: Array, positions: Array, rope: tuple[Array, float]) -> Array:
        """[B, T, M] to [B, K, T, D], turned by RoPE."""
        return self._project(hidden, self.key_projection, self.key_bias, self.key_norm, positions, rope)

    def values(self, hidden: Array) -> Array:
        """[B, T, M] to [B, K, T, D]."""
        hidden = rms_norm(hidden, self.input_norm, self.config.rms_norm_eps)
        values = jnp.einsum("btm,mkd->btkd", hidden, self.value_projection) + self.value_bias
        return einops.rearrange(values, "b t k d -> b k t d")

    def finish(self, hidden: Array, context: Array) -> Array:
        """Adds the projected attention output, context [B, H, T, D], and the MLP to the residual stream [B, T, M]."""
        hidden = hidden + jnp.einsum("bhtd,hdm->btm", context, self.output_projection) + self.output_bias
        x = rms_norm(hidden, self.post_attention_norm, self.config.rms_norm_eps)
        gate = nn.silu(x @ self.gate_projection + self.gate_bias)
        return hidden + (gate * (x @ self.up_projection + self.up_bias)) @ self.down_projection + self.down_bias

    def _project(self, hidden, projection, bias, norm, positions, rope):
        hidden = rms_norm(hidden, self.input_norm, self.config.rms_norm_eps)
        x = jnp.einsum("btm,mhd->bthd", hidden, projection) + bias
        if norm is not None:
            x = rms_norm(x, norm, self.config.rms_norm_eps)
        return apply_rope(einops.rearrange(x, "b t h d -> b h t d"), positions, *rope)


class Decoder(nn.Module):
    """The decoder stack: embedding, `num_hidden_layers` scanned `DecoderLayer`s, final norm, unembedding."""

    config: ModelConfig

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
        functions: StateFunctions = STATELESS,
        state: Any = None,
        chunk_size: int | None = None,
        checkpoint: bool = False,
    ) -> tuple[Array, Any]:
        """Runs the layers over the tokens.

        Layers are scanned, and within a layer the tokens go through in chunks: keys and values of all chunks first,
        then queries, attention and MLP chunk by chunk. So besides the residual stream only one layer's keys and
        values exist for the whole prompt.

        Args:
          tokens: int32 [B, T].
          positions: int32 [B, T], -1 for padding.
          functions: how `state` is read and written in each layer.
          state: any pytree, carried through the layers.
          chunk_size: tokens per chunk, a divisor of `T`; None takes the whole sequence at once.
          checkpoint: whether a backward pass recomputes each layer from its input instead of storing what is in it.

        Returns:
          the normed hidden states [B, T, M] and the next state.
        """
        c = self.config
        rope = rope_frequencies(c, sequence_lengths(positions))

        def layer_step(layer, carry, scanned):
            hidden, state = carry
            index, sliding_window = scanned

            batch, length, _ = hidden.shape
            heads, kv_heads, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim

            def project(layer, pairs, take, put):
                part, places = take(hidden), take(positions)
                return put(pairs, (layer.keys(part, places, rope), layer.values(part)), axis=2), None

            def attend(layer, carry, take, put):
                hidden, last = carry
                part, places = take(hidden), take(positions)
                queries = layer.queries(part, places, rope)
                context, noted = memory.attend(queries, places, sliding_window)
                if functions.num_queries == length:
                    last = put(last, queries, axis=2)
                else:
                    last = jnp.concatenate([last, queries], axis=2)[:, :, -functions.num_queries :]
                return (put(hidden, layer.finish(part, context), axis=1), last), noted

            empty = jnp.zeros((batch, kv_heads, length, dim), hidden.dtype)
            (keys, values), _ = _over_chunks(project, layer, (empty, empty), length, chunk_size)
            memory, state = functions.remember(index, Memory(keys, values, positions), state)
            last = jnp.zeros((batch, heads, functions.num_queries, dim), hidden.dtype)
            (hidden, last), noted = _over_chunks(attend, layer, (hidden, last), length, chunk_size)
            last_positions = positions[:, -functions.num_queries :]
            shown = Layer(index, last, last_positions, layer.output_projection, sliding_window, noted)
            return (hidden, functions.revise(shown, memory, state)), None

        scan = nn.scan(
            nn.checkpoint(layer_step, prevent_cse=False) if checkpoint else layer_step,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.num_hidden_layers,
        )
        scanned = jnp.arange(c.num_hidden_layers), jnp.asarray(c.sliding_windows, jnp.int32)
        (hidden, state), _ = scan(self.layers, (self.embedding[tokens], state), scanned)
        return rms_norm(hidden, self.final_norm, c.rms_norm_eps), state

    def logits(self, hidden: Array) -> Array:
        """Scores of the next token, [..., M] to float32 [..., V]."""
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


def hidden_states(
    model: Decoder, params: Any, tokens: Array, mask: Array | None = None, positions: Array | None = None
) -> Array:
    """Hidden states of every token under plain causal attention; differentiable.

    Args:
      model: a `Decoder`.
      params: its parameters.
      tokens: int32 [B, T].
      mask: bool [B, T], False on left padding.
      positions: int32 [B, T] for RoPE and order, ascending in each row; from the mask if not given.

    Returns:
      [B, T, M].
    """
    if positions is None:
        positions = positions_of(mask if mask is not None else jnp.ones(tokens.shape, bool))
    return model.apply({"params": params}, tokens, positions)[0]


def logits(model: Decoder, params: Any, hidden: Array) -> Array:
    """Scores of the next token from hidden states, [..., M] to float32 [..., V]."""
    return model.apply({"params": params}, hidden, method=Decoder.logits)


def positions_of(mask: Array) -> Array:
    """Prompt positions of a left-padded bool mask [B, T]: int32, -1 on padding."""
    return jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1).astype(jnp.int32)
