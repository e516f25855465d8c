"""Checkpoints of a run: written by orbax while training goes on, complete or absent, and of one configuration."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import traverse_util

from restkv_jax.pod.adaptation.training import TrainState

KEEP = 2
"""Checkpoints on disk; another one exists while it is written."""


class Position(NamedTuple):
    """What besides the state a run needs to go on: steps done, sequences read of the order that `seed` gives.

    The order of the data is all that is random, and a function of the seed and the place in it.
    """

    step: int
    sequences: int
    seed: int


@contextlib.contextmanager
def open_checkpoints(directory: pathlib.Path) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a run; what a killed one left unfinished is removed, and at the end all is written.

    Raises:
      OSError: during the run, something could not be read or written; the message says what survived.
    """
    # a step cannot take the place of arrays that are being written, so on a CPU one beside would need a second state
    beside_steps = jax.default_backend() != "cpu"
    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEEP, cleanup_tmp_directories=True, enable_async_checkpointing=beside_steps
    )
    # weights hardly get smaller by compression, which takes time and memory
    handlers = {"state": ocp.PyTreeCheckpointHandler(use_compression=False), "run": ocp.JsonCheckpointHandler()}
    manager = ocp.CheckpointManager(directory.resolve(), options=options, item_handlers=handlers)
    try:
        yield manager
        with _as_disk_error():
            manager.wait_until_finished()
    except OSError as error:
        raise OSError(f"{error}; {_survivor(manager)}") from error
    finally:
        with contextlib.suppress(OSError, ValueError):  # reported above, or less than the error that ends the run
            manager.close()


def save(manager: ocp.CheckpointManager, state: TrainState, position: Position, configuration: dict[str, Any]) -> None:
    """Writes the state; from an accelerator it is copied to the host, and written while steps go on.

    Raises:
      OSError: the one before, or this one, could not be written.
    """
    description = {"position": position._asdict(), "configuration": configuration}
    kinds = ocp.args.Composite(state=ocp.args.PyTreeSave(state), run=ocp.args.JsonSave(description))
    with _as_disk_error():
        manager.save(position.step, args=kinds)


def restore(
    manager: ocp.CheckpointManager, state: TrainState, configuration: dict[str, Any]
) -> tuple[TrainState, Position] | None:
    """The last complete checkpoint, None if there is none.

    Args:
      manager: of the run.
      state: arrays or their shapes, with the shardings to restore to.
      configuration: of the run that asks.

    Raises:
      ValueError: the checkpoint is of another configuration; names what differs.
    """
    step = manager.latest_step()
    if step is None:
        return None
    description = manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
    differences = list(_differences(description["configuration"], configuration))
    if differences:
        raise ValueError(
            f"{str(manager.directory)!r} holds checkpoints of another configuration: {'; '.join(differences)}; give "
            "another output directory, or remove these checkpoints to start anew"
        )
    places = ocp.checkpoint_utils.construct_restore_args(state)
    shapes = ocp.args.PyTreeRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state), places)
    restored = manager.restore(step, args=ocp.args.Composite(state=shapes))["state"]
    return restored, Position(**description["position"])


def _differences(there: dict[str, Any], here: dict[str, Any]) -> Iterator[str]:
    there, here = (traverse_util.flatten_dict(fields, keep_empty_nodes=True, sep=".") for fields in (there, here))
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            yield f"{name} is {_short(there.get(name))} there and {_short(here.get(name))} here"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _survivor(manager: ocp.CheckpointManager) -> str:
    manager.reload()
    step, directory = manager.latest_step(), str(manager.directory)
    if step is None:
        return f"there is no complete checkpoint in {directory!r}"
    return f"the checkpoint of step {step} in {directory!r} is complete: the same command goes on from there"


@contextlib.contextmanager
def _as_disk_error() -> Iterator[None]:
    """tensorstore reports the errors of the file system as ValueErrors."""
    try:
        yield
    except ValueError as error:
        raise OSError(f"a checkpoint cannot be written: {error}") from error
