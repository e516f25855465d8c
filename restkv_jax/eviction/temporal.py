"""Smoothing of scores over the window's queries."""

from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array

from restkv_jax.models.arguments import check_choice, check_number

Temporal = Literal["ema", "mean", "last", "inverse_ema"]
"""Averages over the window's queries: exponential and moving on, plain, the last query alone, moving backwards."""


def check_temporal(temporal: str, alpha: float) -> None:
    """Refuses an unknown average, or a weight out of range."""
    check_choice("temporal", temporal, get_args(Temporal))
    check_number("alpha", alpha, "the weight of the newest query")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha} must be in (0, 1], the weight of the newest query")


def query_weights(temporal: str, positions: Array, alpha: float) -> Array:
    """Weights of queries in their average, oldest first, with the sum 1 in every row; float32 [B, w].

    `positions` int32 [B, w], -1 on padding on the left: the average of a row begins with its first query.
    """
    is_query, length = positions >= 0, positions.shape[1]
    rank, number = jnp.cumsum(is_query, axis=1) - 1, is_query.sum(1, keepdims=True)
    if temporal == "mean":
        return is_query / jnp.maximum(number, 1)
    if temporal == "last":
        return (is_query & (rank == number - 1)).astype(jnp.float32)
    steps = number - 1 - rank if temporal == "ema" else rank  # from the query of weight alpha on
    weights = ema_weights(length, alpha)[::-1]
    ended = np.concatenate([weights[:-1] / np.float32(alpha), weights[-1:]])
    steps, is_end = jnp.clip(steps, 0, length - 1), steps == number - 1
    return jnp.where(is_query, jnp.where(is_end, jnp.asarray(ended)[steps], jnp.asarray(weights)[steps]), 0.0)


def ema_weights(length: int, alpha: float) -> np.ndarray:
    """Weights of `e_1 = x_1, e_i = alpha x_i + (1 - alpha) e_{i-1}` as a sum over `x`, oldest first; float32 [n]."""
    weights = alpha * (1 - alpha) ** np.arange(length - 1, -1, -1, dtype=np.float64)
    weights[0] /= alpha
    return weights.astype(np.float32)
