"""PoD: layers that attend alike share the keys of distant tokens (arXiv 2412.02252)."""

from restkv_jax.pod.cache import SharedCache
from restkv_jax.pod.groups import LayerGroups
from restkv_jax.pod.sharing import Sharing, hidden_states

__all__ = ["LayerGroups", "SharedCache", "Sharing", "hidden_states"]
