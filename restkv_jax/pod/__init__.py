"""PoD: distant tokens share keys across layers (arXiv 2412.02252)."""

from restkv_jax.pod.adapt import adapt
from restkv_jax.pod.training import Adaptation

__all__ = ["Adaptation", "adapt"]
