"""`restkv generate`: where the answer ends, and how its tokens are drawn."""

import json

import jax
import pytest
import tiny

import restkv_jax as rk
from restkv_jax.commands.cli import main

PROMPT = "The sky is blue. Here we go."
OWN = {"do_sample": True, "temperature": 0.7, "top_k": 40}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def with_own(model, tmp_path_factory):
    """A model with sampling settings of its own."""
    directory = tiny.write_model(tmp_path_factory.mktemp("own"))
    (directory / "generation_config.json").write_text(json.dumps(OWN))
    return str(directory)


def run(capsys, model, *args):
    full = ["generate", PROMPT, "--model", model, "--method", "full", "--max-new-tokens", "12"]
    code = main([*full, *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def expected(model, **options):
    return rk.generate_text(*rk.load_model(model, dtype="float32"), PROMPT, max_new_tokens=12, **options) + "\n"


def test_stop_strings(capsys, model):
    whole = expected(model)
    stops = (whole[6:8], "never said")
    args = ["--stop", stops[0], "--stop", stops[1], "--quiet"]
    assert run(capsys, model, *args) == (0, expected(model, stop=stops), "")
    assert len(expected(model, stop=stops)) < len(whole)


def test_segments(capsys, model):
    prompt, segments = PROMPT * 9, ["--budget", "48", "--segment-size", "64", "--max-new-tokens", "8"]
    assert main(["generate", prompt, "--model", model, *segments]) == 0
    out = capsys.readouterr().out
    loaded, policy = rk.load_model(model, dtype="float32"), rk.restkv(48)
    assert out.startswith(rk.generate_text(*loaded, prompt, policy, max_new_tokens=8, segment_size=64) + "\n")
    assert "cache slots         │ 56 (full cache: " in out
    assert main(["generate", prompt, "--model", model, "--segment-size", "8"]) == 2
    assert "segment_size=8 must be at least the policy's window=32" in capsys.readouterr().err


def test_drawing_with_given_options(capsys, model):
    drawn = expected(model, key=jax.random.key(5), min_p=0.02, temperature=0.8)
    assert run(capsys, model, "--min-p", "0.02", "--temperature", "0.8", "--seed", "5", "--quiet") == (0, drawn, "")
    assert drawn != expected(model)


@pytest.mark.slow
def test_drawing_with_the_models_own_options(capsys, with_own):
    key = jax.random.key(0)
    drawn = expected(with_own, key=key, temperature=0.7, top_k=40)
    assert run(capsys, with_own, "--sample", "--quiet") == (0, drawn, "")
    given_first = expected(with_own, key=key, temperature=0.7, top_k=3)
    code, out, err = run(capsys, with_own, "--sample", "--top-k", "3")
    assert (code, err) == (0, "") and out.startswith(given_first)
    assert "temperature=0.7, top_k=3 " in out
    assert run(capsys, with_own, "--quiet") == (0, expected(with_own), "")  # greedy unless it is asked for


def test_a_model_without_options_says_so(capsys, model):
    code, out, err = run(capsys, model, "--sample", "--quiet")
    assert (code, out) == (0, expected(model, key=jax.random.key(0)))
    assert err == "restkv: --sample: the model has no sampling settings of its own; taken: temperature=1\n"
    *_, err = run(capsys, model, "--sample", "--top-p", "0.5", "--quiet")
    assert err.endswith("taken: temperature=1, top_p=0.5\n")


@pytest.mark.slow
def test_options_of_a_model_that_are_out_of_range(capsys, tmp_path):
    directory = tiny.write_model(tmp_path)
    (directory / "generation_config.json").write_text('{"top_p": 1.5}')
    code, out, err = run(capsys, str(directory), "--sample")
    assert (code, out, err) == (2, "", "restkv: error: top_p=1.5 must be in (0, 1]\n")
    assert run(capsys, str(directory), "--sample", "--top-p", "0.9", "--quiet")[0] == 0


def test_quantised_caches(capsys, model):
    stored = "int8(group_size=8,residual=8)"
    code, out, err = run(capsys, model, "--cache-dtype", stored)
    assert (code, err) == (0, "") and out.startswith(expected(model, cache_dtype=rk.Quantisation("int8", 8, 8)))
    assert f"cache dtype         │ {stored}" in out
    code, _, err = run(capsys, model, "--cache-dtype", "int3")
    assert code != 0 and "cache_dtype='int3' is unknown; choose from 'int8', 'int4', 'float8_e4m3fn'" in err
