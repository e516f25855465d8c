"""PoD: layers that attend alike share the keys of distant tokens (arXiv 2412.02252)."""

from typing import Any

from restkv_jax.caches.shared import SharedCache
from restkv_jax.models.key_groups import LayerGroups, Sharing
from restkv_jax.pod.adaptation.recipe import Adaptation
from restkv_jax.pod.similarity import attention_similarity, group_layers

__all__ = [
    "Adaptation",
    "LayerGroups",
    "SharedCache",
    "Sharing",
    "adapt",
    "attention_similarity",
    "group_layers",
    "merge_layers",
]


def __getattr__(name: str) -> Any:
    """Training's packages, which take seconds to import and are an extra, are imported when asked for."""
    if name == "adapt":
        from restkv_jax.pod.adaptation.runs import adapt

        return adapt
    if name == "merge_layers":
        from restkv_jax.pod.merging import merge_layers

        return merge_layers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
