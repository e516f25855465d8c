"""One decoder for Llama and its relatives; what differs between them is configuration."""

from collections.abc import Callable
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.partition import layer_parts, on_mesh
from restkv_jax.kernels.softmax import cap_logits
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.key_groups import Sharing
from restkv_jax.models.layer import DecoderLayer, rms_norm
from restkv_jax.models.memory import Memory, PairMemory, SharedMemory, follow
from restkv_jax.models.rope import Rope, layer_ropes, sequence_lengths
from restkv_jax.models.rules import with_usual_promotion


class LayerView(NamedTuple):
    """What a layer shows of itself to those who keep its state or score its keys.

    `index` int32 scalar; `queries`, those of the last tokens; `output_projection` [K, G, D, M]; `aux`, what the
    memory's `attend` returned besides the context for the last chunk; `rope`, which turned queries and keys, None where
    nothing did. The projection leads into the residual stream, the model's multiplier included; a norm of the
    attention's output (Gemma, OLMo 2) is not linear, so it is left out.
    """

    index: Array | int
    queries: Queries
    output_projection: Array
    aux: Any = None
    rope: Rope | None = None

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
        num_last: int | None = None,
    ) -> tuple[Array, Any]:
        """Runs the layers over the tokens.

        Layers are scanned, and within a layer the tokens go through in chunks: keys and values of all chunks first,
        then queries, attention and MLP chunk by chunk. So besides the residual stream only one layer's keys and
        values exist for the whole prompt, and with a sharing those of the leaders. On a mesh the tokens of a chunk's
        residual stream are divided like a layer (Korthikanti et al. 2022, sequence parallelism).

        Args:
          tokens: int32 [B, T].
          positions: int32 [B, T], -1 for padding.
          hooks: how `state` is read and written in each layer.
          state: any pytree, carried through the layers.
          chunk_size: tokens per chunk, a divisor of `T`; None takes the whole sequence at once.
          checkpoint: whether a backward pass recomputes each layer from its input instead of storing what is in it.
          num_last: how many of the last tokens to return the residual stream of, at most a chunk; None: of all.

        Returns:
          the residual stream before the final norm, [B, T, M], and the next state.
        """
        c = self.config
        ropes = layer_ropes(c, sequence_lengths(positions))
        batch, length = tokens.shape
        chunk_size = length if chunk_size is None else min(chunk_size, length)
        num_chunks = length // chunk_size
        tokens_of, positions_of = (_in_chunks(x, num_chunks) for x in (tokens, positions))
        # gathered once for keys, values and queries, though these then stand in memory for the whole prompt
        queries_first = num_chunks > 1 and layer_parts() > 1
        heads = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads

        def layer_step(layer, carry, scanned):
            hidden, leader_keys, state = carry
            index, sliding_window, which_rope = scanned
            rope = ropes.of(which_rope)

            def as_queries(vectors, positions):
                return Queries(vectors, positions, sliding_window, c.attn_logit_softcapping, c.widest_window)

            def project(layer, projected, chunk):
                part, places = on_mesh(hidden[chunk], "b c m"), positions_of[chunk]
                found = layer.keys(part, places, rope), layer.values(part)
                if queries_first:
                    found = *found, layer.queries(part, places, rope)
                return tuple(_put(whole, x, chunk) for whole, x in zip(projected, found, strict=True)), None

            def attend(layer, carry, chunk):
                hidden, last = carry
                part, places = hidden[chunk], positions_of[chunk]
                if queries_first:
                    vectors = jax.lax.dynamic_slice_in_dim(queries_of[0], chunk * chunk_size, chunk_size, axis=-2)
                else:
                    vectors = layer.queries(on_mesh(part, "b c m"), places, rope)
                context, aux = memory.attend(as_queries(vectors, places))
                if hooks.num_queries == length:
                    last = _put(last, vectors, chunk)
                else:
                    last = jnp.concatenate([last, vectors], axis=3)[:, :, :, -hooks.num_queries :]
                return (hidden.at[chunk].set(layer.finish(part, context)), last), aux

            empty = on_mesh(jnp.zeros((batch, heads[0], length, c.head_dim), hidden.dtype), "b k n d")
            projected = empty, empty
            if queries_first:
                of_heads = jnp.zeros((batch, *heads, length, c.head_dim), hidden.dtype)
                projected = *projected, on_mesh(of_heads, "b k g n d")
            (keys, values, *queries_of), _ = _over_chunks(project, layer, projected, num_chunks)
            pairs = Pairs(keys, values, positions[:, None])
            if hooks.make_memory is not None:
                memory, state = hooks.make_memory(index, pairs, state)
            else:
                memory, leader_keys = self._own_memory(index, pairs, leader_keys)
            last = jnp.zeros((batch, *heads, hooks.num_queries, c.head_dim), hidden.dtype)
            (hidden, last), aux = _over_chunks(attend, layer, (hidden, last), num_chunks)
            queries = as_queries(last, positions[:, -hooks.num_queries :])
            view = LayerView(index, queries, layer.shown_output_projection(), aux, rope)
            return (hidden, leader_keys, hooks.observe(view, memory, state)), None

        scan = nn.scan(
            nn.checkpoint(layer_step, prevent_cse=False) if checkpoint else layer_step,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.num_hidden_layers,
            check_constancy_invariants=False,  # it would trace every layer twice
        )
        hidden = self._embed(tokens_of)
        leader_keys = None
        if self.sharing is not None and hooks.make_memory is None:
            leader_keys = jnp.zeros((batch, heads[0], length, c.head_dim), hidden.dtype)
        by_layer = (jnp.asarray(x, jnp.int32) for x in (c.sliding_windows, ropes.layers))
        scanned = jnp.arange(c.num_hidden_layers), *by_layer
        (hidden, _, state), _ = scan(self.layers, (hidden, leader_keys, state), scanned)
        if num_last is not None:
            return hidden[-1, :, -num_last:], state
        return einops.rearrange(hidden, "n b t m -> b (n t) m"), state

    def _embed(self, tokens: Array) -> Array:
        """The residual stream before the first layer: int32 [n, B, C] to [n, B, C, M]."""

        def of_chunk(tokens: Array) -> Array:
            # first summed over the parts of the vocabulary, or the whole matrix would be gathered
            hidden = on_mesh(on_mesh(self.embedding[tokens], "b c m"), "b t m")
            return hidden if self.config.embedding_multiplier == 1 else hidden * self.config.embedding_multiplier

        return of_chunk(tokens[0])[None] if len(tokens) == 1 else jax.lax.map(of_chunk, tokens)

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
        return cap_logits(scores if c.logits_scaling == 1 else scores / c.logits_scaling, c.final_logit_softcapping)


def _in_chunks(x: Array, num_chunks: int) -> Array:
    """[B, T] to [n, B, C]."""
    return einops.rearrange(x, "b (n c) -> n b c", n=num_chunks)


def _put(whole: Array, part: Array, chunk: Array | int) -> Array:
    """Writes a chunk [..., C, D] into an array of the whole sequence [..., T, D], in place under jit."""
    if part.shape == whole.shape:
        return part
    return jax.lax.dynamic_update_slice_in_dim(whole, part, chunk * part.shape[-2], axis=-2)


def _over_chunks(function, layer: DecoderLayer, carry: Any, num_chunks: int) -> tuple[Any, Any]:
    """Takes a carry through the chunks of a sequence, in place where it is only overwritten.

    `function(layer, carry, chunk)` returns the next carry and a note. Returns the last carry and the last note.
    """
    if num_chunks == 1:
        return function(layer, carry, 0)
    scan = nn.scan(
        function, variable_broadcast="params", split_rngs={"params": False}, check_constancy_invariants=False
    )
    carry, notes = scan(layer, carry, jnp.arange(num_chunks))
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
    num_last: int | None = None,
) -> tuple[Array, Any]:
    """Runs the layers over whole sequences with the model's own attention, that of its sharing if it has one.

    Differentiable. Of parameters on a mesh of TPUs or GPUs call it under `jax.set_mesh(mesh)`, by which attention
    kernels are divided among devices. With `checkpoint` a backward pass stores a layer's input, and the leaders' keys,
    and recomputes what is in the layer; attention within it stores no probabilities.

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
      num_last: how many of the last tokens to return the residual stream of, at most a chunk; all by default.

    Returns:
      the residual stream before the final norm, [B, T, M], for `logits`; and the state.

    Raises:
      ValueError: groups of a model of another shape.
    """
    if model.sharing is not None:
        model.sharing.groups.check_model(model.config)
    if positions is None:
        positions = positions_of(mask if mask is not None else jnp.ones(tokens.shape, bool))
    arguments: Any = positions, hooks, state, chunk_size, checkpoint, num_last
    found: Any = model.apply({"params": params}, tokens, *arguments)
    return found


@with_usual_promotion
def logits(model: Decoder, params: Any, hidden: Array) -> Array:
    """Logits of the next token from the residual stream, [..., M] to float32 [..., V]."""
    found: Any = model.apply({"params": params}, hidden, method=Decoder.logits)
    return found


def positions_of(mask: Array, before: Array | None = None) -> Array:
    """Positions of a left-padded bool mask [B, T] behind `before` int32 [B] earlier tokens: int32, -1 on padding."""
    ranks = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    return jnp.where(mask, ranks if before is None else ranks + before[:, None], -1)
