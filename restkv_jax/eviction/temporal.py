"""Smoothing of scores over the window's queries."""

import numpy as np

from restkv_jax.models.arguments import check_choice, check_number


def check_temporal(temporal: str, alpha: float) -> None:
    """Refuses an unknown average, or a weight out of range."""
    check_choice("temporal", temporal, ("ema", "mean"))
    check_number("alpha", alpha, "the weight of the newest query")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha} must be in (0, 1], the weight of the newest query")


def query_weights(temporal: str, length: int, alpha: float) -> np.ndarray:
    """Weights of `length` queries in their average, oldest first, with the sum 1; float32 [length]."""
    return ema_weights(length, alpha) if temporal == "ema" else np.full(length, 1 / length, np.float32)


def ema_weights(length: int, alpha: float) -> np.ndarray:
    """Weights of `e_1 = x_1, e_i = alpha x_i + (1 - alpha) e_{i-1}` as a sum over `x`, oldest first; float32 [n]."""
    weights = alpha * (1 - alpha) ** np.arange(length - 1, -1, -1, dtype=np.float64)
    weights[0] /= alpha
    return weights.astype(np.float32)
