"""What a checkpoint in any format gives: a configuration, tensors that are still in their files, a tokenizer."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from restkv_jax.models.config import ModelConfig

CHUNK = 2**22
"""Elements that are read at once: with copies in float32, some 50 MB of the host's memory."""


Index = tuple[slice, ...]
"""A slice for each axis."""


class StoredTensor(NamedTuple):
    """A tensor in a file: its shape, its dtype as the format names it, and what reads some of its rows.

    `read` takes a slice of the first axis and returns an array of floats with those rows; `read_block`, where the
    format can leave out the rest of a row, takes a slice of each axis.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[slice], np.ndarray]
    read_block: Callable[[Index], np.ndarray] | None = None

    def block(self, index: Index) -> "StoredTensor":
        """A part of the tensor, as a tensor."""
        outer = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        shape = tuple(stop - start for start, stop in outer)
        if shape == self.shape:
            return self

        def read_block(index: Index) -> np.ndarray:
            inner = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
            rows, *others = (slice(o[0] + i[0], o[0] + i[1]) for o, i in zip(outer, inner, strict=True))
            return self.read(rows)[:, *others] if self.read_block is None else self.read_block((rows, *others))

        whole = tuple(slice(None) for _ in shape[1:])
        return StoredTensor(shape, self.dtype, lambda rows: read_block((rows, *whole)), read_block)

    def rows(self, start: int, size: int) -> "StoredTensor":
        """`size` rows from `start` on, as a tensor."""

        return self.block((slice(start, start + size), *(slice(None) for _ in self.shape[1:])))


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
