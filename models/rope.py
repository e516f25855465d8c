"""Rotary position embeddings and the scalings that stretch them to longer contexts."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.models.config import ModelConfig


def rope_frequencies(config: ModelConfig, sequence_length: Array) -> tuple[Array, float]:
    """Angular frequencies of the rotary pairs, and the factor by which cosine and sine are multiplied.

    Args:
      config: its `rope_parameters` choose the scaling: `default` (Su et al. 2021), `linear` (positions divided by
        `factor`), `dynamic` (NTK-aware: the base grows with the sequence), `llama3` (low frequencies divided by
        `factor`, a smooth passage between), `yarn` (Peng et al. 2023, eqs. 17-22) or `longrope` (Ding et al. 2024:
        a factor for each pair, one set of them up to the original length and one beyond).
      sequence_length: int32 [B], tokens of each row so far; only `dynamic` and `longrope` look at it.

    Returns:
      float32 [B, D/2] in radians per token, and the attention factor.
    """
    settings = dict(config.rope_parameters)
    dim = config.head_dim
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    base = jnp.asarray(settings["rope_theta"], jnp.float32)
    kind = settings["rope_type"]
    if kind == "dynamic":
        longest = config.max_position_embeddings
        length = jnp.maximum(sequence_length, longest).astype(jnp.float32)
        stretch = settings["factor"] * length / longest - (settings["factor"] - 1)
        base = (base * stretch ** (dim / (dim - 2)))[:, None]
    frequencies = 1.0 / base**exponents
    attention_factor = 1.0
    if kind == "linear":
        frequencies = frequencies / settings["factor"]
    elif kind == "llama3":
        frequencies = _llama3(frequencies, settings, config)
    elif kind == "yarn":
        frequencies, attention_factor = _yarn(frequencies, settings, config)
    elif kind == "longrope":
        frequencies, attention_factor = _longrope(frequencies, settings, config, sequence_length)
    return jnp.broadcast_to(frequencies, (sequence_length.shape[0], dim // 2)), attention_factor


def apply_rope(x: Array, positions: Array, frequencies: Array, factor: float) -> Array:
    """Turns queries or keys by their positions, the first half of the dimensions paired with the second.

    Args:
      x: [B, ..., T, D], any axes of heads between.
      positions: int32 [B, T].
      frequencies: float32 [B, D/2].
      factor: multiplies cosine and sine.

    Returns:
      [B, ..., T, D] in the dtype of `x`; the rotation is computed in float32.
    """
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[:, None, :]
    angles = jnp.expand_dims(angles, tuple(range(1, x.ndim - 2)))
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _original_length(settings: dict, config: ModelConfig) -> int:
    return settings.get("original_max_position_embeddings") or config.max_position_embeddings


def _llama3(frequencies: Array, settings: dict, config: ModelConfig) -> Array:
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = _original_length(settings, config) * frequencies / (2 * math.pi)
    keep = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (keep + (1 - keep) / settings["factor"])


def _yarn(frequencies: Array, settings: dict, config: ModelConfig) -> tuple[Array, float]:
    original = _original_length(settings, config)
    factor, dim, theta = settings["factor"], config.head_dim, settings["rope_theta"]

    def dimension_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(settings.get("beta_fast") or 32), dimension_of(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = jnp.clip((jnp.arange(dim // 2, dtype=jnp.float32) - low) / (high - low or 0.001), 0, 1)
    return frequencies * (ramp / factor + 1 - ramp), _yarn_attention_factor(settings, factor)


def _yarn_attention_factor(settings: dict, factor: float) -> float:
    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if settings.get("attention_factor") is not None:
        return settings["attention_factor"]
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return magnitude(settings["mscale"]) / magnitude(settings["mscale_all_dim"])
    return magnitude(1.0)


def _longrope(frequencies: Array, settings: dict, config: ModelConfig, sequence_length: Array) -> tuple[Array, float]:
    original = _original_length(settings, config)
    is_long = (sequence_length > original)[:, None]
    divisors = jnp.where(is_long, jnp.asarray(settings["long_factor"]), jnp.asarray(settings["short_factor"]))
    factor = settings.get("factor") or config.max_position_embeddings / original
    if settings.get("attention_factor") is not None:
        return frequencies / divisors, settings["attention_factor"]
    return frequencies / divisors, math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def sequence_lengths(positions: Array) -> Array:
    """Tokens of each row so far, from int32 [B, T] positions to int32 [B]."""
    return jax.lax.reduce_max(positions, axes=(1,)) + 1
