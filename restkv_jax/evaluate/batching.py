"""Prompts of different lengths as one batch."""

from collections.abc import Sequence

from jax import Array

from restkv_jax.generation.encoding import pad_left
from restkv_jax.generation.reading import bucket_length


def even_size(count: int, most: int) -> int:
    """The size of batches that divide `count` prompts evenly, at most `most` in each: as few batches as can be."""
    return -(-count // -(-count // most))


def pad_batch(rows: Sequence[Sequence[int]], batch_size: int, length: int | None = None) -> tuple[Array, Array]:
    """Rows filled up with the first one, so that one program serves all batches, and padded on the left.

    Args:
      rows: token ids of at most `batch_size` prompts.
      batch_size: `B`.
      length: `T`; the bucket of the longest row by default.

    Returns:
      token ids int32 [B, T] and their mask bool [B, T].
    """
    length = bucket_length(max(map(len, rows))) if length is None else length
    return pad_left([*rows, *[rows[0]] * (batch_size - len(rows))], length)
