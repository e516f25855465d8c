"""One layer of the decoder: attention's projections and the MLP; what differs between families is configuration."""

import functools
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.partition import on_mesh, project_back
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.experts import Experts, mix_experts
from restkv_jax.models.rope import Rope, apply_rope, grow_with_position

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
        """Adds the projected context [B, K, G, T, D], and the MLP, to the residual stream [B, T, M].

        On a mesh each sum over the devices that share the layer leaves them tokens of their own, and the MLP's input is
        gathered: as many bytes as Megatron's sum that leaves all tokens to all.
        """
        projected = project_back("bkgqd,kgdm->bqm", context, self._grouped(self.output_projection, "d m"))
        hidden = hidden + self._branch(projected + self.output_bias, self.attention_output_norm)
        normed = on_mesh(self._norm(hidden, self.post_attention_norm), "b c m")
        return hidden + self._branch(on_mesh(self._mlp(normed), "b t m"), self.mlp_output_norm)

    def _mlp(self, x: Array) -> Array:
        c, activation = self.config, ACTIVATIONS[self.config.activation]
        if c.num_experts is not None:
            experts = Experts(self.router, self.gate_projection, self.up_projection, self.down_projection)
            return mix_experts(x, experts, c.num_experts_per_tok, c.norm_topk_prob, activation)
        gate = activation(x @ self.gate_projection + self.gate_bias)
        features = gate * (x @ self.up_projection + self.up_bias)
        return project_back("bqf,fm->bqm", features, self.down_projection) + self.down_bias

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
