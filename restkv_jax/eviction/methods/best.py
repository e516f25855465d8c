"""Ours: what the window needs and what queries to come may need, kept pairs corrected for those that are not."""

import dataclasses
from typing import ClassVar

from jax import Array

from restkv_jax.eviction.allocation import AdaptiveHeads
from restkv_jax.eviction.future import Foresight, FutureQueries, root_mean_square_norms
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.pooling import AnswerPooling
from restkv_jax.eviction.refit import LeastSquares
from restkv_jax.kernels.pairs import Pairs
from restkv_jax.models.decoder import LayerView

AMPLE = 50
"""Slots below which values are corrected less."""


@dataclasses.dataclass(frozen=True)
class WindowNorm:
    """`rms(A[:, n]) ||v[n] W_h||`, `A` the window's attention: LaProx's score over the square root of the window."""

    all_queries: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    def __call__(self, view: LayerView, pairs: Pairs, window: int) -> Array:
        norms = root_mean_square_norms(view.queries, view.output_projection, pairs)
        return norms[..., : pairs.keys.shape[2] - window]


def best(
    budget: int | str = 128,
    window: int = 8,
    kernel_size: int = 21,
    weight: float = 0.4,
    sinks: int = 1,
    floor: float = 0.2,
    ridge: float = 0.5,
    mass_ridge: float | None = 0.01,
    future: int = 512,
    candidates: int | None = None,
) -> EvictionPolicy:
    """The policy of this library: on a real model it diverges least in free text by far (docs/policies.md).

    Keys are kept that the window's output needs (LaProx, arXiv 2605.07234) and those behind them, where a model that
    copies goes next; and keys that the last queries of the prompt would need, were they asked after it (pseudo-queries,
    arXiv 2603.11564). Sinks are always kept: their values are small, so that such scores give them up. Each layer
    shares its budget among its KV heads (AdaKV). What is kept is then corrected so that all these queries get nearly
    what the whole prompt gave them (Attention Matching, arXiv 2602.16284, whose biases the keys carry here).

    Args:
      budget: mean slots per layer and KV head, the window and the sinks included.
      window: last tokens of the prompt, whose queries say where an answer begins.
      kernel_size: most keys that the window's scores are spread over, in tokens; at most 0.3 of those kept.
      weight: of the scores by queries to come.
      sinks: first tokens of the prompt, always kept.
      floor: the part of the budget that all heads get evenly.
      ridge: of the values' correction with 50 slots and more: the larger, the less they change.
      mass_ridge: of the keys' correction; None leaves them as they are.
      future: last queries of the prompt that are asked again after it.
      candidates: keys before the window that each layer and KV head carries to the selection; 4 times the budget by
        default.
    """
    queries = FutureQueries(future)
    return EvictionPolicy(
        budget=budget,
        window=window,
        scorer=WindowNorm(),
        pooling=AnswerPooling(kernel_size),
        foresight=Foresight(queries, weight),
        sinks=sinks,
        allocation=AdaptiveHeads(floor=floor, normalize=False),
        candidates=candidates,
        refit=LeastSquares(ridge, queries, mass_ridge, AMPLE),
    )
