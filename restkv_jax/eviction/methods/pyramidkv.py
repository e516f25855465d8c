"""PyramidKV: SnapKV's scores, with budgets that fall from the first layer to the last."""

from typing import Literal

from restkv_jax.eviction.allocation import Pyramid
from restkv_jax.eviction.methods.snapkv import snapkv
from restkv_jax.eviction.policy import EvictionPolicy


def pyramidkv(
    budget: int | str = 128,
    window: int = 32,
    pooling: Literal["avg", "max", "successor", "none"] = "avg",
    kernel_size: int = 5,
    group_reduce: Literal["mean", "max"] = "mean",
) -> EvictionPolicy:
    """PyramidKV: SnapKV with more for the lower layers (arXiv 2406.02069).

    kvpress takes a window of 64 by default, counts the budget without it, and gives a short prompt's layers unequal
    shares too.

    Args:
      budget: mean slots per layer and KV head, the window included.
      window: last tokens of the prompt, whose queries score the others.
      pooling: smoothing over neighbouring keys, or, "successor", over those before.
      kernel_size: width of that smoothing, in tokens; odd where it is symmetric.
      group_reduce: how the query heads of a KV head agree on one score.
    """
    return snapkv(budget, window, pooling, kernel_size, group_reduce).replace(allocation=Pyramid(even_if_short=True))
