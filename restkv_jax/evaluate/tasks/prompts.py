"""What a prompt is, and how one is made as long as it may be."""

import dataclasses
import math
import random
from collections.abc import Callable
from typing import NamedTuple, Protocol


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt and every string its answer must hold, in the order of the text or the most frequent first.

    Attributes:
      text: all of it.
      answers: the strings.
      reply: the answer as the prompt's format writes it, where that is not the strings with commas between them.
      question: what the text asks, at its end before the `answer_prefix`; what is before it is the document.
      answer_prefix: the beginning of the answer, with which the text ends; in a chat the assistant's turn begins so.
      history: for a chat the turns before the text, role and content each; None where the text stands alone.
    """

    text: str
    answers: tuple[str, ...]
    reply: str = ""
    question: str = ""
    answer_prefix: str = ""
    history: tuple[tuple[str, str], ...] | None = None

    @property
    def document(self) -> str:
        """The text before the question."""
        return self.text.removesuffix(self.answer_prefix).removesuffix(self.question)

    @property
    def continuation(self) -> str:
        """The right answer as it would follow the prompt."""
        return " " + (self.reply or ", ".join(self.answers))


class Draft(NamedTuple):
    """A prompt whose length is still open.

    `text(n, rng)` writes it with `n` of its parts, `least` to `most`; more parts never take fewer tokens. The rest is
    the `Prompt`'s.
    """

    text: Callable[[int, random.Random], str]
    least: int
    most: int
    answers: tuple[str, ...]
    question: "Question"
    reply: str = ""

    def prompt(self, size: int, rng: random.Random) -> Prompt:
        """The prompt with so many parts."""
        return Prompt(self.text(size, rng), self.answers, self.reply, *self.question)


class Question(NamedTuple):
    """What a prompt asks, and the beginning of the answer that it gives (RULER's answer prefix)."""

    asked: str
    answer_prefix: str

    @property
    def text(self) -> str:
        """Both, as the prompt ends."""
        return self.asked + self.answer_prefix

    def format(self, **values: object) -> "Question":
        """With its fields filled in."""
        return Question(*(part.format(**values) for part in self))


class Task(Protocol):
    """One kind of prompt: a frozen dataclass that draws prompts of its kind."""

    def draft(self, rng: random.Random, count: Callable[[str], int], num_tokens: int) -> Draft:
        """Draws a prompt to be written in at most `num_tokens` tokens, as `count` counts them."""
        ...


def largest_fitting(count: Callable[[int], int], least: int, most: int, room: int, guess: int) -> int | None:
    """The largest `n` from `least` to `most` with `count(n) <= room`, where `count` never falls; None if there is none.

    Every count costs a tokenisation, so the next `n` to try follows from the mean tokens per part so far: a good guess
    needs three.
    """
    base = count(least)
    if base > room:
        return None
    low, high, n = least, most + 1, guess
    while high - low > 1:
        n = min(max(n, low + 1), high - 1)
        tokens = count(n)
        low, high = (n, high) if tokens <= room else (low, n)
        per_part = max((tokens - base) / (n - least), 1e-3)
        n += math.floor((room - tokens) / per_part)
    return low
