"""Adaptation: a model's training goes on with shared keys (PoD, arXiv 2412.02252)."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any, Literal

import jax
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from restkv_jax.models.arguments import check_integer
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.digest import checksum
from restkv_jax.models.key_groups import Sharing
from restkv_jax.models.mesh import make_mesh
from restkv_jax.models.rules import with_usual_promotion
from restkv_jax.models.saving import check_params, save_model
from restkv_jax.models.tensors import flatten, parameter_shapes, unflatten
from restkv_jax.pod.adaptation.checkpoints import Position, open_checkpoints, restore, save
from restkv_jax.pod.adaptation.data import Sequences, batches, check_vocabulary, make_batch, read_sequences
from restkv_jax.pod.adaptation.journal import open_journal
from restkv_jax.pod.adaptation.program import Program, initial_state, make_program, place_batch, place_params
from restkv_jax.pod.adaptation.recipe import Adaptation

SAVE_DTYPES = ("bfloat16", "float32")

TOKENS_AT_A_TIME = 1024
"""That keep a CPU busy: more at a time take more memory and are no faster."""

TOKENS_WITH_LOGITS = 128
"""On a CPU, whose memory is the host's: so many logits are small beside the weights."""

MODEL = "model"
"""The adapted model in the directory of a run."""


@with_usual_promotion
def adapt(
    model: Decoder,
    params: Any,
    data: Any,
    sharing: Sharing | None = None,
    *,
    adaptation: Adaptation = Adaptation(),  # noqa: B008
    output: str | os.PathLike | None = None,
    tokenizer: Any | None = None,
    mesh: Mesh | None = None,
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    checkpoint_every: int = 100,
    donate: bool = False,
    quiet: bool = False,
) -> Any:
    """Trains a model further on next tokens, with the keys of distant tokens shared across layers.

    The same call goes on where one that was killed stopped, and ends with the same weights.

    Args:
      model: a `Decoder`.
      params: its parameters; they are not changed, unless `donate` gives up those that are trained.
      data: text files, or a token array with or without weights of the tokens: see `read_sequences`.
      sharing: to use instead of the model's own; a model without one is trained as it is, the fair comparison.
      adaptation: how to train.
      output: directory of the run: `model/` with the result in Hugging Face's layout and its groups, `metrics.jsonl`,
        `checkpoints/`, and the ids of text. Without it nothing is written, and a killed run is lost.
      tokenizer: the model's, for text; saved with the result.
      mesh: devices with the axes `data`, over which batches are divided, and `model`, over which weights are; all
        devices on `data` by default.
      save_dtype: of the weights in `model/`.
      checkpoint_every: steps between checkpoints; the last step has one anyway.
      donate: frees the parameters that are trained once the run has its copy of them; they must be JAX arrays, which
        cannot be used afterwards.
      quiet: shows no progress.

    Returns:
      the parameters: in float32 those that were trained, the others as they were given.

    Raises:
      ValueError: an argument that cannot work, named with a remedy; checkpoints of another configuration.
      OSError: data that cannot be read, or an output that cannot be written; what was saved before survives.
      FloatingPointError: the loss is not finite.
    """
    check_integer("checkpoint_every", checkpoint_every, 1, "steps between checkpoints")
    if save_dtype not in SAVE_DTYPES:
        raise ValueError(f"save_dtype={save_dtype!r} is not supported; supported: {', '.join(SAVE_DTYPES)}")
    check_params(flatten(params), parameter_shapes(model))
    output = None if output is None else _make_directory(output)
    longest = model.config.context_length
    sequences = read_sequences(data, adaptation.sequence_length, longest, tokenizer, output)
    for arrays in sequences.sample():  # the others when their turn comes
        check_vocabulary(arrays["tokens"], model.config.vocab_size)
    mesh = make_mesh() if mesh is None else mesh
    adaptation = _resolve(adaptation, sequences, mesh)
    if sharing is not None:
        sharing.groups.check_model(model.config)
        model = model.clone(sharing=sharing)
    _check_distant(model, adaptation)
    program = make_program(model, adaptation, mesh)
    configuration = describe(model, params, sequences, adaptation)
    trained = _train(program, params, sequences, adaptation, configuration, output, checkpoint_every, donate, quiet)
    result = unflatten(flatten(params) | trained)
    if output is not None:
        _export(output / MODEL, model, result, tokenizer, save_dtype)
    return result


def _check_distant(model: Decoder, adaptation: Adaptation) -> None:
    """Refuses sequences in which no key is shared."""
    sharing, length = model.sharing, adaptation.sequence_length
    if sharing is not None and length is not None and length <= sharing.proximal:
        raise ValueError(
            f"sequence_length={length} is all proximal with sink={sharing.sink} and recent={sharing.recent}: no shared "
            "key would be read; give longer sequences, or a smaller recent"
        )


def describe(model: Decoder, params: Any, sequences: Sequences, adaptation: Adaptation) -> dict[str, Any]:
    """All that the result depends on, as JSON: checkpoints of a run are refused by a run where this differs."""
    description = {
        "model": dataclasses.asdict(model.config),
        "weights": checksum(params),
        "data": {"sequences": len(sequences), "checksum": sequences.checksum()},
        "sharing": None if model.sharing is None else dataclasses.asdict(model.sharing),
        "adaptation": dataclasses.asdict(adaptation),
    }
    return json.loads(json.dumps(description))


def _train(
    program: Program,
    params: Any,
    sequences: Sequences,
    adaptation: Adaptation,
    configuration: dict[str, Any],
    output: pathlib.Path | None,
    checkpoint_every: int,
    donate: bool,
    quiet: bool,
) -> dict[str, Array]:
    """Runs the steps that are left and returns the trained parameters."""
    dataset: Any = batches(sequences, adaptation)
    vocabulary = configuration["model"]["vocab_size"]
    is_first_process = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(open_checkpoints(output / "checkpoints")) if output else None
        restored = restore(manager, program.state, configuration) if manager else None
        state, position = restored or (initial_state(program, params, adaptation), Position(0, 0, adaptation.seed))
        if donate:
            for name in state.params:
                flatten(params)[name].delete()
        if position.step == adaptation.steps:
            return state.params
        frozen = place_params(program.frozen, params)
        step = program.lower().compile()
        log = output / "metrics.jsonl" if output and is_first_process else None
        quiet = quiet or not is_first_process
        journal = stack.enter_context(open_journal(log, adaptation, position.step, quiet))
        for done in range(position.step + 1, adaptation.num_steps + 1):
            batch = make_batch(dataset[done - 1], adaptation.num_parts, vocabulary)
            state, metrics = step(state, frozen, place_batch(program, batch))
            journal.record(done, metrics)
            if done % checkpoint_every == 0 or done == adaptation.steps:
                journal.flush()
                if manager:
                    position = Position(done, done * adaptation.batch_size, adaptation.seed)
                    save(manager, state, position, configuration)
    return state.params


def _export(directory: pathlib.Path, model: Decoder, params: Any, tokenizer: Any, dtype: str) -> None:
    """Writes the model's directory, its sharing with it; what a killed export left beside is removed."""
    params = jax.tree.map(_gather, params)
    if jax.process_index() != 0:
        return
    for unfinished in directory.parent.glob(f".{directory.name}.*"):
        shutil.rmtree(unfinished)
    save_model(directory, model, jax.tree.map(lambda leaf: leaf.astype(dtype), params), tokenizer)


def _gather(leaf: Array) -> Array:
    """The whole of an array of which other processes hold parts."""
    return leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)


def _resolve(adaptation: Adaptation, sequences: Sequences, mesh: Mesh) -> Adaptation:
    """The same with everything said that follows from data and devices."""
    is_cpu, dtype, parts = jax.default_backend() == "cpu", adaptation.compute_dtype, adaptation.accumulation
    if dtype == "auto":
        dtype = "float32" if is_cpu else "bfloat16"
    if parts is None:
        rows, rest = divmod(adaptation.batch_size, mesh.shape.get("data", 1))
        parts = _parts(rows, sequences.tokens.shape[1]) if is_cpu and not rest else 1
    return dataclasses.replace(
        adaptation,
        steps=adaptation.steps or max(1, len(sequences) // adaptation.batch_size),
        sequence_length=sequences.tokens.shape[1],
        compute_dtype=dtype,
        accumulation=parts,
        loss_chunk=adaptation.loss_chunk or (TOKENS_WITH_LOGITS if is_cpu else adaptation.tokens_with_logits),
    )


def _parts(rows: int, length: int) -> int:
    """The most parts of a device's sequences with `TOKENS_AT_A_TIME` each, 1 where there are fewer."""
    divisors = (parts for parts in range(rows, 1, -1) if rows % parts == 0)
    return next((parts for parts in divisors if rows // parts * length >= TOKENS_AT_A_TIME), 1)


def _make_directory(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path).resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise OSError(f"output={str(path)!r} is not a directory that can be written: {error}") from error
