"""Writing checkpoints that `load_model` and `transformers` load."""

import os
import pathlib
import shutil
import uuid
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from restkv_jax.models.config import to_hugging_face
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.files import write_json
from restkv_jax.models.key_groups import FILE as GROUPS_FILE
from restkv_jax.models.mesh import fetched, spans_processes
from restkv_jax.models.sampling_defaults import GENERATION_CONFIG, SamplingDefaults, sampling_fields
from restkv_jax.models.tensors import Tensor, checkpoint_tensors, flatten, fused_names, parameter_shapes, to_checkpoint
from restkv_jax.models.tokenizer import FILES as TOKENIZER_FILES

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MODEL_FILES = ("model*.safetensors", INDEX, "config.json", GENERATION_CONFIG, GROUPS_FILE)
"""What `save_model` replaces in a directory that exists."""


def save_model(
    directory: str | os.PathLike,
    model: Decoder,
    params: Any,
    tokenizer: Any | None = None,
    max_shard_bytes: int = 2**32,
) -> None:
    """Writes a checkpoint that `load_model` and `transformers` load: configuration, weights, tokenizer, sharing.

    The files are written into a temporary directory beside, which then takes the place of `directory`: it is never
    seen half-written. Of a directory that exists the model's files, and with a tokenizer the tokenizer's, are replaced
    and all others kept.

    Args:
      directory: made if it does not exist.
      model: a `Decoder`.
      params: its parameters, stored in their own dtypes. Where they span processes, all call this and the first writes.
      tokenizer: a tokenizer of `transformers`.
      max_shard_bytes: weights larger than this are written into several files with an index.

    Raises:
      ValueError: parameters that are not the model's.
      NotADirectoryError: `directory` is a file.
    """
    directory = pathlib.Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"directory={str(directory)!r} is a file; give the directory to write")
    params = flatten(params)
    check_params(params, parameter_shapes(model))
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = directory.parent / f".{directory.name}.{uuid.uuid4().hex}"
    unfinished.mkdir()
    is_first = jax.process_index() == 0 or not spans_processes(params)
    try:
        fields = to_hugging_face(model.config) | {"dtype": str(params["embedding"].dtype)}
        write_json(unfinished / "config.json", fields)
        sampling = sampling_fields(model.config.sampling)
        if sampling != sampling_fields(SamplingDefaults()):
            ids = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            write_json(unfinished / GENERATION_CONFIG, ids | sampling)
        _write_weights(
            unfinished, model.config.model_type, checkpoint_tensors(model), params, max_shard_bytes, is_first
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        if model.sharing is not None:
            model.sharing.save(unfinished, model)
        if is_first:
            _replace_directory(unfinished, directory, MODEL_FILES + (() if tokenizer is None else TOKENIZER_FILES))
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_params(params: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    """Refuses parameters, by dotted name, that are not those of the expected shapes.

    Raises:
      ValueError: names or a shape that differ.
    """
    if set(params) != set(expected):
        raise ValueError(
            f"params are not the model's: missing {sorted(set(expected) - set(params))}, "
            f"unknown {sorted(set(params) - set(expected))}"
        )
    for name, shape in expected.items():
        if params[name].shape != shape:
            raise ValueError(f"params: {name!r} has the wrong shape: found {params[name].shape}, expected {shape}")


def _write_weights(
    directory: pathlib.Path,
    model_type: str,
    tensors: dict[str, Tensor],
    params: dict[str, Any],
    max_shard_bytes: int,
    is_first: bool,
) -> None:
    """Writes the weights; a process that is not the first only takes part in fetching them."""

    def part_size(name: str) -> int:
        return int(np.prod(tensors[name].shape)) * params[tensors[name].parameter].dtype.itemsize

    def size(name: str) -> int:
        return sum(part_size(part) for part in stored[name])

    stored = fused_names(model_type, tensors)
    shards, room = [], 0
    for name in stored:
        if size(name) > room or not shards:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size(name)

    def part(name: str) -> np.ndarray:
        whole = params[tensors[name].parameter]
        one = fetched(whole[tensors[name].place])
        return np.ascontiguousarray(to_checkpoint(tensors[name].parameter, one))

    def array(name: str) -> np.ndarray:
        parts = [part(one) for one in stored[name]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    of = len(shards)
    files = [WEIGHTS] if of == 1 else [f"model-{i:05d}-of-{of:05d}.safetensors" for i in range(1, of + 1)]
    for file, names in zip(files, shards, strict=True):
        arrays = {name: array(name) for name in names}
        if is_first:
            save_file(arrays, directory / file, metadata={"format": "pt"})
    if of > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(directory / INDEX, {"metadata": {"total_size": sum(map(size, stored))}, "weight_map": weight_map})


def _replace_directory(new: pathlib.Path, directory: pathlib.Path, replaced: tuple[str, ...]) -> None:
    """Renames `new` to `directory`, keeping those files of a directory there that match none of `replaced`."""
    if not directory.exists():
        new.rename(directory)
        return
    old = new.with_name(new.name + ".old")
    directory.rename(old)
    new.rename(directory)
    for path in old.iterdir():
        if not (directory / path.name).exists() and not any(path.match(pattern) for pattern in replaced):
            path.rename(directory / path.name)
    shutil.rmtree(old)
