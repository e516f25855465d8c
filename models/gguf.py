"""Checkpoints of llama.cpp: a GGUF file holds configuration, tokenizer and weights, mostly quantised."""

import functools
import pathlib
from typing import Any, NamedTuple

import gguf
import numpy as np

from restkv_jax.models.config import ModelConfig, read_config
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.gguf_metadata import config_fields, make_tokenizer
from restkv_jax.models.stored import StoredCheckpoint, StoredTensor
from restkv_jax.models.tensors import checkpoint_tensors

ROPE_DIVISORS = "rope_freqs.weight"
DAMAGED = (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError)
"""What reading a file with impossible lengths, types or offsets raises."""


class _Block(NamedTuple):
    """Where a tensor lies in its file: `stored_shape` and `stored_dtype` are those of the quantised blocks."""

    path: pathlib.Path
    offset: int
    stored_shape: tuple[int, ...]
    stored_dtype: np.dtype
    shape: tuple[int, ...]
    quantisation: gguf.GGMLQuantizationType


def read_gguf(path: pathlib.Path) -> StoredCheckpoint:
    """Opens a GGUF file; its weights are dequantised when they are read.

    Raises:
      ValueError: not a GGUF file, or a damaged one; an architecture, an option or a quantisation that is not
        supported; no tokenizer.
    """
    fields, blocks = _open(path)
    try:
        _check_quantisations(blocks)
        divisors = _read_rows(blocks.pop(ROPE_DIVISORS), None, slice(None)) if ROPE_DIVISORS in blocks else None
        config = read_config(config_fields(fields, {name: block.shape for name, block in blocks.items()}, divisors))
        tensors = _tensors(fields["general.architecture"], config, blocks)
        return StoredCheckpoint(config, tensors, make_tokenizer(fields))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def gguf_within(directory: pathlib.Path) -> pathlib.Path | None:
    """The GGUF file of a directory that has no configuration of its own, or None.

    Raises:
      ValueError: there are several.
    """
    files = sorted(directory.glob("*.gguf"))
    if (directory / "config.json").exists() or not files:
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{directory} holds several GGUF files ({names}); give the path of one of them")
    return files[0]


class _BoundedReader(gguf.GGUFReader):
    """A reader to which lengths and offsets beyond the file are errors, not empty arrays."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends early")
        return super()._get(offset, dtype, count, override_order)


def _open(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, _Block]]:
    """The fields of the header and where each tensor lies."""
    with path.open("rb") as file:
        magic = file.read(8)
    if magic == b"version ":
        raise ValueError(f"{path} is a pointer of git-lfs, not the file itself; fetch it with `git lfs pull`")
    if not magic.startswith(b"GGUF"):
        raise ValueError(f"{path} is not a GGUF file: it begins with {magic[:4]!r}, not with b'GGUF'")
    try:
        with np.errstate(over="ignore"):
            reader = _BoundedReader(path)
        _check_offsets(reader)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return fields, {tensor.name: _block(path, tensor) for tensor in reader.tensors}
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged ({error}); download or convert it again") from error


def _check_offsets(reader: gguf.GGUFReader) -> None:
    end = reader.data_offset
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
        if tensor.data_offset < end:
            raise ValueError(f"tensor {tensor.name!r} overlaps what stands before it")
        end = tensor.data_offset + tensor.n_bytes


def _block(path: pathlib.Path, tensor: gguf.ReaderTensor) -> _Block:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return _Block(path, tensor.data_offset, tensor.data.shape, tensor.data.dtype, shape, tensor.tensor_type)


def _check_quantisations(blocks: dict[str, _Block]) -> None:
    for name, block in {block.quantisation: (name, block) for name, block in blocks.items()}.values():
        try:
            _read_rows(block, None, slice(0, 1))
        except NotImplementedError as error:
            raise ValueError(
                f"tensor {name!r} is quantised as {block.quantisation.name}, which the package `gguf` cannot "
                "dequantise; convert the model to another quantisation such as Q8_0"
            ) from error


def _tensors(architecture: str, config: ModelConfig, blocks: dict[str, _Block]) -> dict[str, StoredTensor]:
    """The tensors under their Hugging Face names; one that the model does not have keeps its own."""
    names = _hugging_face_names(architecture, config)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for name in blocks:
        block, name = blocks[name], names.get(name, name)
        projection = name.split(".")[-2] if "." in name else ""
        # llama.cpp reorders Llama's queries and keys, since it takes neighbours for rotary pairs there.
        permuted = architecture == "llama" and projection in heads
        order = _row_order(block.shape[0], heads[projection]) if permuted else None
        tensors[name] = StoredTensor(block.shape, "F32", functools.partial(_read_rows, block, order))
    return tensors


def _hugging_face_names(architecture: str, config: ModelConfig) -> dict[str, str]:
    """The Hugging Face name of each name in GGUF."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    splits = (name.rpartition(".") for name in checkpoint_tensors(Decoder(config)))
    return {f"{known.get_name(module)}.{suffix}": f"{module}.{suffix}" for module, _, suffix in splits}


def _row_order(rows: int, heads: int) -> np.ndarray:
    """Where each row of a query or key projection stands in GGUF: there the halves of a head alternate."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)


def _read_rows(block: _Block, order: np.ndarray | None, rows: slice) -> np.ndarray:
    # A map of its own for each read: closing it gives back the memory that its pages were mapped to.
    stored = np.memmap(block.path, block.stored_dtype, "r", block.offset, block.stored_shape)
    if stored.ndim > 1:
        return gguf.dequantize(stored[rows if order is None else order[rows]], block.quantisation)
    whole = gguf.dequantize(stored, block.quantisation)
    return whole[rows if order is None else order[rows]]
