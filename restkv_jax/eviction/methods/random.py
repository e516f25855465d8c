"""Random eviction: the floor that every method should beat."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
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
        batch, num_kv_heads, length, _ = pairs.keys.shape
        key = jax.random.fold_in(jax.random.key(self.seed), view.index)

        def draw(head: Array, position: Array) -> Array:
            return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, head), position))

        positions = jnp.broadcast_to(pairs.positions, (batch, num_kv_heads, length))[:, :, : length - window]
        of_head = jax.vmap(draw, in_axes=(None, 0))
        return jax.vmap(jax.vmap(of_head), in_axes=(None, 0))(jnp.arange(num_kv_heads), positions)[:, :, None]


def random(budget: int | str = 128, window: int = 32, seed: int = 0) -> EvictionPolicy:
    """Random keys before the window: the baseline that looks at nothing.

    Args:
      budget: slots kept per layer and KV head, the window included.
      window: last tokens of the prompt, always kept.
      seed: of the random choice.
    """
    return EvictionPolicy(budget=budget, window=window, scorer=RandomScores(seed))
