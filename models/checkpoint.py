"""Loading checkpoints: tensors that are still in their files get plain names, then fill one parameter after another."""

import dataclasses
import functools
import hashlib
import importlib.resources
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from restkv_jax.models.config import ModelConfig, as_ids, read_config
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.files import one_line, read_json, refuse_pointer
from restkv_jax.models.gguf import gguf_within, read_gguf
from restkv_jax.models.key_groups import Sharing
from restkv_jax.models.mesh import parameter_shardings
from restkv_jax.models.quantised import FLOAT8, dequantised, read_float8
from restkv_jax.models.refused import missing_weights, refuse_adapter, refuse_pickled, refuse_quantised
from restkv_jax.models.sampling_defaults import GENERATION_CONFIG, read_sampling
from restkv_jax.models.saving import INDEX, WEIGHTS
from restkv_jax.models.stored import Index, StoredCheckpoint, StoredTensor, aligned_empty, read_into, row_slices
from restkv_jax.models.tensors import (
    Tensor,
    check_tensors,
    checkpoint_index,
    checkpoint_tensors,
    flatten,
    parameter_shapes,
    plain_names,
    split_fused,
    to_checkpoint,
    unflatten,
)
from restkv_jax.models.tokenizer import tokenizer_beside

EMBEDDED = pathlib.Path(str(importlib.resources.files("restkv_jax") / "embedded"))
"""The directory of the model that comes with the package."""

SHARD = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,200}(/[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,200}){0,3}")
"""A file below the directory: no part of its name begins with a dot."""
EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = ("float32", "bfloat16", "float16")
STORED_DTYPES = ("F64", "F32", "F16", "BF16")
HUB_FILES = ["model*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]


def load_model(
    path_or_id: str | os.PathLike | None = None, dtype: Any = jnp.bfloat16, mesh: Mesh | None = None
) -> tuple[Decoder, Any, Any]:
    """Loads a checkpoint: its model, parameters and tokenizer.

    Tensors are read a few rows at a time into one parameter at a time, so the host never holds the weights twice.
    Quantised ones (GGUF's, fp8 with scales, compressed-tensors' integers, MLX's) are dequantised as they are read.

    A text ends with any of `model.config.eos_token_ids`: the union of what `generation_config.json`, `config.json`
    and the tokenizer name. The padding is that of the first of the two files that names one. `model.config.sampling`
    has what `generation_config.json` says of sampling.

    A stored unembedding that differs from the embedding is kept, whatever `tie_word_embeddings` says. Prefixes that
    wrappers put before the tensors' names are taken off. Code in a checkpoint never runs.

    Args:
      path_or_id: a directory in Hugging Face's layout, a GGUF file or a directory with one, or a model id of the
        Hugging Face hub, which is downloaded; None is the model that comes with the package.
      dtype: of every parameter: float32, bfloat16 or float16.
      mesh: of devices with the axes `data` and `model`, as `make_mesh` makes it: every process reads those parts alone
        that its devices hold, and what is called with the parameters runs on all of them. None is one device.

    Returns:
      the model, with the sharing that it was adapted to; its parameters, a dict of arrays where those of the layers
      carry a leading axis `L`; the tokenizer of `transformers`, None, with a warning, if the directory has none.

    Raises:
      TypeError: a mesh that is not one.
      FileNotFoundError: no such path or model, or a file is missing from the directory.
      NotADirectoryError: the path is a file.
      ValueError: a dtype that is not supported; weights that are pickled, or quantised in a way that cannot be undone;
        an adapter, a git-lfs pointer; an unsupported architecture or a configuration that no model can have; a tensor
        that is missing, unknown, of the wrong shape or not finite; a damaged file; a tokenizer that cannot be loaded;
        a mesh without these axes, or one that does not divide the model; processes with different checkpoints.
        The message is one line.
    """
    if jnp.dtype(dtype).name not in DTYPES:
        raise ValueError(f"dtype={jnp.dtype(dtype).name!r} is not supported; supported: {', '.join(DTYPES)}")
    path = _find_checkpoint(path_or_id)
    config, stored, tokenizer = read_gguf(path) if path.suffix == ".gguf" else _read_directory(path)
    names = plain_names(stored, path)
    config, tensors = _tie(config, {plain: stored[name] for plain, name in names.items()})
    model = Decoder(_with_end_of(config, tokenizer))
    expected = checkpoint_tensors(model)
    tensors = split_fused(config.model_type, tensors, expected)
    check_tensors(expected, {name: tensor.shape for name, tensor in tensors.items()}, path, names)
    _check_stored_dtypes({name: tensors[name] for name in expected})
    sharing = Sharing.load(path, model) if path.is_dir() else None
    shardings = {} if mesh is None else flatten(parameter_shardings(model, mesh))
    if mesh is not None:
        _compare_processes(path, model.config, {name: tensors[name] for name in expected})
    params = {
        parameter: _read_parameter(parameter, shape, jnp.dtype(dtype), tensors, expected, shardings.get(parameter))
        for parameter, shape in parameter_shapes(model).items()
    }
    return model.clone(sharing=sharing), unflatten(params), tokenizer


def _find_checkpoint(path_or_id: str | os.PathLike | None) -> pathlib.Path:
    if path_or_id is None:
        return EMBEDDED
    path = pathlib.Path(path_or_id)
    if path.is_dir():
        return gguf_within(path) or path
    if path.suffix == ".gguf" and path.exists():
        return path
    if path.exists():
        raise NotADirectoryError(f"path_or_id={str(path)!r} is a file; give the directory that holds it")
    is_path = isinstance(path_or_id, os.PathLike) or path.suffix == ".gguf"
    if is_path or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path_or_id)):
        raise FileNotFoundError(
            f"path_or_id={str(path_or_id)!r} does not exist; give a directory with config.json and safetensors, a "
            "GGUF file, or the id of a model on the Hugging Face hub such as 'owner/name'"
        )
    return _download(str(path_or_id))


def _download(model_id: str) -> pathlib.Path:
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(snapshot_download(model_id, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"path_or_id={model_id!r} is neither a directory nor a model that the Hugging Face hub gives: "
            f"{one_line(error)}"
        ) from error


def _read_directory(directory: pathlib.Path) -> StoredCheckpoint:
    refuse_adapter(directory)
    files = _weight_files(directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} has no config.json; it describes the architecture of the weights")
    fields = read_json(directory / "config.json")
    fields, tensors = dequantised(fields, _read_headers(directory, files), directory)
    refuse_quantised(directory, fields, tensors)
    return StoredCheckpoint(_read_model_config(directory, fields), tensors, tokenizer_beside(directory))


def _weight_files(directory: pathlib.Path) -> list[str]:
    """The files that hold the weights."""
    if (directory / WEIGHTS).is_file():
        return [WEIGHTS]
    if (directory / INDEX).is_file():
        return _shards(directory, read_json(directory / INDEX).get("weight_map"))
    refuse_pickled(directory, [path.name.removesuffix(".index.json") for path in directory.iterdir()])
    raise missing_weights(directory)


def _shards(directory: pathlib.Path, weight_map: Any) -> list[str]:
    """The files that an index names, all of them inside of the directory."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{directory / INDEX} has no 'weight_map'; download it again")
    for file in weight_map.values():
        if not isinstance(file, str) or not SHARD.fullmatch(file):
            raise ValueError(
                f"{directory / INDEX} names the shard {str(file)[:200]!r}, which is not the name of a file in the same "
                "directory; download it again"
            )
    files = sorted(set(weight_map.values()))
    refuse_pickled(directory, files)
    for file in files:
        if not (directory / file).is_file():
            raise FileNotFoundError(
                f"{directory}: the index names shard {file!r}, which is missing; download the file again"
            )
    return files


def _read_model_config(directory: pathlib.Path, fields: dict[str, Any]) -> ModelConfig:
    """The configuration; ends, padding and sampling of `generation_config.json` included."""
    path_of_generation = directory / GENERATION_CONFIG
    generation = read_json(path_of_generation) if path_of_generation.is_file() else {}
    path = directory / "config.json"
    try:
        config = read_config(fields)
        path = path_of_generation
        pad = generation.get("pad_token_id")
        pad = config.pad_token_id if pad is None else pad
        config = dataclasses.replace(config, pad_token_id=pad, sampling=read_sampling(generation))
        return _ending_with(config, (*as_ids(generation.get("eos_token_id")), *config.eos_token_ids))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _with_end_of(config: ModelConfig, tokenizer: Any | None) -> ModelConfig:
    """Adds what the tokenizer ends texts with, if the model has such a token."""
    end = getattr(tokenizer, "eos_token_id", None)
    if not isinstance(end, int) or end >= config.vocab_size:
        return config
    return _ending_with(config, (*config.eos_token_ids, end))


def _ending_with(config: ModelConfig, eos_token_ids: tuple[Any, ...]) -> ModelConfig:
    unique = tuple(token for i, token in enumerate(eos_token_ids) if token not in eos_token_ids[:i])
    return dataclasses.replace(config, eos_token_ids=unique)


def _tie(config: ModelConfig, tensors: dict[str, StoredTensor]) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """One matrix for embedding and unembedding where the configuration ties them, unless the files hold two."""
    if not config.tie_word_embeddings or UNEMBEDDING not in tensors:
        return config, tensors
    rest = {name: tensor for name, tensor in tensors.items() if name != UNEMBEDDING}
    if EMBEDDING not in tensors:
        return config, rest | {EMBEDDING: tensors[UNEMBEDDING]}
    if _are_equal(tensors[EMBEDDING], tensors[UNEMBEDDING]):
        return config, rest
    return dataclasses.replace(config, tie_word_embeddings=False), tensors


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    _check_stored_dtypes({EMBEDDING: one, UNEMBEDDING: other})
    return one.shape == other.shape and all(
        np.array_equal(one.read(rows), other.read(rows)) for rows in row_slices(one.shape)
    )


def _read_headers(directory: pathlib.Path, files: list[str]) -> dict[str, StoredTensor]:
    """The tensors of all files, each with its dtype in the spelling of safetensors."""
    tensors: dict[str, StoredTensor] = {}
    for path in [directory / file for file in files]:
        refuse_pointer(path)
        try:
            with safe_open(path, framework="np") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found = {name: _stored(path, name, x.get_shape(), x.get_dtype()) for name, x in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({one_line(error)}); download or write it again") from error
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise ValueError(f"{path}: tensor {twice[0]!r} is in another shard too; download the model again")
        tensors |= found
    return tensors


def _stored(path: pathlib.Path, name: str, shape: list[int], dtype: str) -> StoredTensor:
    if dtype in FLOAT8:
        return StoredTensor(tuple(shape), dtype, functools.partial(read_float8, path, name))
    read = functools.partial(_read_block, path, name)
    return StoredTensor(tuple(shape), dtype, lambda rows: read((rows,)), read)


def _read_block(path: pathlib.Path, name: str, index: Index) -> np.ndarray:
    # Closing the file gives back the memory that its pages were mapped to.
    with safe_open(path, framework="np") as file:
        stored = file.get_slice(name)
        return stored[index] if stored.get_shape() else file.get_tensor(name)


def _check_stored_dtypes(tensors: Mapping[str, StoredTensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in STORED_DTYPES:
            raise ValueError(
                f"tensor {name!r} is stored as {tensor.dtype}, which is not supported; "
                f"supported: {', '.join(STORED_DTYPES)}"
            )


def _read_parameter(
    parameter: str,
    shape: tuple[int, ...],
    dtype: Any,
    tensors: Mapping[str, StoredTensor],
    expected: dict[str, Tensor],
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """One parameter, all layers stacked, from its tensors: what the devices of this process hold of it."""
    places = {name: tensor.place for name, tensor in expected.items() if tensor.parameter == parameter}

    def read(index: Index) -> np.ndarray:
        bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        stacked = aligned_empty(tuple(stop - start for start, stop in bounds), dtype)
        for name, place in places.items():
            # A view of the parameter in the axes of the checkpoint.
            view = to_checkpoint(parameter, stacked[place])
            stored = tensors[name].block(checkpoint_index(parameter, index[len(place) :], shape[len(place) :]))
            if not all(np.isfinite(rows).all() for rows in read_into(view, stored)):
                raise ValueError(f"tensor {name!r} holds NaN or infinity (read as {dtype}); the weights are unusable")
        return stacked

    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    index_of: Any = sharding.addressable_devices_indices_map(shape)
    holders: dict[str, list[Any]] = {}
    for device, index in index_of.items():
        holders.setdefault(repr(index), []).append(device)
    parts = []
    for devices in holders.values():
        part = read(index_of[devices[0]])
        parts += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _compare_processes(path: pathlib.Path, config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuses checkpoints that differ between processes, by their configuration and the ends of every tensor."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(repr(config).encode())
    for name, tensor in sorted(tensors.items()):
        ends = [tensor.read(rows).tobytes() for rows in (slice(0, 1), slice(tensor.shape[0] - 1, None))]
        digest.update(repr((name, tensor.shape, tensor.dtype, ends)).encode())
    found = multihost_utils.process_allgather(np.frombuffer(digest.digest()[:8], np.uint32))
    others = np.flatnonzero((found != found[0]).any(-1))
    if others.size:
        raise ValueError(
            f"{path}: process {others[0]} has another checkpoint there than process 0, by their checksums; give all "
            "hosts the same files"
        )
