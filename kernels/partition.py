"""How arrays lie on a mesh of devices, and which rows and KV heads lie together on one of them.

A mesh has the axes `data`, along which rows are divided, and `model`, along which a layer is. Where `model` has more
devices than there are KV heads, it is taken apart: `model` for the KV heads, `group` for the query heads of each, and
`repeat`, along which attention is repeated and all else divided (`models.mesh.divided_mesh`).

Stores that several KV heads fill together, a pool of pages or the distant keys of blocks, are cut into one part per
place on the mesh: `A` along its axis `data`, by rows, times `M` along `model`, by KV heads. Without a mesh it is one.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

R = TypeVar("R")

EVERY = "model", "group", "repeat"
"""The axes along which a layer is divided."""

MESH_AXES: Mapping[str, tuple[str, ...]] = {
    "b": ("data",),  # rows
    "A": ("data",),  # parts of the rows
    "k": ("model",),  # KV heads
    "M": ("model",),  # parts of the KV heads
    "g": ("group",),  # query heads of a KV head
    "h": ("model", "group"),  # query heads
    "f": EVERY,  # features of the MLP
    "v": EVERY,  # vocabulary
    "t": EVERY,  # tokens of the residual stream, between layers
}
"""The axes of the mesh that an axis of parameters, activations or caches is divided along, by its letter."""


def spec_of(axes: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """How an array lies on a mesh.

    Args:
      axes: a letter for each axis, as "l b k n d".
      shape: of the array; an axis that cannot be divided evenly is whole everywhere.
      sizes: of the mesh's axes.
    """

    def of_axis(letter: str, size: int) -> Any:
        names = tuple(name for name in MESH_AXES.get(letter, ()) if sizes.get(name, 1) > 1)
        if not names or size % math.prod(sizes[name] for name in names):
            return None
        return names[0] if len(names) == 1 else names

    return PartitionSpec(*map(of_axis, axes.split(), shape))


def on_mesh(x: Array, axes: str) -> Array:
    """Lays an array with the given axes, as "l b k n d", out over the mesh of the context."""
    sizes = mesh_sizes()
    return x if not sizes else jax.lax.with_sharding_constraint(x, spec_of(axes, x.shape, sizes))


def mesh_sizes() -> dict[str, int]:
    """The sizes of the axes, more than 1, along which the mesh of the context (`jax.set_mesh`) divides anything."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return {name: sizes[name] for name in ("data", *EVERY) if sizes.get(name, 1) > 1}


def layer_parts() -> int:
    """The parts that the mesh of the context divides a layer into."""
    return math.prod(size for name, size in mesh_sizes().items() if name in EVERY)


def by_device(function: Callable[..., R], arrays: Any, axes: Any, out_axes: Any) -> R:
    """Applies a function to what each device of the context's mesh has of some arrays, without any exchange.

    Args:
      function: of one device's arrays; rows, KV heads and query heads of the result are those of the first.
      arrays: a tuple of pytrees; rows, KV heads and query heads are independent of each other.
      axes: a tree of the same structure with the axes of each array, as "b k g n d".
      out_axes: a tree with those of the result.
    """
    if not (sizes := mesh_sizes()):
        return function(*arrays)
    specs = jax.tree.map(lambda x, axes: spec_of(axes, x.shape, sizes), arrays, axes)
    like = jax.tree.leaves(arrays)[0].shape
    out = jax.tree.map(lambda axes: spec_of(axes, like, sizes), out_axes)
    return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=False)(*arrays)


def project_back(equation: str, x: Array, weight: Array) -> Array:
    """Products with a weight whose sum over the devices that share a layer leaves each of them tokens of its own.

    Args:
      equation: as `einsum` takes it, of axes as in `MESH_AXES`, `q` those of tokens: "bqf,fm->bqm".
      x: [B, ..., T, ...], what heads or features gave, divided by these.
      weight: [..., M], likewise.

    Returns:
      [B, T, M], tokens divided like a layer where that is possible.
    """
    sizes = mesh_sizes()
    names = tuple(name for name in EVERY if name in sizes)
    terms = [" ".join(term) for term in equation.partition("->")[0].split(",")]
    length = x.shape[terms[0].split().index("q")]
    specs = tuple(spec_of(axes, array.shape, sizes) for axes, array in zip(terms, (x, weight), strict=True))
    divided = jax.tree.leaves(tuple(specs[0]))
    is_whole = any(sizes[name] > 1 and name not in divided for name in names)  # each device then has the sum already
    if not names or "repeat" in names or length % layer_parts() or is_whole:
        return on_mesh(jnp.einsum(equation, x, weight), "b t m")

    def alone(x: Array, weight: Array) -> Array:
        sums = jnp.einsum(equation, x, weight)
        for groups in scatter_steps(layer_parts(), largest_ring()):
            sums = jax.lax.psum_scatter(sums, names, scatter_dimension=1, tiled=True, axis_index_groups=groups)
        return sums

    out = spec_of("b t m", (x.shape[0], length, weight.shape[-1]), sizes)
    return jax.shard_map(alone, in_specs=specs, out_specs=out, check_vma=False)(x, weight)


def scatter_steps(devices: int, ring: float) -> list[list[list[int]]]:
    """The groups of devices that exchange sums, step by step, until each has its own: a reduce-scatter.

    Halves exchange with each other, then the halves of each, down to rings of at most `ring` devices in a row. However
    many steps there are, a device sends `1 - 1 / devices` of the sums in all.
    """
    steps, size = [], devices
    while size > ring and size % 2 == 0:
        size //= 2
        steps.append([[i, i + size] for start in range(0, devices, 2 * size) for i in range(start, start + size)])
    rings = [list(range(start, start + size)) for start in range(0, devices, size)]
    return [*steps, rings] if size > 1 else steps


def largest_ring() -> float:
    """Of how many devices the compiler makes a reduce-scatter; of others an all-reduce and a slice, twice the bytes."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.platform != "tpu":
        return math.inf
    return 8 if "lite" in device.device_kind else 2  # 2 x 4 chips of a flat slice; the pairs of a cube


class Parts(NamedTuple):
    """How many parts rows and KV heads are in; each part has as many of them as the others."""

    rows: int = 1
    heads: int = 1


def parts_of_mesh(batch: int, num_kv_heads: int) -> Parts:
    """The parts that the mesh of the context divides rows and KV heads into; 1 where it does not."""
    sizes = mesh_sizes()
    rows, heads = (sizes.get(name, 1) for name in ("data", "model"))
    return Parts(rows if batch % rows == 0 else 1, heads if num_kv_heads % heads == 0 else 1)


def divide(x: Array, parts: Parts, before: str = "") -> Array:
    """[B, K, ...] to [A, M, B / A, K / M, ...]; axes named in `before` stand before rows and heads."""
    return einops.rearrange(x, f"{before} (a b) (m k) ... -> a m {before} b k ...", a=parts.rows, m=parts.heads)


def undivide(x: Array, before: str = "") -> Array:
    """The reverse of `divide`."""
    return einops.rearrange(x, f"a m {before} b k ... -> {before} (a b) (m k) ...")


def each_part(function: Callable, *trees: Any) -> Any:
    """Applies a function of one part to pytrees whose leaves begin with [A, M], every device to its own part.

    Parts of another number than the mesh has, those of a cache from elsewhere, are on every device, one after the
    other: kernels can neither be divided by the compiler nor always mapped.
    """

    def of_each(*trees: Any) -> Any:
        num_rows, num_heads = jax.tree.leaves(trees)[0].shape[:2]
        results = [
            function(*jax.tree.map(lambda x, a=a, m=m: x[a, m], trees)) for a, m in np.ndindex(num_rows, num_heads)
        ]
        return jax.tree.map(lambda *x: jnp.stack(x).reshape(num_rows, num_heads, *x[0].shape), *results)

    if not (sizes := mesh_sizes()):
        return of_each(*trees)
    parts = zip(("data", "model"), jax.tree.leaves(trees)[0].shape, strict=False)
    spec = PartitionSpec(*(name if n > 1 and n == sizes.get(name) else None for name, n in parts))
    return jax.shard_map(of_each, in_specs=spec, out_specs=spec, check_vma=False)(*trees)
