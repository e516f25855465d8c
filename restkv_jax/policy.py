"""An eviction policy: small parts with one job each, put together as a static description."""

import dataclasses
from typing import Literal

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
        least importance; without it the cache grows by one slot per token.
    """

    budget: int | None = None
    window: int = 32
    scorer: Scorer | None = None
    pooling: Pooling = dataclasses.field(default_factory=NoPooling)
    group_reduce: Literal["mean", "max"] = "mean"
    while_generating: bool = False

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1: the last token of a prompt is always kept")
        if self.group_reduce not in ("mean", "max"):
            raise ValueError(f"group_reduce={self.group_reduce!r} is unknown; choose 'mean' or 'max'")
        if self.budget is None:
            if self.while_generating:
                raise ValueError("while_generating=True needs a budget: without one nothing is evicted")
        elif self.budget <= self.window:
            raise ValueError(
                f"budget={self.budget} must exceed window={self.window}, whose tokens are always kept; "
                "raise the budget or shorten the window"
            )

    def replace(self, **changes) -> "EvictionPolicy":
        """Returns the policy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def slots(self, length: int) -> int:
        """Slots kept of a prompt of `length` tokens."""
        return length if self.budget is None else min(self.budget, length)
