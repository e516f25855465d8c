"""Needle prompts: sized, repeatable, answerable; and how answers are judged."""

import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("wonderwords")

import restkv_jax as rk
from restkv_jax.evaluate import TASKS, Prompt, is_exact, make_prompts, measure_accuracy, wilson_interval
from restkv_jax.evaluate.tasks import NOISE


@pytest.fixture(scope="module")
def embedded():
    return rk.load_model(dtype=jnp.float32)


class Words:
    """A stand-in tokenizer: one token per run of letters or digits, per mark and per line end."""

    def __call__(self, text):
        return {"input_ids": re.findall(r"\w+|[^\w ]", text)}


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
    with pytest.raises(ValueError, match="prompts"):
        measure_accuracy(None, None, None, [], [])


def test_exact_answers_hold_all_and_nothing_else():
    assert is_exact(" 1234567.", ("1234567",))
    assert is_exact(" 7654321, 1234567", ("1234567", "7654321"))
    assert not is_exact(" 1234567, 7654321", ("1234567",))
    assert not is_exact(" 12345678", ("1234567",))


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
