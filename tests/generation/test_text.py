"""Answers as text: batches, stop strings, rows that end."""

import functools
import importlib.resources

import jax
import numpy as np
import pytest
import tiny

import restkv_jax as rk
from restkv_jax.generation.encoding import encode_prompts
from restkv_jax.generation.text import decode_text
from restkv_jax.models.tokenizer import load_tokenizer
from restkv_jax.timing import CompilationClock

NEW = 24
POLICY = rk.restkv(40)
PROMPTS = ["The grass is green. The sky is blue. The sun is", "Here we go. There and", "The sky"]


@functools.cache
def random_model():
    """A small random model that speaks in the tokens of the embedded one."""
    tokenizer = load_tokenizer(str(importlib.resources.files("restkv_jax") / "embedded"))
    model = rk.build_model(tiny.CONFIG | {"vocab_size": len(tokenizer), "initializer_range": 0.3})
    return model, rk.init_params(model, jax.random.key(0)), tokenizer


def decoded(tokens, lengths):
    return [
        random_model()[2].decode(row[:length], skip_special_tokens=True)
        for row, length in zip(np.asarray(tokens).tolist(), lengths.tolist(), strict=True)
    ]


SAMPLED = {"key": jax.random.key(3), "temperature": 0.9, "top_p": 0.9, "min_p": 0.01}


@pytest.mark.parametrize("options", [{}, pytest.param(SAMPLED, marks=pytest.mark.slow)])
def test_text_is_that_of_generate(options):
    model, params, tokenizer = random_model()
    out = rk.generate(model, params, *encode_prompts(tokenizer, PROMPTS), POLICY, NEW, **options)
    texts = rk.generate_text(*random_model(), PROMPTS, POLICY, NEW, **options)
    assert texts == decoded(out.tokens, out.lengths)
    assert len(set(texts)) == 3 and all(texts)
    pieces = list(rk.stream_text(*random_model(), PROMPTS, POLICY, NEW, **options))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == texts


def test_one_prompt_gives_one_text_and_rows_are_as_alone():
    together = rk.generate_text(*random_model(), PROMPTS, POLICY, NEW)
    for prompt, text in zip(PROMPTS, together, strict=True):
        assert rk.generate_text(*random_model(), prompt, POLICY, NEW) == text
        pieces = list(rk.stream_text(*random_model(), prompt, POLICY, NEW))
        assert "".join(pieces) == text and len(pieces) > 1


def test_rows_end_before_stop_strings_and_stop_decoding():
    model, params, own = random_model()
    whole = rk.generate_text(model, params, own, PROMPTS, POLICY, NEW)
    middle = len(whole[0]) // 2
    stop = (whole[0][middle - 2 : middle + 2], whole[1][2:5], "never said")
    expected = [text[: min((text.find(string) for string in stop if string in text), default=None)] for text in whole]
    assert rk.generate_text(model, params, own, PROMPTS, POLICY, NEW, stop=stop) == expected
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert rk.generate_text(model, params, own, prompt, POLICY, NEW, stop=stop) == text
    texts = decode_text(model, params, own, *encode_prompts(own, PROMPTS), POLICY, NEW, stop=stop)
    steps = list(texts)
    assert [row.text for row in texts.rows] == expected
    lengths = [len(row.tokens) for row in texts.rows]
    assert texts.last.lengths.tolist() == lengths and len(steps) <= max(lengths) + 1
    assert lengths[0] < NEW and lengths[1] < NEW
    prompt_lengths = [len(own(prompt)["input_ids"]) for prompt in PROMPTS]
    fed = texts.last.cache.next_positions - np.array(prompt_lengths)
    assert fed.tolist() == [length - 1 for length in lengths]  # the last token of a row is not fed


def test_a_row_is_ended_from_outside():
    model, params, own = random_model()
    texts = decode_text(model, params, own, *encode_prompts(own, PROMPTS), POLICY, NEW)
    for step, _ in enumerate(texts):
        texts.rows[1].ended |= step == 3
    assert len(texts.rows[1].tokens) == 4
    assert texts.last.lengths.tolist() == [len(row.tokens) for row in texts.rows]
    whole = rk.generate_text(model, params, own, PROMPTS, POLICY, NEW)
    assert [row.text for row in texts.rows][::2] == whole[::2] and whole[1].startswith(texts.rows[1].text)


def test_stopping_a_row_compiles_nothing():
    options = dict(policy=POLICY, max_new_tokens=NEW)
    whole = rk.generate_text(*random_model(), PROMPTS, **options)
    rk.generate_text(*random_model(), PROMPTS, **options, stop=whole[0][3:5])
    with CompilationClock() as clock:
        rk.generate_text(*random_model(), PROMPTS, **options, stop=whole[0][6:9])
    assert clock.seconds == 0


def test_special_tokens_end_a_row_which_no_text_has():
    tokenizer = tiny.tokenizer()
    model = rk.build_model(tiny.CONFIG | {"initializer_range": 0.3, "eos_token_id": None})
    arguments = model, rk.init_params(model, jax.random.key(0)), tokenizer, "The sky"
    whole = rk.generate_text(*arguments, max_new_tokens=NEW)
    prompt = np.array([tokenizer("The sky")["input_ids"]])
    sixth = int(rk.generate(*arguments[:2], prompt, max_new_tokens=6).tokens[0, 5])
    token = tokenizer.convert_ids_to_tokens(sixth)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    texts = rk.generate_text(*arguments, max_new_tokens=NEW, stop=token)
    assert texts == whole[: len(texts)] and len(texts) < len(whole)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|beyond|>"]})
    assert rk.generate_text(*arguments, max_new_tokens=NEW, stop="<|beyond|>") == rk.generate_text(
        *arguments, max_new_tokens=NEW
    )


@pytest.mark.parametrize(("stop", "error", "words"), [
    ("", ValueError, "an empty string, which would end every answer"),
    (["\n", ""], ValueError, "an empty string"),
    ([13], TypeError, r"stop=\[13\] must be a string or a list of strings"),
    (7, TypeError, "stop=7 must be"),
])  # fmt: skip
@pytest.mark.parametrize("call", [rk.generate_text, rk.stream_text])
def test_stop_strings_that_make_no_sense(call, stop, error, words):
    with pytest.raises(error, match=words):
        call(*random_model(), "The sky", stop=stop)
