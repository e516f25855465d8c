"""Prompts: sized, repeatable, answerable; and how answers are scored."""

import collections
import hashlib
import re

import jax
import jax.numpy as jnp
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("wonderwords")

import restkv_jax as rk
from restkv_jax.evaluate import (
    TASKS,
    FrequentWords,
    Needles,
    Prompt,
    accuracy,
    generate_texts,
    is_exact,
    make_prompts,
    match_share,
    measure_accuracy,
    wilson_interval,
)
from restkv_jax.evaluate.tasks.needles import NOISE
from restkv_jax.evaluate.tasks.prompts import largest_fitting

NEEDLE_TASKS = tuple(name for name, task in TASKS.items() if isinstance(task, Needles))
ESSAYS = ("essays", "essays_multikey")
ONE_ASKED = tuple(name for name in NEEDLE_TASKS if TASKS[name].asks_one and name not in ESSAYS)


@pytest.fixture(scope="module")
def embedded():
    return rk.load_model(dtype=jnp.float32)


class Words:
    """A stand-in tokenizer: one token per run of letters or digits, per mark and per line end."""

    def __call__(self, text):
        return {"input_ids": re.findall(r"\w+|[^\w ]", text)}


class Quarters:
    """A stand-in tokenizer: one token per four characters of a word, with the white space before them."""

    def __call__(self, text):
        return {"input_ids": re.findall(r"\s*\S{1,4}|\s+$", text)}


def count(tokenizer, prompt):
    return len(tokenizer(prompt.text)["input_ids"])


@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_the_wanted_size_and_hold_their_answers(task):
    for prompt in make_prompts(task, Words(), 512, 5, seed=1):
        assert 512 - 26 <= len(Words()(prompt.text)["input_ids"]) <= 512
        haystack, question = prompt.text.rsplit("\n", 1)
        assert all(answer in haystack and answer not in question for answer in prompt.answers)


def test_prompts_repeat_with_the_seed_and_differ_without():
    one, same, other = (make_prompts("single", Words(), 256, 3, seed) for seed in (1, 1, 2))
    assert one == same
    assert not set(one) & set(other)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokenizer", [Words(), Quarters(), tiny.tokenizer()], ids=["words", "quarters", "bytes"])
@given(num_tokens=st.integers(1600, 2500), seed=st.integers(0, 2**32))
@settings(max_examples=5, deadline=None)
def test_prompts_of_any_tokenizer_are_full_but_not_longer(task, tokenizer, num_tokens, seed):
    prompts = make_prompts(task, tokenizer, num_tokens, 3, seed)
    assert all(num_tokens - 100 <= count(tokenizer, prompt) <= num_tokens for prompt in prompts)
    assert prompts == make_prompts(task, tokenizer, num_tokens, 3, seed)
    assert prompts[:1] == make_prompts(task, tokenizer, num_tokens, 1, seed)


def test_prompts_of_a_seed_stay_what_they_are():
    """The tables of docs/ were made with them."""
    digest = hashlib.sha256()
    for task in ("single", "multikey", "haystack", "multivalue", "multiquery", "tracking"):
        digest.update("\0".join(prompt.text for prompt in make_prompts(task, Words(), 512, 3, seed=1)).encode())
    assert digest.hexdigest()[:16] == "5c96255344e5c20c"


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    least=st.integers(0, 60),
    room=st.integers(0, 800),
    guess=st.integers(-10, 100),
)
@settings(max_examples=300, deadline=None)
def test_the_largest_that_fits_is_found_from_any_guess(sizes, least, room, guess):
    least = min(least, len(sizes))
    fitting = [n for n in range(least, len(sizes) + 1) if sum(sizes[:n]) <= room]
    found = largest_fitting(lambda n: sum(sizes[:n]), least, len(sizes), room, guess)
    assert found == max(fitting, default=None)


@pytest.mark.parametrize("task", ESSAYS)
@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_needles_in_essays_stand_between_sentences_of_running_text(task, depth):
    for prompt in make_prompts(task, Words(), 600, 3, seed=2, depth=depth):
        header, context, question = prompt.text.split("\n")
        assert header.startswith("A special magic number is hidden") and prompt.answers[0] not in question
        sentences = context.split(". ")
        needles = [i for i, sentence in enumerate(sentences) if "special magic number" in sentence]
        (asked,) = (i for i in needles if prompt.answers[0] in sentences[i])
        assert len(needles) == TASKS[task].num_keys and asked == round(depth * (len(sentences) - 1))
        numbers = [int(re.search(r"\d+", s)[0]) for i, s in enumerate(sentences) if i not in needles]
        assert numbers == [(numbers[0] + i) % 400 for i in range(len(numbers))], "neighbours, in their order"
        assert 600 - 26 <= count(Words(), prompt) <= 600


@pytest.mark.parametrize("task", ONE_ASKED)
@given(depths=st.lists(st.floats(0, 1), min_size=2, max_size=2), seed=st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_depth_places_the_asked_needle(task, depths, seed):
    places = []
    for depth in (0, *sorted(depths), 1):
        (prompt,) = make_prompts(task, Words(), 700, 1, seed, depth)
        lines = prompt.text.split("\n")[1:-1]
        (place,) = (i for i, line in enumerate(lines) if prompt.answers[0] in line)
        assert place == round(depth * (len(lines) - 1))
        assert count(Words(), prompt) <= 700
        places.append(place)
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-1] == len(lines) - 1


@pytest.mark.parametrize(("num_tokens", "common", "other"), [(512, 6, 1), (1024, 6, 1), (4096, 30, 3)])
def test_common_words_are_those_counted_most(num_tokens, common, other):
    for prompt in make_prompts("common_words", Words(), num_tokens, 4, seed=8):
        *example, _, words, _ = prompt.text.split("\n")
        found = re.findall(r"(\d+)\. ([a-z]+)", words)
        counts = collections.Counter(word for _, word in found)
        assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
        assert {word for word, times in counts.items() if times == common} == set(prompt.answers)
        assert set(counts.values()) == {common, other}
        assert len(prompt.answers) == 10
        assert match_share(prompt.reply, prompt.answers) == 1
        assert len(example) == (3 if num_tokens >= 1024 else 0)
        assert not set(counts) & set(re.findall(r"\d+\. ([a-z]+)", "\n".join(example)))


def test_the_example_of_common_words_is_solved():
    (prompt,) = make_prompts("common_words", Words(), 1024, 1, seed=9)
    _, words, solved, *_ = prompt.text.split("\n")
    counts = collections.Counter(re.findall(r"\d+\. ([a-z]+)", words))
    answers = re.findall(r"\d+\. ([a-z]+)", solved)
    assert counts == dict.fromkeys(answers, 3) | {word: 1 for word in counts if word not in answers}
    assert len(answers) == 10


@given(num_tokens=st.integers(512, 5000), seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_frequent_words_are_those_counted_most(num_tokens, seed):
    (prompt,) = make_prompts("frequent_words", Words(), num_tokens, 1, seed)
    words = prompt.text.split("coded words. ")[1].split("\n")[0].split(" ")
    (dots, most), *ranked = collections.Counter(words).most_common()
    assert dots == "..."
    assert prompt.answers == tuple(word for word, _ in ranked[:3])
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked)
    assert ranked[2][1] > ranked[3][1]
    # Shares of 1, 1/4 and 1/9, each rounded down to whole words.
    assert abs(ranked[0][1] - most / 4) <= 1
    assert abs(ranked[1][1] - most / 9) <= 1


@pytest.mark.parametrize(("task", "needles"), [("single", 1), ("multikey", 8), ("multivalue", 4), ("multiquery", 4)])
def test_noise_surrounds_the_needles(task, needles):
    for prompt in make_prompts(task, Words(), 512, 3, seed=3):
        assert prompt.text.count("One of the special magic numbers for ") == needles
        assert prompt.text.count(NOISE) > 3


def test_a_haystack_of_needles_names_every_key_and_value_once():
    for prompt in make_prompts("haystack", Words(), 1024, 3, seed=4):
        found = re.findall(r"numbers for (.+?) is: (\d{7})\.", prompt.text)
        assert NOISE not in prompt.text
        assert len(found) > 30
        assert len(dict(found)) == len({value for _, value in found}) == len(found)


def test_tracking_asks_for_the_chain_in_order():
    (prompt,) = make_prompts("tracking", Words(), 512, 1, seed=5)
    lines = re.findall(r"VAR ([A-Z]{5}) = (\d{5}|VAR [A-Z]{5})$", prompt.text, re.MULTILINE)
    assert [name for name, _ in lines] == list(prompt.answers)
    assert [source for _, source in lines[1:]] == [f"VAR {name}" for name in prompt.answers[:-1]]


def test_impossible_requests_are_named():
    with pytest.raises(ValueError, match="task='golden'"):
        make_prompts("golden", Words(), 512, 1, seed=0)
    with pytest.raises(ValueError, match="num_tokens=64"):
        make_prompts("multikey", Words(), 64, 1, seed=0)
    for words in ("common_words", "frequent_words"):
        with pytest.raises(ValueError, match=f"num_tokens=128 .*{words}"):
            make_prompts(words, Words(), 128, 1, seed=0)
    for task in ("multivalue", "multiquery", "tracking", "common_words", "frequent_words"):
        with pytest.raises(ValueError, match=f"task='{task}' .*depth"):
            make_prompts(task, Words(), 512, 1, seed=0, depth=0.5)
    for depth in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"depth={depth}"):
            make_prompts("single", Words(), 512, 1, seed=0, depth=depth)
    with pytest.raises(ValueError, match="depth"):
        Needles(num_values=2, depth=0.5)
    with pytest.raises(ValueError, match="alpha"):
        FrequentWords(alpha=1.0)
    with pytest.raises(ValueError, match="prompts"):
        measure_accuracy(None, None, None, [], [])


def test_exact_answers_hold_all_and_nothing_else():
    assert is_exact(" 1234567.", ("1234567",))
    assert is_exact(" 7654321, 1234567", ("1234567", "7654321"))
    assert not is_exact(" 1234567, 7654321", ("1234567",))
    assert not is_exact(" 12345678", ("1234567",))
    assert is_exact(" 1. zebra 2. apple", ("apple", "zebra"))
    assert is_exact(" 42.\n", ("42",))
    assert not is_exact(" 1. zebra 2. apple 3. pear", ("apple", "zebra"))
    assert is_exact(" New york.", ("New York",))
    assert is_exact(" 3.5, and", ("and", "3.5"))
    assert not is_exact(" York", ("New York",))


def test_the_share_of_answers_that_a_text_holds():
    assert match_share("1. Apple 2. pear", ("apple", "PEAR")) == 1
    assert match_share("apples and quinces", ("apple", "pear", "plum", "quince")) == 0.5
    assert match_share("", ("apple",)) == 0


def test_an_answer_in_a_format_of_its_own_has_room(monkeypatch):
    asked = []
    monkeypatch.setattr(accuracy, "generate_each", lambda *args, **_: asked.append(args[5]) or ())
    for reply in ("", "1. one 2. two"):
        generate_texts(None, None, tiny.tokenizer(), [Prompt("a", ("one", "two"), reply)], [], batch_size=1)
    assert asked == [len(" one, two") + 4, len(" 1. one 2. two") + 4]


def test_wilson_interval():
    low, high = wilson_interval(95, 100)
    assert low == pytest.approx(0.8882, abs=1e-4)
    assert high == pytest.approx(0.9785, abs=1e-4)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_prompts_are_plain_values():
    assert Prompt("a", ("b",)) == Prompt("a", ("b",))


@given(text=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_the_embedded_tokenizer_keeps_any_text(embedded, text):
    _, _, tokenizer = embedded
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=False) == tokenizer.bos_token + text


def test_the_embedded_tokenizer_takes_keys_and_digit_groups_whole(embedded):
    _, _, tokenizer = embedded
    ids = tokenizer(" for quick-aardvark is: 1234567.", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == [" for", " quick", "-aardvark", " is", ":", " 123", "456", "7", "."]


@pytest.mark.parametrize("task", TASKS)
def test_embedded_prompts_have_the_wanted_size(embedded, task):
    _, _, tokenizer = embedded
    lengths = [len(tokenizer(prompt.text)["input_ids"]) for prompt in make_prompts(task, tokenizer, 1024, 5, seed=6)]
    assert all(1024 - 25 <= length <= 1024 for length in lengths)


@pytest.mark.slow
def test_the_embedded_model_finds_a_needle_and_stops(embedded):
    model, params, tokenizer = embedded
    prompts = make_prompts("single", tokenizer, 1024, 8, seed=7)
    assert measure_accuracy(model, params, tokenizer, prompts, [rk.full()], batch_size=8)[0].correct >= 6


def test_the_embedded_model_is_small(embedded):
    model, params, _ = embedded
    config = model.config
    assert sum(2 * leaf.size for leaf in jax.tree.leaves(params)) <= 12e6
    assert config.num_hidden_layers >= 6
    assert config.num_attention_heads > config.num_key_value_heads >= 2
