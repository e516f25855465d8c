"""Random eviction: the floor that every method should beat."""

import dataclasses
from typing import ClassVar

import jax
from jax import Array

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.kernels.pairs import Pairs
from restkv_jax.models.decoder import LayerView


@dataclasses.dataclass(frozen=True)
class RandomScores:
    """Uniform scores that depend on the seed, layer, KV head and position only, so batching does not change them."""

    seed: int = 0
    all_queries: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    def __call__(self, view: LayerView, pairs: Pairs, window: int) -> Array:
        num_kv_heads = pairs.keys.shape[1]
        key = jax.random.fold_in(jax.random.key(self.seed), view.index)

        def draw(position: Array) -> Array:
            return jax.random.uniform(jax.random.fold_in(key, position), (num_kv_heads, 1))

        return jax.vmap(jax.vmap(draw, out_axes=-1))(pairs.positions[:, 0, : pairs.keys.shape[2] - window])


def random(budget: int | str = 128, window: int = 32, seed: int = 0) -> EvictionPolicy:
    """Random keys before the window: the baseline that looks at nothing.

    Args:
      budget: slots kept per layer and KV head, the window included.
      window: last tokens of the prompt, always kept.
      seed: of the random choice.
    """
    return EvictionPolicy(budget=budget, window=window, scorer=RandomScores(seed))
