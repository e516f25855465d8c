"""ReST-KV: evict what changes the layer's output least, smoothed over time and space."""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.allocation import make_allocation
from restkv_jax.eviction.methods.snapkv import WindowAttention
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.pooling import make_pooling
from restkv_jax.eviction.temporal import Temporal, check_temporal, query_weights
from restkv_jax.kernels.pairs import Pairs
from restkv_jax.kernels.scores import averaged_attention_removal_error, averaged_removal_error, output_gram
from restkv_jax.models.arguments import check_choice, check_number
from restkv_jax.models.decoder import LayerView

WIDTHS = {"ruler": 21, "infinitebench": 21, "longbench": 5, "needle": 5}
"""Least widths of the smoothing over neighbours in the authors' scripts, by benchmark."""


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Error of the layer's output when one key is deleted, smoothed over the window's queries.

    `I[t, n] = A[t, n] / (1 - A[t, n]) * ||(o[t] - v[n]) W_h||_2 ** tau`; `order="before"` smooths `I` over `t`, as the
    paper's formula; `order="after"` smooths `A` first, as the authors' code does by default.
    """

    temporal: Temporal = "ema"
    alpha: float = 0.3
    order: Literal["after", "before"] = "after"
    use_output_projection: bool = True
    tau: float = 1.0
    all_queries: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    def __post_init__(self):
        check_temporal(self.temporal, self.alpha)
        check_choice("order", self.order, ("after", "before"))
        check_choice("use_output_projection", self.use_output_projection, (False, True))
        check_number("tau", self.tau, "the power of the norms")
        if self.tau < 0:
            raise ValueError(f"tau={self.tau} must not be negative: keys that change the output would go first")

    def __call__(self, view: LayerView, pairs: Pairs, window: int) -> Array:
        weights = query_weights(self.temporal, view.queries.positions, self.alpha)
        gram = self.gram(view.output_projection)
        if self.order == "after":
            return averaged_attention_removal_error(view.queries, pairs, gram, weights, window=window, tau=self.tau)
        errors = averaged_removal_error(view.queries, pairs, gram, weights, tau=self.tau)
        return errors[..., : pairs.keys.shape[2] - window]

    def gram(self, output_projection: Array) -> Array:
        """The quadratic form in which errors are measured: [K, G, D, M] to float32 [K, G, D, D]."""
        if self.use_output_projection:
            return output_gram(output_projection)
        *heads, dim, _ = output_projection.shape
        return jnp.broadcast_to(jnp.eye(dim, dtype=jnp.float32), (*heads, dim, dim))


def restkv(
    budget: int | str = 128,
    window: int = 32,
    criterion: Literal["reconstruction", "attention"] = "reconstruction",
    temporal: Temporal = "ema",
    alpha: float = 0.3,
    order: Literal["after", "before"] = "after",
    pooling: Literal["adaptive", "avg", "max", "successor", "none"] = "adaptive",
    kernel_size: int | None = None,
    scale: int = 2000,
    use_output_projection: bool = True,
    group_reduce: Literal["mean", "max"] = "mean",
    while_generating: bool = False,
    allocation: Literal["uniform", "pyramid", "adaptive_heads", "model"] = "uniform",
    tau: float = 1.0,
    benchmark: Literal["ruler", "infinitebench", "longbench", "needle"] = "ruler",
) -> EvictionPolicy:
    """ReST-KV: layer-wise output reconstruction, smoothed over time and space (arXiv 2605.08840).

    Its authors smooth over at least 21 keys for RULER and InfiniteBench and over 5 for LongBench and needle maps. Most
    tokenizers cut a number or a name into many tokens, and a prompt's last queries attend to the first of them only:
    over 5 keys the others are lost, so 21 is the default. Other methods compare fairly with the same `kernel_size`.

    Args:
      budget: slots kept per layer and KV head, the window included.
      window: last tokens of the prompt, whose queries score the others.
      criterion: what a key is scored by: the error of the layer's output without it, or, as an ablation, the attention
        it receives.
      temporal: how the window's queries are averaged: exponential moving average, plain mean, the last query alone, or
        the moving average backwards, which weighs the oldest query as "ema" does the newest.
      alpha: weight of the newest query in the moving average.
      order: smooth the attention and then measure the error ("after"), or measure and then smooth ("before").
      pooling: smoothing over neighbouring keys, or, "successor", over those before.
      kernel_size: least width of that smoothing, in tokens; odd where it is symmetric. By default that of `benchmark`.
      scale: drift of the attention, in tokens, that widens the adaptive window by two.
      use_output_projection: measure errors after the output projection, not in value space.
      group_reduce: how the query heads of a KV head agree on one score.
      while_generating: hold the cache at `budget` slots while tokens are generated.
      allocation: how layers and KV heads share the budget: evenly, less and less from layer to layer, by one selection
        over the heads of a layer, or by one over the whole model.
      tau: power of the norms by which errors are measured; 0 leaves the attention's part alone.
      benchmark: the authors' scripts whose width is taken where none is given.
    """
    check_choice("criterion", criterion, ("reconstruction", "attention"))
    check_choice("benchmark", benchmark, tuple(WIDTHS))
    kernel_size = WIDTHS[benchmark] if kernel_size is None else kernel_size
    scorer = Reconstruction(temporal, alpha, order, use_output_projection, tau)
    return EvictionPolicy(
        budget=budget,
        window=window,
        scorer=scorer if criterion == "reconstruction" else WindowAttention(temporal, alpha),
        pooling=make_pooling(pooling, kernel_size, scale),
        group_reduce=group_reduce,
        while_generating=while_generating,
        allocation=make_allocation(allocation),
    )
