"""Rotary position embeddings and the scalings that stretch them to longer contexts."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.models.config import ModelConfig


class Rope(NamedTuple):
    """Angular frequencies of the rotary pairs, float32 [B, R/2] in radians per token, and the attention factor.

    The factor multiplies cosine and sine. `R` is the number of dimensions that turn, `config.rotary_dim`.
    """

    frequencies: Array
    factor: Array | float


class LayerRopes(NamedTuple):
    """The different rotations of a model's layers, and which of them each layer has, an index per layer."""

    ropes: tuple[Rope, ...]
    layers: tuple[int, ...]

    def of(self, which: Array) -> Rope:
        """One of them, by an int32 scalar."""
        if len(self.ropes) == 1:
            return self.ropes[0]
        frequencies = jnp.stack([rope.frequencies for rope in self.ropes])
        return Rope(frequencies[which], jnp.asarray([rope.factor for rope in self.ropes], jnp.float32)[which])


SCALED_BEYOND = ("llama3", "yarn", "longrope")
"""Kinds of RoPE that are scaled beyond an original length, that of pretraining."""


def layer_ropes(config: ModelConfig, sequence_length: Array) -> LayerRopes:
    """The rotations of all layers; one that turns nothing for layers without RoPE.

    Args:
      config: its `ropes` are the settings of each layer.
      sequence_length: int32 [B], tokens of each row so far.
    """
    kinds = tuple(dict.fromkeys(config.ropes))
    still = Rope(jnp.zeros((sequence_length.shape[0], config.rotary_dim // 2), jnp.float32), 1.0)
    ropes = tuple(still if kind is None else rope_frequencies(config, dict(kind), sequence_length) for kind in kinds)
    return LayerRopes(ropes, tuple(kinds.index(kind) for kind in config.ropes))


def rope_frequencies(config: ModelConfig, settings: dict, sequence_length: Array) -> Rope:
    """The rotation by one set of settings.

    Args:
      config: of the model.
      settings: of all layers or of one; they choose the scaling: `default` (Su et al. 2021), `linear` (positions
        divided by `factor`), `dynamic` (NTK-aware: the base grows with the sequence), `llama3` (low frequencies divided
        by `factor`, a smooth passage between), `yarn` (Peng et al. 2023, eqs. 17-22) or `longrope` (Ding et al. 2024:
        a factor for each pair, one set of them up to the original length and one beyond).
      sequence_length: int32 [B], tokens of each row so far; only `dynamic` and `longrope` look at it.
    """
    dim = config.rotary_dim
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
    return Rope(jnp.broadcast_to(frequencies, (sequence_length.shape[0], dim // 2)), attention_factor)


def apply_rope(x: Array, positions: Array, rope: Rope, scale: float = 1.0) -> Array:
    """Turns queries or keys by their positions, the first half of the rotary dimensions paired with the second.

    Args:
      x: [B, ..., T, D], any axes of heads between.
      positions: int32 [B, T].
      rope: the rotation; dimensions beyond its rotary ones stay as they are.
      scale: multiplies the result.

    Returns:
      [B, ..., T, D] in the dtype of `x`; the rotation is computed in float32.
    """
    angles, factor = _angles(x, positions, rope), rope.factor * scale
    return _turn(x, jnp.cos(angles) * factor, jnp.sin(angles) * factor, scale).astype(x.dtype)


def undo_rope(x: Array, positions: Array, rope: Rope | None) -> Array:
    """What queries or keys were before `apply_rope` turned them, float32.

    Args:
      x: [B, ..., T, D], any axes of heads between.
      positions: int32 [B, T], or [B, K or 1, T] for x of [B, K, ..., T, D]; -1 turns by one token, and means nothing.
      rope: the rotation; None leaves `x` as it is.
    """
    if rope is None:
        return x.astype(jnp.float32)
    angles = _angles(x, positions, rope)
    return _turn(x, jnp.cos(angles) / rope.factor, -jnp.sin(angles) / rope.factor)


def undo_average_rope(x: Array, first: Array, count: int, rope: Rope | None) -> Array:
    """`R^T x` with `R` the mean rotation at `count` positions, so that `q R^T x` is the mean logit of a query there.

    Args:
      x: keys [B, ..., T, D], after RoPE.
      first: int32 [B], the first of these positions.
      count: how many there are, one after the other.
      rope: the rotation; None leaves `x` as it is.

    Returns:
      float32 [B, ..., T, D].
    """
    if rope is None:
        return x.astype(jnp.float32)
    angles = _angles(x, first[:, None] + jnp.arange(count), rope)
    cos, sin = (part.mean(-2, keepdims=True) * rope.factor for part in (jnp.cos(angles), jnp.sin(angles)))
    return _turn(x, cos, -sin)


def _angles(x: Array, positions: Array, rope: Rope) -> Array:
    """float32 [B, ..., T, R/2] for x [B, ..., T, D], by positions [B, T] or [B, K, T]; axes of heads may be 1."""
    frequencies = jnp.expand_dims(rope.frequencies, tuple(range(1, positions.ndim)))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.expand_dims(angles, tuple(range(positions.ndim - 1, x.ndim - 2)))


def _turn(x: Array, cos: Array, sin: Array, scale: float = 1.0) -> Array:
    """Turns the rotary dimensions and multiplies the others by a scale, in float32."""
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest * scale], axis=-1)


def grow_with_position(config: ModelConfig, queries: Array, positions: Array) -> Array:
    """Queries times `1 + beta ln(1 + floor(p / original length))`, for longer texts than seen in pretraining (Llama 4).

    Args:
      config: `beta` is its `llama_4_scaling_beta`; of most models it is 0, and the queries stay as they are.
      queries: [B, K, G, T, D].
      positions: int32 [B, T].
    """
    if config.llama_4_scaling_beta == 0:
        return queries
    original = _original_length(dict(config.rope_parameters), config)
    times = jnp.floor(jnp.maximum(positions, 0).astype(jnp.float32) / original)
    growth = 1 + config.llama_4_scaling_beta * jnp.log1p(times)
    return queries * growth[:, None, None, :, None].astype(queries.dtype)


def _original_length(settings: dict, config: ModelConfig) -> int:
    return settings.get("original_max_position_embeddings") or config.max_position_embeddings


def depends_on_longest(config: ModelConfig) -> bool:
    """Whether `max_position_embeddings` says how keys are turned, or queries grow."""

    def depends(settings: dict) -> bool:
        kind, has_original = settings["rope_type"], bool(settings.get("original_max_position_embeddings"))
        says_factor = settings.get("factor") or settings.get("attention_factor") is not None
        if kind == "longrope" and not says_factor:
            return True
        return kind == "dynamic" or (not has_original and (kind in SCALED_BEYOND or config.llama_4_scaling_beta != 0))

    return any(depends(dict(rope)) for rope in {config.rope_parameters, *config.ropes} - {None})


def _llama3(frequencies: Array, settings: dict, config: ModelConfig) -> Array:
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = _original_length(settings, config) * frequencies / (2 * math.pi)
    keep = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (keep + (1 - keep) / settings["factor"])


def _yarn(frequencies: Array, settings: dict, config: ModelConfig) -> tuple[Array, float]:
    original = _original_length(settings, config)
    factor, dim, theta = settings["factor"], config.rotary_dim, settings["rope_theta"]

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
