"""StreamingLLM: keep the first tokens and the most recent ones."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.kernels.pairs import Pairs
from restkv_jax.models.arguments import check_integer
from restkv_jax.models.decoder import LayerView


@dataclasses.dataclass(frozen=True)
class SinksAndRecency:
    """The later the token the better, and the first `sinks` tokens before all."""

    sinks: int = 4
    all_queries: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    def __post_init__(self):
        check_integer("sinks", self.sinks, 0, "first tokens of the prompt")

    def check_budget(self, budget: int) -> None:
        if budget <= self.sinks:
            raise ValueError(f"budget={budget} must exceed sinks={self.sinks}; raise the budget or keep fewer sinks")

    def __call__(self, view: LayerView, pairs: Pairs, window: int) -> Array:
        positions = pairs.positions[:, :, None, : pairs.keys.shape[2] - window].astype(jnp.float32)
        scores = jnp.where(positions < self.sinks, 2.0**31 - positions, positions)
        return jnp.broadcast_to(scores, (*pairs.keys.shape[:2], *scores.shape[2:]))


def streaming_llm(budget: int | str = 128, sinks: int = 4) -> EvictionPolicy:
    """StreamingLLM: attention sinks and the most recent tokens (arXiv 2309.17453).

    Args:
      budget: slots kept per layer and KV head.
      sinks: first tokens of the prompt that are kept; the rest of the budget goes to the last ones.
    """
    return EvictionPolicy(budget=budget, window=1, scorer=SinksAndRecency(sinks))
