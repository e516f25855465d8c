"""How a budget is shared among the layers and KV heads of a sequence."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.top import top_mask
from restkv_jax.models.arguments import check_choice, check_number

PYRAMID_BETA = 20
"""The upper layers of a pyramid go down to this part of the mean (PyramidKV's `beta`)."""


class Allocation:
    """Says how many keys before the window each layer and KV head keeps; a frozen dataclass, static under jit.

    `uniform` marks equal shares, which a dense cache holds. `additive` says that `weigh` needs scores that are not
    negative and can be summed.
    """

    uniform: ClassVar[bool] = False

    @property
    def additive(self) -> bool:
        """Whether `weigh` needs scores that can be summed."""
        return False

    def weigh(self, scores: Array, present: Array, quota: int) -> Array:
        """Makes a layer's scores comparable across what the budget is shared by, the order within a head unchanged.

        Args:
          scores: float32 [B, K, P].
          present: bool [B, K, P], False on padding and on keys out of reach.
          quota: mean number of keys kept per KV head.

        Returns:
          float32 [B, K, P].
        """
        return scores

    def counts(
        self, scores: Array, prefix_lengths: Array, budget: int, window: int, layers: Array, num_layers: int
    ) -> Array:
        """Keys before the window that each KV head keeps.

        Args:
          scores: float32 [L, B, K, N] of the candidates, weighed; -inf where there is none.
          prefix_lengths: int32 [L, B, K], keys before the window; different ones where a cache was evicted before.
          budget: mean slots per layer and KV head, the window included.
          window: the last tokens, kept besides.
          layers: int32 [L], which layers the scores are of.
          num_layers: of the model.

        Returns:
          int32 [L, B, K].
        """
        raise NotImplementedError

    def most(self, budget: int, window: int, num_layers: int, num_kv_heads: int) -> int:
        """Bound on the sum of a sequence's counts over all layers and KV heads."""
        return num_layers * num_kv_heads * (budget - window)

    def most_per_head(self, budget: int, window: int, num_layers: int, num_kv_heads: int) -> int:
        """Bound on the count of one layer's KV head: as many keys may have to be held until the budget is shared."""
        return self.most(budget, window, num_layers, num_kv_heads)


@dataclasses.dataclass(frozen=True)
class Uniform(Allocation):
    """The same for every layer and KV head."""

    uniform: ClassVar[bool] = True

    def counts(self, scores, prefix_lengths, budget, window, layers, num_layers):
        return jnp.minimum(budget - window, prefix_lengths).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Pyramid(Allocation):
    """Budgets that fall linearly from the first layer to the last (PyramidKV, arXiv 2406.02069).

    With `C - w` the mean and `P` the keys of a row's longest head, the most is `2 (C - w) - (C - w) // 20`, at most
    `P`, and the least `2 (C - w)` less the most; layer `l` keeps `most - floor(l (most - least) / (L - 1))`, and no
    more than it has. The authors floor the step, `l floor((most - least) / (L - 1))`: the same in the first two layers,
    but up to `(L - 1) / 2` more in the mean, where here it is above `C - w` by less than one half. With
    `even_if_short`, as in PyramidKV's code but not in ReST-KV's, rows of fewer than `2 (C - w)` tokens keep `C - w` in
    every layer.
    """

    even_if_short: bool = False

    def counts(self, scores, prefix_lengths, budget, window, layers, num_layers):
        mean = budget - window
        longest = prefix_lengths.max((0, 2), keepdims=True)
        most = jnp.minimum(2 * mean - mean // PYRAMID_BETA, longest)
        fall = layers[:, None, None] * (2 * most - 2 * mean) // max(num_layers - 1, 1)
        is_even = num_layers == 1 or (self.even_if_short & (longest + window < 2 * mean))
        return jnp.minimum(jnp.where(is_even, mean, most - fall), prefix_lengths).astype(jnp.int32)

    def most(self, budget, window, num_layers, num_kv_heads):
        rounding = max(num_layers - 2, 0) // 2
        return num_kv_heads * (num_layers * (budget - window) + rounding)

    def most_per_head(self, budget, window, num_layers, num_kv_heads):
        return 2 * (budget - window) - (budget - window) // PYRAMID_BETA


@dataclasses.dataclass(frozen=True)
class AdaptiveHeads(Allocation):
    """Budgets that differ by head within a layer: one top-k over the layer's heads (AdaKV, arXiv 2407.11550).

    A head that has `n` of the layer's best `K (C - w)` keys keeps `round((1 - floor) n + int(floor (C - w)))`. In the
    authors' code that is all, and some pairs of the budget are lost to rounding: so it is for one of several layers
    alone. Where all layers are given, the best of the other keys take these places, so that a layer keeps `K (C - w)`.
    With `normalize`, as in the authors' code but not in kvpress's, a head's scores count by the share of their sum that
    its best `C - w` hold.
    """

    floor: float = 0.2
    normalize: bool = True

    def __post_init__(self):
        check_number("floor", self.floor, "the part of the budget that all heads get evenly")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor} must be in [0, 1], the part of the budget that all heads get evenly")

    @property
    def additive(self) -> bool:
        return self.normalize

    def weigh(self, scores, present, quota):
        if not self.normalize:
            return scores
        is_best = present & top_mask(jnp.where(present, scores, 0.0), quota)
        best = jnp.where(is_best, scores, 0.0).sum(-1, keepdims=True)
        return _over_sum(scores * best, scores, present, axis=-1)

    def counts(self, scores, prefix_lengths, budget, window, layers, num_layers):
        mean, quota = budget - window, scores.shape[2] * (budget - window)
        among_best = counts_among_best(scores, quota, num_axes=2)
        mixed = jnp.round((1 - self.floor) * among_best + int(self.floor * mean)).astype(jnp.int32)
        is_whole = (prefix_lengths <= mean).all((0, 2), keepdims=True)
        counts = jnp.where(is_whole, prefix_lengths, jnp.minimum(mixed, prefix_lengths))
        return _filled(scores, counts, quota) if scores.shape[0] == num_layers else counts

    def most_per_head(self, budget, window, num_layers, num_kv_heads):
        return self.most(budget, window, 1, num_kv_heads)


@dataclasses.dataclass(frozen=True)
class ModelWide(Allocation):
    """One top-k over all layers and KV heads of a sequence (LaProx, arXiv 2605.07234).

    Scores of a layer are divided by their sum over its KV heads and prefix; the best `L K (C - w)` are kept.
    """

    @property
    def additive(self) -> bool:
        return True

    def weigh(self, scores, present, quota):
        return _over_sum(scores, scores, present, axis=(1, 2))

    def counts(self, scores, prefix_lengths, budget, window, layers, num_layers):
        num_kv_heads = scores.shape[2]
        quota = scores.shape[0] * num_kv_heads * (budget - window)
        return jnp.moveaxis(counts_among_best(jnp.moveaxis(scores, 1, 0), quota, num_axes=3), 0, 1)


def _filled(scores: Array, counts: Array, quota: int) -> Array:
    """Counts [..., K] whose sum over the heads is `quota`, as far as there are keys, and as near as can be to others.

    The best keys beyond the counts given are added; where these are too many, the ones of the last ranks go.
    """
    rank = ranks(scores)
    sure = (rank < counts[..., None]) & (scores > -jnp.inf)
    return counts_among_best(jnp.where(sure, jnp.finfo(jnp.float32).max / (1 + rank), scores), quota, num_axes=2)


def ranks(scores: Array) -> Array:
    """The place of every score in its head's order, from the best, 0, on: [..., N] to int32 [..., N]."""
    best_first = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(best_first, axis=-1)


def _over_sum(numerator: Array, scores: Array, present: Array, axis) -> Array:
    """Divides by the sum of the scores that are present; what is not keeps its score."""
    total = jnp.where(present, scores, 0.0).sum(axis, keepdims=True)
    return jnp.where(present, numerator / jnp.maximum(total, jnp.finfo(jnp.float32).tiny), scores)


def counts_among_best(scores: Array, count: int, num_axes: int) -> Array:
    """How many of the best `count` scores over the last `num_axes` axes each head has.

    Args:
      scores: float32 [..., N], -inf where there is none.
      count: of the choice, static.
      num_axes: which axes one choice goes over, the keys' included.

    Returns:
      int32 [...].
    """
    is_best = top_mask(scores, count, num_axes) & (scores > -jnp.inf)
    return is_best.sum(-1, dtype=jnp.int32)


ALLOCATIONS = {"uniform": Uniform, "pyramid": Pyramid, "adaptive_heads": AdaptiveHeads, "model": ModelWide}
"""Allocations by the names that presets take."""


def make_allocation(name: str) -> Allocation:
    """The allocation that a preset's option names.

    Raises:
      ValueError: an unknown name.
    """
    check_choice("allocation", name, tuple(ALLOCATIONS))
    return ALLOCATIONS[name]()
