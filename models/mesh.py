"""Where parameters live on a mesh of devices with the axes `data` and `model`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from restkv_jax.models.decoder import Decoder
from restkv_jax.models.rules import usual_promotion
from restkv_jax.models.tensors import TENSORS, parameter_shapes, unflatten

SPLIT_AXES = {"h", "k", "f", "v"}
"""Heads, KV heads, MLP features and vocabulary, in the letters of `TENSORS`: they are divided among `model`."""


def make_mesh(model_parallel: int = 1) -> Mesh:
    """A mesh of all devices: `model_parallel` of them share the weights, the rest is data-parallel.

    Raises:
      ValueError: a number that does not divide the number of devices.
    """
    devices = jax.device_count()
    if model_parallel < 1 or devices % model_parallel:
        raise ValueError(f"model_parallel={model_parallel} must be a divisor of the number of devices, {devices}")
    return automatic(jax.make_mesh((devices // model_parallel, model_parallel), ("data", "model")))


def automatic(mesh: Mesh) -> Mesh:
    """The same mesh, on which the compiler derives the shardings of what is computed."""
    return mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def parameter_shardings(model: Decoder, mesh: Mesh) -> Any:
    """A `NamedSharding` per parameter, in the tree of the parameters.

    Attention is divided by heads and the MLP by features, so each needs one sum over `model` per layer (Shoeybi et
    al. 2019, Megatron-LM); embeddings by vocabulary where that is divisible. What has none of these is replicated.

    Raises:
      ValueError: KV heads or MLP features that the mesh's `model` axis does not divide.
    """
    parts, config = mesh.shape["model"], model.config
    for name in ("num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % parts:
            raise ValueError(f"the mesh's model axis, {parts}, must divide {name}={getattr(config, name)}")

    def sharding(parameter: str, shape: tuple[int, ...]) -> NamedSharding:
        letters = TENSORS[parameter][1].split(" -> ")[1].split()
        letters = ["L"] * (len(shape) - len(letters)) + letters
        axes = [
            "model" if letter in SPLIT_AXES and size % parts == 0 else None
            for letter, size in zip(letters, shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return unflatten({name: sharding(name, shape) for name, shape in parameter_shapes(model).items()})


@contextlib.contextmanager
def beside(params: Any) -> Iterator[Any]:
    """Programs that are called inside divide what they make as the parameters are divided.

    Yields:
      the parameters, on a mesh whose axes the compiler handles: the same buffers.

    Raises:
      ValueError: parameters under the caller's transform on a mesh with explicit axes.
    """
    with usual_promotion():
        shardings = [jax.typeof(x).sharding if isinstance(x, jax.Array) else None for x in jax.tree.leaves(params)]
        explicit = any(s is not None and AxisType.Explicit in s.mesh.axis_types for s in shardings)
        if explicit and any(isinstance(x, Tracer) for x in jax.tree.leaves(params)):
            raise ValueError(
                "params lie on a mesh with explicit axes, which the compiler does not divide programs over; make it "
                "with axis_types=(jax.sharding.AxisType.Auto,) * 2, or call this outside of jax.jit"
            )
        mesh = _mesh_of(params)
        if mesh is None:
            yield params
            return
        mesh = automatic(mesh)
        if explicit:
            params = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, x.sharding.spec)), params)
        with jax.set_mesh(mesh):
            yield params


def _mesh_of(params: Any) -> Mesh | None:
    """The mesh with the axes `data` and `model` that parameters lie on; None for one device, or under a transform."""
    for leaf in jax.tree.leaves(params):
        sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and {"data", "model"} <= set(sharding.mesh.axis_names):
            return sharding.mesh if isinstance(sharding.mesh, Mesh) else None
    return None
