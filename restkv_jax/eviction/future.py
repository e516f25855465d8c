"""Queries to come, foretold: the last ones of the prompt, asked again at the positions that follow it; their scores."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.scores import column_row_norms, fold_queries, output_gram
from restkv_jax.models.arguments import check_integer, check_number
from restkv_jax.models.decoder import LayerView
from restkv_jax.models.rope import apply_rope, undo_rope


@dataclasses.dataclass(frozen=True)
class FutureQueries:
    """The prompt's last `count` queries, turned by RoPE to the `horizon` positions after it, again and again in order.

    What a text asks for next it has mostly asked for before, but from nearer by: queries where they stand attend to
    neighbours, of which later ones see nothing. Pseudo-queries at future positions are arXiv 2603.11564's.
    """

    count: int = 512
    horizon: int = 64

    def __post_init__(self):
        check_integer("count", self.count, 1, "last queries of the prompt")
        check_integer("horizon", self.horizon, 1, "positions after the prompt")

    def __call__(self, view: LayerView) -> Queries:
        """The queries of a layer as they may be to come.

        Args:
          view: with `count` queries or more; of fewer, all are taken. Without a rotation they keep their directions.

        Returns:
          `count` queries, [B, K, G, count, D], which see the whole prompt; those of padding have position -1 and see
          nothing.
        """
        asked = view.queries.last(self.count)
        is_token = asked.positions >= 0
        rank = jnp.maximum(jnp.cumsum(is_token, axis=1) - 1, 0)  # among tokens, so that padding changes nothing
        after = asked.positions[:, -1:] + 1 + rank % self.horizon
        vectors = asked.vectors
        if view.rope is not None:
            vectors = undo_rope(vectors, jnp.where(is_token, asked.positions, 0), view.rope)
            vectors = apply_rope(vectors, jnp.where(is_token, after, 0), view.rope).astype(asked.vectors.dtype)
        return asked.replace(vectors=vectors, positions=jnp.where(is_token, after, -1))


@dataclasses.dataclass(frozen=True)
class Foresight:
    """`weight rms(F[:, n]) ||v[n] W_h||`, `F` the attention of queries to come: scores that are added to smoothed ones.

    Smoothing is for what the window's queries ask for, where an answer of several tokens begins; free text asks for
    single keys.
    """

    queries: FutureQueries
    weight: float

    def __post_init__(self):
        check_number("weight", self.weight, "of queries to come against those of the window")
        if self.weight < 0:
            raise ValueError(f"weight={self.weight} must not be negative; 0 leaves queries to come out")

    def __call__(self, view: LayerView, pairs: Pairs, window: int) -> Array:
        """Scores of one layer's keys, float32 [B, K, G, T - w].

        Args:
          view: with as many queries as are asked again, or more.
          pairs: [B, K, T, D] of the whole prompt.
          window: `w`, the last tokens, which are not scored.
        """
        norms = root_mean_square_norms(self.queries(view), view.output_projection, pairs)
        return self.weight * norms[..., : pairs.keys.shape[2] - window]


def root_mean_square_norms(queries: Queries, output_projection: Array, pairs: Pairs) -> Array:
    """`||A[:, n]||_2 ||v[n] W_h||_2` over the square root of the number of queries, float32 [B, K, G, T].

    LaProx's score (arXiv 2605.07234), so divided that any numbers of queries compare.

    Args:
      queries: [B, K, G, r, D].
      output_projection: [K, G, D, M].
      pairs: [B, K, T, D].
    """
    gram = output_gram(output_projection)

    def add(total: Array, some: Queries) -> Array:
        return total + column_row_norms(some, pairs, gram) ** 2

    *heads, _, _ = queries.vectors.shape
    total = fold_queries(add, jnp.zeros((*heads, pairs.keys.shape[2]), jnp.float32), queries)
    number = jnp.maximum((queries.positions >= 0).sum(-1), 1)
    return jnp.sqrt(total / number[:, None, None, None])
