"""LaProx: norms of attention columns times norms of projected values, with one budget for the whole model."""

import dataclasses
from typing import ClassVar, Literal

from jax import Array

from restkv_jax.eviction.allocation import AdaptiveHeads, ModelWide
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.pooling import make_pooling
from restkv_jax.kernels.pairs import Pairs
from restkv_jax.kernels.scores import column_row_norms, output_gram
from restkv_jax.models.arguments import check_choice
from restkv_jax.models.decoder import LayerView


@dataclasses.dataclass(frozen=True)
class ColumnRowNorm:
    """`||A[:, n]||_2 ||v[n] W_h||_2`: the size of one column-row pair of the window's output as a matrix product."""

    all_queries: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    def __call__(self, view: LayerView, pairs: Pairs, window: int) -> Array:
        gram = output_gram(view.output_projection)
        return column_row_norms(view.queries, pairs, gram)[..., : pairs.keys.shape[2] - window]


def laprox(
    budget: int | str = 128,
    window: int = 32,
    pooling: Literal["avg", "max", "successor", "none"] = "avg",
    kernel_size: int = 7,
    group_reduce: Literal["mean", "max"] = "mean",
    scope: Literal["model", "layer"] = "model",
    candidates: int | None = None,
) -> EvictionPolicy:
    """LaProx: attention columns times projected values, one budget for all layers and heads (arXiv 2605.07234).

    Args:
      budget: mean slots per layer and KV head, the window included.
      window: last tokens of the prompt, whose queries score the others.
      pooling: smoothing over neighbouring keys, or, "successor", over those before.
      kernel_size: width of that smoothing, in tokens; odd where it is symmetric.
      group_reduce: how the query heads of a KV head agree on one score.
      scope: one selection over the whole model, or one per layer.
      candidates: keys before the window that each layer and KV head carries to the selection; 4 times the budget by
        default.
    """
    check_choice("scope", scope, ("model", "layer"))
    return EvictionPolicy(
        budget=budget,
        window=window,
        scorer=ColumnRowNorm(),
        pooling=make_pooling(pooling, kernel_size),
        group_reduce=group_reduce,
        allocation=ModelWide() if scope == "model" else AdaptiveHeads(floor=0.0, normalize=False),
        candidates=candidates,
    )
