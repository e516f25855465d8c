"""What a checkpoint in any format gives: a configuration, tensors that are still in their files, a tokenizer."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from restkv_jax.models.config import ModelConfig

CHUNK = 2**22
"""Elements that are read at once: with copies in float32, some 50 MB of the host's memory."""


class StoredTensor(NamedTuple):
    """A tensor in a file: its shape, its dtype as the format names it, and what reads some of its rows.

    `read` takes a slice of the first axis and returns an array of floats with those rows.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[slice], np.ndarray]

    def rows(self, start: int, size: int) -> "StoredTensor":
        """`size` rows from `start` on, as a tensor."""

        def read(rows: slice) -> np.ndarray:
            first, stop, _ = rows.indices(size)
            return self.read(slice(start + first, start + stop))

        return StoredTensor((size, *self.shape[1:]), self.dtype, read)


class StoredCheckpoint(NamedTuple):
    """A checkpoint of which no weights have been read, its tensors under their Hugging Face names."""

    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    tokenizer: Any | None


def row_slices(shape: tuple[int, ...]) -> Iterator[slice]:
    """The rows of a tensor, a few at a time."""
    step = max(1, CHUNK // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def read_into(place: np.ndarray, tensor: StoredTensor) -> Iterator[np.ndarray]:
    """Reads a tensor into an array of its shape, a few rows at a time; yields the rows that were filled."""
    for rows in row_slices(tensor.shape):
        with np.errstate(over="ignore", invalid="ignore"):
            place[rows] = tensor.read(rows)
        yield place[rows]


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that JAX takes over on the CPU without copying it: such must begin at a multiple of 64 bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)
