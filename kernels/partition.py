"""Which rows and KV heads lie together on a device, so that what they share out among themselves can be divided.

Stores that several KV heads fill together, a pool of pages or the distant keys of blocks, are cut into one part per
place on the mesh: `A` along its axis `data`, by rows, times `M` along `model`, by KV heads. Without a mesh it is one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import einops
import jax
from jax import Array
from jax.sharding import PartitionSpec


class Parts(NamedTuple):
    """How many parts rows and KV heads are in; each part has as many of them as the others."""

    rows: int = 1
    heads: int = 1


def parts_of_mesh(batch: int, num_kv_heads: int) -> Parts:
    """The parts that the mesh of the context (`jax.set_mesh`) divides rows and KV heads into; 1 where it does not."""
    mesh = jax.sharding.get_abstract_mesh()
    rows, heads = (mesh.shape.get(name, 1) for name in ("data", "model"))
    return Parts(rows if batch % rows == 0 else 1, heads if num_kv_heads % heads == 0 else 1)


def on_mesh(x: Array, rows: int, heads: int) -> Array:
    """Lays an array out over the context's mesh: the axis `rows` along `data`, the axis `heads` along `model`."""
    axes: list[str | None] = [None] * x.ndim
    parts = parts_of_mesh(x.shape[rows], x.shape[heads])
    for axis, name, n in ((rows, "data", parts.rows), (heads, "model", parts.heads)):
        axes[axis] = name if n > 1 else None
    return x if parts == Parts() else jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def divide(x: Array, parts: Parts, before: str = "") -> Array:
    """[B, K, ...] to [A, M, B / A, K / M, ...]; axes named in `before` stand before rows and heads."""
    return einops.rearrange(x, f"{before} (a b) (m k) ... -> a m {before} b k ...", a=parts.rows, m=parts.heads)


def undivide(x: Array, before: str = "") -> Array:
    """The reverse of `divide`."""
    return einops.rearrange(x, f"a m {before} b k ... -> {before} (a b) (m k) ...")


def each_part(function: Callable, *trees: Any) -> Any:
    """Applies a function of one part to pytrees whose leaves begin with [A, M], every device to its own part."""
    parts = Parts(*jax.tree.leaves(trees)[0].shape[:2])

    def alone(*trees: Any) -> Any:
        result = function(*jax.tree.map(lambda x: x.squeeze((0, 1)), trees))
        return jax.tree.map(lambda x: x[None, None], result)

    if parts == Parts():
        return alone(*trees)
    mesh = jax.sharding.get_abstract_mesh()
    spec = PartitionSpec(*(name if n > 1 else None for name, n in zip(("data", "model"), parts, strict=True)))
    if parts == Parts(*(mesh.shape.get(name, 1) if name else 1 for name in spec)):
        return jax.shard_map(alone, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*trees)
    return jax.vmap(jax.vmap(function))(*trees)  # a cache from a mesh, read without it
