"""Needles in a haystack and chains of assignments: sentences hidden between other ones."""

import dataclasses
import random
import string
from collections.abc import Callable, Sequence
from typing import Literal

from restkv_jax.evaluate.tasks.essays import essay_sentences
from restkv_jax.evaluate.tasks.prompts import Draft, Question
from restkv_jax.evaluate.tasks.vocabulary import adjectives, nouns

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic numbers for {key} is: {value}."
ONE_HEADER = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards."
)
MANY_HEADER = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards."
)
ONE_ASKED = Question(
    "What is the special magic number for {keys} mentioned in the provided text?",
    " The special magic number for {keys} mentioned in the provided text is",
)
MANY_ASKED = Question(
    "What are all the special magic numbers for {keys} mentioned in the provided text?",
    " The special magic numbers for {keys} mentioned in the provided text are",
)
TRACKING_HEADER = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
TRACKING_ASKED = Question(
    "Question: Find all variables that are assigned the value {value} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned "
    "the value {value}, they are:",
)
ONE_QUESTION, MANY_QUESTION, TRACKING_QUESTION = ONE_ASKED.text, MANY_ASKED.text, TRACKING_ASKED.text
ASSIGNMENT = "VAR {name} = {value}"
MIN_NEEDLE_TOKENS = 12
"""No tokenizer at hand writes a needle in fewer; the prompts are cut to size afterwards."""
TEMPLATES = (
    NOISE,
    NEEDLE,
    ONE_HEADER,
    MANY_HEADER,
    ONE_QUESTION,
    MANY_QUESTION,
    TRACKING_HEADER,
    TRACKING_QUESTION,
    ASSIGNMENT,
    "VAR = VAR, and, and",
)


@dataclasses.dataclass(frozen=True)
class Needles:
    """Numbers hidden under keys, some of which are asked for.

    Attributes:
      num_keys: keys, each with a needle per value.
      num_values: values of each key.
      num_asked: keys asked for.
      haystack: what the rest of the text is, "noise", further "needles", or running text from "essays", which begins at
        a random sentence (RULER's always with the first).
      depth: where the asked needle stands among the sentences, 0 at their beginning to 1 at their end; None anywhere.
        Only where one needle is asked for.
    """

    num_keys: int = 1
    num_values: int = 1
    num_asked: int = 1
    haystack: Literal["noise", "needles", "essays"] = "noise"
    depth: float | None = None

    def __post_init__(self):
        if self.depth is None:
            return
        if not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth} must be between 0, the beginning, and 1, the end")
        if not self.asks_one:
            asked = self.num_asked * self.num_values
            raise ValueError(f"depth={self.depth} places one needle, but {asked} are asked for; leave it out")

    @property
    def asks_one(self) -> bool:
        """Whether the answer is one needle's value."""
        return self.num_asked * self.num_values == 1

    def draft(self, rng: random.Random, count: Callable[[str], int], num_tokens: int) -> Draft:
        """Draws needles and question, and what to hide them in."""
        keys = _distinct(_key, self.num_keys, rng)
        values = _distinct(_number, self.num_keys * self.num_values, rng)
        pairs = [(key, value) for i, key in enumerate(keys) for value in values[i :: self.num_keys]]
        rng.shuffle(pairs)
        asked = rng.sample(keys, self.num_asked)
        answers = tuple(value for key in asked for k, value in pairs if k == key)
        header, question = (ONE_HEADER, ONE_ASKED) if self.asks_one else (MANY_HEADER, MANY_ASKED)
        question = question.format(keys=join_keys(asked))
        sentences = [NEEDLE.format(key=key, value=value) for key, value in pairs]
        room = num_tokens - count(_join(header, sentences, question.text))
        if self.haystack == "noise":
            fillers = _noise(room, count)
        elif self.haystack == "needles":
            fillers = _other_needles(room, keys, values, rng)
        else:
            fillers = _sentences_of_essays(room, count, rng)
        pinned, depth = "", self.depth
        if depth is not None:
            pinned = sentences.pop(next(i for i, (key, _) in enumerate(pairs) if key in asked))

        def text(n: int, rng: random.Random) -> str:
            lines = _mix(sentences, fillers[:n], rng)
            if depth is not None:
                lines.insert(round(depth * len(lines)), pinned)
            return _join(header, [" ".join(lines)] if self.haystack == "essays" else lines, question.text)

        return Draft(text, 0, len(fillers), answers, question)


@dataclasses.dataclass(frozen=True)
class Chain:
    """Variables assigned to one another, `num_hops` times, hidden in noise; all that hold the value are asked for."""

    num_hops: int

    def draft(self, rng: random.Random, count: Callable[[str], int], num_tokens: int) -> Draft:
        """Draws the chain and its question."""
        names = _distinct(_name, self.num_hops + 1, rng)
        value = str(rng.randrange(10_000, 100_000))
        sources = [value, *(f"VAR {name}" for name in names)]
        sentences = [ASSIGNMENT.format(name=name, value=source) for name, source in zip(names, sources, strict=False)]
        question = TRACKING_ASKED.format(value=value, count=len(names))
        fillers = _noise(num_tokens - count(_join(TRACKING_HEADER, sentences, question.text)), count)

        def text(n: int, rng: random.Random) -> str:
            return _join(TRACKING_HEADER, _mix(sentences, fillers[:n], rng), question.text)

        return Draft(text, 0, len(fillers), tuple(names), question)


def join_keys(keys: Sequence[str]) -> str:
    """`a`, `a and b`... as RULER writes them: commas, and `, and` before the last."""
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]


def _join(header: str, lines: Sequence[str], question: str) -> str:
    return "\n".join([header, *lines, question])


def _mix(sentences: list[str], fillers: list[str], rng: random.Random) -> list[str]:
    """Puts the sentences between the fillers at random places, keeping the order of both."""
    total = len(sentences) + len(fillers)
    places = set(rng.sample(range(total), len(sentences)))
    ours, others = iter(sentences), iter(fillers)
    return [next(ours) if i in places else next(others) for i in range(total)]


def _noise(room: int, count: Callable[[str], int]) -> list[str]:
    """Lines of noise that fill `room` tokens."""
    return [NOISE] * (room // max(1, count(NOISE + "\n" + NOISE) - count(NOISE)))


def _sentences_of_essays(room: int, count: Callable[[str], int], rng: random.Random) -> list[str]:
    """Neighbouring sentences that fill `room` tokens and more; after the last essay comes the first again."""
    sentences = essay_sentences()
    start, number = rng.randrange(len(sentences)), max(1, room // 16)
    while True:
        found = [sentences[(start + i) % len(sentences)] for i in range(number)]
        if count(" ".join(found)) >= room:
            return found
        number *= 2


def _other_needles(room: int, keys: Sequence[str], values: Sequence[str], rng: random.Random) -> list[str]:
    """Needles that fill `room` tokens and more, with keys and values that no other has."""
    used_keys, used_values, found = set(keys), set(values), []
    while len(found) < room // MIN_NEEDLE_TOKENS:
        key, value = _key(rng), _number(rng)
        if key not in used_keys and value not in used_values:
            used_keys.add(key)
            used_values.add(value)
            found.append(NEEDLE.format(key=key, value=value))
    return found


def _distinct(draw: Callable[[random.Random], str], count: int, rng: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(rng)] = None
    return list(found)


def _key(rng: random.Random) -> str:
    return f"{rng.choice(adjectives())}-{rng.choice(nouns())}"


def _number(rng: random.Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _name(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=5))
