"""Training of the embedded model: lists whose items come in any order, their loss, and starting from a model."""

import importlib
import itertools
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("wonderwords")
pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tyro")

import restkv_jax as rk

SCRIPTS = str(pathlib.Path(__file__).parents[1] / "scripts")
LISTS = ("values", "queries", "tracking", "bare-values", "bare-queries", "bare-tracking")


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, SCRIPTS)
    try:
        return importlib.import_module("train_embedded"), importlib.import_module("embedded_data")
    finally:
        sys.path.remove(SCRIPTS)


@pytest.fixture(scope="module")
def vocabulary(scripts):
    return scripts[1].Vocabulary(rk.load_model()[2])


def draw(data, vocabulary, form):
    stage = data.Stage("lists", "text", batch=2, length=288, targets=48, formats=((form, 1.0),), noise=0.7)
    return stage, data.make_batch(stage, vocabulary, np.random.default_rng(0))


@pytest.mark.parametrize("form", LISTS)
def test_every_item_not_said_yet_is_right(scripts, vocabulary, form):
    _, data = scripts
    _, batch = draw(data, vocabulary, form)
    for tokens, index, answer, target in zip(batch.tokens, batch.index, batch.answer, batch.target, strict=True):
        first = answer == 0
        np.testing.assert_array_equal(tokens[index[first] + 1], target[first][:, 0])
        several = target[first][(target[first] >= 0).sum(axis=1) > 1]
        sizes = (several >= 0).sum(axis=1).tolist()
        assert sizes == list(range(5 if "tracking" in form else 4, 1, -1))
        assert all(set(later[later >= 0]) < set(sooner) for sooner, later in itertools.pairwise(several))


def test_the_loss_adds_the_probabilities_of_what_is_right(scripts, vocabulary):
    train, data = scripts
    model, params, tokenizer = rk.load_model(dtype=jnp.float32)
    _, batch = draw(data, vocabulary, "bare-values")
    size = len(tokenizer)
    anything, right = train.answer_loss(model.config, params, batch, size)
    one = batch._replace(target=batch.target.copy())
    one.target[..., 1:] = -1
    ordered, ordered_right = train.answer_loss(model.config, params, one, size)
    assert anything < ordered
    assert np.all(np.asarray(right) >= np.asarray(ordered_right))


def test_exact_shares_count_whole_answers_by_format(scripts, vocabulary):
    train, data = scripts
    stage, batch = draw(data, vocabulary, "values")
    right = np.ones(batch.answer.shape, bool)
    assert train.exact_shares(stage, batch, right) == {"all": 1.0, "values": 1.0}
    right[0] = False
    assert train.exact_shares(stage, batch, right)["values"] < 1.0


def test_a_run_that_starts_from_a_model_warms_up_there(scripts):
    train, _ = scripts
    options = train.Options(run=pathlib.Path("run"), start=pathlib.Path("model"), start_step=100, steps=1000)
    assert train.rate_scale(options, 100, 1.0) == pytest.approx(1 / options.warmup)
    assert train.rate_scale(options, 100 + options.warmup, 1.0) == 1.0
    assert train.rate_scale(options, 1000, 1.0) == 0.0
