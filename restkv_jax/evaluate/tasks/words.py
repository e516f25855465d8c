"""Lists of words whose most frequent ones are asked."""

import dataclasses
import math
import random
import string
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import scipy.special

from restkv_jax.evaluate.tasks.prompts import Draft, Question
from restkv_jax.evaluate.tasks.vocabulary import plain_words

COMMON_ASKED = Question(
    "Question: What are the {count} most common words in the above list?",
    " Answer: The top {count} words that appear most often in the list are:",
)
COMMON_WORDS = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{words}\n" + COMMON_ASKED.text
)
FREQUENT_ASKED = Question(
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
FREQUENT_WORDS = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {words}\n" + FREQUENT_ASKED.text
)
DOTS = "..."
NUM_FREQUENT = 3
NUM_LETTERS = 6
TOKENS_PER_CODED_WORD = 50
EXAMPLE_TOKENS = 1024
"""Prompts of this size and more begin with a solved example."""
LONG_TOKENS = 4096
"""Prompts of this size and more repeat words more often."""


class Repeats(NamedTuple):
    """How often each common and each other word of a list appears."""

    common: int
    other: int


@dataclasses.dataclass(frozen=True)
class CommonWords:
    """A numbered list in which `num_common` words appear more often than the others; these are asked (RULER's cwe).

    As in RULER, common and other words appear 30 and 3 times from 4,096 tokens, 6 times and once below; a solved
    example goes before the list, here from 1,024 tokens where there is room for it. Its words are not in the list.
    Where all `plain_words` are in the list, it stays shorter than asked: beyond some 100,000 tokens.
    """

    num_common: int = 10

    def draft(self, rng: random.Random, count: Callable[[str], int], num_tokens: int) -> Draft:
        """Draws the words and their order; the parts are the words that are not common."""
        is_long = num_tokens >= LONG_TOKENS
        repeats = Repeats(30, 3) if is_long else Repeats(6, 1)
        example_others = self.num_common * (3 if is_long else 1)
        most = num_tokens // (2 * repeats.other)  # a word and its number are two tokens at least
        total = min(self.num_common + example_others + self.num_common + most, len(plain_words()))
        words = rng.sample(plain_words(), total)
        example_words, words = words[: self.num_common + example_others], words[self.num_common + example_others :]
        common = words[: self.num_common]
        order = _shuffled(len(words), self.num_common, repeats, rng)

        def listed(n: int) -> str:
            return self._ask(words[i] for i in order if i < self.num_common + n)

        example = self._example(example_words, Repeats(10, 3) if is_long else Repeats(3, 1), rng)
        if num_tokens < EXAMPLE_TOKENS or count(example + listed(1)) > num_tokens:
            example = ""
        most, question = len(words) - self.num_common, COMMON_ASKED.format(count=self.num_common)
        return Draft(lambda n, _: example + listed(n), 1, most, tuple(common), question, _numbered(common))

    def _example(self, words: Sequence[str], repeats: Repeats, rng: random.Random) -> str:
        order = _shuffled(len(words), self.num_common, repeats, rng)
        return self._ask(words[i] for i in order) + " " + _numbered(words[: self.num_common]) + "\n"

    def _ask(self, words: Iterable[str]) -> str:
        return COMMON_WORDS.format(words=_numbered(words), count=self.num_common)


@dataclasses.dataclass(frozen=True)
class FrequentWords:
    """Coded words of six letters, the `k`-th in a share of `k^-alpha / zeta(alpha)`; three are asked (RULER's fwe).

    The first in rank are dots, which the question says to ignore. There is a word per 50 tokens of the prompt.
    """

    alpha: float = 2.0

    def __post_init__(self):
        if not self.alpha > 1:
            raise ValueError(f"alpha={self.alpha} must exceed 1, or the shares of the words have no sum")

    def draft(self, rng: random.Random, count: Callable[[str], int], num_tokens: int) -> Draft:
        """Draws the words and their order; a part is a place in the text, divided among the words by their shares."""
        ranks = max(num_tokens // TOKENS_PER_CODED_WORD, NUM_FREQUENT + 2)
        coded: dict[str, None] = {}
        while len(coded) < ranks - 1:
            coded["".join(rng.choices(string.ascii_lowercase, k=NUM_LETTERS))] = None
        words = [DOTS, *coded]
        total = float(scipy.special.zeta(self.alpha))
        shares = [rank**-self.alpha / total for rank in range(1, ranks + 1)]
        # The third asked is then ahead of the fourth by one appearance at least.
        least = math.ceil(1 / (shares[NUM_FREQUENT] - shares[NUM_FREQUENT + 1]))
        most = max(least, num_tokens + num_tokens // 4)
        order = [(i, j) for i, share in enumerate(shares) for j in range(int(most * share))]
        rng.shuffle(order)

        def text(n: int, _: random.Random) -> str:
            counts = [int(n * share) for share in shares]
            return FREQUENT_WORDS.format(words=" ".join(words[i] for i, j in order if j < counts[i]))

        return Draft(text, least, most, tuple(words[1 : NUM_FREQUENT + 1]), FREQUENT_ASKED)


def _shuffled(num_words: int, num_common: int, repeats: Repeats, rng: random.Random) -> list[int]:
    """Indices of words in a random order, those of the first `num_common` and of the others as often as they repeat."""
    order = [*range(num_common)] * repeats.common + [*range(num_common, num_words)] * repeats.other
    rng.shuffle(order)
    return order


def _numbered(words: Iterable[str]) -> str:
    """`1. one 2. two`."""
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
