"""Where parameters live on a mesh of devices with the axes `data` and `model`."""

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from restkv_jax.kernels.partition import EVERY, spec_of
from restkv_jax.models.arguments import check_integer
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.rules import usual_promotion
from restkv_jax.models.tensors import TENSORS, flatten, parameter_shapes, unflatten


def make_mesh(data: int | None = None, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of devices with the axes `data` and `model`, for `load_model`.

    Args:
      data: parts that the rows of a batch are divided into; as many as the devices allow if left out.
      model: devices that share the weights.
      devices: to take; all by default, those of other processes included.

    Raises:
      TypeError, ValueError: numbers that are not integers from 1 on, or that need other devices than there are.
    """
    devices = jax.devices() if devices is None else list(devices)
    check_integer("model", model, 1, "devices that share the weights")
    if data is None:
        data = max(1, len(devices) // model)
    check_integer("data", data, 1, "parts of a batch")
    is_subset = len(devices) > data * model and jax.process_count() == 1
    if len(devices) != data * model and not is_subset:
        raise ValueError(
            f"data={data} times model={model} needs {data * model} devices, but there are {len(devices)}: divide those"
        )
    mesh = jax.make_mesh((data, model), ("data", "model"), devices=devices[: data * model])
    return automatic(mesh)


def automatic(mesh: Mesh) -> Mesh:
    """The same mesh, on which the compiler derives the shardings of what is computed."""
    return mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def divided_mesh(model: Decoder, mesh: Mesh) -> Mesh:
    """The mesh with its axis `model` taken apart, if KV heads cannot be divided along all of it.

    Then `model` divides KV heads and `group` the query heads of each, which a KV head's copies share out; along
    `repeat` attention is repeated. The MLP and the vocabulary are divided along all three. A warning says what is
    repeated, or not divided.

    Raises:
      ValueError: a mesh without these axes, or one that does not divide the MLP's features.
    """
    check_axes(mesh)
    if set(EVERY) <= set(mesh.axis_names):
        return mesh
    config, parts = model.config, mesh.shape["model"]
    if config.intermediate_size % parts:
        raise ValueError(
            f"the mesh's model axis of {parts} must divide intermediate_size={config.intermediate_size}; "
            f"{_nearest(parts, config.intermediate_size)} would"
        )
    if config.vocab_size % parts:
        warnings.warn(
            f"the mesh's model axis of {parts} does not divide vocab_size={config.vocab_size}: embedding and logits "
            f"stand whole on every device; {_nearest(parts, config.vocab_size)} would divide it",
            stacklevel=3,
        )
    heads = math.gcd(parts, config.num_key_value_heads)
    if heads == parts:
        return mesh
    group = math.gcd(parts // heads, config.num_attention_heads // config.num_key_value_heads)
    repeat = parts // heads // group
    if repeat > 1:
        warnings.warn(
            f"the mesh's model axis of {parts} divides {config.num_key_value_heads} KV heads and "
            f"{config.num_attention_heads} query heads into {heads * group}: attention is repeated on "
            f"{repeat} devices each; {_nearest(parts, config.num_attention_heads)} would divide it",
            stacklevel=3,
        )
    place = mesh.axis_names.index("model")

    def apart(of_axes: tuple, instead: tuple) -> tuple:
        return (*of_axes[:place], *instead, *of_axes[place + 1 :])

    shape = apart(mesh.devices.shape, (heads, group, repeat))
    types = apart(mesh.axis_types, (mesh.axis_types[place],) * 3)
    return Mesh(mesh.devices.reshape(shape), apart(mesh.axis_names, EVERY), axis_types=types)


def check_axes(mesh: Any) -> None:
    """Refuses what is not a mesh with the axes `data` and `model`.

    Raises:
      TypeError, ValueError: something else.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh={mesh!r} must be a Mesh, such as restkv_jax.make_mesh(model=2) makes")
    if not {"data", "model"} <= set(mesh.axis_names):
        raise ValueError(
            f"mesh has axes {mesh.axis_names}, but must have 'data' and 'model', as restkv_jax.make_mesh makes them"
        )


def _nearest(parts: int, size: int) -> str:
    """The divisors of a size next to a number, for a message."""
    divisors = [n for n in range(1, min(size, 4 * parts) + 1) if size % n == 0]
    below = max((n for n in divisors if n < parts), default=None)
    above = min((n for n in divisors if n > parts), default=None)
    return " or ".join(str(n) for n in (below, above) if n is not None)


def parameter_shardings(model: Decoder, mesh: Mesh) -> Any:
    """A `NamedSharding` per parameter, in the tree of the parameters, on the mesh that `divided_mesh` gives.

    Attention is divided by heads and the MLP by features, so each needs one sum over `model` per layer (Shoeybi et
    al. 2019, Megatron-LM); embeddings by vocabulary. What has none of these is replicated.

    Raises:
      ValueError: a mesh without the axes, or one whose `model` axis does not divide the MLP's features.
    """
    mesh = divided_mesh(model, mesh)

    def sharding(parameter: str, shape: tuple[int, ...]) -> NamedSharding:
        letters = TENSORS[parameter][1].split(" -> ")[1].split()
        axes = " ".join(["l"] * (len(shape) - len(letters)) + letters)
        return NamedSharding(mesh, spec_of(axes, shape, mesh.shape))

    return unflatten({name: sharding(name, shape) for name, shape in parameter_shapes(model).items()})


@contextlib.contextmanager
def beside(params: Any) -> Iterator[Any]:
    """Programs that are called inside divide what they make as the parameters are divided.

    Yields:
      the parameters, on a mesh whose axes the compiler handles: the same buffers.

    Raises:
      ValueError: parameters on several meshes, or under the caller's transform on a mesh with explicit axes.
    """
    with usual_promotion():
        shardings = [jax.typeof(x).sharding if isinstance(x, jax.Array) else None for x in jax.tree.leaves(params)]
        explicit = any(s is not None and AxisType.Explicit in s.mesh.axis_types for s in shardings)
        if explicit and any(isinstance(x, Tracer) for x in jax.tree.leaves(params)):
            raise ValueError(
                "params lie on a mesh with explicit axes, which the compiler does not divide programs over; make it "
                "with axis_types=(jax.sharding.AxisType.Auto,) * 2, or call this outside of jax.jit"
            )
        mesh = mesh_of(params)
        if mesh is None:
            yield params
            return
        if explicit:
            params = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, x.sharding.spec)), params)
        with jax.set_mesh(mesh):
            yield params


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that parameters lie on, its axes handled by the compiler; None for one device, or under a transform.

    Raises:
      ValueError: several meshes, or one without the axes `data` and `model`.
    """
    found: dict[str, Mesh] = {}
    for name, leaf in flatten(params).items():
        sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            found[name] = automatic(sharding.mesh)
    if not found:
        return None
    (first, mesh), *others = found.items()
    for name, other in others:
        if other != mesh:
            raise ValueError(
                f"params: {name!r} lies on another mesh ({_described(other)}) than {first!r} ({_described(mesh)}); "
                "put all on one with jax.device_put(params, parameter_shardings(model, mesh))"
            )
    check_axes(mesh)
    return mesh


def spans_processes(params: Any) -> bool:
    """Whether this process holds a part of the parameters alone; then all have to call what is called with them."""
    return any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(params))


def fetched(x: Any) -> np.ndarray:
    """An array on the host, whatever devices and processes it lies on; where it spans processes, all have to call."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def check_rows(batch: int, mesh: Mesh | None) -> None:
    """Refuses a batch that a mesh cannot divide.

    Raises:
      ValueError: rows that its `data` axis does not divide.
    """
    parts = 1 if mesh is None else mesh.shape["data"]
    if batch % parts:
        below, above = batch // parts * parts, -(-batch // parts) * parts
        near = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"a batch of {batch} rows cannot be divided along the mesh's data axis of {parts}; take {near} rows, or a "
            "mesh with data=1"
        )


def divisible(batch: int, params: Any) -> int:
    """The rows that a batch is filled up to, so that the mesh of the parameters divides it."""
    mesh = mesh_of(params)
    parts = 1 if mesh is None else mesh.shape["data"]
    return -(-batch // parts) * parts


def _described(mesh: Mesh) -> str:
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"{sizes} of devices {', '.join(str(d.id) for d in np.ravel(mesh.devices)[:4])}, ..."
