"""What a checkpoint says of sampling is read, offered and saved again."""

import json

import pytest
import tiny
from transformers import GenerationConfig

import restkv_jax as rk
from restkv_jax.models.sampling_defaults import SamplingDefaults, read_sampling

LLAMA = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05, "eos_token_id": [2, 5]}


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        (LLAMA, {"temperature": 0.6, "top_p": 0.9}),
        ({"top_k": 64, "min_p": 0.05, "repetition_penalty": 1.05}, {"top_k": 64, "min_p": 0.05}),
        ({"temperature": 1, "top_k": 0, "top_p": None}, {"temperature": 1}),
        ({"top_k": -1}, {}),
        ({}, {}),
    ],
)
def test_options_that_are_given(fields, options):
    assert read_sampling(fields).options == options


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": "hot"}, "temperature='hot' must be a number; null means none"),
        ({"temperature": float("nan")}, "temperature=nan must be a number"),
        ({"top_k": 2.5}, "top_k=2.5 must be an integer"),
        ({"min_p": True}, "min_p=True must be a number"),
    ],
)
def test_values_that_are_not_numbers(fields, message):
    with pytest.raises(ValueError, match=message):
        read_sampling(fields)


def test_they_are_read_from_a_directory_and_saved_again(tmp_path):
    tiny.write_model(tmp_path / "plain")
    assert not (tmp_path / "plain" / "generation_config.json").exists()
    (tmp_path / "plain" / "generation_config.json").write_text(json.dumps(LLAMA))
    model, params, _ = rk.load_model(tmp_path / "plain")
    assert model.config.sampling == SamplingDefaults(
        temperature=0.6, top_p=0.9, do_sample=True, others='{"repetition_penalty": 1.05}'
    )
    rk.save_model(tmp_path / "again", model, params)
    assert rk.load_model(tmp_path / "again")[0].config == model.config
    theirs = GenerationConfig.from_pretrained(tmp_path / "again")
    assert (theirs.do_sample, theirs.temperature, theirs.top_p, theirs.repetition_penalty) == (True, 0.6, 0.9, 1.05)
    assert (theirs.eos_token_id, theirs.pad_token_id) == ([2, 5], 0)


def test_what_nothing_here_uses_is_kept_in_place(tmp_path):
    tiny.write_model(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text('{"repetition_penalty": 1.1, "max_new_tokens": 2048}')
    rk.save_model(tmp_path, *rk.load_model(tmp_path))
    kept = json.loads(file.read_text())
    assert (kept["repetition_penalty"], kept["max_new_tokens"]) == (1.1, 2048)


def test_a_value_that_is_not_a_number_names_the_file(tmp_path):
    tiny.write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"top_p": "most"}')
    with pytest.raises(ValueError, match=r"generation_config\.json: top_p='most' must be a number"):
        rk.load_model(tmp_path)
