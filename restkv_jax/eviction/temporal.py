"""Smoothing of scores over the window's queries."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from restkv_jax.models.arguments import check_choice, check_number


def check_temporal(temporal: str, alpha: float) -> None:
    """Refuses an unknown average, or a weight out of range."""
    check_choice("temporal", temporal, ("ema", "mean"))
    check_number("alpha", alpha, "the weight of the newest query")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha} must be in (0, 1], the weight of the newest query")


def query_weights(temporal: str, positions: Array, alpha: float) -> Array:
    """Weights of queries in their average, oldest first, with the sum 1 in every row; float32 [B, w].

    `positions` int32 [B, w], -1 on padding on the left: the average of a row begins with its first query.
    """
    is_query = positions >= 0
    if temporal == "mean":
        return is_query / jnp.maximum(is_query.sum(1, keepdims=True), 1)
    weights = ema_weights(positions.shape[1], alpha)
    is_first = is_query & (jnp.cumsum(is_query, axis=1) == 1)
    started = np.concatenate([weights[:1], weights[1:] / np.float32(alpha)])
    return jnp.where(is_first, started, jnp.where(is_query, weights, 0.0))


def ema_weights(length: int, alpha: float) -> np.ndarray:
    """Weights of `e_1 = x_1, e_i = alpha x_i + (1 - alpha) e_{i-1}` as a sum over `x`, oldest first; float32 [n]."""
    weights = alpha * (1 - alpha) ** np.arange(length - 1, -1, -1, dtype=np.float64)
    weights[0] /= alpha
    return weights.astype(np.float32)
