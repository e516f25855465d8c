"""AdaKV: SnapKV's scores, with budgets that differ by head within a layer."""

from typing import Literal

from restkv_jax.eviction.allocation import AdaptiveHeads
from restkv_jax.eviction.methods.snapkv import snapkv
from restkv_jax.eviction.policy import EvictionPolicy


def adakv(
    budget: int | str = 128,
    window: int = 32,
    pooling: Literal["avg", "max", "successor", "none"] = "max",
    kernel_size: int = 7,
    floor: float = 0.2,
    group_reduce: Literal["mean", "max"] = "mean",
) -> EvictionPolicy:
    """AdaKV: SnapKV with a budget for each head, by one top-k over the layer's heads (arXiv 2407.11550).

    kvpress takes a window of 64, averages over 5 and compares scores as they are, after it has kept the best fifth of
    every head's even share: `replace(allocation=AdaptiveHeads(floor=0, normalize=False))` where each head wins as much.

    Args:
      budget: mean slots per layer and KV head, the window included.
      window: last tokens of the prompt, whose queries score the others.
      pooling: smoothing over neighbouring keys, or, "successor", over those before.
      kernel_size: width of that smoothing, in tokens; odd where it is symmetric.
      floor: part of the budget that all heads share evenly.
      group_reduce: how the query heads of a KV head agree on one score.
    """
    return snapkv(budget, window, pooling, kernel_size, group_reduce).replace(allocation=AdaptiveHeads(floor))
