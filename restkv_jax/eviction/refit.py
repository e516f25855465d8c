"""Least-squares correction of the kept values, so that the window's output is reconstructed."""

import dataclasses

import einops
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.attention import attend
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.scores import HIGHEST, probabilities
from restkv_jax.kernels.solve import solve_positive_definite
from restkv_jax.models.arguments import check_number


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """Adds `X` to the kept values so that the window's queries get what the whole prompt gave them.

    Minimises `||A (V + X) - O||^2 + lambda ||X||^2` per KV head, with `A` [w G, N] the attention of the group's window
    queries renormalised over the kept keys, `O` their outputs over all keys, and `lambda` equal to `ridge`, at least
    `w G` float32 roundings, times the mean diagonal of `A A^T`. In the dual form one `w G x w G` system is solved:
    `X = A^T (A A^T + lambda I)^-1 (O - A V)`. The error of the window's output never grows.
    """

    ridge: float = 0.01

    def __post_init__(self):
        check_number("ridge", self.ridge, "relative to the mean diagonal of the system; 0.01 is usual")
        if not self.ridge > 0:
            raise ValueError(f"ridge={self.ridge} must be above 0, or the system may be singular; 0.01 is usual")

    def __call__(self, queries: Queries, outputs: Array, kept: Pairs) -> Array:
        """Corrected values.

        Args:
          queries: [B, K, G, w, D], the window's.
          outputs: float32 [B, K, G, w, D], what they got from the whole prompt.
          kept: pairs [B, K, N, D].

        Returns:
          [B, K, N, D] in the dtype of the values; empty places stay as they are.
        """
        by_group = "b k g w n -> b k (g w) n"
        attention = einops.rearrange(probabilities(queries, kept), by_group)
        expected = einops.rearrange(outputs, by_group)
        correction = jax.vmap(jax.vmap(self._solve))(attention, expected, kept.values)
        # Summed in float32 and rounded once: a rounded correction would be rounded again in the sum.
        return (kept.values.astype(jnp.float32) + correction).astype(kept.values.dtype)

    def _solve(self, attention: Array, outputs: Array, values: Array) -> Array:
        """`X` [N, D] from `A` [r, N], `O` [r, D] and `V` [N, D]; rows of zeros, padding, count for nothing."""
        real = attention.sum(-1) > 0
        missing = outputs - jnp.matmul(attention, values.astype(jnp.float32), precision=HIGHEST)
        squared = jnp.matmul(attention, attention.T, precision=HIGHEST)
        # `A A^T` is singular with more queries than keys. Below the rounding of its entries a ridge no longer keeps
        # the Cholesky factor finite.
        least = real.sum() * jnp.finfo(jnp.float32).eps
        ridge = jnp.maximum(self.ridge, least) * jnp.trace(squared) / jnp.maximum(real.sum(), 1)
        system = squared + jnp.diag(jnp.where(real, ridge, 1.0))
        weights = solve_positive_definite(system, jnp.where(real[:, None], missing, 0.0))
        return jnp.matmul(attention.T, weights, precision=HIGHEST)


def window_outputs(queries: Queries, pairs: Pairs) -> Array:
    """What queries get from pairs, float32 [B, K, G, w, D], as exactly as the refit's own attention.

    It would take the rounding of fast float32 products for a missing output.
    """
    queries = queries.replace(vectors=queries.vectors.astype(jnp.float32))
    with jax.default_matmul_precision("highest"):
        return attend(queries, pairs._replace(values=pairs.values.astype(jnp.float32)))
