"""The task without answers: pieces of running text, each a prefix and the tokens that follow it."""

import functools
import pathlib
import random
from typing import Any, NamedTuple

from restkv_jax.evaluate.tasks.essays import read_essays
from restkv_jax.generation.encoding import encode_text

DIVERGENCE = "divergence"
"""The task's name."""
NUM_FOLLOWING = 64
"""Tokens after a prefix, over which the mean is taken."""


class Piece(NamedTuple):
    """Token ids of a prefix, which is compressed, and of what follows it."""

    prefix: list[int]
    following: list[int]


def read_text(path: str | None) -> str:
    """A file's text, or the essays.

    Raises:
      OSError: essays that cannot be fetched.
      ValueError: a file that cannot be read.
    """
    if path is None:
        return read_essays()
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"text {path!r} cannot be read ({error}); give a file of text in UTF-8") from error


def cut_pieces(tokenizer: Any, text: str, length: int, count: int, seed: int) -> list[Piece]:
    """Pieces of a text with prefixes of `length` tokens, none of whose following tokens overlap, at random places.

    A prefix begins with the tokens that the tokenizer puts before every text.

    Raises:
      ValueError: a text that has too few tokens for so many pieces, or a length without room for tokens of it.
    """
    ids, opening = _encode(tokenizer, text), encode_text(tokenizer, "")
    own = length - len(opening)
    if own < 1:
        raise ValueError(f"length {length} leaves no tokens of the text; raise it")
    places = range(0, len(ids) - own - NUM_FOLLOWING + 1, NUM_FOLLOWING)
    if len(places) < count:
        raise ValueError(
            f"task {DIVERGENCE!r}: the text has {len(ids):,} tokens, enough for {len(places)} pieces of {length:,} and "
            f"{NUM_FOLLOWING} tokens, but prompts={count}; give a longer --text, or lower prompts or lengths"
        )
    starts = sorted(random.Random(seed).sample(places, count))
    ends = [start + own for start in starts]
    return [
        Piece([*opening, *ids[start:end]], ids[end : end + NUM_FOLLOWING])
        for start, end in zip(starts, ends, strict=True)
    ]


@functools.lru_cache(maxsize=1)
def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
