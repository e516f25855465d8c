"""KeyDiff: keep the keys that are least like the others."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.kernels.pairs import Pairs, within_reach
from restkv_jax.kernels.scores import einsum, fold_tiles, map_tiles
from restkv_jax.models.decoder import LayerView


@dataclasses.dataclass(frozen=True)
class KeyDissimilarity:
    """`-cos(k[n], anchor)`, after RoPE, with the anchor the mean direction of the keys that later tokens can see."""

    all_queries: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    def __call__(self, view: LayerView, pairs: Pairs, window: int) -> Array:
        one = view.queries.last(1)

        def add_directions(total: Array, tile: Pairs, is_new: Array, _) -> Array:
            seen = within_reach(one, tile.positions) & is_new
            return total + jnp.where(seen[..., None], _directions(tile.keys), 0.0).sum(2)

        batch, num_kv_heads, length, dim = pairs.keys.shape
        anchor = _directions(fold_tiles(add_directions, jnp.zeros((batch, num_kv_heads, dim)), one, pairs))

        def cosines(tile: Pairs, _) -> Array:
            return einsum("bknd,bkd->bkn", _directions(tile.keys), anchor)

        return -map_tiles(cosines, one, pairs)[:, :, None, : length - window]


def _directions(vectors: Array) -> Array:
    wide = vectors.astype(jnp.float32)
    return wide / jnp.maximum(jnp.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)


def keydiff(budget: int = 128, window: int = 1) -> EvictionPolicy:
    """KeyDiff: keys least similar to the mean of all keys, whatever is asked of them (arXiv 2504.15364).

    The paper evicts after every block of a prompt; like kvpress's press alone, this does once.

    Args:
      budget: slots kept per layer and KV head, the window included.
      window: last tokens of the prompt, always kept.
    """
    return EvictionPolicy(budget=budget, window=window, scorer=KeyDissimilarity())
