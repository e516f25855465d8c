"""Sequences of equal length from token arrays and text files, and the batch of each step."""

import dataclasses
import os
import pathlib
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np

from restkv_jax.models.arguments import check_integer
from restkv_jax.pod.adaptation.recipe import Adaptation
from restkv_jax.pod.adaptation.text import tokenize_files
from restkv_jax.pod.adaptation.training import Batch

LONGEST_DEFAULT = 2**15
ARRAYS = (".npy", ".npz")
SAMPLED_ROWS = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
    """Random access to sequences: tokens int [N, T], weights of their prediction float [N, T], None where all count.

    The arrays may be memory-mapped files.
    """

    tokens: np.ndarray
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens = np.asarray(self.tokens[index], np.int32)
        weights = np.ones(tokens.shape) if self.weights is None else self.weights[index]
        return {"tokens": tokens, "weights": np.asarray(weights, np.float32)}

    def sample(self) -> Iterator[dict[str, np.ndarray]]:
        """Up to `SAMPLED_ROWS` sequences, evenly spaced."""
        return (self[int(i)] for i in np.unique(np.linspace(0, len(self) - 1, SAMPLED_ROWS).astype(int)))

    def checksum(self) -> int:
        """CRC-32 of the shape and of the sample."""
        value = zlib.crc32(repr(self.tokens.shape).encode())
        for arrays in self.sample():
            for array in arrays.values():
                value = zlib.crc32(array.tobytes(), value)
        return value


def read_sequences(
    data: Any, length: int | None, longest: int, tokenizer: Any = None, directory: pathlib.Path | None = None
) -> Sequences:
    """Packs data into sequences: one after the other, without padding; what is left at the end is not used.

    Args:
      data: a path or several of text files, which `tokenize_files` describes; or the path of one array: `.npy`, mapped
        into memory, of ids [N] or of rows [N, T], or `.npz`, read whole, with `tokens` and `weights` of the same
        shape; or such an array, or a mapping of the two, itself.
      length: tokens per sequence; None is the rows' length, else the shorter of `longest` and `LONGEST_DEFAULT`.
      longest: the model's `context_length`.
      tokenizer: for text.
      directory: where ids of text are kept; a temporary one for None.

    Raises:
      FileNotFoundError: a path that does not exist.
      ValueError: a length below 2 or above `longest`, or above that of the data; data that is empty or of another kind.
    """
    tokens, weights, name = _read(data, tokenizer, directory)
    _check_arrays(tokens, weights, name)
    default = tokens.shape[1] if tokens.ndim == 2 else min(longest, LONGEST_DEFAULT)
    size = default if length is None else length
    check_integer("sequence_length", size, 2, "tokens")
    if size > longest:
        raise ValueError(f"sequence_length={size} exceeds the model's maximum of {longest} positions")
    if tokens.ndim == 2 and tokens.shape[1] != size:
        raise ValueError(f"{name} has rows of {tokens.shape[1]} tokens, but sequence_length={size}; leave it out")
    count = tokens.size // size
    if not count:
        raise ValueError(f"{name} has {tokens.size} tokens, fewer than sequence_length={size}; give more or shorten")

    def pack(array: np.ndarray) -> np.ndarray:
        return array.reshape(-1)[: count * size].reshape(count, size)  # a view, of mapped files too

    return Sequences(pack(tokens), None if weights is None else pack(weights))


def batches(sequences: Sequences, adaptation: Adaptation) -> grain.MapDataset:
    """The batch of every step by its index, a dict of [batch_size, T]: each pass is shuffled anew, from the seed."""
    return grain.MapDataset.source(sequences).seed(adaptation.seed).shuffle().repeat().batch(adaptation.batch_size)


def make_batch(arrays: Mapping[str, np.ndarray], accumulation: int, vocabulary: int) -> Batch:
    """Divides arrays [batch_size, T] into parts: a `Batch` of [A, b, T].

    Raises:
      ValueError: an id that is not in the vocabulary.
    """
    check_vocabulary(arrays["tokens"], vocabulary)
    length = arrays["tokens"].shape[1]
    return Batch(*(arrays[name].reshape(accumulation, -1, length) for name in Batch._fields))


def check_vocabulary(tokens: np.ndarray, vocabulary: int) -> None:
    """Refuses ids of another model.

    Raises:
      ValueError: an id that is not in the vocabulary.
    """
    outside = (tokens < 0) | (tokens >= vocabulary)
    if outside.any():
        raise ValueError(
            f"the data holds id {tokens[outside][0]}, out of the model's vocabulary of {vocabulary} tokens; was it "
            "made with another model's tokenizer?"
        )


def _read(data: Any, tokenizer: Any, directory: pathlib.Path | None) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Tokens, weights, and the name of the data for messages."""
    if isinstance(data, np.ndarray | jax.Array):
        return _on_host(data), None, "data"
    if isinstance(data, Mapping):
        return _members(data, "data")
    paths = [pathlib.Path(data)] if isinstance(data, (str, os.PathLike)) else [pathlib.Path(path) for path in data]
    if not paths:
        raise ValueError("data is empty; give text files or a token array")
    for path in paths:
        if not path.is_file():
            problem = "is a directory; give its files" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"data {str(path)!r} {problem}")
    if any(path.suffix in ARRAYS for path in paths):
        if len(paths) > 1:
            raise ValueError(f"data of {len(paths)} files with an array among them; give one array, or text files only")
        return _load_array(paths[0])
    if tokenizer is None:
        raise ValueError("data is text, but there is no tokenizer; give one, or a token array")
    name = f"data {', '.join(repr(str(path)) for path in paths[:3])}{', ...' if len(paths) > 3 else ''}"
    if directory is not None:
        return tokenize_files(paths, tokenizer, directory), None, name
    with tempfile.TemporaryDirectory() as temporary:
        return np.array(tokenize_files(paths, tokenizer, pathlib.Path(temporary))), None, name


def _load_array(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None, str]:
    name = f"data {str(path)!r}"
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {"tokens": loaded}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name} cannot be read as an array: {error}") from error
    return _members(arrays, name)


def _members(arrays: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray | None, str]:
    if "tokens" not in arrays or set(arrays) - {"tokens", "weights"}:
        raise ValueError(f"{name} holds {sorted(arrays)}; expected 'tokens' and, if you like, 'weights'")
    tokens, weights = arrays["tokens"], arrays.get("weights")
    return _on_host(tokens), None if weights is None else _on_host(weights), name


def _on_host(array: np.ndarray | jax.Array) -> np.ndarray:
    """An array of NumPy's, which may be mapped from a file."""
    return array if isinstance(array, np.ndarray) else np.asarray(array)


def _check_arrays(tokens: np.ndarray, weights: np.ndarray | None, name: str) -> None:
    if tokens.ndim not in (1, 2) or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{name} holds {tokens.dtype} of shape {tokens.shape}; give integer ids [N] or rows [N, T]")
    if not tokens.size:
        raise ValueError(f"{name} is empty; give data with some tokens")
    if tokens.ndim == 2 and tokens.shape[1] < 2:
        raise ValueError(f"{name} has rows of one token; at least two are needed, of which one predicts the other")
    if weights is None:
        return
    if weights.shape != tokens.shape:
        raise ValueError(f"{name} has weights of shape {weights.shape}, but tokens of shape {tokens.shape}")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ValueError(f"{name} has weights that are negative, not finite, or all zero")
