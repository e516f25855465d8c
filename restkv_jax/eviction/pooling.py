"""Smoothing of scores over neighbouring keys."""

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import Pairs
from restkv_jax.kernels.scores import attention_centres
from restkv_jax.models.arguments import check_choice, check_integer, check_number
from restkv_jax.models.decoder import LayerView


class Pooling(Protocol):
    """Smooths scores of the keys before the window; a frozen dataclass, static under jit."""

    def __call__(self, scores: Array, view: LayerView, pairs: Pairs, count: int) -> Array:
        """Smoothed scores.

        Args:
          scores: float32 [B, K, G or 1, P].
          view: with the window's queries, or more.
          pairs: [B, K, P + w, D] of the prompt.
          count: how many of the `P` keys are to be kept.

        Returns:
          float32 [B, K, G or 1, P].
        """
        ...


@dataclasses.dataclass(frozen=True)
class NoPooling:
    """Leaves the scores as they are."""

    def __call__(self, scores: Array, view: LayerView, pairs: Pairs, count: int) -> Array:
        return scores


@dataclasses.dataclass(frozen=True)
class AveragePooling:
    """Mean over `kernel_size` neighbours; beyond the ends zeros count (SnapKV, arXiv 2404.14469)."""

    kernel_size: int = 5

    def __post_init__(self):
        _check_kernel_size(self.kernel_size)

    def __call__(self, scores: Array, view: LayerView, pairs: Pairs, count: int) -> Array:
        inside = _inside(scores, pairs)
        return _sliding(jnp.where(inside, scores, 0.0), self.kernel_size, jax.lax.add, 0.0) / self.kernel_size


@dataclasses.dataclass(frozen=True)
class SuccessorPooling:
    """Mean over the `kernel_size` keys of which most stand before: scores spread to what follows an attended key.

    `s'[n]` is the mean of `s[n - a]` to `s[n + b]` with `a + b + 1 = kernel_size` and `b = (kernel_size - 1) // 5`;
    beyond the ends zeros count. A prompt's last queries attend to where an answer begins, and a model that copies goes
    on from there, to tokens which no query has asked for yet.
    """

    kernel_size: int = 12

    def __post_init__(self):
        check_integer("kernel_size", self.kernel_size, 1, "tokens")

    def __call__(self, scores: Array, view: LayerView, pairs: Pairs, count: int) -> Array:
        later = (self.kernel_size - 1) // 5
        return _mean_of(scores, pairs, self.kernel_size - 1 - later, later)


@dataclasses.dataclass(frozen=True)
class AnswerPooling:
    """Mean over as many keys as there is room for: to where an answer goes on first, then to what says whose it is.

    `s'[n]` is the mean of `s[n - a]` to `s[n + b]`, `a + b + 1` keys; beyond the ends zeros count. There are
    `kernel_size` of them, or the `share` of the keys that are to be kept, if that is less: few slots hold no long
    answer. Four fifths of the others stand before, as in `SuccessorPooling`, until `a` is half of `kernel_size`; `b` is
    the rest.
    """

    kernel_size: int = 21
    share: float = 0.3

    def __post_init__(self):
        check_integer("kernel_size", self.kernel_size, 1, "tokens")
        check_number("share", self.share, "the part of the kept keys that one answer may take")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be above 0 and at most 1: the part of the kept keys")

    def __call__(self, scores: Array, view: LayerView, pairs: Pairs, count: int) -> Array:
        others = min(self.kernel_size, max(int(self.share * count), 1)) - 1
        earlier = min(others - others // 5, self.kernel_size // 2)
        return _mean_of(scores, pairs, earlier, others - earlier)


@dataclasses.dataclass(frozen=True)
class MaxPooling:
    """Maximum over `kernel_size` neighbours."""

    kernel_size: int = 5

    def __post_init__(self):
        _check_kernel_size(self.kernel_size)

    def __call__(self, scores: Array, view: LayerView, pairs: Pairs, count: int) -> Array:
        inside = _inside(scores, pairs)
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
        check_integer("scale", self.scale, 1, "tokens of drift")

    def __call__(self, scores: Array, view: LayerView, pairs: Pairs, count: int) -> Array:
        length, prefix = pairs.keys.shape[2], scores.shape[-1]
        width, shift = self.width_and_shift(view.last(length - prefix), pairs, count)
        # Drift is measured in positions, and may exceed the keys that there are once some were evicted.
        widest = max(self.kernel_size, 2 * (length // self.scale) + 1)
        width = jnp.minimum(width, widest)
        first = jnp.argmax(pairs.positions[:, :, None, :prefix] >= 0, axis=-1, keepdims=True)
        edge = jnp.take_along_axis(scores, first, axis=-1)
        extended = jnp.where(_inside(scores, pairs), scores, edge)
        left = jnp.clip(width // 2 - shift, 0, width - 1)
        return window_mean(jnp.broadcast_to(extended, (*width.shape, prefix)), width, left, widest)

    def width_and_shift(self, view: LayerView, pairs: Pairs, count: int) -> tuple[Array, Array]:
        """Width and shift of every head's window, int32 [B, K, G]; the view's queries are the window's."""
        centres = attention_centres(view.queries, pairs, count=count)
        drift = _drift(centres, view.queries.positions >= 0)
        width = jnp.maximum(self.kernel_size, 2 * jnp.floor(jnp.abs(drift) / self.scale) + 1)
        shift = jnp.floor(drift / self.scale) + (drift <= 0)
        return width.astype(jnp.int32), shift.astype(jnp.int32)


def _drift(centres: Array, is_query: Array) -> Array:
    """Mean over the front half of a row's queries less that over the rear half: [B, K, G, w], [B, w] to [B, K, G]."""
    number, rank = is_query.sum(1, keepdims=True), jnp.cumsum(is_query, axis=1)
    is_front = (rank <= number // 2) & is_query

    def mean(chosen: Array) -> Array:
        total = jnp.where(chosen[:, None, None], centres, 0.0).sum(-1)
        return total / jnp.maximum(chosen.sum(1), 1)[:, None, None]

    return jnp.where(number[..., None] > 1, mean(is_front) - mean(is_query & ~is_front), 0.0)


def window_mean(scores: Array, width: Array, left: Array, widest: int) -> Array:
    """Mean of a sliding window whose width is data, accurate for scores of any range.

    Sums of `1, 2, 4, ...` neighbours are doubled up and put together by the binary digits of the width: no
    subtraction, hence no cancellation, and `log2(widest)` passes.

    Args:
      scores: float32 [..., P]; the ends are extended by their values.
      width: int32 [...], at most `widest`.
      left: int32 [...], places that the window of output 0 begins before score 0; 0 to `widest - 1`.
      widest: static bound.

    Returns:
      float32 [..., P]: the mean of `scores[n - left : n - left + width]`.
    """
    length = scores.shape[-1]
    powers = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(widest - 1, widest - 1)], mode="edge")
    total, start = jnp.zeros_like(scores), widest - 1 - left
    slice_from = jnp.vectorize(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, length), signature="(n),()->(p)")
    for digit in range(widest.bit_length()):
        taken = (width >> digit) & 1
        total = jnp.where(taken[..., None], total + slice_from(powers, start), total)
        start = start + (taken << digit)
        powers = powers + jnp.roll(powers, -(1 << digit), axis=-1)
    return total / width[..., None]


def make_pooling(
    kind: Literal["adaptive", "avg", "max", "successor", "none"], kernel_size: int, scale: int = 2000
) -> Pooling:
    """The pooling that a preset's options name.

    Raises:
      ValueError: an unknown kind.
    """
    kinds = {
        "adaptive": lambda: AdaptivePooling(kernel_size, scale),
        "avg": lambda: AveragePooling(kernel_size),
        "max": lambda: MaxPooling(kernel_size),
        "successor": lambda: SuccessorPooling(kernel_size),
        "none": NoPooling,
    }
    check_choice("pooling", kind, tuple(kinds))
    return kinds[kind]()


def _inside(scores: Array, pairs: Pairs) -> Array:
    """bool [B, K or 1, 1, P]: not padding."""
    return pairs.positions[:, :, None, : scores.shape[-1]] >= 0


def _mean_of(scores: Array, pairs: Pairs, earlier: int, later: int) -> Array:
    """Mean of each score, the `earlier` ones before it and the `later` ones behind; zeros beyond the ends."""
    size = earlier + 1 + later
    padded = jnp.pad(jnp.where(_inside(scores, pairs), scores, 0.0), [(0, 0)] * (scores.ndim - 1) + [(earlier, later)])
    return _sliding(padded, size, jax.lax.add, 0.0, "VALID") / size


def _sliding(scores: Array, size: int, reduce, empty: float, padding: str = "SAME") -> Array:
    dims = (1,) * (scores.ndim - 1) + (size,)
    return jax.lax.reduce_window(scores, empty, reduce, dims, (1,) * scores.ndim, padding)


def _check_kernel_size(kernel_size: int) -> None:
    check_integer("kernel_size", kernel_size, 1, "tokens, an odd number, so that the window has a centre")
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} must be odd, so that the window has a centre")
