"""An eviction policy: small parts with one job each, put together as a static description."""

import dataclasses
from typing import Literal, cast

from restkv_jax.eviction.allocation import Allocation, Uniform
from restkv_jax.eviction.pooling import NoPooling, Pooling
from restkv_jax.eviction.refit import LeastSquares
from restkv_jax.eviction.scorer import QueryScorer, Scorer
from restkv_jax.kernels.paged import check_page_size
from restkv_jax.models.arguments import check_choice, check_integer


@dataclasses.dataclass(frozen=True)
class EvictionPolicy:
    """What to keep of a prompt, static under `jax.jit`.

    Attributes:
      budget: slots kept per layer and KV head, the window included; None keeps everything.
      window: the last tokens of the prompt; their queries score the others and they are always kept.
      scorer: how keys before the window are scored; None only with `budget=None`.
      pooling: smoothing of the scores over neighbouring keys.
      group_reduce: how the query heads of a KV head agree on one score, "mean" or "max".
      while_generating: holds the cache at `budget` slots while tokens are generated, each new pair taking the slot of
        least importance, a moving average of the scorer's error over the generated queries; without it the cache
        grows by one slot per token. For ReST-KV's scorer only.
      allocation: how the budget is shared among layers and KV heads. Other shares than equal ones are held in pages.
      candidates: with such shares, the keys before the window that each layer and KV head carries until all layers
        are scored; `min(P, 4 * budget)` of `P` by default. With `P` or more the selection is exact; with fewer, a head
        whose share would be larger keeps its best `candidates`, and others get what it leaves.
      page_size: slots of a page.
      refit: corrects the kept values so that the window's output is reconstructed; None leaves them.
    """

    budget: int | None = None
    window: int = 32
    scorer: Scorer | None = None
    pooling: Pooling = dataclasses.field(default_factory=NoPooling)
    group_reduce: Literal["mean", "max"] = "mean"
    while_generating: bool = False
    allocation: Allocation = dataclasses.field(default_factory=Uniform)
    candidates: int | None = None
    page_size: int = 16
    refit: LeastSquares | None = None

    def __post_init__(self):
        check_integer("window", self.window, 1, "the last token of a prompt is always kept")
        check_choice("group_reduce", self.group_reduce, ("mean", "max"))
        check_choice("while_generating", self.while_generating, (False, True))
        check_integer("page_size", self.page_size, 1, "slots of a page")
        if not isinstance(self.refit, LeastSquares | None):
            raise TypeError(f"refit={self.refit!r} must be a restkv_jax.LeastSquares(ridge=0.01), or None")
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
                    f"while_generating=True is for restkv; {type(self.scorer).__name__} does not score query by query"
                )

        if not self.allocation.uniform:
            self._check_pages()

    def _check_pages(self):
        allocation = type(self.allocation).__name__
        check_page_size(self.page_size)
        if self.budget is None:
            raise ValueError(f"allocation={allocation} needs a budget: without one nothing is shared out")
        if self.budget < self.page_size:
            raise ValueError(
                f"budget={self.budget} is less than one page per layer and KV head; raise it to page_size="
                f"{self.page_size} at least, or take smaller pages"
            )
        if self.candidates is not None:
            check_integer("candidates", self.candidates, 1, "keys per layer and KV head to choose from")
            if self.candidates < self.budget:
                raise ValueError(
                    f"candidates={self.candidates} must be at least budget={self.budget}, the mean of what is kept; "
                    "None takes 4 times the budget"
                )
        if self.while_generating:
            raise ValueError(
                f"allocation={allocation} and while_generating=True exclude each other: slots are taken over within a "
                "dense cache; leave one out"
            )
        if self.allocation.additive and not getattr(self.scorer, "additive", False):
            raise ValueError(
                f"allocation={allocation} divides scores by their sum, which those of {type(self.scorer).__name__} "
                "do not allow; choose another allocation or scorer"
            )

    @property
    def slots_given(self) -> int:
        """The budget, where there is one."""
        assert self.budget is not None
        return self.budget

    @property
    def query_scorer(self) -> QueryScorer:
        """The scorer, where it scores query by query."""
        return cast(QueryScorer, self.scorer)

    def is_ragged(self, length: int) -> bool:
        """Whether layers and KV heads may keep different numbers of pairs of a prompt of `length` tokens."""
        return not self.allocation.uniform and self.slots(length) < length

    def num_candidates(self, length: int) -> int:
        """Keys before the window that a layer and KV head carries to the selection of a prompt of `length` tokens."""
        prefix = length - self.window_of(length)
        return min(prefix, 4 * self.slots_given if self.candidates is None else self.candidates)

    def window_of(self, length: int) -> int:
        """Tokens always kept of a prompt of `length` tokens."""
        return min(self.window, length)

    def num_queries(self, length: int) -> int:
        """How many of the last queries of a prompt of `length` tokens score its keys."""
        uses_all = self.scorer is not None and self.scorer.all_queries
        return length if uses_all else self.window_of(length)

    def replace(self, **changes) -> "EvictionPolicy":
        """Returns the policy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def slots(self, length: int) -> int:
        """Slots kept of a prompt of `length` tokens."""
        return length if self.budget is None else min(self.budget, length)
