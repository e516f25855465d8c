"""Needle prompts in the text format of RULER's tasks (Hsieh et al. 2024), sized in tokens of any tokenizer."""

import dataclasses
import functools
import random
import string
from collections.abc import Callable, Sequence
from typing import Any

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
ONE_QUESTION = (
    "What is the special magic number for {keys} mentioned in the provided text? "
    "The special magic number for {keys} mentioned in the provided text is"
)
MANY_QUESTION = (
    "What are all the special magic numbers for {keys} mentioned in the provided text? "
    "The special magic numbers for {keys} mentioned in the provided text are"
)
TRACKING_HEADER = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
TRACKING_QUESTION = (
    "Question: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned "
    "the value {value}, they are:"
)
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
class Prompt:
    """A prompt and every string its answer must hold, in the order in which the text has them."""

    text: str
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """What one kind of prompt is made of.

    `num_keys` needles with `num_values` values each, `num_asked` keys asked. `haystack` is "noise" or "needles":
    then the rest of the text is further needles. `num_hops` > 0 makes a chain of assignments instead.
    """

    num_keys: int = 1
    num_values: int = 1
    num_asked: int = 1
    haystack: str = "noise"
    num_hops: int = 0


TASKS = {
    "single": Task(),
    "multikey": Task(num_keys=8),
    "haystack": Task(haystack="needles"),
    "multivalue": Task(num_values=4),
    "multiquery": Task(num_keys=4, num_asked=4),
    "tracking": Task(num_hops=4),
}
"""The tasks by name: RULER's niah_single, _multikey (8 keys, and all needles), _multivalue, _multiquery and vt."""


@functools.cache
def adjectives() -> tuple[str, ...]:
    """The adjectives of `wonderwords`."""
    return _words("adjectivelist.txt")


@functools.cache
def nouns() -> tuple[str, ...]:
    """The nouns of `wonderwords`."""
    return _words("nounlist.txt")


def make_prompts(task: Task | str, tokenizer: Any, num_tokens: int, num_prompts: int, seed: int) -> list[Prompt]:
    """Fresh prompts of at most `num_tokens` tokens, filled as far as whole sentences go.

    Args:
      task: a `Task` or a name in `TASKS`.
      tokenizer: called as `tokenizer(text)["input_ids"]`; its special tokens count.
      num_tokens: the size of each prompt.
      num_prompts: how many.
      seed: of Python's generator; equal seeds give equal prompts.

    Raises:
      ValueError: an unknown task, or `num_tokens` too small for the needles and the question.
    """
    if isinstance(task, str):
        if task not in TASKS:
            raise ValueError(f"task={task!r} is unknown; known: {', '.join(TASKS)}")
        task = TASKS[task]
    rng = random.Random(seed)
    return [_make_prompt(task, tokenizer, num_tokens, rng) for _ in range(num_prompts)]


def _make_prompt(task: Task, tokenizer: Any, num_tokens: int, rng: random.Random) -> Prompt:
    header, sentences, question, answers = (_tracking if task.num_hops else _needles)(task, rng)

    def join(texts: Sequence[str]) -> str:
        return "\n".join([header, *texts, question])

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    if count(join(sentences)) > num_tokens:
        raise ValueError(f"num_tokens={num_tokens} cannot hold the {len(sentences)} needles and the question")
    fill = functools.partial(_other_needle, set(answers), set(sentences)) if task.haystack == "needles" else _noise
    room = num_tokens - count(join(sentences))
    size = max(1, count("\n" + NOISE) - count("")) if task.haystack == "noise" else MIN_NEEDLE_TOKENS
    fillers = [fill(rng) for _ in range(room // size)]
    while fillers and count(join(sentences + fillers)) > num_tokens:
        fillers.pop()
    return Prompt(join(_insert(sentences, fillers, rng)), tuple(answers))


def _needles(task: Task, rng: random.Random):
    """Header, needle sentences, question and answers."""
    keys = _distinct(_key, task.num_keys, rng)
    values = _distinct(_number, task.num_keys * task.num_values, rng)
    pairs = [(key, value) for i, key in enumerate(keys) for value in values[i :: task.num_keys]]
    rng.shuffle(pairs)
    asked = rng.sample(keys, task.num_asked)
    answers = [value for key in asked for k, value in pairs if k == key]
    many = len(answers) > 1
    header, question = (MANY_HEADER, MANY_QUESTION) if many else (ONE_HEADER, ONE_QUESTION)
    sentences = [NEEDLE.format(key=key, value=value) for key, value in pairs]
    return header, sentences, question.format(keys=join_keys(asked)), answers


def _tracking(task: Task, rng: random.Random):
    """Header, assignments in order, question and the names of the variables."""
    names = _distinct(_name, task.num_hops + 1, rng)
    value = str(rng.randrange(10_000, 100_000))
    sources = [value, *(f"VAR {name}" for name in names)]
    sentences = [ASSIGNMENT.format(name=name, value=source) for name, source in zip(names, sources, strict=False)]
    return TRACKING_HEADER, sentences, TRACKING_QUESTION.format(value=value, count=len(names)), names


def _insert(sentences: list[str], fillers: list[str], rng: random.Random) -> list[str]:
    """Puts the sentences between the fillers at random places, keeping the order of both."""
    total = len(sentences) + len(fillers)
    places = sorted(rng.sample(range(total), len(sentences)))
    ours, others = iter(sentences), iter(fillers)
    return [next(ours) if i in places else next(others) for i in range(total)]


def join_keys(keys: Sequence[str]) -> str:
    """`a`, `a and b`... as RULER writes them: commas, and `, and` before the last."""
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]


def _noise(rng: random.Random) -> str:
    return NOISE


def _other_needle(values: set[str], sentences: set[str], rng: random.Random) -> str:
    """A needle whose value and key no other has; both sets grow by it."""
    while True:
        key, value = _key(rng), _number(rng)
        start = NEEDLE.split("{value}")[0].format(key=key)
        if value not in values and not any(sentence.startswith(start) for sentence in sentences):
            break
    sentence = NEEDLE.format(key=key, value=value)
    values.add(value)
    sentences.add(sentence)
    return sentence


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


def _words(file: str) -> tuple[str, ...]:
    try:
        from wonderwords.random_word import _get_words_from_text_file
    except ImportError as error:
        raise ImportError("prompts need the package `wonderwords`: install restkv-jax[eval]") from error
    return tuple(word for word in _get_words_from_text_file(file) if word)
