"""The axes of every cache's arrays, by which files are checked and arrays laid out over a mesh."""

from typing import Any, TypeVar

import jax
from jax import Array
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding

from restkv_jax.caches.base import Cache
from restkv_jax.kernels.partition import spec_of

C = TypeVar("C", bound=Cache)

DENSE = {"keys": "l b k n d", "values": "l b k n d", "positions": "l b k n", "lengths": "l b k"}
QUANTISED = {
    "stored.keys.codes": "l b k q e d", "stored.keys.scales": "l b k q d", "stored.values.codes": "l b k q e d",
    "stored.values.scales": "l b k q x", "recent_keys": "l b k w d", "recent_values": "l b k w d",
    "positions": "l b k n", "lengths": "l b k",
}  # fmt: skip
IMPORTANCE = {"importance": "l b k n", "gram": "l k g d d"}
DISTANT = {
    "distant_positions": "A M o r n", "kept": "b", "skips.gates": "b k", "skips.skipped": "b", "skips.total": "b",
}  # fmt: skip
AXES = {
    "KVCache": DENSE,
    "QuantisedCache": QUANTISED,
    "QuantisedPagedCache": {
        "stored.keys.codes": "A M p e d", "stored.keys.scales": "A M p d", "stored.values.codes": "A M p e d",
        "stored.values.scales": "A M p x", "positions": "A M p s", "page_table": "l b k j", "lengths": "l b k",
        "recent_keys": "l b k w d", "recent_values": "l b k w d", "recent_positions": "l b k w",
    },
    "EvictingCache": DENSE | IMPORTANCE,
    "QuantisedEvictingCache": QUANTISED | IMPORTANCE,
    "PagedCache": {
        "keys": "A M p s d", "values": "A M p s d", "positions": "A M p s", "page_table": "l b k j", "lengths": "l b k",
    },
    "SharedCache": {
        "keys": "l b k p d", "values": "l b k p d", "distant_keys": "A M o r n d", "distant_values": "l b k n d",
    } | DISTANT,
    "QuantisedSharedCache": {
        "keys": "l b k p d", "values": "l b k p d",
        "distant_keys.codes": "A M o r q e d", "distant_keys.scales": "A M o r q d",
        "distant_values.codes": "l b k q e d", "distant_values.scales": "l b k q x",
    } | DISTANT,
}  # fmt: skip
OF_ALL = {"prompt_lengths": "b", "next_positions": "b"}


def axes_of(kind: type[Cache]) -> dict[str, str] | None:
    """The axes of a cache's arrays by dotted name, None for a kind that is not known here.

    Axes of one name are of one size, `l`, `k` and `d` those of the model.
    """
    return AXES[kind.__name__] | OF_ALL if kind.__name__ in AXES else None


def named_arrays(cache: Cache) -> dict[str, Array]:
    """A cache's arrays by dotted name."""
    flat, _ = jax.tree_util.tree_flatten_with_path(cache)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in flat}


def laid_out(cache: C, mesh: Mesh | None) -> C:
    """The cache as programs on a mesh have it, so that they can write it in place.

    Args:
      cache: from anywhere: another mesh, one device, a file.
      mesh: with the axes `data` and `model`; None, or a cache under a transform, leaves it as it is.
    """
    axes = axes_of(type(cache))
    if mesh is None or axes is None:
        return cache

    def lay(path: Any, x: Array) -> Array:
        if isinstance(x, Tracer):
            return x
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return jax.device_put(x, NamedSharding(mesh, spec_of(axes[name], x.shape, mesh.shape)))

    return jax.tree_util.tree_map_with_path(lay, cache)
