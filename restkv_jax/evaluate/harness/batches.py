"""Requests of the harness in batches of few shapes, so that few programs are compiled for them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from restkv_jax.generation.reading import bucket_length


class Scored(NamedTuple):
    """A continuation to score: its place among the requests, both texts, and token ids of context and continuation."""

    index: int
    texts: tuple[str, str] | None
    context: list[int]
    continuation: list[int]


class Prompted(NamedTuple):
    """A prompt to go on from: its place among the requests, its text and options, token ids, the most new tokens."""

    index: int
    arguments: tuple[str, dict]
    tokens: list[int]
    options: dict[str, Any]
    max_new_tokens: int


class Batch(NamedTuple):
    """Requests of one program, and the rows that it takes."""

    items: Sequence[Any]
    size: int


def make_batches(
    items: Sequence[Any],
    also: Callable[[Any], tuple],
    tokens_of: Callable[[Any], list[int]],
    size_for: Callable[[int], int],
) -> Iterator[Batch]:
    """Batches of one bucket and one `also`, the longest first; those of a group are filled to one size.

    Args:
      items: requests, with their place in `index`.
      also: what else those of a batch have in common.
      tokens_of: the tokens of an item that are read.
      size_for: most prompts of a batch, for texts of so many tokens.
    """
    groups: dict[tuple, list[Any]] = {}
    for item in sorted(items, key=lambda item: (-len(tokens_of(item)), item.index)):
        groups.setdefault((bucket_length(len(tokens_of(item))), *also(item)), []).append(item)
    for (length, *_), group in groups.items():
        most = size_for(length)
        size = min(_power(len(group)), most)
        yield from (Batch(group[start : start + most], size) for start in range(0, len(group), most))


def filled(batch: Sequence[Any], size: int) -> list[Any]:
    """Repeats the first row up to a size."""
    return [*batch, *[batch[0]] * (size - len(batch))]


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def padded_length(item: Scored) -> int:
    """The padded length of a continuation: 1, 4, 16, 64, ..., so that few programs serve many short ones."""
    return 1 << -(-(len(item.continuation) - 1).bit_length() // 2) * 2
