"""The training step on a mesh: one program for one device and for many."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from restkv_jax.models.decoder import Decoder, read
from restkv_jax.models.mesh import automatic, divided_mesh, parameter_shardings
from restkv_jax.models.tensors import flatten, parameter_shapes, unflatten
from restkv_jax.pod.adaptation.recipe import Adaptation
from restkv_jax.pod.adaptation.training import Batch, Metrics, TrainState, make_optimizer, split_params, train_step


class Program(NamedTuple):
    """A jitted step `(state, frozen, batch) -> (state, metrics)` and what it takes, as shapes with shardings.

    `step` is compiled for the `mesh` that all of these lie on.
    """

    step: jax.stages.Wrapped
    state: TrainState
    frozen: dict[str, Any]
    batch: Batch
    mesh: Mesh

    def lower(self, **options: Any) -> jax.stages.Lowered:
        """The step as `step.lower` gives it: compiled it allocates nothing, and `memory_analysis()` says what it needs.

        Args:
          options: of `jax.stages.Traced.lower`.
        """
        with jax.set_mesh(self.mesh):  # by which kernels are divided among devices
            return self.step.trace(self.state, self.frozen, self.batch).lower(**options)


def make_program(model: Decoder, adaptation: Adaptation, mesh: Mesh) -> Program:
    """The program of an adaptation whose `steps`, `sequence_length` and `compute_dtype` are given.

    Raises:
      ValueError: a batch or a model that the mesh does not divide, a pattern that matches no parameter.
    """
    _check_mesh(adaptation, mesh)
    rows = adaptation.batch_size // adaptation.num_parts // mesh.shape["data"]
    mesh = divided_mesh(model, automatic(mesh))
    state, frozen = _state_shapes(model, adaptation, mesh)
    step = functools.partial(
        train_step,
        forward=lambda params, tokens: read(model, params, tokens, checkpoint=True)[0],
        model=model,
        optimizer=make_optimizer(adaptation),
        clip_norm=adaptation.clip_norm,
        compute_dtype=jnp.dtype(adaptation.compute_dtype),
        loss_chunk=-(-adaptation.tokens_with_logits // rows),
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    out = jax.tree.map(lambda leaf: leaf.sharding, state), Metrics(replicated, replicated)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=out)
    return Program(jitted, state, frozen, _batch_shapes(adaptation, mesh), mesh)


def _state_shapes(model: Decoder, adaptation: Adaptation, mesh: Mesh) -> tuple[TrainState, dict[str, Any]]:
    """Trained parameters in float32 with the optimizer's state, where they are; frozen ones as they compute."""
    shardings, dtype = flatten(parameter_shardings(model, mesh)), jnp.dtype(adaptation.compute_dtype)
    shapes = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[name])
        for name, shape in parameter_shapes(model).items()
    }
    chosen, frozen = split_params(unflatten(shapes), adaptation.train)
    trained: dict[str, Any] = {name: leaf.update(dtype=jnp.float32) for name, leaf in chosen.items()}
    optimizer = make_optimizer(adaptation)
    optimizer_state = optax.tree.map_params(
        optimizer,
        lambda leaf, parameter: leaf.update(sharding=parameter.sharding),
        jax.eval_shape(optimizer.init, trained),
        trained,
        transform_non_params=lambda leaf: leaf.update(sharding=NamedSharding(mesh, PartitionSpec())),
    )
    return TrainState(trained, optimizer_state), frozen


def _batch_shapes(adaptation: Adaptation, mesh: Mesh) -> Batch:
    parts = adaptation.num_parts
    shape = parts, adaptation.batch_size // parts, adaptation.sequence_length
    over_data = NamedSharding(mesh, PartitionSpec(None, "data"))
    return Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=over_data) for dtype in (jnp.int32, jnp.float32)))


def initial_state(program: Program, params: Any, adaptation: Adaptation) -> TrainState:
    """The state before the first step; the parameters are copied, as steps donate their state."""
    trained = place_params(program.state.params, params, copy=True)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state.optimizer)
    return TrainState(trained, jax.jit(make_optimizer(adaptation).init, out_shardings=shardings)(trained))


def place_params(shapes: Mapping[str, Any], params: Any, copy: bool = False) -> dict[str, Array]:
    """The parameters that `shapes` names, in its dtypes and shardings; with `copy` none are shared with those given."""
    flat = flatten(params)
    # `device_put` to several devices may keep the array that it is given as one of the replicas, so it cannot copy
    return {
        name: jax.device_put(jnp.array(flat[name], shape.dtype, copy=copy), shape.sharding)
        for name, shape in shapes.items()
    }


def place_batch(program: Program, batch: Batch) -> Batch:
    """The host's arrays on the mesh; of several processes, each places the rows of its own devices."""
    return jax.tree.map(
        lambda shape, array: jax.make_array_from_callback(
            shape.shape, shape.sharding, lambda index: np.asarray(array[index], shape.dtype)
        ),
        program.batch,
        batch,
    )


def _check_mesh(adaptation: Adaptation, mesh: Mesh) -> None:
    if set(mesh.axis_names) != {"data", "model"}:
        raise ValueError(f"mesh has axes {mesh.axis_names}; expected 'data' and 'model', as make_mesh gives")
    rows, parts = adaptation.batch_size // adaptation.num_parts, mesh.shape["data"]
    if rows % parts:
        raise ValueError(
            f"batch_size={adaptation.batch_size} in accumulation={adaptation.num_parts} parts is {rows} sequences, "
            f"which the mesh's data axis, {parts}, must divide; change the batch size or make the model axis larger"
        )
