"""Training of the embedded model: where heads are shown to look, the losses, the start, and resuming."""

import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("wonderwords")
pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")

import restkv_jax as rk
from restkv_jax.models.decoder import read
from restkv_jax.models.layer import rms_norm

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
MODULES = "train_embedded", "embedded_data", "embedded_circuit", "embedded_forward"
LISTS = ("values", "queries", "tracking")


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(SCRIPTS))
    try:
        return tuple(importlib.import_module(name) for name in MODULES)
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def embedded():
    return rk.load_model(dtype=jnp.float32)


@pytest.fixture(scope="module")
def vocabulary(scripts, embedded):
    return scripts[1].Vocabulary(embedded[2])


def draw(data, vocabulary, form, seed=0):
    stage = data.Stage("lists", 2, 400, 64, 8, ((form, 1.0),), noise=0.7, span=900)
    return stage, data.make_batch(stage, vocabulary, np.random.default_rng(seed))


def looks_of(data, batch, row):
    """Of each role, where to look from each place."""
    return {
        role: {int(at): [int(i) for i in to if i >= 0] for at, to in zip(start, targets, strict=True) if at >= 0}
        for role, start, targets in zip(data.ROLES, batch.look_from[:, row], batch.look_to[:, row], strict=True)
    }


def followed(looks, tokens, at):
    """The token that the looks lead to from the place before it."""
    places = looks["next"].get(at) or looks["continue"].get(at, [])
    if not places or places == [0]:
        return None
    found = set()
    for place in places:
        if place in looks["retrieve"]:
            found |= {int(tokens[i]) for i in looks["retrieve"][place]}
        elif place in looks["previous"] and place not in looks["second"]:  # the end of an assignment
            found |= {int(tokens[i]) for i in looks["first"][place]}
        else:
            found.add(int(tokens[place]))
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", ["one", "values", "queries", "tracking", "queries-short", "tracking-short"])
def test_looks_lead_to_the_token_that_follows(scripts, vocabulary, form, seed):
    _, data, *_ = scripts
    _, batch = draw(data, vocabulary, form, seed)
    ends = {vocabulary.eos, *vocabulary.encode(",")}
    for row, tokens in enumerate(batch.tokens):
        looks = looks_of(data, batch, row)
        asked = batch.answer[row] >= 0
        checked = 0
        for at, target in zip(batch.index[row][asked], batch.target[row][asked], strict=True):
            assert tokens[at + 1] == target
            if target not in ends:
                assert followed(looks, tokens, int(at)) == target
                checked += 1
        assert checked >= 3


def test_lists_say_what_comes_after_the_item_said_last(scripts, vocabulary):
    _, data, *_ = scripts
    comma = vocabulary.encode(",")[0]
    for form in LISTS:
        _, batch = draw(data, vocabulary, form)
        tokens, looks = batch.tokens[0], looks_of(data, batch, 0)
        for at, (said,) in looks["last"].items():
            if tokens[at] != comma:
                continue
            for place in looks["next"][at]:
                before = [
                    i
                    for to in looks["previous"][place]
                    for i in looks["last"].get(to) or looks["retrieve"].get(to, [to])
                ]
                assert place == 0 or int(tokens[said]) in {int(tokens[i]) for i in before}


@pytest.mark.slow
def test_look_losses_are_the_attention_that_is_missing(scripts, vocabulary, embedded):
    _, data, circuit, forward = scripts
    model = embedded[0]
    params = circuit.initial_params(model.config, jax.random.key(0))  # a trained model misses next to nothing
    _, batch = draw(data, vocabulary, "queries")
    _, queries, keys = forward.hidden_states(model.config, params, batch.tokens, batch.positions, batch.log_copies)
    got = circuit.look_losses(queries, keys, batch)
    groups = queries.shape[2] // keys.shape[2]
    for r, role in enumerate(data.ROLES):
        layer, head = circuit.HEADS[role]
        at_beginning, elsewhere = [], []
        for row in range(len(batch.tokens)):
            for at, targets in looks_of(data, batch, row)[role].items():
                scores = np.float64(keys[layer, row, head // groups, : at + 1] @ queries[layer, row, head, at])
                weights = np.exp(scores + batch.log_copies[row, : at + 1])
                losses = at_beginning if targets == [0] else elsewhere
                losses.append(-np.log(weights[targets].sum() / weights.sum()))
        wanted = np.mean([np.mean(losses) for losses in (at_beginning, elsewhere) if losses])
        np.testing.assert_allclose(got[r], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_forward_pass_is_the_models(scripts, vocabulary, embedded):
    _, data, _, forward = scripts
    model, params, _ = embedded
    _, batch = draw(data, vocabulary, "one")
    positions = np.broadcast_to(np.arange(batch.tokens.shape[1]), batch.tokens.shape)
    got, _, _ = forward.hidden_states(model.config, params, batch.tokens, positions, 0 * batch.log_copies)
    hidden, _ = read(model, params, batch.tokens)
    wanted = rms_norm(hidden, params["final_norm"], model.config.rms_norm_eps)
    np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-3)


def test_copies_of_a_token_count_as_often_as_they_stand_for(scripts, vocabulary, embedded):
    _, _, _, forward = scripts
    model, params, _ = embedded
    text = [vocabulary.bos, *vocabulary.encode(" is"), *vocabulary.encode(" for")]
    repeated = np.array([[text[0], text[1], text[1], text[1], text[2]]])
    together = np.array([[text[0], text[1], text[2]]])
    copies = np.log(np.array([[1.0, 3.0, 1.0]]))
    # The copies see one another too, so only what the last token takes from the first layer is the same.
    one_layer = jax.tree.map(lambda x: x[:1], params["layers"])
    shallow = params | {"layers": one_layer}
    config = dataclasses.replace(model.config, num_hidden_layers=1)
    many, _, _ = forward.hidden_states(config, shallow, repeated, np.array([[0, 1, 1, 1, 2]]), np.zeros((1, 5)))
    one, _, _ = forward.hidden_states(config, shallow, together, np.array([[0, 1, 2]]), copies)
    np.testing.assert_allclose(one[0, -1], many[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_at_the_start_the_first_layer_looks_back(scripts, vocabulary, embedded):
    train, data, circuit, forward = scripts
    options = train.Options(run=pathlib.Path("run"))
    model = rk.build_model(train.model_config(options, embedded[2]))
    params = circuit.initial_params(model.config, jax.random.key(0))
    _, batch = draw(data, vocabulary, "one")
    _, queries, keys = forward.hidden_states(model.config, params, batch.tokens, batch.positions, batch.log_copies)
    groups = options.num_heads // 2
    for head in range(options.num_heads):
        scores = queries[0, 0, head, 60:100] @ keys[0, 0, head // groups, :100].T
        scores = np.where(np.arange(100) <= np.arange(60, 100)[:, None], scores, -np.inf)
        back = np.arange(60, 100) - scores.argmax(axis=1)
        assert (back == head + 1).mean() > 0.7


def test_exact_shares_count_whole_answers_by_format(scripts, vocabulary):
    train, data, *_ = scripts
    stage, batch = draw(data, vocabulary, "values")
    right = np.ones(batch.answer.shape, bool)
    assert train.exact_shares(stage, batch, right) == {"all": 1.0, "values": 1.0}
    right[0] = False
    assert train.exact_shares(stage, batch, right)["values"] < 1.0


def test_the_rate_rises_and_falls(scripts):
    train, *_ = scripts
    options = train.Options(run=pathlib.Path("run"), steps=1000, decay=0.5)
    assert train.rate_scale(options, 0, 1.0) == pytest.approx(1 / options.warmup)
    assert train.rate_scale(options, 499, 0.5) == 0.5
    assert train.rate_scale(options, 750, 1.0) == pytest.approx(0.5)
    assert train.rate_scale(options, 1000, 1.0) == 0.0


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    def train(run, *args):
        small = ["--intermediate-size", "32", "--num-layers", "3", "--decay", "0"]
        command = [sys.executable, str(SCRIPTS / "train_embedded.py"), "--run", str(run), *small, *args]
        subprocess.run(command, check=True, capture_output=True)
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])

    whole = train(tmp_path / "whole", "--steps", "3")
    train(tmp_path / "killed", "--steps", "2", "--checkpoint-every", "1")
    again = train(tmp_path / "killed", "--steps", "3")
    assert again["step"] == whole["step"] == 2
    assert again["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    one, other = (rk.load_model(tmp_path / name / "model")[1] for name in ("whole", "killed"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2), one, other)
