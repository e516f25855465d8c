"""PoD: layers that attend alike share the keys of distant tokens (arXiv 2412.02252)."""

from restkv_jax.pod.cache import SharedCache
from restkv_jax.pod.groups import LayerGroups
from restkv_jax.pod.sharing import Sharing, hidden_states
from restkv_jax.pod.similarity import attention_similarity, group_layers

__all__ = ["LayerGroups", "SharedCache", "Sharing", "attention_similarity", "group_layers", "hidden_states"]
