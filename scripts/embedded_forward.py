"""The decoder's forward pass for training on short sequences that stand for long ones.

Equal to `restkv_jax.models.hidden_states` for Llama configurations, with two additions: a key may count as several
copies of itself, and attention keeps its weights for the backward pass, which on a CPU is faster at these lengths.
"""

import math
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.models.config import ModelConfig

CHUNK = 128


def hidden_states(
    config: ModelConfig, params: Any, tokens: Array, positions: Array, log_copies: Array
) -> tuple[Array, Array, Array]:
    """Final hidden states, and every layer's queries and keys.

    Args:
      config: a Llama configuration with default RoPE.
      params: of the model that `build_model` makes from it.
      tokens: int32 [B, T].
      positions: int32 [B, T] for RoPE; attention is causal by array order.
      log_copies: float32 [B, T], logarithm of how many equal tokens each key stands for.

    Returns:
      hidden states [B, T, M], scaled queries [L, B, H, T, D] and keys [L, B, K, T, D], both rotated.
    """
    theta = dict(config.rope_parameters)["rope_theta"]
    frequencies = theta ** (-jnp.arange(0, config.head_dim, 2) / config.head_dim)
    angles = positions[:, None, :, None] * frequencies
    rotation = jnp.cos(angles), jnp.sin(angles)

    batch, length = tokens.shape

    def layer_step(hidden, layer):
        x = _rms_norm(hidden, layer["input_norm"], config.rms_norm_eps)
        projections = layer["query_projection"], layer["key_projection"], layer["value_projection"]
        joined = x @ jnp.concatenate([p.reshape(len(p), -1) for p in projections], axis=1)
        joined = einops.rearrange(joined, "(b t) (h d) -> b h t d", b=batch, d=config.head_dim)
        heads = config.num_attention_heads, config.num_attention_heads + config.num_key_value_heads
        queries, keys, values = jnp.split(joined, heads, axis=1)
        queries = _rotate(queries, rotation) / math.sqrt(config.head_dim)
        keys = _rotate(keys, rotation)
        context = _causal_attention(queries, keys, values, log_copies)
        projection = layer["output_projection"]
        hidden += einops.rearrange(context, "b h t d -> (b t) (h d)") @ projection.reshape(-1, projection.shape[-1])
        x = _rms_norm(hidden, layer["post_attention_norm"], config.rms_norm_eps)
        gate, up = jnp.split(x @ jnp.concatenate([layer["gate_projection"], layer["up_projection"]], axis=1), 2, axis=1)
        return hidden + (jax.nn.silu(gate) * up) @ layer["down_projection"], (queries, keys)

    hidden, (queries, keys) = jax.lax.scan(layer_step, params["embedding"][tokens.reshape(-1)], params["layers"])
    return _rms_norm(hidden, params["final_norm"], config.rms_norm_eps).reshape(batch, length, -1), queries, keys


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def _rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    cos, sin = rotation
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _causal_attention(queries: Array, keys: Array, values: Array, log_copies: Array) -> Array:
    """Attention of queries [B, H, T, D] to keys and values [B, K, T, D], chunk by chunk so that half is left out."""
    batch, heads, length, _ = queries.shape
    groups = heads // keys.shape[1]
    flat = "b k t d -> (b k) t d"
    keys, values = einops.rearrange(keys, flat), einops.rearrange(values, flat)
    contexts = []
    for start in range(0, length, CHUNK):
        stop = min(start + CHUNK, length)
        chunk = einops.rearrange(queries[:, :, start:stop], "b (k g) t d -> (b k) (g t) d", g=groups)
        future = jnp.arange(stop) > jnp.arange(start, stop)[:, None]
        bias = jnp.where(future, -1e9, log_copies[:, None, :stop])
        bias = jnp.repeat(jnp.tile(bias, (1, groups, 1)), len(keys) // batch, axis=0)
        context = _attention(chunk, keys[:, :stop], values[:, :stop], bias)
        contexts.append(einops.rearrange(context, "(b k) (g t) d -> b (k g) t d", b=batch, g=groups))
    return jnp.concatenate(contexts, axis=2)


@jax.custom_vjp
def _attention(queries: Array, keys: Array, values: Array, bias: Array) -> Array:
    """softmax(queries @ keys^T + bias) @ values over the leading axis; the bias has no gradient."""
    return _attention_forward(queries, keys, values, bias)[0]


def _attention_forward(queries, keys, values, bias):
    scores = jnp.einsum("bqd,bkd->bqk", queries, keys) + bias
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    context = jnp.einsum("bqk,bkd->bqd", weights, values) / total
    return context, (queries, keys, values, bias, weights, total, context)


def _attention_backward(saved, gradient):
    queries, keys, values, bias, weights, total, context = saved
    scaled = gradient / total
    mean = (context * scaled).sum(axis=-1, keepdims=True)
    score_gradient = weights * (jnp.einsum("bqd,bkd->bqk", scaled, values) - mean)
    return (
        jnp.einsum("bqk,bkd->bqd", score_gradient, keys),
        jnp.einsum("bqk,bqd->bkd", score_gradient, queries),
        jnp.einsum("bqk,bqd->bkd", weights, scaled),
        jnp.zeros_like(bias),
    )


_attention.defvjp(_attention_forward, _attention_backward)
