"""The part of a policy that scores keys."""

from typing import ClassVar, Protocol

from jax import Array

from restkv_jax.kernels.pairs import Pairs
from restkv_jax.models.decoder import LayerView


class Scorer(Protocol):
    """Scores the keys before the window: the larger the score, the sooner a key is kept.

    A frozen dataclass, hashable and so static under jit. `all_queries` asks for the queries of the whole prompt instead
    of the window's. A scorer whose scores are not negative, so that an allocation may divide them by their sum, says so
    with `additive = True`. One that cannot do with every budget has a method `check_budget(slots)` that raises a
    ValueError.
    """

    all_queries: ClassVar[bool]
    additive: ClassVar[bool] = False

    def __call__(self, view: LayerView, pairs: Pairs, window: int) -> Array:
        """Scores of one layer's keys.

        Args:
          view: its `queries` are those of the window, or of the whole prompt where it asks for all; `output_projection`
            [K, G, D, M].
          pairs: [B, K, T, D] of the whole prompt.
          window: `w`, the last tokens, which are not scored.

        Returns:
          float32 [B, K, G, T - w], or [B, K, 1, T - w] where the query heads of a KV head agree.
        """
        ...


class QueryScorer(Scorer, Protocol):
    """A scorer that can go on scoring while tokens are generated, by the error that each query sees in each slot.

    `alpha` is the weight of the newest query in the moving average of the errors, `tau` the power of their norms.
    """

    @property
    def alpha(self) -> float: ...

    @property
    def tau(self) -> float: ...

    def gram(self, output_projection: Array) -> Array:
        """The quadratic form in which errors are measured: [K, G, D, M] to float32 [K, G, D, D]."""
        ...
