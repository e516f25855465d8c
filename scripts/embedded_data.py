"""Training sequences for the embedded model: needle texts and chains of assignments, and where to look in them."""

import dataclasses
import functools
import itertools
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from restkv_jax.evaluate.tasks import needles, vocabulary

ROLES = ("first", "second", "last", "retrieve", "previous", "next", "continue")
"""What heads are shown to do. `first` and `second`: the adjective and the noun of the key that a token belongs to or
that is asked; of an assignment, `first` is the name it makes. `last`: the item said last. `retrieve`: what has the key.
`previous`: items before in the same list, the beginning of the text for the first. `next`: the next item to say.
`continue`: the rest of an item.
"""
NEEDLE_TOKENS = 16
"""The usual tokens of a needle."""
HOPS = 4
MOST_TARGETS = 4
BEGINNING = ("beginning",)


class Batch(NamedTuple):
    """`tokens`, `positions` int32 and `log_copies` float32 [B, T]; of the N supervised tokens of each row the index of
    the token before, the token, and the number of the answer it belongs to (-1 where there is none), int32 [B, N]; of
    each role of `ROLES`, M places and where to look from there, any of several, int32 [R, B, M] and
    [R, B, M, MOST_TARGETS] (-1 where there are fewer); and the format of each row, its number in the stage, int32 [B].
    """

    tokens: np.ndarray
    positions: np.ndarray
    log_copies: np.ndarray
    index: np.ndarray
    target: np.ndarray
    answer: np.ndarray
    look_from: np.ndarray
    look_to: np.ndarray
    form: np.ndarray


@dataclasses.dataclass(frozen=True)
class Stage:
    """One kind of training text: `batch` rows of `length` tokens, at most `targets` of them supervised.

    A text has up to `max_needles` needles, spread over up to `span` positions; a share `noise` of them has noise
    between. `formats` weighs what is asked.
    """

    name: str
    batch: int
    length: int
    targets: int
    max_needles: int
    formats: tuple[tuple[str, float], ...]
    noise: float = 0.0
    span: int = 0


class Segment(NamedTuple):
    """Tokens that stay together; the spans (start, stop) of answers in them; names of some of their places; and the
    looks, each a role, a place, and places or names to look at. It stands for `copies` of itself.
    """

    tokens: list[int]
    answers: Sequence[tuple[int, int]] = ()
    marks: dict[tuple, int] = {}  # noqa: RUF012
    looks: Sequence[tuple[str, int, list]] = ()
    copies: int = 1


class Vocabulary:
    """Token ids of the pieces that sequences are put together from."""

    def __init__(self, tokenizer):
        self.encode_once = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        self.encode = functools.lru_cache(None)(self.encode_once)
        ids = tokenizer.convert_tokens_to_ids
        self.bos, self.eos, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        groups = ["".join(digits) for n in (1, 2, 3) for digits in itertools.product(string.digits, repeat=n)]
        self.inner = {group: ids(group) for group in groups}
        self.first = {group: ids("Ġ" + group) for group in groups}
        self.adjectives = [self.encode(" " + word) for word in vocabulary.adjectives()]
        self.nouns = [self.encode("-" + word) for word in vocabulary.nouns()]

    def number(self, value: str) -> list[int]:
        """The tokens of " " and a number."""
        return [self.first[value[:3]]] + [self.inner[value[i : i + 3]] for i in range(3, len(value), 3)]


def make_batch(stage: Stage, vocabulary: Vocabulary, rng: np.random.Generator) -> Batch:
    """Draws a batch of `stage.batch` sequences."""
    weights = np.array([weight for _, weight in stage.formats])
    forms = rng.choice(len(weights), stage.batch, p=weights / weights.sum()).astype(np.int32)
    rows = [_text(stage, vocabulary, rng, stage.formats[form][0]) for form in forms]
    return _pack(stage, vocabulary, rows, rng)._replace(form=forms)


def _pack(stage: Stage, vocabulary: Vocabulary, rows: list[list[Segment]], rng: np.random.Generator) -> Batch:
    shape, target_shape, looked = (stage.batch, stage.length), (stage.batch, stage.targets), stage.length // 4
    tokens = np.full(shape, vocabulary.pad, np.int32)
    positions, log_copies = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    index, target, answer = (np.full(target_shape, fill, np.int32) for fill in (0, 0, -1))
    look_from = np.full((len(ROLES), stage.batch, looked), -1, np.int32)
    look_to = np.full((*look_from.shape, MOST_TARGETS), -1, np.int32)
    for b, row in enumerate(rows):
        offsets = _offsets(row, stage.span, rng)
        start = used = 0
        number, marks, looks = itertools.count(), {BEGINNING: 0}, []
        for segment, offset in zip(row, offsets, strict=True):
            stop = min(start + len(segment.tokens), stage.length)
            tokens[b, start:stop] = segment.tokens[: stop - start]
            positions[b, start:stop] = np.arange(start, stop) + offset
            log_copies[b, start:stop] = np.log(segment.copies)
            marks |= {name: start + at for name, at in segment.marks.items()}
            looks += [
                (role, start + at, [start + to if isinstance(to, int) else to for to in targets])
                for role, at, targets in segment.looks
                if start + at < stage.length
            ]
            for first, last in segment.answers:
                size = last - first
                if start + last > stage.length or used + size > stage.targets:
                    break
                places = slice(used, used + size)
                index[b, places] = np.arange(start + first - 1, start + last - 1)
                target[b, places] = segment.tokens[first:last]
                answer[b, places] = next(number)
                used += size
            start = stop
        for r, role in enumerate(ROLES):
            ours = [(at, to) for name, at, to in looks if name == role]
            for m, i in enumerate(rng.permutation(len(ours))[:looked]):
                at, to = ours[i]
                found = [t if isinstance(t, int) else marks[t] for t in to]
                found = [t for t in found if t <= at][:MOST_TARGETS]
                if found:
                    look_from[r, b, m] = at
                    look_to[r, b, m, : len(found)] = found
    return Batch(
        tokens, positions, log_copies, index, target, answer, look_from, look_to, np.zeros(len(rows), np.int32)
    )


def _offsets(row: list[Segment], span: int, rng: np.random.Generator) -> np.ndarray:
    """Ascending position offsets, one per segment: gaps of random size at random places, `span` positions at most."""
    extra = max(span - sum(len(segment.tokens) for segment in row), 0)
    extra = rng.integers(extra + 1) if rng.random() < 0.5 else int(extra * rng.random() ** 3)
    offsets = np.sort(rng.integers(0, extra + 1, len(row)))
    offsets[0] = 0
    return offsets


def _text(stage: Stage, v: Vocabulary, rng: np.random.Generator, form: str) -> list[Segment]:
    """A text of one form: "one" asks key by key, "values" for several values of a key, "queries" for several keys at
    once, "tracking" for chains of assignments; each with "-short" without the question itself.
    """
    kind, short = form.removesuffix("-short"), form.endswith("-short")
    if kind == "tracking":
        return _tracking(stage, v, rng, short)
    return _needles(stage, v, rng, kind, short)


def _needles(stage: Stage, v: Vocabulary, rng: np.random.Generator, kind: str, short: bool) -> list[Segment]:
    """Needles among noise, then questions."""
    newline = v.encode("\n") if rng.random() < 0.85 else []
    noisy = rng.random() < stage.noise
    share = rng.random() ** 2.5 if noisy else rng.uniform(0.3, 0.9)
    most = max(1, int(min(stage.max_needles, stage.length // NEEDLE_TOKENS) * share * (0.6 if noisy else 1.0)))
    per_key = int(rng.integers(2, 6)) if kind == "values" else 1
    at_once = int(rng.integers(2, 6)) if kind == "queries" else 1
    num_keys = max(most // per_key, at_once, 1)
    if kind != "one" and rng.random() < 0.4:
        num_keys = at_once
    keys = _keys(v, rng, num_keys)
    owners = rng.permutation(np.repeat(np.arange(num_keys), per_key)).tolist()
    groups = [[i for i, owner in enumerate(owners) if owner == key] for key in range(num_keys)]
    numbers = [v.number(str(rng.integers(1_000_000, 10_000_000))) for _ in owners]
    header = needles.ONE_HEADER if kind == "one" and rng.random() < 0.4 else needles.MANY_HEADER
    start = v.encode(header) + newline if rng.random() < 0.9 else []
    haystack = [_needle(v, i, keys[key], numbers[i], groups[key], newline) for i, key in enumerate(owners)]

    budget = stage.length - 1 - len(start) - sum(len(s.tokens) for s in haystack)
    questions, used = [], 0
    order = rng.permutation(num_keys).tolist()
    for at in range(0, num_keys - at_once + 1, at_once):
        asked = order[at : at + at_once]
        question = _question(v, asked, keys, groups, numbers, newline, kind != "one", short)
        if questions and used + len(question.tokens) > budget * (0.5 if noisy else 1.0):
            break
        questions.append(question)
        used += len(question.tokens)
    noise = _noise(stage, v, rng, budget - used, newline) if noisy else []
    return [Segment([v.bos, *start]), *_merge(haystack, noise, rng), *questions]


def _needle(v: Vocabulary, i: int, key: list[int], number: list[int], group: list[int], newline: list[int]) -> Segment:
    """The `i`-th needle; `group` are those of its key, in order."""
    opening = v.encode(("" if newline else " ") + needles.NEEDLE.split(" {key}")[0])
    before = [*opening, *key, *v.encode(" is:")]
    at, adjective = len(before), len(opening)
    noun, place = adjective + len(key) - 1, group.index(i)
    end = at + len(number)
    looks: list[Any] = [look for t in range(at, end + 1) for look in (("first", t, [adjective]), ("second", t, [noun]))]
    looks.append(("last", end, [at]))
    looks.append(("previous", at, [("end", j) for j in group[:place]] or [BEGINNING]))
    marks = {("item", i, t): at + t for t in range(len(number))} | {("end", i): end}
    return Segment([*before, *number, *v.encode("."), *newline], (), marks, looks)


def _question(v, asked: list[int], keys, groups, numbers, newline, many: bool, short: bool) -> Segment:
    """The question for some keys with its answer: their values in the order of the keys and of the text."""
    parts = (needles.MANY_QUESTION if many else needles.ONE_QUESTION).split(" {keys}")
    opening = parts[1].split("? ")[1] if short else parts[0]
    tokens = list(v.encode(("" if newline else " ") + opening))
    looks, mentions = [], []
    for part in parts[2:] if short else parts[1:]:
        nouns = []
        for i, key in enumerate(asked):
            if i:
                tokens += v.encode(",") + (v.encode(" and") if i == len(asked) - 1 else [])
            adjective, noun = len(tokens), len(tokens) + len(keys[key]) - 1
            tokens += keys[key]
            looks += [("first", noun, [adjective]), ("second", noun, [noun])]
            looks.append(("retrieve", noun, [("item", j, 0) for j in groups[key]]))
            looks.append(("previous", noun, [nouns[-1][1] if nouns else BEGINNING]))
            nouns.append((adjective, noun))
        mentions.append(nouns)
        tokens += v.encode(part)
    end, (adjective, noun) = len(tokens) - 1, mentions[-1][0]
    items = [(j, place) for place, key in enumerate(asked) for j in groups[key]]
    also = [] if many else ["retrieve"]
    looks += [("first", end, [adjective]), ("second", end, [noun]), ("last", end, [BEGINNING])]
    looks += [(role, end, [("item", items[0][0], 0)]) for role in ["next", *also]]
    for n, (item, place) in enumerate(items):
        tokens += v.encode(",") if n else []
        at = len(tokens)
        tokens += numbers[item]
        last = len(tokens) - 1
        for t in range(at, last):
            looks.append(("continue", t, [("item", item, t - at + 1)]))
        if len(asked) == 1:
            looks += [
                (role, t, [to]) for t in range(at, last + 1) for role, to in (("first", adjective), ("second", noun))
            ]
        following = [BEGINNING]
        if n + 1 < len(items):
            another = items[n + 1][1] != place
            following = [m[items[n + 1][1]][1] for m in mentions] if another else [("item", items[n + 1][0], 0)]
        for t in (last, last + 1) if n + 1 < len(items) else (last,):
            looks += [("last", t, [at]), ("next", t, following)]
    return Segment([*tokens, v.eos], [(end + 1, len(tokens) + 1)], {}, looks)


def _tracking(stage: Stage, v: Vocabulary, rng: np.random.Generator, short: bool) -> list[Segment]:
    """Chains of assignments among noise, then the question for the names on each."""
    most = max(1, min(4, stage.length // 128))
    count = 1 if rng.random() < 0.4 else int(rng.integers(1, most + 1))
    hops = [int(rng.integers(2, HOPS + 2)) if rng.random() < 0.5 else HOPS for _ in range(count)]
    names = iter(_names(rng, sum(hops) + count))
    chains = [[next(names) for _ in range(n + 1)] for n in hops]
    values = [str(value) for value in rng.choice(np.arange(10_000, 100_000), count, replace=False)]
    lines = [
        [_assignment(v, name, f"VAR {chain[i - 1]}" if i else value) for i, name in enumerate(chain)]
        for chain, value in zip(chains, values, strict=True)
    ]
    which = rng.permutation(np.repeat(np.arange(count), [len(chain) for chain in chains]))
    upcoming = [iter(chain) for chain in lines]
    sentences = [next(upcoming[i]) for i in which]
    start = Segment([v.bos, *v.encode(needles.TRACKING_HEADER + "\n")])
    budget = stage.length - len(start.tokens) - sum(len(s.tokens) for s in sentences)
    questions, used = [], 0
    for i in rng.permutation(count):
        question = _tracking_question(v, chains[i], values[i], short)
        if questions and used + len(question.tokens) > budget:
            break
        questions.append(question)
        used += len(question.tokens)
    noise = _noise(stage, v, rng, budget - used, v.encode("\n")) if rng.random() < max(stage.noise, 0.2) else []
    return [start, *_merge(sentences, noise, rng), *questions]


def _assignment(v: Vocabulary, name: str, source: str) -> Segment:
    tokens = v.encode_once(needles.ASSIGNMENT.format(name=name, value=source) + "\n")
    made, given = v.encode_once(" " + name), v.encode_once(" " + source.removeprefix("VAR "))
    end = len(tokens) - 1
    marks = {("name", name, t): 1 + t for t in range(len(made))} | {("line", name): end}
    return Segment(tokens, (), marks, [("first", end, [1]), ("previous", end, [end - len(given)])])


def _tracking_question(v: Vocabulary, chain: list[str], value: str, short: bool) -> Segment:
    text = needles.TRACKING_QUESTION.format(value=value, count=len(chain))
    tokens = v.encode_once(text[text.rindex("variables") - 2 :] if short else text)
    end, number = len(tokens) - 1, v.number(value)
    at = max(i for i, token in enumerate(tokens) if token == number[0])
    looks = [("first", end, [at]), ("last", end, [at]), ("next", end, [("line", chain[0])])]
    for n, name in enumerate(chain):
        tokens += v.encode(",") if n else []
        pieces, at = v.encode_once(" " + name), len(tokens)
        tokens += pieces
        last, more = len(tokens) - 1, n + 1 < len(chain)
        looks += [("continue", t, [("name", name, t - at + 1)]) for t in range(at, last)]
        for t in (last, last + 1) if more else (last,):
            looks += [("last", t, [at]), ("next", t, [("line", chain[n + 1]) if more else BEGINNING])]
    return Segment([*tokens, v.eos], [(end + 1, len(tokens) + 1)], {}, looks)


def _names(rng: np.random.Generator, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(string.ascii_uppercase[i] for i in rng.integers(0, 26, 5))] = None
    return list(found)


def _merge(needles: list[Segment], noise: list[Segment], rng: np.random.Generator) -> list[Segment]:
    """Both in their own order, put together at random places."""
    places = set(rng.choice(len(needles) + len(noise), len(needles), replace=False).tolist())
    ours, others = iter(needles), iter(noise)
    return [next(ours) if i in places else next(others) for i in range(len(needles) + len(noise))]


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


def _noise(stage: Stage, v: Vocabulary, rng: np.random.Generator, room: int, newline: list[int]) -> list[Segment]:
    """Noise sentences for `room` tokens; where positions are spread, each stands for many."""
    tokens = v.encode(("" if newline else " ") + needles.NOISE) + newline
    count = max(room, 0) // len(tokens)
    most = max(1, stage.span // max(1, count * len(tokens)))
    return [Segment(tokens, copies=int(rng.integers(1, most + 1))) for _ in range(count)]
