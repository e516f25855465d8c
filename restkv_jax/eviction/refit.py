"""Least-squares correction of what is kept, so that queries get from it what they got from the whole prompt."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.future import FutureQueries
from restkv_jax.kernels.pairs import PAIR_AXES, Pairs, Queries, query_axes, take_pairs, take_places
from restkv_jax.kernels.partition import by_device
from restkv_jax.kernels.scores import Peaks, einsum, find_peaks, fold_tiles, map_tiles, probabilities, read_pairs
from restkv_jax.kernels.solve import solve_positive_definite
from restkv_jax.models.arguments import check_integer, check_number
from restkv_jax.models.decoder import LayerView

LEAST_MASS, MOST_MASS = 0.2, 20.0
"""How far the exponential of a kept key's logits may be scaled."""

SIZES = 4
"""Of how many sizes the systems of KV heads are that keep different numbers of pairs; each size is a program."""

DIRECTION_RIDGE = 1e-3
"""Ridge of the direction along which keys are moved, relative to the mean diagonal of its system."""


class Wanted(NamedTuple):
    """What queries got from the whole prompt.

    `outputs` float32 [B, K, G, r, D]; `peaks`, how much they saw, float32 [B, K, G, r].
    """

    outputs: Array
    peaks: Peaks


class Asked(NamedTuple):
    """Queries [B, K, G, r, D], and what is `wanted` for them."""

    queries: Queries
    wanted: Wanted


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """Adds `X` to the kept values so that queries get what the whole prompt gave them: the window's, and `future` ones.

    Minimises `||A (V + X) - O||^2 + lambda ||X||^2` per KV head, with `A` [r, N] the attention of the group's `r`
    queries renormalised over the `N` kept keys, `O` their outputs over all keys, and `lambda` equal to `ridge`, at
    least `N` float32 roundings, times the mean diagonal of `A^T A`: the less a key is attended to, the less it changes,
    however many are kept. From what the keys give by then the error of these queries' output never grows.

    What is evicted leaves the softmax too, so that sinks, the window and tokens to come get more than their share. With
    a `mass_ridge` the kept keys carry the mass of all first (Attention Matching, arXiv 2602.16284): of all weights,
    those near 1 that minimise `||E w - 1||^2 + lambda ||w - 1||^2`, `E` [r, N] being the queries' attention over the
    whole prompt to the kept keys. There a bias `log w` is stored beside the keys; here each key moves by `u log w`,
    where `u` is the direction that has a product of 1 with all queries, as nearly as can be: queries of a head have
    much in common.

    What few slots lack is pressed into what they have, needles included: with a budget below `ample` slots the `ridge`
    grows with the square of how many times fewer they are.
    """

    ridge: float = 0.01
    future: FutureQueries | None = None
    mass_ridge: float | None = None
    ample: int = 1

    def __post_init__(self):
        check_integer("ample", self.ample, 1, "slots from which on values are corrected by `ridge`")
        _check_ridge("ridge", self.ridge, "0.01 is usual")
        if not isinstance(self.future, FutureQueries | None):
            raise TypeError(f"future={self.future!r} must be a restkv_jax.FutureQueries(count=512), or None")
        if self.mass_ridge is not None:
            _check_ridge("mass_ridge", self.mass_ridge, "0.01 is usual, None moves no keys")

    def within(self, budget: int) -> "LeastSquares":
        """The correction with a mean budget of so many slots per layer and KV head."""
        return dataclasses.replace(self, ridge=self.ridge * max(1.0, self.ample / budget) ** 2)

    @property
    def num_future(self) -> int:
        """Last queries of the prompt that are asked again."""
        return 0 if self.future is None else self.future.count

    def queries(self, view: LayerView, window: int) -> Queries:
        """Those whose outputs are wanted, `r = window + num_future`; places without a query have position -1.

        Args:
          view: with `window` and `num_future` queries, or more; where there are fewer, places are empty.
          window: `w`.
        """
        shown = [_filled(view.queries.last(window), window)]
        if self.future is not None:
            shown.append(_filled(self.future(view), self.num_future))
        return shown[0].replace(
            vectors=jnp.concatenate([part.vectors for part in shown], axis=3),
            positions=jnp.concatenate([part.positions for part in shown], axis=1),
        )

    def ask(self, view: LayerView, pairs: Pairs, window: int) -> Asked:
        """The `queries` of a layer and what they get from the whole prompt's pairs."""
        queries = self.queries(view, window)
        return Asked(queries, find_wanted(queries, pairs))

    def __call__(self, asked: Asked, kept: Pairs) -> Pairs:
        """The corrected pairs.

        Args:
          asked: what `ask` gave.
          kept: pairs [B, K, N, D].

        Returns:
          [B, K, N, D] in the dtypes of the pairs; empty places stay as they are.
        """
        return _by_device(self._corrected, asked, kept)

    def head_by_head(self, asked: Asked, kept: Pairs) -> Pairs:
        """The same for KV heads that keep few of their `N` places: one after the other, in about as many as each needs.

        All at once their systems would be of `N` keys each, and take time with its square and cube.

        Args:
          asked: what `ask` gave.
          kept: pairs [B, K, N, D], empty places anywhere.

        Returns:
          [B, K, N, D] in the dtypes of the pairs; empty places stay as they are.
        """
        return _by_device(self._head_by_head, asked, kept)

    def _head_by_head(self, asked: Asked, kept: Pairs) -> Pairs:
        batch, num_kv_heads, places, _ = kept.keys.shape
        order = jnp.argsort(kept.positions < 0, axis=-1, stable=True)
        packed = Pairs(*(take_places(x, order) for x in kept))
        sizes = [-(-places * i // SIZES) for i in range(1, SIZES + 1)]

        def in_places(size: int, asked: Asked, packed: Pairs) -> Pairs:
            corrected = self._corrected(asked, take_pairs(packed, 0, size))
            return Pairs(*(x.at[:, :, :size].set(part) for x, part in zip(packed, corrected, strict=True)))

        def one_head(head: tuple[Array, Array, Wanted, Pairs]) -> Pairs:
            vectors, positions, wanted, packed = head
            shown = asked.queries.replace(vectors=vectors, positions=positions)
            fitting = jnp.searchsorted(jnp.asarray(sizes), (packed.positions >= 0).sum())
            branches = [functools.partial(in_places, size) for size in sizes]
            return jax.lax.switch(fitting, branches, Asked(shown, wanted), packed)

        def alone(x: Array) -> Array:
            return einops.rearrange(x, "b k ... -> (b k) 1 1 ...")

        positions = jnp.repeat(asked.queries.positions[:, None], num_kv_heads, axis=0)
        heads = alone(asked.queries.vectors), positions, *jax.tree.map(alone, (asked.wanted, packed))
        corrected = jax.lax.map(one_head, heads)
        back = jnp.argsort(order, axis=-1)
        return Pairs(*(take_places(einops.rearrange(x, "(b k) 1 1 ... -> b k ...", b=batch), back) for x in corrected))

    def _corrected(self, asked: Asked, kept: Pairs) -> Pairs:
        queries, wanted = asked
        if self.mass_ridge is not None:
            kept = kept._replace(keys=_carry_mass(queries, wanted.peaks, kept, self.mass_ridge))
        values = kept.values.astype(jnp.float32)
        correction = _ridge_regression(
            queries, kept, find_peaks(queries, kept), values, _rows(wanted.outputs), self.ridge
        )
        # Summed in float32 and rounded once: a rounded correction would be rounded again in the sum.
        return kept._replace(values=(values + correction).astype(kept.values.dtype))


def _by_device(correct: Callable[[Asked, Pairs], Pairs], asked: Asked, kept: Pairs) -> Pairs:
    """Corrects what each device has."""
    rows = "b k heads r"  # a KV head's query heads are rows of one system, which no device has a part of
    of_queries = query_axes(asked.queries).replace(vectors=f"{rows} d")
    of_asked = Asked(of_queries, Wanted._make((f"{rows} d", Peaks._make((rows, rows)))))
    return by_device(correct, (asked, kept), (of_asked, PAIR_AXES), PAIR_AXES)


def _check_ridge(name: str, value: float, advice: str):
    check_number(name, value, f"relative to the mean diagonal of the system; {advice}")
    if not value > 0:
        raise ValueError(f"{name}={value} must be above 0, or the system may be singular; {advice}")


def _carry_mass(queries: Queries, peaks: Peaks, kept: Pairs, ridge: float) -> Array:
    """The kept keys, moved so that their exponentials sum to those of the whole prompt; as `LeastSquares` says."""
    ones = jnp.ones((*kept.keys.shape[:3], 1), jnp.float32)
    expected = jnp.ones((*kept.keys.shape[:2], math.prod(queries.vectors.shape[2:4]), 1), jnp.float32)
    weights = ones + _ridge_regression(queries, kept, peaks, ones, expected, ridge)
    bias = jnp.log(jnp.clip(weights, LEAST_MASS, MOST_MASS))
    asked = jnp.where((queries.positions >= 0)[:, None, None, :, None], queries.vectors, 0.0)
    direction = _common_direction(_rows(asked.astype(jnp.float32)))
    return (kept.keys.astype(jnp.float32) + bias * direction[:, :, None]).astype(kept.keys.dtype)


def find_wanted(queries: Queries, pairs: Pairs) -> Wanted:
    """What queries [B, K, G, r, D] get from the whole prompt's pairs [B, K, T, D].

    As exactly as the refit's own attention, which would take rounding for a missing output.
    """
    return Wanted(*read_pairs(queries, pairs))


def _filled(queries: Queries, count: int) -> Queries:
    """Empty places before queries that are fewer than `count`."""
    missing = count - queries.positions.shape[1]
    return queries.replace(
        vectors=jnp.pad(queries.vectors, ((0, 0), (0, 0), (0, 0), (missing, 0), (0, 0))),
        positions=jnp.pad(queries.positions, ((0, 0), (missing, 0)), constant_values=-1),
    )


def _rows(x: Array) -> Array:
    """[B, K, G, r, N] to [B, K, G r, N]: the queries of all heads of a KV head as rows of one matrix."""
    return einops.rearrange(x, "b k g r n -> b k (g r) n")


def _ridge_regression(queries: Queries, kept: Pairs, peaks: Peaks, now: Array, expected: Array, ridge: float) -> Array:
    """The `X` [B, K, N, M] that minimises `||A (Y + X) - E||^2 + lambda ||X||^2` per KV head.

    With fewer keys than queries `X = (A^T A + lambda I)^-1 A^T (E - A Y)`; else the dual form
    `A^T (A A^T + lambda I)^-1 (E - A Y)`, whose system has as many rows as there are queries: `A` is never whole then.

    Args:
      queries: [B, K, G, r, D]; those that see nothing do not count.
      kept: pairs [B, K, N, D].
      peaks: `A` is the queries' attention to the kept keys, over the pairs that these are of.
      now: `Y`, float32 [B, K, N, M].
      expected: `E`, float32 [B, K, G r, M].
      ridge: `lambda`, relative to the mean diagonal of `A^T A`.
    """
    num_kept = (kept.positions >= 0).sum(-1)
    if kept.keys.shape[2] < expected.shape[2]:
        attention = _rows(probabilities(queries, kept, peaks))
        is_real = attention.sum(-1, keepdims=True) > 0
        missing = jnp.where(is_real, expected - einsum("bkrn,bknm->bkrm", attention, now), 0.0)
        squared, targets = (einsum("bkrn,bkrm->bknm", attention, x) for x in (attention, missing))
        return _solve(squared, num_kept, targets, ridge)

    def add(sums: tuple[Array, Array], tile: Pairs, is_new: Array, start: Array) -> tuple[Array, Array]:
        attention = jnp.where(is_new, _rows(probabilities(queries, tile, peaks)), 0.0)
        of_tile = jax.lax.dynamic_slice_in_dim(now, start, is_new.size, axis=2)
        squared = einsum("bkrn,bksn->bkrs", attention, attention)
        return sums[0] + squared, sums[1] + einsum("bkrn,bknm->bkrm", attention, of_tile)

    rows = expected.shape[2]
    empty = jnp.zeros((*expected.shape[:2], rows, rows), jnp.float32), jnp.zeros_like(expected)
    squared, got = fold_tiles(add, empty, queries, kept)
    is_real = jnp.diagonal(squared, axis1=2, axis2=3)[..., None] > 0
    weights = _solve(squared, num_kept, jnp.where(is_real, expected - got, 0.0), ridge)

    def of_tile(tile: Pairs, _) -> Array:
        return einsum("bkrn,bkrm->bkmn", _rows(probabilities(queries, tile, peaks)), weights)

    return jnp.moveaxis(map_tiles(of_tile, queries, kept), 2, 3)


def _solve(squared: Array, count: Array, targets: Array, ridge: float) -> Array:
    """Solves `(S + lambda I) x = targets` for `S` [B, K, n, n] and targets [B, K, n, M], float32.

    `lambda` is `ridge` times the trace of `S` over `count`, int32 [B, K]; 1 where `S` is zero.
    """
    # The system is singular with more queries than keys, or the reverse. Below the rounding of its entries a ridge no
    # longer keeps the Cholesky factor finite.
    count = jnp.maximum(count, 1)
    scale = jnp.maximum(ridge, count * jnp.finfo(jnp.float32).eps) * jnp.trace(squared, axis1=2, axis2=3) / count
    scale = jnp.where(scale > 0, scale, 1.0)[..., None, None]
    return jax.vmap(jax.vmap(solve_positive_definite))(squared + scale * jnp.eye(squared.shape[-1]), targets)


def _common_direction(vectors: Array) -> Array:
    """The `u` [B, K, D] that has a product of 1 with all rows of `Q` [B, K, r, D], in least squares."""
    squared, total = einsum("bkrd,bkre->bkde", vectors, vectors), vectors.sum(2)[..., None]
    return _solve(squared, jnp.full(squared.shape[:2], squared.shape[-1]), total, DIRECTION_RIDGE)[..., 0]
