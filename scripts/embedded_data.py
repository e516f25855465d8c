"""Training sequences for the embedded model: periodic repeats, pairs, and needle texts with many keys asked."""

import dataclasses
import functools
import itertools
import string
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from restkv_jax.evaluate import tasks

NEEDLE_TOKENS = 16
"""The usual tokens of a needle."""
LISTED, HOPS = 4, 4
"""How many numbers are asked at once, and the hops of a chain."""


class Batch(NamedTuple):
    """`tokens`, `positions` int32 and `log_copies` float32 [B, T]; of the N supervised tokens of each row the index of
    the token before and the number of the answer it belongs to (-1 where there is none), int32 [B, N], and the tokens
    that are right there, first the one that follows, int32 [B, N, HOPS + 1] (-1 where there are fewer); and the
    format of each row by its number in the stage, int32 [B].
    """

    tokens: np.ndarray
    positions: np.ndarray
    log_copies: np.ndarray
    index: np.ndarray
    answer: np.ndarray
    target: np.ndarray
    form: np.ndarray


@dataclasses.dataclass(frozen=True)
class Stage:
    """One kind of training sequence.

    `kind` is "periodic", "pairs" or "text". `pool` bounds the distinct tokens of the first two, `key_size` and
    `value_size` the tokens of a pair. A text has up to `max_needles` needles and as many tokens as fit `length`, spread
    over up to `span` positions; `formats` weighs what is asked.
    """

    name: str
    kind: str
    batch: int
    length: int
    targets: int
    pool: int = 128
    num_pairs: int = 8
    key_size: int = 1
    value_size: int = 1
    separators: bool = False
    max_needles: int = 8
    noise: float = 0.0
    span: int = 0
    formats: tuple[tuple[str, float], ...] = ()


class Segment(NamedTuple):
    """Tokens that stay together, the spans (start, stop) of answers in them, how many copies they stand for, and what
    would be as right as the token at a place."""

    tokens: list[int]
    answers: Sequence[tuple[int, int]] = ()
    copies: int = 1
    others: Mapping[int, Sequence[int]] = {}


class Vocabulary:
    """Token ids of the pieces that sequences are put together from."""

    def __init__(self, tokenizer):
        self.encode = functools.lru_cache(None)(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = tokenizer.convert_tokens_to_ids
        self.bos, self.eos, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        groups = ["".join(digits) for n in (1, 2, 3) for digits in itertools.product(string.digits, repeat=n)]
        self.inner = {group: ids(group) for group in groups}
        self.first = {group: ids("Ġ" + group) for group in groups}
        self.adjectives = [self.encode(" " + word) for word in tasks.adjectives()]
        self.nouns = [self.encode("-" + word) for word in tasks.nouns()]
        self.answers = np.arange(max(ids("AA"), *self.first.values(), *self.inner.values(), ids("ZZ")) + 27)
        self.words = np.array([piece[0] for piece in self.adjectives + self.nouns if len(piece) == 1])
        self.separators = self.encode(" is: for.\n")

    def number(self, value: str) -> list[int]:
        """The tokens of " " and a number."""
        return [self.first[value[:3]]] + [self.inner[value[i : i + 3]] for i in range(3, len(value), 3)]


def make_batch(stage: Stage, vocabulary: Vocabulary, rng: np.random.Generator) -> Batch:
    """Draws a batch of `stage.batch` sequences."""
    make = {"periodic": _periodic, "pairs": _pairs, "text": _text}[stage.kind]
    forms = np.zeros(stage.batch, np.int32)
    if stage.formats:
        weights = np.array([weight for _, weight in stage.formats])
        forms = rng.choice(len(weights), stage.batch, p=weights / weights.sum()).astype(np.int32)
    rows = [make(stage, vocabulary, rng, stage.formats[form][0] if stage.formats else "") for form in forms]
    return _pack(stage, vocabulary, rows, rng)._replace(form=forms)


def _pack(stage: Stage, vocabulary: Vocabulary, rows: list[list[Segment]], rng: np.random.Generator) -> Batch:
    shape, wanted = (stage.batch, stage.length), (stage.batch, stage.targets)
    tokens = np.full(shape, vocabulary.pad, np.int32)
    positions, log_copies = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    index, answer = np.zeros(wanted, np.int32), np.full(wanted, -1, np.int32)
    target = np.full((*wanted, HOPS + 1), -1, np.int32)
    for b, row in enumerate(rows):
        offsets = _offsets(row, stage.span, rng)
        start = used = 0
        number = itertools.count()
        for segment, offset in zip(row, offsets, strict=True):
            stop = min(start + len(segment.tokens), stage.length)
            tokens[b, start:stop] = segment.tokens[: stop - start]
            positions[b, start:stop] = np.arange(start, stop) + offset
            log_copies[b, start:stop] = np.log(segment.copies)
            for first, last in segment.answers:
                size = last - first
                if start + last > stage.length or used + size > stage.targets:
                    break
                places = slice(used, used + size)
                index[b, places] = np.arange(start + first - 1, start + last - 1)
                target[b, places, 0] = segment.tokens[first:last]
                for at, others in segment.others.items():
                    target[b, used + at - first, 1 : 1 + len(others)] = others
                answer[b, places] = next(number)
                used += size
            start = stop
    return Batch(tokens, positions, log_copies, index, answer, target, np.zeros(len(rows), np.int32))


def _offsets(row: list[Segment], span: int, rng: np.random.Generator) -> np.ndarray:
    """Ascending position offsets, one per segment: gaps of random size at random places, `span` positions at most."""
    extra = max(span - sum(len(segment.tokens) for segment in row), 0)
    extra = rng.integers(extra + 1) if rng.random() < 0.5 else int(extra * rng.random() ** 3)
    offsets = np.sort(rng.integers(0, extra + 1, len(row)))
    offsets[0] = 0
    return offsets


def _periodic(stage: Stage, vocabulary: Vocabulary, rng: np.random.Generator, _: str) -> list[Segment]:
    """Distinct tokens, then the same again and again; every repeated token is asked."""
    period = int(rng.integers(8, 25))
    start = rng.integers(0, len(vocabulary.answers) - stage.pool + 1) if stage.pool > 128 else 300
    unit = rng.choice(vocabulary.answers[start : start + stage.pool], period, replace=False)
    tokens = np.resize(unit, stage.length - 1).tolist()
    return [Segment([vocabulary.bos, *tokens], [(i, i + 1) for i in range(period + 2, stage.length)])]


def _pairs(stage: Stage, vocabulary: Vocabulary, rng: np.random.Generator, _: str) -> list[Segment]:
    """Keys with values in one order, then in another; the values of the second time are asked."""
    pool = min(stage.pool, len(vocabulary.words))
    words = vocabulary.words[:pool]
    small = rng.choice(words, max(3, stage.num_pairs // 2), replace=False)
    draw = small if stage.key_size > 1 and rng.random() < 0.25 else words
    keys: dict[tuple[int, ...], None] = {}
    while len(keys) < stage.num_pairs:
        keys[tuple(rng.choice(draw, stage.key_size).tolist())] = None
    answers = vocabulary.answers[300 : 300 + stage.pool] if stage.pool <= 1024 else vocabulary.answers[259:]
    values = [rng.choice(answers, stage.value_size).tolist() for _ in keys]
    between, after = [], []
    if stage.separators:
        between = rng.choice(vocabulary.separators, rng.integers(3)).tolist()
        after = rng.choice(vocabulary.separators, rng.integers(3)).tolist()
    pairs = [([*key, *between], [*value, *after]) for key, value in zip(keys, values, strict=True)]
    first = [Segment(key + value) for key, value in pairs]
    second = [Segment(key + value, [(len(key), len(key) + stage.value_size)]) for key, value in pairs]
    return [Segment([vocabulary.bos]), *_shuffled(first, rng), *_shuffled(second, rng)]


def _shuffled(items: list, rng: np.random.Generator) -> list:
    return [items[i] for i in rng.permutation(len(items))]


def _text(stage: Stage, v: Vocabulary, rng: np.random.Generator, form: str) -> list[Segment]:
    """A text of one form.

    Needles among noise, then questions: "lines" repeats needles, "one" asks key by key, "short" does so without the
    question itself, "values" and "queries" ask for several values of a key and for several keys at once, and so do
    "values-short" and "queries-short". "tracking" is a chain of assignments among noise. With little more than keys,
    values and names: "bare", "bare-values", "bare-queries" and "bare-tracking".
    """
    if form == "bare":
        return _bare(v, rng, int(rng.integers(3, stage.max_needles + 1)))
    if form == "bare-tracking":
        return _bare_chain(v, rng)
    if form.startswith("bare-"):
        return _bare_list(v, rng, form == "bare-values")
    if form == "tracking":
        return _tracking(stage, v, rng)
    return _needles(stage, v, rng, form)


def _needles(stage: Stage, v: Vocabulary, rng: np.random.Generator, form: str) -> list[Segment]:
    """Needles among noise, then questions of one form."""
    newline = v.encode("\n") if rng.random() < 0.8 else []
    many = form.startswith(("values", "queries"))
    values_per_key = LISTED if form.startswith("values") else 1
    asked_at_once = LISTED if form.startswith("queries") else 1
    noisy = rng.random() < stage.noise
    share = rng.random() ** 2.5 / 2 if noisy else rng.uniform(0.3, 0.9)
    most = min(stage.max_needles, stage.length // NEEDLE_TOKENS) // values_per_key
    num_keys = max(1 + int(most * share), asked_at_once)
    if many and rng.random() < 0.85:
        num_keys = asked_at_once
    keys = _keys(v, rng, num_keys)
    needles = [(i, str(rng.integers(1_000_000, 10_000_000))) for i in range(num_keys) for _ in range(values_per_key)]
    needles = _shuffled(needles, rng)
    header = tasks.ONE_HEADER if rng.random() < 0.4 and not many else tasks.MANY_HEADER
    start = v.encode(header) + newline if rng.random() < 0.9 else []

    def needle(key: int, value: str) -> Segment:
        before, between = v.encode(_opening(newline)), v.encode(" is:")
        text = before + keys[key] + between
        number = v.number(value)
        return Segment(text + number + v.encode(".") + newline, [(len(text), len(text) + len(number) + 1)])

    haystack = [needle(key, value)._replace(answers=()) for key, value in needles]
    budget = stage.length - 1 - len(start) - sum(len(s.tokens) for s in haystack)
    questions, used = [], 0
    values = [[value for k, value in needles if k == key] for key in range(num_keys)]
    order = rng.permutation(num_keys)
    for at in range(0, num_keys - asked_at_once + 1, asked_at_once):
        if form == "lines":
            question = needle(int(order[at]), values[order[at]][0])
        else:
            question = _question(v, rng, [int(i) for i in order[at : at + asked_at_once]], keys, values, newline, form)
        if questions and used + len(question.tokens) > budget * (0.5 if noisy else 1.0):
            break
        questions.append(question)
        used += len(question.tokens)
    noise = _noise(stage, v, rng, budget - used, newline) if noisy else []
    return [Segment([v.bos, *start]), *_merge(haystack, noise, rng), *questions]


def _bare(v: Vocabulary, rng: np.random.Generator, num_keys: int) -> list[Segment]:
    """Keys and values, then all keys again with a part of the words that stand between key and value in questions."""
    ending = v.encode(tasks.ONE_QUESTION.split("{keys}")[2])
    keys = _keys(v, rng, num_keys)
    numbers = [v.number(str(rng.integers(1_000_000, 10_000_000))) for _ in keys]
    needles = [Segment([*k, *v.encode(" is:"), *n, *v.encode(".\n")]) for k, n in zip(keys, numbers, strict=True)]
    questions = []
    for key, number in _shuffled(list(zip(keys, numbers, strict=True)), rng):
        text = key + ending[int(rng.integers(len(ending))) :]
        questions.append(Segment([*text, *number, v.eos], [(len(text), len(text) + len(number) + 1)]))
    return [Segment([v.bos]), *needles, *questions]


def _merge(needles: list[Segment], noise: list[Segment], rng: np.random.Generator) -> list[Segment]:
    """Both in their own order, put together at random places."""
    places = set(rng.choice(len(needles) + len(noise), len(needles), replace=False).tolist())
    ours, others = iter(needles), iter(noise)
    return [next(ours) if i in places else next(others) for i in range(len(needles) + len(noise))]


def _opening(newline: list[int]) -> str:
    return "One of the special magic numbers for" if newline else " One of the special magic numbers for"


def _keys(v: Vocabulary, rng: np.random.Generator, count: int) -> list[list[int]]:
    """Distinct adjective-noun keys, in a fifth of the draws from few adjectives and nouns so that they share parts."""
    adjectives, nouns = np.arange(len(v.adjectives)), np.arange(len(v.nouns))
    if rng.random() < 0.2:
        few = max(2, int(1.5 * count**0.5) + 1)
        adjectives, nouns = rng.choice(adjectives, few), rng.choice(nouns, few)
    found: dict[tuple[int, int], None] = {}
    for _ in range(50 * count):
        found[int(rng.choice(adjectives)), int(rng.choice(nouns))] = None
        if len(found) == count:
            break
    while len(found) < count:
        found[int(rng.integers(len(v.adjectives))), int(rng.integers(len(v.nouns)))] = None
    return [v.adjectives[a] + v.nouns[n] for a, n in found]


def _question(v, rng, asked: list[int], keys, values, newline, form: str) -> Segment:
    """The question for some keys with its answer."""
    names = _names(v, [keys[key] for key in asked])
    many = form.startswith(("values", "queries"))
    template = tasks.MANY_QUESTION if many else tasks.ONE_QUESTION
    first, second, third = template.split(" {keys}")
    if form.endswith("short"):
        first, second, third = second.split("? ")[1], "", third
    tokens = v.encode(first if newline else " " + first) + names
    tokens = tokens + (v.encode(second) + names if second else []) + v.encode(third)
    if many:
        return _listed(v, rng, tokens, [v.number(value) for key in asked for value in values[key]])
    number = v.number(values[asked[0]][0])
    return Segment([*tokens, *number, v.eos], [(len(tokens), len(tokens) + len(number) + 1)])


def _names(v: Vocabulary, keys: list[list[int]]) -> list[int]:
    """The tokens of `tasks.join_keys`."""
    names = list(keys[0])
    for i, key in enumerate(keys[1:], 1):
        names += v.encode(",") + (v.encode(" and") if i == len(keys) - 1 else []) + key
    return names


def _listed(v: Vocabulary, rng, question: list[int], items: list[list[int]]) -> Segment:
    """A question, then all items with commas between them, and the end.

    They come in any order: the first token of each that was not said yet is right.
    """
    items = _shuffled(items, rng)
    tokens, others = list(question), {}
    for i, item in enumerate(items):
        tokens += v.encode(",") if i else []
        others[len(tokens)] = [other[0] for other in items[i + 1 :]]
        tokens += item
    return Segment([*tokens, v.eos], [(len(question), len(tokens) + 1)], others=others)


def _bare_list(v: Vocabulary, rng: np.random.Generator, several_values: bool) -> list[Segment]:
    """Keys and values, then a question for all the values, with little more words."""
    ending = v.encode(tasks.MANY_QUESTION.split("{keys}")[2])
    keys = _keys(v, rng, 1 if several_values else LISTED)
    numbers = [v.number(str(rng.integers(1_000_000, 10_000_000))) for _ in range(LISTED)]
    needles = [Segment([*keys[i % len(keys)], *v.encode(" is:"), *n, *v.encode(".\n")]) for i, n in enumerate(numbers)]
    question = _names(v, _shuffled(keys, rng)) + ending[int(rng.integers(len(ending))) :]
    return [Segment([v.bos]), *needles, _listed(v, rng, question, numbers)]


def _noise(stage: Stage, v: Vocabulary, rng: np.random.Generator, room: int, newline: list[int]) -> list[Segment]:
    """Noise sentences for `room` tokens; where positions are spread, each stands for many."""
    tokens = v.encode(tasks.NOISE if newline else " " + tasks.NOISE) + newline
    count = max(room, 0) // len(tokens)
    most = max(1, stage.span // max(1, count * len(tokens)))
    return [Segment(tokens, copies=int(rng.integers(1, most + 1))) for _ in range(count)]


def _chain(v: Vocabulary, rng: np.random.Generator) -> tuple[list[Segment], list[list[int]], str]:
    """Assignments, the tokens of the names, and the value."""
    letters = rng.integers(0, 26, (HOPS + 1, 5))
    names = ["".join(string.ascii_uppercase[i] for i in row) for row in letters]
    value = str(rng.integers(10_000, 100_000))
    encode = v.encode.__wrapped__
    sources = [value, *(f"VAR {name}" for name in names)]
    lines = [tasks.ASSIGNMENT.format(name=b, value=a) + "\n" for a, b in zip(sources, names, strict=False)]
    return [Segment(encode(line)) for line in lines], [encode(" " + name) for name in names], value


def _bare_chain(v: Vocabulary, rng: np.random.Generator) -> list[Segment]:
    """A chain of assignments and its names, with little more words."""
    lines, names, _ = _chain(v, rng)
    return [Segment([v.bos]), *lines, _listed(v, rng, v.encode(" they are:"), names)]


def _tracking(stage: Stage, v: Vocabulary, rng: np.random.Generator) -> list[Segment]:
    """One chain of assignments among noise, then the question for the names on it."""
    sentences, names, value = _chain(v, rng)
    question = v.encode.__wrapped__(tasks.TRACKING_QUESTION.format(value=value, count=len(names)))
    end = _listed(v, rng, question, names)
    start = Segment([v.bos, *v.encode(tasks.TRACKING_HEADER + "\n")])
    used = len(start.tokens) + len(end.tokens) + sum(len(s.tokens) for s in sentences)
    noise = _noise(stage, v, rng, stage.length - used, v.encode("\n"))
    return [start, *_merge(sentences, noise, rng), end]
