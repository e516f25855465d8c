"""The full cache: nothing is evicted."""

from restkv_jax.eviction.policy import EvictionPolicy


def full() -> EvictionPolicy:
    """Keeps every key and value of the prompt."""
    return EvictionPolicy(budget=None)
