"""An eviction policy: small parts with one job each, put together as a static description."""

import dataclasses
import warnings
from typing import Literal, cast

from restkv_jax.eviction.allocation import Allocation, Uniform
from restkv_jax.eviction.budgets import budget_slots, check_budget
from restkv_jax.eviction.future import Foresight
from restkv_jax.eviction.pooling import NoPooling, Pooling
from restkv_jax.eviction.refit import LeastSquares
from restkv_jax.eviction.scorer import QueryScorer, Scorer
from restkv_jax.kernels.paged import check_page_size, page_size_within
from restkv_jax.models.arguments import check_choice, check_integer


@dataclasses.dataclass(frozen=True)
class EvictionPolicy:
    """What to keep of a prompt, static under `jax.jit`.

    Attributes:
      budget: slots kept per layer and KV head, the window included, or a percentage such as "10%" of the prompt's
        `bucket_length`, which `resolved` makes a number; None keeps everything.
      window: the last tokens of the prompt; their queries score the others and they are always kept. One that is not
        smaller than the budget shrinks to half of it, with a warning.
      scorer: how keys before the window are scored; None only with `budget=None`.
      pooling: smoothing of the scores over neighbouring keys.
      foresight: scores by queries to come, which are added to the smoothed ones; None adds nothing.
      sinks: the first tokens of the prompt, kept before all others that the window leaves room for: queries that have
        nothing else to attend to attend to them (StreamingLLM, arXiv 2309.17453), whatever their values.
      group_reduce: how the query heads of a KV head agree on one score, "mean" or "max".
      while_generating: holds the cache at `budget` slots while tokens are generated, each new pair taking the slot of
        least importance, a moving average of the scorer's error over the generated queries; without it the cache
        grows by one slot per token. A prompt that with `max_new_tokens` needs fewer slots gets as many as it needs,
        and stays at these. For ReST-KV's scorer only.
      allocation: how the budget is shared among layers and KV heads. Other shares than equal ones are held in pages.
      candidates: with such shares, how many of the `P` keys before the window each layer and KV head carries until
        all layers are scored: `4 * budget` by default, and never more than the allocation can give a head. With `P` or
        more the selection is exact; with fewer, a head whose share would be larger keeps its best `candidates`, and
        others get what it leaves, but for a pyramid's, whose shares are given.
      page_size: slots of a page; shrinks with a budget that is smaller, down to 8, which changes no result.
      refit: corrects the kept values, and keys, so that queries get what they got from the whole prompt; None leaves
        them as they are.
    """

    budget: int | str | None = None
    window: int = 32
    scorer: Scorer | None = None
    pooling: Pooling = dataclasses.field(default_factory=NoPooling)
    foresight: Foresight | None = None
    sinks: int = 0
    group_reduce: Literal["mean", "max"] = "mean"
    while_generating: bool = False
    allocation: Allocation = dataclasses.field(default_factory=Uniform)
    candidates: int | None = None
    page_size: int = 16
    refit: LeastSquares | None = None

    def __post_init__(self):
        check_integer("window", self.window, 1, "the last token of a prompt is always kept")
        check_integer("sinks", self.sinks, 0, "first tokens of the prompt")
        check_choice("group_reduce", self.group_reduce, ("mean", "max"))
        check_choice("while_generating", self.while_generating, (False, True))
        check_integer("page_size", self.page_size, 1, "slots of a page")
        if not isinstance(self.foresight, Foresight | None):
            raise TypeError(f"foresight={self.foresight!r} must be a restkv_jax.Foresight(queries, weight), or None")
        if not isinstance(self.refit, LeastSquares | None):
            raise TypeError(f"refit={self.refit!r} must be a restkv_jax.LeastSquares(ridge=0.01), or None")
        if self.budget is not None:
            check_budget(self.budget)
            if self.scorer is None:
                raise ValueError(f"budget={self.budget} needs a scorer to say what to keep; None keeps everything")
        if self.while_generating:
            if self.budget is None:
                raise ValueError("while_generating=True needs a budget: without one nothing is evicted")
            if not hasattr(self.scorer, "gram"):
                raise ValueError(
                    f"while_generating=True is for restkv; {type(self.scorer).__name__} does not score query by query"
                )
            if self.foresight is not None:
                raise ValueError(
                    "foresight and while_generating=True exclude each other: a generated query scores as it comes; "
                    "leave one out"
                )
        if not self.allocation.uniform:
            self._check_shares()
        if self.budget is not None and not isinstance(self.budget, str):
            self._fit(int(self.budget))

    def _check_shares(self):
        allocation = type(self.allocation).__name__
        check_page_size(self.page_size)
        if self.budget is None:
            raise ValueError(f"allocation={allocation} needs a budget: without one nothing is shared out")
        if self.candidates is not None:
            check_integer("candidates", self.candidates, 1, "keys per layer and KV head to choose from")
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

    def _fit(self, budget: int):
        """Checks what depends on the number of slots, and shrinks a window or page that does not fit into it."""
        check = getattr(self.scorer, "check_budget", None)
        if check is not None:
            check(budget)
        window = max(1, budget // 2) if self.window >= budget else self.window
        if window < self.window:
            said = f"budget={budget} is too small for window={self.window}, which shrinks to {window}"
            warnings.warn(said, stacklevel=5)
            self._shrink("window", window)
        if not self.allocation.uniform:
            if self.candidates is not None and self.candidates < budget:
                raise ValueError(
                    f"candidates={self.candidates} must be at least budget={budget}, the mean of what is kept; "
                    "None takes 4 times the budget"
                )
            self._shrink("page_size", page_size_within(budget, self.page_size))

    def _shrink(self, name: str, size: int):
        """Sets a field; `replace` goes on from what was asked for."""
        asked = {name: getattr(self, name)} | getattr(self, "_asked", {})
        object.__setattr__(self, "_asked", asked)
        object.__setattr__(self, name, size)

    def resolved(self, length: int) -> "EvictionPolicy":
        """The policy for prompts of `length` tokens, padding included: a percentage becomes a number of slots.

        Raises:
          ValueError: a number that the policy's other parts refuse.
        """
        if not isinstance(self.budget, str):
            return self
        slots = budget_slots(self.budget, length)
        try:
            return self.replace(budget=slots)
        except ValueError as error:
            raise ValueError(f"budget={self.budget} of {length:,} tokens is {slots:,} slots: {error}") from error

    @property
    def slots_given(self) -> int:
        """The budget, where there is one and it is resolved."""
        assert self.budget is not None and not isinstance(self.budget, str)
        return self.budget

    @property
    def correction(self) -> LeastSquares | None:
        """The refit at this budget, which is resolved; None where nothing is corrected or evicted."""
        return None if self.refit is None or self.budget is None else self.refit.within(self.slots_given)

    @property
    def query_scorer(self) -> QueryScorer:
        """The scorer, where it scores query by query."""
        return cast(QueryScorer, self.scorer)

    def is_ragged(self, length: int) -> bool:
        """Whether layers and KV heads may keep different numbers of pairs of a prompt of `length` tokens."""
        return not self.allocation.uniform and self.slots(length) < length

    def num_candidates(self, length: int, num_layers: int, num_kv_heads: int) -> int:
        """Keys before the window that a layer and KV head carries to the selection of a prompt of `length` tokens."""
        budget, window = self.slots_given, self.window_of(length)
        most = self.allocation.most_per_head(budget, window, num_layers, num_kv_heads)
        return min(length - window, most, 4 * budget if self.candidates is None else self.candidates)

    def window_of(self, length: int) -> int:
        """Tokens always kept of a prompt of `length` tokens."""
        return min(self.window, length)

    def num_queries(self, length: int) -> int:
        """How many of the last queries of a prompt of `length` tokens are looked at."""
        return max(self.num_scoring_queries(length), min(max(self._asked_again().values()), length))

    def asking_again(self) -> str:
        """The field of the part that asks most of the earlier queries again."""
        counts = self._asked_again()
        return max(counts, key=lambda name: counts[name])

    def _asked_again(self) -> dict[str, int]:
        return {
            "refit": 0 if self.refit is None else self.refit.num_future,
            "foresight": 0 if self.foresight is None else self.foresight.queries.count,
        }

    def num_scoring_queries(self, length: int) -> int:
        """How many of the last queries of a prompt of `length` tokens the scorer looks at."""
        return length if self.scorer is not None and self.scorer.all_queries else self.window_of(length)

    def replace(self, **changes) -> "EvictionPolicy":
        """Returns the policy with some fields changed; what a budget has shrunk is as asked for with another one."""
        asked = {name: size for name, size in getattr(self, "_asked", {}).items() if name not in changes}
        if "budget" in changes:
            return dataclasses.replace(self, **asked, **changes)
        replaced = dataclasses.replace(self, **changes)
        object.__setattr__(replaced, "_asked", getattr(replaced, "_asked", {}) | asked)
        return replaced

    def slots(self, length: int) -> int:
        """Slots kept of a prompt of `length` tokens."""
        return length if self.budget is None else min(self.slots_given, length)
