"""Least-squares correction of the kept values, so that the window's output is reconstructed."""

import dataclasses

import einops
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax import kernels
from restkv_jax.kernels.scores import HIGHEST, probabilities

ELEMENTS_AT_ONCE = 2**22
"""Bound on the largest float32 array of the KV heads that are solved at one time: 16 MiB."""


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
        if not 0 < self.ridge < float("inf"):
            raise ValueError(
                f"ridge={self.ridge} must be finite and above 0, or the system may be singular; 0.01 is usual"
            )

    def __call__(
        self,
        queries: Array,
        outputs: Array,
        keys: Array,
        values: Array,
        query_positions: Array,
        key_positions: Array,
        sliding_window: Array | int,
    ) -> Array:
        """Corrected values.

        Args:
          queries: [B, H, w, D], the window's, after RoPE.
          outputs: float32 [B, H, w, D], what they got from the whole prompt.
          keys: [B, K, N, D], kept.
          values: [B, K, N, D], kept.
          query_positions: int32 [B, w], -1 on padding.
          key_positions: int32 [B, K, N], -1 where a place is empty.
          sliding_window: int32 scalar, in tokens.

        Returns:
          [B, K, N, D] in the dtype of `values`; empty places stay as they are.
        """
        batch, num_kv_heads, places, dim = keys.shape
        group = queries.shape[1] // num_kv_heads

        def one_head(queries, outputs, keys, values, query_positions, key_positions):
            attention, _ = jax.vmap(lambda q: probabilities(q, keys, query_positions, key_positions, sliding_window))(
                queries
            )
            attention = einops.rearrange(attention, "g w n -> (g w) n")
            correction = self._solve(attention, einops.rearrange(outputs, "g w d -> (g w) d"), values)
            # Summed in float32 and rounded once: a rounded correction would be rounded again in the sum.
            return (values.astype(jnp.float32) + correction).astype(values.dtype)

        by_head = "b (k g) w d -> (b k) g w d"
        arrays = (
            einops.rearrange(queries, by_head, g=group),
            einops.rearrange(outputs, by_head, g=group),
            *(einops.rearrange(x, "b k n d -> (b k) n d") for x in (keys, values)),
            jnp.repeat(query_positions, num_kv_heads, axis=0),
            einops.rearrange(key_positions, "b k n -> (b k) n"),
        )
        rows = group * queries.shape[2]
        at_once = max(1, ELEMENTS_AT_ONCE // max(rows * places, rows * rows, places * dim))
        heads = batch * num_kv_heads
        corrected = jax.lax.map(lambda head: one_head(*head), arrays, batch_size=min(at_once, heads))
        return einops.rearrange(corrected, "(b k) n d -> b k n d", b=batch)

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
        weights = kernels.solve_positive_definite(system, jnp.where(real[:, None], missing, 0.0))
        return jnp.matmul(attention.T, weights, precision=HIGHEST)


def window_outputs(
    queries: Array,
    keys: Array,
    values: Array,
    query_positions: Array,
    key_positions: Array,
    sliding_window: Array | int,
) -> Array:
    """What the window's queries get from the whole prompt, float32 [B, H, w, D]; arguments as for `attention`."""
    wide = queries.astype(jnp.float32), keys, values.astype(jnp.float32)
    # As exact as the refit's own attention: it would take the rounding of fast float32 products for a missing output.
    with jax.default_matmul_precision("highest"):
        return kernels.attention(*wide, query_positions, key_positions, sliding_window)
