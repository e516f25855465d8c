"""The task without answers: divergences against decoding by hand, their table, and texts that are not there."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from emulated import environment

pytest.importorskip("wonderwords")
pytest.importorskip("yaml")

import restkv_jax as rk
from restkv_jax.commands.cli import main
from restkv_jax.evaluate.grid import CacheConfig, Grid, policies
from restkv_jax.evaluate.report.plots import plot_divergence
from restkv_jax.evaluate.report.summary import rank_divergences
from restkv_jax.evaluate.results import read_lines, read_results
from restkv_jax.evaluate.sweep import prompt_set_seed
from restkv_jax.evaluate.tasks.texts import NUM_FOLLOWING, cut_pieces
from restkv_jax.models import logits, read

METHODS = ("full", "snapkv(window=8)")
WHILE_GENERATING = "restkv(window=8, while_generating=true)"
TEXT = "".join(f"Line {i} says that {i * i} is the square of {i}. " for i in range(60))
LENGTH, COUNT = 96, 3
OWN = [{"prompt": f"No. {10**i} is {i}. " * 5, "question": "Which?", "answers": [str(i)]} for i in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


def evaluate(output, model, *args):
    methods = [] if "--methods" in args else ["--methods", *METHODS]
    grid = [*methods, "--budgets", "25%", "--lengths", str(LENGTH), "--prompts", str(COUNT)]
    given = ["--output", str(output), "--model", model, *grid, "--compilation-cache", "none", "--no-costs", *args]
    return main(["evaluate", *given])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, model, text):
    directory = tmp_path_factory.mktemp("sweep") / "out"
    assert evaluate(directory, model, "--tasks", "divergence", "--text", text, "--batch-size", "2", "--quiet") == 0
    return directory


def divergence_by_hand(decoder, params, piece, policy, cache_dtype=None):
    """Teacher-forced, token by token, against one forward pass over the whole text."""
    tokens = jnp.asarray([[*piece.prefix, *piece.following]])
    of_all = jax.nn.log_softmax(logits(decoder, params, read(decoder, params, tokens)[0])[0, LENGTH:])
    _, cache = rk.prefill(
        decoder, params, jnp.asarray([piece.prefix]), None, policy, NUM_FOLLOWING, cache_dtype=cache_dtype
    )
    found = []
    for token, full in zip(piece.following, np.asarray(of_all, np.float64), strict=True):
        scores, cache = rk.decode_step(decoder, params, jnp.asarray([token]), cache)
        evicted = np.asarray(jax.nn.log_softmax(scores)[0], np.float64)
        found.append((np.exp(full) * (full - evicted)).sum())
    return np.mean(found)


def check_by_hand(directory, model, method, cache_dtype=None):
    decoder, params, tokenizer = rk.load_model(model, dtype=jnp.float32)
    piece = cut_pieces(tokenizer, TEXT, LENGTH, COUNT, prompt_set_seed(0, "divergence", LENGTH, None))[-1]
    ((config, policy),) = policies(Grid(methods=(method,), budgets=("25%",)), LENGTH).items()
    found = read_lines(directory)["divergence", LENGTH, None, COUNT - 1].divergences[config.label]
    expected = divergence_by_hand(decoder, params, piece, policy, cache_dtype)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-7) and expected > 1e-5


def test_divergences_are_those_of_decoding_by_hand(sweep, model):
    check_by_hand(sweep, model, METHODS[1])
    assert all(line.divergences["full"] == 0 for line in read_lines(sweep).values())


@pytest.mark.slow
def test_divergences_of_eviction_while_generating_are_those_of_decoding_by_hand(tmp_path, model, text):
    args = "--tasks", "divergence", "--text", text, "--methods", WHILE_GENERATING, "--quiet"
    assert evaluate(tmp_path / "out", model, *args) == 0
    check_by_hand(tmp_path / "out", model, WHILE_GENERATING)


@pytest.mark.slow
def test_divergences_of_quantised_caches_are_from_the_full_cache_as_it_is(tmp_path, model, text):
    how, methods = "int4(group_size=16,residual=8)", (METHODS[1], "full")
    args = "--tasks", "divergence", "--text", text, "--methods", *methods, "--cache-dtype", how, "--quiet"
    assert evaluate(tmp_path / "out", model, *args) == 0
    check_by_hand(tmp_path / "out", model, METHODS[1], how)
    assert all(line.divergences["full"] > 0 for line in read_lines(tmp_path / "out").values())


def test_pieces_are_of_the_text_and_are_followed_by_what_follows_there():
    tokenizer = tiny.tokenizer()
    pieces = cut_pieces(tokenizer, TEXT, 100, 20, seed=1)
    whole = tokenizer(TEXT)["input_ids"]
    starts = []
    for prefix, following in pieces:
        assert (len(prefix), len(following)) == (100, NUM_FOLLOWING)
        starts += [i for i in range(len(whole)) if whole[i : i + 164] == [*prefix, *following]]
    assert len(starts) == 20 and min(np.diff(starts)) >= NUM_FOLLOWING
    assert pieces == cut_pieces(tokenizer, TEXT, 100, 20, seed=1) != cut_pieces(tokenizer, TEXT, 100, 20, seed=2)


def test_table_has_means_and_standard_errors_and_the_lowest_is_best(sweep, capsys, model, text):
    results = read_results(sweep)
    nats = {cell.config.label: values.nats for cell, values in results.divergences.items()}
    label = "snapkv(window=8) 25%"
    expected = f"{nats[label].mean():.4f} ± {nats[label].std(ddof=1) / COUNT**0.5:.4f}"
    assert evaluate(sweep, model, "--tasks", "divergence", "--text", text, "--batch-size", "2") == 0
    assert expected in capsys.readouterr().out
    report = (sweep / "report.md").read_text()
    assert expected in report and "nats per token" in report and "## Scores" not in report


def test_the_lowest_divergence_is_best_and_what_is_surely_higher_differs():
    random = np.random.default_rng(0).random
    nats = {"laprox": 1 + 0.1 * random(12), "h2o": 0.5 + 0.1 * random(12)}
    nats["snapkv"] = nats["h2o"] + 0.001 + 0.05 * (-1.0) ** np.arange(12)
    by_config = {CacheConfig(name, "64"): dict(enumerate(values)) for name, values in nats.items()}
    standings = rank_divergences(by_config, list(by_config))
    assert [config.method for config, standing in standings.items() if standing.is_best] == ["h2o"]
    assert [config.method for config, standing in standings.items() if standing.differs_from_best] == ["laprox"]
    for config, standing in standings.items():
        assert standing.estimate.mean == pytest.approx(nats[config.method].mean())


def test_picture_has_means_by_budget_with_standard_errors(sweep):
    results = read_results(sweep)
    nats = [values.nats for cell, values in results.divergences.items() if cell.config.method == METHODS[1]]
    axis = plot_divergence(results, METHODS[1:2]).axes[0]
    np.testing.assert_allclose(axis.get_lines()[0].get_ydata(), [values.mean() for values in nats])
    ((_, low), (_, high)) = axis.collections[0].get_segments()[0]
    assert high - low == pytest.approx(2 * nats[0].std(ddof=1) / COUNT**0.5)
    assert axis.get_title(loc="left") == f"divergence, {LENGTH} tokens"


@pytest.mark.slow
def test_several_devices_find_the_same(tmp_path, model, text):
    """A paged cache among them, whose arrays have no axis of rows, and prompts that are asked afterwards."""
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(line) + "\n" for line in OWN))
    found = []
    for devices in (1, 4):
        output = tmp_path / f"of-{devices}"
        args = ["--tasks", "divergence", str(own), "--text", text, "--ask", "after", "--methods", "laprox(window=8)"]
        args += ["snapkv(window=8)", "--budgets", "25%", "--lengths", str(LENGTH), "--prompts", "5", "--no-costs"]
        command = [sys.executable, "-m", "restkv_jax", "evaluate", *args, "--output", str(output), "--model", model]
        done = subprocess.run([*command, "--quiet"], env=environment(devices), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(read_lines(output))
    one, four = found
    assert len(one) == 5 + len(OWN) and one.keys() == four.keys()
    for item, line in one.items():
        assert line.said == four[item].said
        assert line.divergences == pytest.approx(four[item].divergences, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks", "divergence", "--text", "absent.txt"], "text 'absent.txt' cannot be read"),
        (["--tasks", "divergence", "--prompts", "5000"], "enough for"),
        (["--tasks", "single"], "is only for the task 'divergence'"),
    ],
)
def test_texts_that_cannot_be_measured_are_one_line(tmp_path, capsys, model, text, args, message):
    assert evaluate(tmp_path / "out", model, "--text", text, *args) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
