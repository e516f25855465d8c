"""An eviction policy: small parts with one job each, put together as a static description."""

import dataclasses
from typing import Literal

import numpy as np

from restkv_jax.observation import Scorer
from restkv_jax.pooling import NoPooling, Pooling


@dataclasses.dataclass(frozen=True)
class EvictionPolicy:
    """What to keep of a prompt, static under `jax.jit`.

    Attributes:
      budget: slots kept per layer and KV head, the window included; None keeps everything.
      window: the last tokens of the prompt; their queries judge the others and they are always kept.
      scorer: how keys before the window are judged; None only with `budget=None`.
      pooling: smoothing of the scores over neighbouring keys.
      group_reduce: how the query heads of a KV head agree on one score, "mean" or "max".
      while_generating: holds the cache at `budget` slots while tokens are generated, each new pair taking the slot of
        least importance, a moving average of the scorer's error over the generated queries; without it the cache
        grows by one slot per token. For ReST-KV's scorer only.
    """

    budget: int | None = None
    window: int = 32
    scorer: Scorer | None = None
    pooling: Pooling = dataclasses.field(default_factory=NoPooling)
    group_reduce: Literal["mean", "max"] = "mean"
    while_generating: bool = False

    def __post_init__(self):
        check_integer("window", self.window, 1, "the last token of a prompt is always kept")
        if self.group_reduce not in ("mean", "max"):
            raise ValueError(f"group_reduce={self.group_reduce!r} is unknown; choose 'mean' or 'max'")
        if self.budget is not None:
            check_integer("budget", self.budget, 1, "slots per layer and KV head")
            if self.budget <= self.window:
                raise ValueError(
                    f"budget={self.budget} must exceed window={self.window}, whose tokens are always kept; "
                    "raise the budget or shorten the window"
                )
            if self.scorer is None:
                raise ValueError(f"budget={self.budget} needs a scorer to say what to keep; None keeps everything")
        if self.while_generating:
            if self.budget is None:
                raise ValueError("while_generating=True needs a budget: without one nothing is evicted")
            if not hasattr(self.scorer, "gram"):
                raise ValueError(
                    f"while_generating=True is for restkv; {type(self.scorer).__name__} does not judge query by query"
                )

    def window_of(self, length: int) -> int:
        """Tokens always kept of a prompt of `length` tokens."""
        return min(self.window, length)

    def num_queries(self, length: int) -> int:
        """How many of the last queries of a prompt of `length` tokens judge its keys."""
        judges_by_all = self.scorer is not None and self.scorer.all_queries
        return length if judges_by_all else self.window_of(length)

    def replace(self, **changes) -> "EvictionPolicy":
        """Returns the policy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def slots(self, length: int) -> int:
        """Slots kept of a prompt of `length` tokens."""
        return length if self.budget is None else min(self.budget, length)


def check_integer(name: str, value: int, least: int, reason: str) -> None:
    """Refuses a value that is no integer or too small.

    Raises:
      TypeError: no integer.
      ValueError: less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r} must be an integer")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}: {reason}")
