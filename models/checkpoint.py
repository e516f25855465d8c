"""Hugging Face checkpoints in safetensors: reading them into parameters and writing them back."""

import dataclasses
import functools
import importlib.resources
import json
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from restkv_jax.models.config import ModelConfig, read_config, to_hugging_face
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.gguf import gguf_within, read_gguf
from restkv_jax.models.stored import StoredCheckpoint, StoredTensor, aligned_empty, read_into
from restkv_jax.models.tensors import (
    Tensor,
    check_tensors,
    checkpoint_tensors,
    flatten,
    parameter_shapes,
    to_checkpoint,
    unflatten,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("float32", "bfloat16", "float16")
STORED_DTYPES = ("F64", "F32", "F16", "BF16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
HUB_FILES = ["model*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MODEL_FILES = ("model*.safetensors", INDEX, "config.json", "generation_config.json")
"""What `save_model` replaces in a directory that exists."""


def load_model(
    path_or_id: str | os.PathLike | None = None, dtype: Any = jnp.bfloat16
) -> tuple[Decoder, Any, Any | None]:
    """Loads a checkpoint: its model, parameters and tokenizer.

    Tensors are read one at a time into one parameter at a time, so the host never holds the weights twice.
    Ids that end or pad a text come from `generation_config.json`, where it names them, else from `config.json`.

    Args:
      path_or_id: a directory in Hugging Face's layout, or a model id of the Hugging Face hub, which is downloaded;
        None is the model that comes with the package.
      dtype: of every parameter: float32, bfloat16 or float16.

    Returns:
      the model; its parameters, a dict of arrays where those of the layers carry a leading axis `L`; the tokenizer
      of `transformers`, None if the directory has none.

    Raises:
      FileNotFoundError: no such path or model, or a file is missing from the directory.
      NotADirectoryError: the path is a file.
      ValueError: a dtype that is not supported, pickled or quantised weights, an unsupported architecture, a tensor
        that is missing, unknown, of the wrong shape or not finite, a damaged file.
    """
    if jnp.dtype(dtype).name not in DTYPES:
        raise ValueError(f"dtype={jnp.dtype(dtype).name!r} is not supported; supported: {', '.join(DTYPES)}")
    path = _find_checkpoint(path_or_id)
    config, tensors, tokenizer = read_gguf(path) if path.suffix == ".gguf" else _read_directory(path)
    model = Decoder(config)
    expected = checkpoint_tensors(model)
    check_tensors(expected, {name: tensor.shape for name, tensor in tensors.items()}, path)
    _check_stored_dtypes({name: tensors[name] for name in expected})
    params = {
        parameter: _read_parameter(parameter, shape, jnp.dtype(dtype), tensors, expected)
        for parameter, shape in parameter_shapes(model).items()
    }
    return model, unflatten(params), tokenizer


def save_model(
    directory: str | os.PathLike,
    model: Decoder,
    params: Any,
    tokenizer: Any | None = None,
    max_shard_bytes: int = 2**32,
) -> None:
    """Writes a checkpoint that `load_model` and `transformers` load: configuration, weights, tokenizer.

    The files are written into a temporary directory beside, which then takes the place of `directory`: it is never
    seen half-written. Of a directory that exists the model's files are replaced and all others kept.

    Args:
      directory: made if it does not exist.
      model: a `Decoder`.
      params: its parameters, stored in their own dtypes.
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
    try:
        fields = to_hugging_face(model.config) | {"dtype": str(params["embedding"].dtype)}
        _write_json(unfinished / "config.json", fields)
        _write_weights(unfinished, checkpoint_tensors(model), params, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        _replace_directory(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _find_checkpoint(path_or_id: str | os.PathLike | None) -> pathlib.Path:
    if path_or_id is None:
        return pathlib.Path(str(importlib.resources.files("restkv_jax") / "embedded"))
    path = pathlib.Path(path_or_id)
    if path.is_dir():
        return gguf_within(path) or path
    if path.suffix == ".gguf" and path.exists():
        return path
    if path.exists():
        raise NotADirectoryError(f"path_or_id={str(path)!r} is a file; give the directory that holds it")
    if isinstance(path_or_id, os.PathLike) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path_or_id):
        raise FileNotFoundError(
            f"path_or_id={str(path_or_id)!r} does not exist; give a directory with config.json and safetensors, or the "
            "id of a model on the Hugging Face hub such as 'owner/name'"
        )
    return _download(path_or_id)


def _download(model_id: str) -> pathlib.Path:
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(snapshot_download(model_id, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"path_or_id={model_id!r} is neither a directory nor a model that the Hugging Face hub gives: {error}"
        ) from error


def _read_directory(directory: pathlib.Path) -> StoredCheckpoint:
    files = _weight_files(directory)
    config = _read_model_config(directory)
    return StoredCheckpoint(config, _read_headers(directory, files), _load_tokenizer(directory))


def _weight_files(directory: pathlib.Path) -> dict[str, str] | None:
    """The index's map of tensors to files, None where all are in one file."""
    if (directory / WEIGHTS).is_file():
        return None
    if (directory / INDEX).is_file():
        files = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(files, dict):
            raise ValueError(f"{directory / INDEX} has no 'weight_map'; download it again")
        for file in sorted(set(files.values())):
            if not (directory / file).is_file():
                raise FileNotFoundError(
                    f"{directory}: the index names shard {file!r}, which is missing; download the file again"
                )
        return files
    pickled = sorted(path.name for pattern in PICKLED for path in directory.glob(pattern))
    if pickled:
        raise ValueError(
            f"{directory} has only pickled weights ({', '.join(pickled)}): refused, since unpickling runs code from "
            "the file; convert them to safetensors where you trust them: transformers' save_pretrained does"
        )
    raise FileNotFoundError(f"{directory} has no weights: neither {WEIGHTS} nor {INDEX}")


def _read_model_config(directory: pathlib.Path) -> ModelConfig:
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} has no config.json; it describes the architecture of the weights")
    fields = _read_json(directory / "config.json")
    if fields.get("quantization_config"):
        raise ValueError(
            f"{directory}: quantised weights (quantization_config) are not supported; use the original ones"
        )
    config = read_config(fields)
    generation = directory / "generation_config.json"
    ids = _read_json(generation) if generation.is_file() else {}
    eos, pad = ids.get("eos_token_id"), ids.get("pad_token_id")
    return dataclasses.replace(
        config,
        eos_token_ids=config.eos_token_ids if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_token_id=config.pad_token_id if pad is None else pad,
    )


def _read_headers(directory: pathlib.Path, files: dict[str, str] | None) -> dict[str, StoredTensor]:
    """The tensors of all files, each with its dtype in the spelling of safetensors."""
    tensors = {}
    for path in [directory / file for file in sorted(set(files.values()) if files else [WEIGHTS])]:
        try:
            with safe_open(path, framework="np") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                for name, x in slices.items():
                    read = functools.partial(_read_rows, path, name)
                    tensors[name] = StoredTensor(tuple(x.get_shape()), x.get_dtype(), read)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}); download or write it again") from error
    return tensors


def _read_rows(path: pathlib.Path, name: str, rows: slice) -> np.ndarray:
    # Closing the file gives back the memory that its pages were mapped to.
    with safe_open(path, framework="np") as file:
        return file.get_slice(name)[rows]


def _check_stored_dtypes(tensors: Mapping[str, StoredTensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in STORED_DTYPES:
            raise ValueError(
                f"tensor {name!r} is stored as {tensor.dtype}, which is not supported; "
                f"supported: {', '.join(STORED_DTYPES)}"
            )


def _read_parameter(
    parameter: str, shape: tuple[int, ...], dtype: Any, tensors: Mapping[str, StoredTensor], expected: dict[str, Tensor]
) -> jax.Array:
    """One parameter, all layers stacked, from its tensors."""
    stacked = aligned_empty(shape, dtype)
    for name, tensor in expected.items():
        if tensor.parameter == parameter:
            # A view of the parameter in the axes of the checkpoint.
            place = to_checkpoint(parameter, stacked if tensor.layer is None else stacked[tensor.layer])
            if not all(np.isfinite(rows).all() for rows in read_into(place, tensors[name])):
                raise ValueError(f"tensor {name!r} holds NaN or infinity (read as {dtype}); the weights are unusable")
    return jax.device_put(stacked)


def _load_tokenizer(directory: pathlib.Path) -> Any | None:
    if not any((directory / file).is_file() for file in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


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
    directory: pathlib.Path, tensors: dict[str, Tensor], params: dict[str, Any], max_shard_bytes: int
) -> None:
    def size(name: str) -> int:
        return int(np.prod(tensors[name].shape)) * params[tensors[name].parameter].dtype.itemsize

    shards, room = [], 0
    for name in tensors:
        if size(name) > room or not shards:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size(name)

    def array(name: str) -> np.ndarray:
        whole = params[tensors[name].parameter]
        one = whole if tensors[name].layer is None else whole[tensors[name].layer]
        return np.ascontiguousarray(to_checkpoint(tensors[name].parameter, np.asarray(one)))

    of = len(shards)
    files = [WEIGHTS] if of == 1 else [f"model-{i:05d}-of-{of:05d}.safetensors" for i in range(1, of + 1)]
    for file, names in zip(files, shards, strict=True):
        save_file({name: array(name) for name in names}, directory / file, metadata={"format": "pt"})
    if of > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(directory / INDEX, {"metadata": {"total_size": sum(map(size, tensors))}, "weight_map": weight_map})


def _replace_directory(new: pathlib.Path, directory: pathlib.Path) -> None:
    """Renames `new` to `directory`, keeping those files of a directory there that are no part of a model."""
    if not directory.exists():
        new.rename(directory)
        return
    old = new.with_name(new.name + ".old")
    directory.rename(old)
    new.rename(directory)
    for path in old.iterdir():
        if not (directory / path.name).exists() and not any(path.match(pattern) for pattern in MODEL_FILES):
            path.rename(directory / path.name)
    shutil.rmtree(old)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _write_json(path: pathlib.Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")
