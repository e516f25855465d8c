"""One decoder for Llama and its relatives; what differs between them is configuration."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.experts import Experts, mix_experts
from restkv_jax.models.key_groups import Sharing
from restkv_jax.models.memory import Memory, PairMemory, SharedMemory, follow
from restkv_jax.models.rope import Rope, apply_rope, grow_with_position, layer_ropes, sequence_lengths
from restkv_jax.models.rules import with_usual_promotion


class LayerView(NamedTuple):
    """What a layer shows of itself to those who keep its state or score its keys.

    `index` int32 scalar; `queries`, those of the last tokens; `output_projection` [K, G, D, M]; `aux`, what the
    memory's `attend` returned besides the context for the last chunk. The projection leads into the residual stream,
    the model's multiplier included; a norm of the attention's output (Gemma, OLMo 2) is not linear, so it is left out.
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


ACTIVATIONS = {"silu": nn.silu, "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True)}


def rms_norm(x: Array, weight: Array, eps: float, adds_one: bool = False) -> Array:
    """`x / sqrt(mean(x^2) + eps) * weight` over the axes of the weight, the last ones (Zhang & Sennrich 2019).

    Computed in float32, but for the weight. With `adds_one` it is `1 + weight`, and that in float32 too (Gemma).
    """
    wide = x.astype(jnp.float32)
    axes = tuple(range(-weight.ndim, 0))
    scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=axes, keepdims=True) + eps)
    if adds_one:
        return (wide * scale * (1 + weight.astype(jnp.float32))).astype(x.dtype)
    return weight * (wide * scale).astype(x.dtype)


def soft_cap(x: Array, cap: float | None) -> Array:
    """`cap tanh(x / cap)`, or `x` without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class DecoderLayer(nn.Module):
    """Attention and gated MLP, normed as the configuration says.

    Parameters carry their axes: `output_projection` is [H, D, M]. `input_norm` and `post_attention_norm`, which Llama
    names so, stand before attention and MLP, `attention_output_norm` and `mlp_output_norm` behind them.
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        init, ones, zeros = nn.initializers.normal(c.initializer_range), nn.initializers.ones, nn.initializers.zeros
        hidden, heads, kv_heads, dim = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        neutral = zeros if c.norm_adds_one else ones

        def norm(name: str, exists: bool, *shape: int) -> Array | None:
            return self.param(name, neutral, shape) if exists else None

        self.input_norm = norm("input_norm", c.norms_before, hidden)
        self.attention_output_norm = norm("attention_output_norm", c.norms_after, hidden)
        self.query_projection = self.param("query_projection", init, (hidden, heads, dim))
        self.key_projection = self.param("key_projection", init, (hidden, kv_heads, dim))
        self.value_projection = self.param("value_projection", init, (hidden, kv_heads, dim))
        self.output_projection = self.param("output_projection", init, (heads, dim, hidden))
        self.post_attention_norm = norm("post_attention_norm", c.norms_before, hidden)
        self.mlp_output_norm = norm("mlp_output_norm", c.norms_after, hidden)
        if c.num_experts is not None:
            self.router = self.param("router", init, (hidden, c.num_experts))
        names = ("gate_projection", "up_projection", "down_projection")
        shapes = (hidden, c.intermediate_size), (hidden, c.intermediate_size), (c.intermediate_size, hidden)
        kind, stack = ("", ()) if c.num_experts is None else ("expert_", (c.num_experts,))
        self.gate_projection, self.up_projection, self.down_projection = (
            self.param(kind + name, init, (*stack, *shape)) for name, shape in zip(names, shapes, strict=True)
        )
        self.query_bias = self.param("query_bias", zeros, (heads, dim)) if c.qkv_bias else 0
        self.key_bias = self.param("key_bias", zeros, (kv_heads, dim)) if c.qkv_bias else 0
        self.value_bias = self.param("value_bias", zeros, (kv_heads, dim)) if c.qkv_bias else 0
        self.output_bias = self.param("output_bias", zeros, (hidden,)) if c.output_bias else 0
        self.gate_bias = self.param("gate_bias", zeros, (c.intermediate_size,)) if c.mlp_bias else 0
        self.up_bias = self.param("up_bias", zeros, (c.intermediate_size,)) if c.mlp_bias else 0
        self.down_bias = self.param("down_bias", zeros, (hidden,)) if c.mlp_bias else 0
        normed_heads = (heads, kv_heads) if c.query_key_norm == "projection" else (1, 1)
        self.query_norm = norm("query_norm", c.query_key_norm is not None, normed_heads[0] * dim)
        self.key_norm = norm("key_norm", c.query_key_norm is not None, normed_heads[1] * dim)

    def queries(self, hidden: Array, positions: Array, rope: Rope) -> Array:
        """[B, T, M] to [B, K, G, T, D], turned by RoPE and times the scale of the logits."""
        projection, bias = (self._grouped(x, "d") for x in (self.query_projection, self.query_bias))
        x = jnp.einsum("btm,mkgd->btkgd", self._norm(hidden, self.input_norm), projection) + bias
        x = einops.rearrange(self._head_norm(x, self.query_norm), "b t k g d -> b k g t d")
        return grow_with_position(self.config, apply_rope(x, positions, rope, self.config.logit_scale), positions)

    def keys(self, hidden: Array, positions: Array, rope: Rope) -> Array:
        """[B, T, M] to [B, K, T, D], turned by RoPE."""
        x = jnp.einsum("btm,mkd->btkd", self._norm(hidden, self.input_norm), self.key_projection) + self.key_bias
        return apply_rope(einops.rearrange(self._head_norm(x, self.key_norm), "b t k d -> b k t d"), positions, rope)

    def values(self, hidden: Array) -> Array:
        """[B, T, M] to [B, K, T, D]."""
        normed = self._norm(hidden, self.input_norm)
        values = jnp.einsum("btm,mkd->btkd", normed, self.value_projection) + self.value_bias
        return einops.rearrange(values, "b t k d -> b k t d")

    def shown_output_projection(self) -> Array:
        """[K, G, D, M], times the multiplier of what goes into the residual stream."""
        projection, multiplier = self._grouped(self.output_projection, "d m"), self.config.residual_multiplier
        return projection if multiplier == 1 else projection * multiplier

    def finish(self, hidden: Array, context: Array) -> Array:
        """Adds the projected context [B, K, G, T, D], and the MLP, to the residual stream [B, T, M]."""
        projected = jnp.einsum("bkgtd,kgdm->btm", context, self._grouped(self.output_projection, "d m"))
        hidden = hidden + self._branch(projected + self.output_bias, self.attention_output_norm)
        return hidden + self._branch(self._mlp(self._norm(hidden, self.post_attention_norm)), self.mlp_output_norm)

    def _mlp(self, x: Array) -> Array:
        c, activation = self.config, ACTIVATIONS[self.config.activation]
        if c.num_experts is not None:
            experts = Experts(self.router, self.gate_projection, self.up_projection, self.down_projection)
            return mix_experts(x, experts, c.num_experts_per_tok, c.norm_topk_prob, activation)
        gate = activation(x @ self.gate_projection + self.gate_bias)
        return (gate * (x @ self.up_projection + self.up_bias)) @ self.down_projection + self.down_bias

    def _branch(self, output: Array, norm: Array | None) -> Array:
        """What the output of attention or MLP adds to the residual stream."""
        normed, multiplier = self._norm(output, norm), self.config.residual_multiplier
        return normed if multiplier == 1 else normed * multiplier

    def _norm(self, x: Array, weight: Array | None) -> Array:
        return x if weight is None else rms_norm(x, weight, self.config.rms_norm_eps, self.config.norm_adds_one)

    def _head_norm(self, x: Array, weight: Array | None) -> Array:
        """Norms heads [B, T, K, ..., D], each or all of a token together."""
        if weight is not None and self.config.query_key_norm == "projection":
            weight = weight.reshape(x.shape[2:])
        return self._norm(x, weight)

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
        neutral = nn.initializers.zeros if c.norm_adds_one else nn.initializers.ones
        self.final_norm = self.param("final_norm", neutral, (c.hidden_size,))
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
        ropes = layer_ropes(c, sequence_lengths(positions))
        batch, length = tokens.shape
        heads = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads

        def layer_step(layer, carry, scanned):
            hidden, leader_keys, state = carry
            index, sliding_window, which_rope = scanned
            rope = ropes.of(which_rope)

            def as_queries(vectors, positions):
                return Queries(vectors, positions, sliding_window, c.attn_logit_softcapping)

            def project(layer, pairs, take, put):
                part, places = take(hidden), take(positions)
                return put(pairs, (layer.keys(part, places, rope), layer.values(part)), axis=2), None

            def attend(layer, carry, take, put):
                hidden, last = carry
                part, places = take(hidden), take(positions)
                vectors = layer.queries(part, places, rope)
                context, aux = memory.attend(as_queries(vectors, places))
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
            queries = as_queries(last, positions[:, -hooks.num_queries :])
            view = LayerView(index, queries, layer.shown_output_projection(), aux)
            return (hidden, leader_keys, hooks.observe(view, memory, state)), None

        scan = nn.scan(
            nn.checkpoint(layer_step, prevent_cse=False) if checkpoint else layer_step,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.num_hidden_layers,
        )
        hidden = self.embedding[tokens]
        if c.embedding_multiplier != 1:
            hidden = hidden * c.embedding_multiplier
        leader_keys = None
        if self.sharing is not None and hooks.make_memory is None:
            leader_keys = jnp.zeros((batch, heads[0], length, c.head_dim), hidden.dtype)
        by_layer = (jnp.asarray(x, jnp.int32) for x in (c.sliding_windows, ropes.layers))
        scanned = jnp.arange(c.num_hidden_layers), *by_layer
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
        c = self.config
        hidden = rms_norm(hidden, self.final_norm, c.rms_norm_eps, c.norm_adds_one)
        unembedding = self.embedding if c.tie_word_embeddings else self.unembedding
        scores = jnp.einsum("...m,vm->...v", hidden, unembedding, preferred_element_type=jnp.float32)
        return soft_cap(scores if c.logits_scaling == 1 else scores / c.logits_scaling, c.final_logit_softcapping)


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
