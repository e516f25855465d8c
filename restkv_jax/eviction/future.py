"""Queries to come, foretold: the last ones of the prompt, asked again at the positions that follow it."""

import dataclasses

import jax.numpy as jnp

from restkv_jax.kernels.pairs import Queries
from restkv_jax.models.arguments import check_integer
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
        number = asked.positions.shape[1]
        is_token = asked.positions >= 0
        after = asked.positions[:, -1:] + 1 + jnp.arange(number) % self.horizon
        vectors = asked.vectors
        if view.rope is not None:
            vectors = undo_rope(vectors, jnp.where(is_token, asked.positions, 0), view.rope)
            vectors = apply_rope(vectors, jnp.where(is_token, after, 0), view.rope).astype(asked.vectors.dtype)
        return asked.replace(vectors=vectors, positions=jnp.where(is_token, after, -1))
