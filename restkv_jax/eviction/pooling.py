"""Smoothing of scores over neighbouring keys."""

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax import kernels
from restkv_jax.eviction.observation import Observation


class Pooling(Protocol):
    """Smooths float32 [B, H, P] scores of the keys before the window; a frozen dataclass, static under jit."""

    def __call__(self, scores: Array, observation: Observation, window: int, count: int) -> Array:
        """float32 [B, H, P]; `count` is how many keys of the prefix are to be kept."""


@dataclasses.dataclass(frozen=True)
class NoPooling:
    """Leaves the scores as they are."""

    def __call__(self, scores, observation, window, count):
        return scores


@dataclasses.dataclass(frozen=True)
class AveragePooling:
    """Mean over `kernel_size` neighbours; beyond the ends zeros count (SnapKV, arXiv 2404.14469)."""

    kernel_size: int = 5

    def __post_init__(self):
        _check_kernel_size(self.kernel_size)

    def __call__(self, scores, observation, window, count):
        inside = _inside(scores, observation)
        return _sliding(jnp.where(inside, scores, 0.0), self.kernel_size, jax.lax.add, 0.0) / self.kernel_size


@dataclasses.dataclass(frozen=True)
class MaxPooling:
    """Maximum over `kernel_size` neighbours."""

    kernel_size: int = 5

    def __post_init__(self):
        _check_kernel_size(self.kernel_size)

    def __call__(self, scores, observation, window, count):
        inside = _inside(scores, observation)
        return _sliding(jnp.where(inside, scores, -jnp.inf), self.kernel_size, jax.lax.max, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class AdaptivePooling:
    """Mean over a window as wide as the attention drifts (ReST-KV, arXiv 2605.08840, spatial smoothing).

    Each query's `count` most attended keys have a mean position; `drift` is its mean over the front half of the
    window's queries less that over the rear half, per head. The width is `max(kernel_size, 2 floor(|drift| / scale)
    + 1)`, shifted by `floor(drift / scale)`, plus one where the drift is not positive; the ends are extended by
    their values.
    """

    kernel_size: int = 5
    scale: int = 2000

    def __post_init__(self):
        _check_kernel_size(self.kernel_size)
        if self.scale < 1:
            raise ValueError(f"scale={self.scale} must be at least 1 token")

    def __call__(self, scores, observation, window, count):
        width, shift = self.width_and_shift(observation, window, count)
        widest = max(self.kernel_size, 2 * (observation.keys.shape[2] // self.scale) + 1)
        first = jnp.argmax(observation.positions[:, : scores.shape[-1]] >= 0, axis=1)
        edge = jnp.take_along_axis(scores, first[:, None, None], axis=-1)
        extended = jnp.where(_inside(scores, observation), scores, edge)
        mean = jax.vmap(jax.vmap(lambda s, w, left: window_mean(s, w, left, widest)))
        left = jnp.clip(width // 2 - shift, 0, width - 1)
        return mean(extended, width, left)

    def width_and_shift(self, observation: Observation, window: int, count: int) -> tuple[Array, Array]:
        """Width and shift of every head's window, int32 [B, H]."""
        queries = observation.queries[:, :, -window:]
        query_positions = observation.query_positions[:, -window:]
        centres = kernels.attention_centres(
            queries, observation.keys, query_positions, observation.key_positions, observation.sliding_window,
            count=count,
        )  # fmt: skip
        half = window // 2
        drift = centres[..., :half].mean(-1) - centres[..., half:].mean(-1) if half else jnp.zeros(centres.shape[:2])
        width = jnp.maximum(self.kernel_size, 2 * jnp.floor(jnp.abs(drift) / self.scale) + 1)
        shift = jnp.floor(drift / self.scale) + (drift <= 0)
        return width.astype(jnp.int32), shift.astype(jnp.int32)


def window_mean(scores: Array, width: Array, left: Array, widest: int) -> Array:
    """Mean of a sliding window whose width is data, accurate for scores of any range.

    Sums of `1, 2, 4, ...` neighbours are doubled up and put together by the binary digits of the width: no
    subtraction, hence no cancellation, and `log2(widest)` passes.

    Args:
      scores: float32 [P]; the ends are extended by their values.
      width: int32 scalar, at most `widest`.
      left: int32 scalar, places that the window of output 0 begins before score 0; 0 to `widest - 1`.
      widest: static bound.

    Returns:
      float32 [P]: the mean of `scores[n - left : n - left + width]`.
    """
    length = scores.shape[0]
    powers = jnp.pad(scores, (widest - 1, widest - 1), mode="edge")
    total, start = jnp.zeros_like(scores), widest - 1 - left
    for digit in range(widest.bit_length()):
        taken = (width >> digit) & 1
        part = jax.lax.dynamic_slice_in_dim(powers, start, length)
        total = jnp.where(taken, total + part, total)
        start = start + (taken << digit)
        powers = powers + jnp.roll(powers, -(1 << digit))
    return total / width


def make_pooling(kind: Literal["adaptive", "avg", "max", "none"], kernel_size: int, scale: int = 2000) -> Pooling:
    """The pooling that a preset's options name.

    Raises:
      ValueError: an unknown kind.
    """
    kinds = {
        "adaptive": lambda: AdaptivePooling(kernel_size, scale),
        "avg": lambda: AveragePooling(kernel_size),
        "max": lambda: MaxPooling(kernel_size),
        "none": NoPooling,
    }
    if kind not in kinds:
        raise ValueError(f"pooling={kind!r} is unknown; choose from {', '.join(map(repr, kinds))}")
    return kinds[kind]()


def _inside(scores: Array, observation: Observation) -> Array:
    """bool [B, 1, P]: not padding."""
    return observation.positions[:, None, : scores.shape[-1]] >= 0


def _sliding(scores: Array, size: int, reduce, empty: float) -> Array:
    dims = (1,) * (scores.ndim - 1) + (size,)
    return jax.lax.reduce_window(scores, empty, reduce, dims, (1,) * scores.ndim, "SAME")


def _check_kernel_size(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} must be odd and at least 1, so that the window has a centre")
