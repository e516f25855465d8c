"""The tasks of a sweep in words, for readers who have not seen a prompt."""

from typing import NamedTuple

from restkv_jax.evaluate.tasks.needles import (
    ASSIGNMENT,
    MANY_QUESTION,
    NEEDLE,
    NOISE,
    ONE_QUESTION,
    TRACKING_QUESTION,
    join_keys,
)
from restkv_jax.evaluate.tasks.texts import DIVERGENCE
from restkv_jax.evaluate.tasks.words import COMMON_WORDS, FREQUENT_WORDS

KEYS = ("quick-fox", "calm-river", "brave-lamp", "sour-violin")
VALUES = ("4821937", "1302856", "7745190", "2968314")


class Description(NamedTuple):
    """What a task asks for, in one sentence, and the form of its prompts; None if that is not known."""

    sentence: str
    example: str | None


def describe(task: str) -> Description:
    """A task of a grid in words: of `TASKS`, or a file of prompts."""
    if task.endswith(".jsonl"):
        return Description(f"Prompts and answers read from the file {task}.", None)
    return DESCRIPTIONS.get(task, Description(f"Prompts of the task {task} of restkv_jax.evaluate.TASKS.", None))


def _needles(*pairs: tuple[str, str], question: str) -> str:
    """Needles with other text around them, then the question."""
    hidden = " … ".join(NEEDLE.format(key=key, value=value) for key, value in pairs)
    return f"… {hidden} … {question}"


def _tracking() -> str:
    names = ("QWERT", "ZUIOP", "ASDFG")
    sources = (VALUES[0][:5], *(f"VAR {name}" for name in names))
    hidden = " … ".join(ASSIGNMENT.format(name=n, value=s) for n, s in zip(names, sources, strict=False))
    return f"… {hidden} … {TRACKING_QUESTION.format(value=sources[0], count=len(names))}"


_one = ONE_QUESTION.format(keys=KEYS[0])
_first = (KEYS[0], VALUES[0])

DESCRIPTIONS = {
    "single": Description(
        f"One sentence with a number is hidden in a text that repeats “{NOISE}”; the number is asked for.",
        _needles(_first, question=_one),
    ),
    "multikey": Description(
        "Eight such sentences are hidden, each with its own name; the number of one of them is asked for.",
        _needles((KEYS[1], VALUES[1]), _first, (KEYS[2], VALUES[2]), question=_one),
    ),
    "haystack": Description(
        "The whole text consists of such sentences, each with its own name; the number of one of them is asked for.",
        _needles((KEYS[1], VALUES[1]), _first, (KEYS[2], VALUES[2]), question=_one),
    ),
    "essays": Description(
        "One sentence with a number is hidden in essays; the number is asked for.", _needles(_first, question=_one)
    ),
    "essays_multikey": Description(
        "Four such sentences are hidden in essays, each with its own name; the number of one of them is asked for.",
        _needles((KEYS[1], VALUES[1]), _first, (KEYS[2], VALUES[2]), question=_one),
    ),
    "multivalue": Description(
        "Four numbers are hidden under one name; all four are asked for.",
        _needles(*((KEYS[0], value) for value in VALUES), question=MANY_QUESTION.format(keys=KEYS[0])),
    ),
    "multiquery": Description(
        "Four numbers are hidden under four names; all four are asked for.",
        _needles(*zip(KEYS, VALUES, strict=True), question=MANY_QUESTION.format(keys=join_keys(KEYS))),
    ),
    "tracking": Description(
        "A chain of variables is hidden, each set to the one before it; all that hold the first one's value are asked "
        "for.",
        _tracking(),
    ),
    "common_words": Description(
        "A numbered list of words, ten of which come up more often than the others; these are asked for.",
        COMMON_WORDS.format(words="1. lamp 2. river 3. lamp 4. window …", count=10),
    ),
    DIVERGENCE: Description(
        "Running text without a question: a prefix is compressed, and the 64 tokens that follow it are read.", None
    ),
    "frequent_words": Description(
        "A text of made-up words; the three most frequent ones are asked for.",
        FREQUENT_WORDS.format(words="qzwerk … tolmar … qzwerk …"),
    ),
}
"""By the name in `TASKS`."""
