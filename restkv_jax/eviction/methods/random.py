"""Random eviction: the floor that every method should beat."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.observation import Observation
from restkv_jax.eviction.policy import EvictionPolicy


@dataclasses.dataclass(frozen=True)
class RandomScores:
    """Uniform scores that depend on the seed, layer, KV head and position only, so batching does not change them."""

    seed: int = 0
    all_queries: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    def __call__(self, observation: Observation, window: int) -> Array:
        o = observation
        num_kv_heads = o.keys.shape[1]
        key = jax.random.fold_in(jax.random.key(self.seed), o.layer)
        draw = lambda position: jax.random.uniform(jax.random.fold_in(key, position), (num_kv_heads,))  # noqa: E731
        scores = jax.vmap(jax.vmap(draw, out_axes=1))(o.positions[:, : o.positions.shape[1] - window])
        return jnp.repeat(scores, o.queries.shape[1] // num_kv_heads, axis=1)


def random(budget: int = 128, window: int = 32, seed: int = 0) -> EvictionPolicy:
    """Random keys before the window: the baseline without any judgement.

    Args:
      budget: slots kept per layer and KV head, the window included.
      window: last tokens of the prompt, always kept.
      seed: of the random choice.
    """
    return EvictionPolicy(budget=budget, window=window, scorer=RandomScores(seed))
