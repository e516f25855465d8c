"""Expected Attention: keep what queries to come would attend to, by the distribution of those seen."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.kernels.pairs import Pairs, Queries, within_reach
from restkv_jax.kernels.scores import einsum, fold_places, map_tiles
from restkv_jax.models.arguments import check_choice, check_integer, check_number
from restkv_jax.models.decoder import LayerView
from restkv_jax.models.rope import Rope, undo_average_rope, undo_rope

QUERIES_AT_ONCE = 256
"""Queries that are turned back at one time."""


@dataclasses.dataclass(frozen=True)
class ExpectedAttention:
    """`softmax_n(mu k'[n] + k'[n] Sigma k'[n] / 2) ||v[n]||_2`, mean over the query heads.

    `mu` and `Sigma` are mean and covariance of the queries before RoPE, those of the first `sinks` tokens left out, and
    `k' = R^T k` with `R` the mean rotation of the `future` positions that follow: if queries to come are normally
    distributed like these, the exponential is the mean of theirs. The first `sinks` keys do not count and score 0: who
    keeps them sets the policy's `sinks`.
    """

    future: int = 512
    sinks: int = 4
    use_covariance: bool = True
    use_value_norm: bool = True
    epsilon: float = 0.0
    all_queries: ClassVar[bool] = True
    additive: ClassVar[bool] = True

    def __post_init__(self):
        check_integer("future", self.future, 1, "positions of queries to come")
        check_integer("sinks", self.sinks, 0, "first tokens of the prompt, which do not count")
        check_choice("use_covariance", self.use_covariance, (False, True))
        check_choice("use_value_norm", self.use_value_norm, (False, True))
        check_number("epsilon", self.epsilon, "added to the attention before it counts by the values' norms")
        if self.epsilon < 0:
            raise ValueError(f"epsilon={self.epsilon} must not be negative")

    def __call__(self, view: LayerView, pairs: Pairs, window: int) -> Array:
        mean, covariance = query_moments(view.queries, view.rope, self.sinks)
        next_positions = view.queries.positions[:, -1] + 1

        def logits(tile: Pairs, _) -> Array:
            keys = undo_average_rope(tile.keys, next_positions, self.future, view.rope)
            expected = einsum("bkgd,bknd->bkgn", mean, keys)
            if not self.use_covariance:
                return expected
            return expected + einsum("bknd,bkgde,bkne->bkgn", keys, covariance, keys) / 2

        counted = within_reach(view.queries, pairs.positions) & (pairs.positions >= self.sinks)
        attention = jax.nn.softmax(map_tiles(logits, view.queries.last(1), pairs), where=counted[:, :, None])
        scores = attention.mean(2)
        if self.use_value_norm:
            scores = (scores + self.epsilon) * jnp.linalg.norm(pairs.values.astype(jnp.float32), axis=-1)
        return jnp.where(counted, scores, 0.0)[:, :, None, : pairs.keys.shape[2] - window]


def query_moments(queries: Queries, rope: Rope | None, sinks: int) -> tuple[Array, Array]:
    """Mean and covariance of queries before RoPE, float32 [B, K, G, D] and [B, K, G, D, D].

    Args:
      queries: [B, K, G, T, D], times the scale of the logits, which the moments keep.
      rope: what turned them.
      sinks: those at positions before it, and padding, do not count.
    """
    *heads, length, dim = queries.vectors.shape
    counts = queries.positions >= sinks
    number = jnp.maximum(counts.sum(-1), 1)[:, None, None, None]
    size = min(QUERIES_AT_ONCE, length)

    def fold(function, empty):
        def step(total, start, is_new):
            take = [jax.lax.dynamic_slice_in_dim(x, start, size, 1) for x in (queries.positions, counts)]
            vectors = jax.lax.dynamic_slice_in_dim(queries.vectors, start, size, 3)
            weights = (take[1] & is_new).astype(jnp.float32)
            return total + function(undo_rope(vectors, take[0], rope), weights)

        return fold_places(step, empty, length, size)

    mean = fold(lambda x, weights: einsum("bt,bkgtd->bkgd", weights, x), jnp.zeros((*heads, dim))) / number

    def second_moment(x: Array, weights: Array) -> Array:
        centred = x - mean[..., None, :]
        return einsum("bt,bkgtd,bkgte->bkgde", weights, centred, centred)

    return mean, fold(second_moment, jnp.zeros((*heads, dim, dim))) / number[..., None]


def expected_attention(
    budget: int = 128,
    window: int = 1,
    future: int = 512,
    sinks: int = 4,
    use_covariance: bool = True,
    use_value_norm: bool = True,
    epsilon: float = 0.0,
) -> EvictionPolicy:
    """Expected Attention: what normally distributed queries at the next positions would attend to (arXiv 2510.00636).

    Args:
      budget: slots kept per layer and KV head, the window included.
      window: last tokens of the prompt, always kept.
      future: positions after the prompt over which RoPE is averaged.
      sinks: first tokens of the prompt, always kept; their queries do not count.
      use_covariance: count how far queries lie around their mean, not only the mean.
      use_value_norm: count a key's attention times the norm of its value.
      epsilon: added to the attention before it is multiplied by that norm.
    """
    scorer = ExpectedAttention(future, sinks, use_covariance, use_value_norm, epsilon)
    return EvictionPolicy(budget=budget, window=window, scorer=scorer, sinks=sinks)
