"""Ours: what the window needs and what queries to come may need, kept pairs corrected for those that are not."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.allocation import AdaptiveHeads
from restkv_jax.eviction.future import FutureQueries
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.pooling import SuccessorPooling
from restkv_jax.eviction.refit import LeastSquares
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.scores import column_row_norms, fold_queries, output_gram
from restkv_jax.models.arguments import check_number
from restkv_jax.models.decoder import LayerView


@dataclasses.dataclass(frozen=True)
class WindowAndFutureNorm:
    """`pool(rms(A[:, n]) ||v[n] W_h||) + weight rms(F[:, n]) ||v[n] W_h||`, `A` of the window, `F` of queries to come.

    The first is LaProx's score (arXiv 2605.07234) over the square root of the window, spread to the keys that follow
    where an answer begins; the second is not spread: free text needs single keys.
    """

    future: FutureQueries
    weight: float
    pooling: SuccessorPooling
    all_queries: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    def __post_init__(self):
        check_number("weight", self.weight, "of queries to come against those of the window")
        if self.weight < 0:
            raise ValueError(f"weight={self.weight} must not be negative; 0 leaves queries to come out")

    @property
    def num_queries(self) -> int:
        """Last queries of the prompt that are looked at."""
        return self.future.count

    def __call__(self, view: LayerView, pairs: Pairs, window: int) -> Array:
        prefix = pairs.keys.shape[2] - window
        now, later = (
            root_mean_square_norms(queries, view.output_projection, pairs)[..., :prefix]
            for queries in (view.queries.last(window), self.future(view))
        )
        return self.pooling(now, view, pairs, prefix) + self.weight * later


def root_mean_square_norms(queries: Queries, output_projection: Array, pairs: Pairs) -> Array:
    """`||A[:, n]||_2 ||v[n] W_h||_2` over the square root of the number of queries, float32 [B, K, G, T]."""
    gram = output_gram(output_projection)

    def add(total: Array, some: Queries) -> Array:
        return total + column_row_norms(some, pairs, gram) ** 2

    *heads, _, _ = queries.vectors.shape
    total = fold_queries(add, jnp.zeros((*heads, pairs.keys.shape[2]), jnp.float32), queries)
    number = jnp.maximum((queries.positions >= 0).sum(-1), 1)
    return jnp.sqrt(total / number[:, None, None, None])


def best(
    budget: int | str = 128,
    window: int = 8,
    kernel_size: int = 12,
    weight: float = 0.4,
    sinks: int = 4,
    floor: float = 0.2,
    ridge: float = 3.0,
    mass_ridge: float | None = 0.3,
    future: int = 512,
    candidates: int | None = None,
) -> EvictionPolicy:
    """The policy of this library that measured best on a real model (docs/policies.md).

    Keys are kept that the window's output needs (LaProx, arXiv 2605.07234) and those behind them, where a model that
    copies goes next; and keys that the last queries of the prompt would need, were they asked after it (pseudo-queries,
    arXiv 2603.11564). Sinks are always kept: their values are small, so that such scores give them up. Each layer
    shares its budget among its KV heads (AdaKV). What is kept is then corrected so that all these queries get nearly
    what the whole prompt gave them (Attention Matching, arXiv 2602.16284, whose biases the keys carry here).

    Args:
      budget: mean slots per layer and KV head, the window and the sinks included.
      window: last tokens of the prompt, whose queries say where an answer begins.
      kernel_size: keys that the window's scores are spread over, in tokens; see `SuccessorPooling`.
      weight: of the scores by queries to come.
      sinks: first tokens of the prompt, always kept.
      floor: the part of the budget that all heads get evenly.
      ridge: of the values' correction; see `LeastSquares`.
      mass_ridge: of the keys' correction; None leaves them as they are.
      future: last queries of the prompt that are asked again after it.
      candidates: keys before the window that each layer and KV head carries to the selection; 4 times the budget by
        default.
    """
    queries = FutureQueries(future)
    return EvictionPolicy(
        budget=budget,
        window=window,
        scorer=WindowAndFutureNorm(queries, weight, SuccessorPooling(kernel_size)),
        sinks=sinks,
        allocation=AdaptiveHeads(floor=floor, normalize=False),
        candidates=candidates,
        refit=LeastSquares(ridge, queries, mass_ridge),
    )
