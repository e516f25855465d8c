"""The task without answers: divergences against decoding by hand, their table, and texts that are not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

pytest.importorskip("wonderwords")
pytest.importorskip("yaml")

import restkv_jax as rk
from restkv_jax.commands.cli import main
from restkv_jax.evaluate.grid import Grid, policies
from restkv_jax.evaluate.report.summary import rank_divergences
from restkv_jax.evaluate.results import read_lines, read_results
from restkv_jax.evaluate.sweep import prompt_set_seed
from restkv_jax.evaluate.tasks.texts import NUM_FOLLOWING, cut_pieces
from restkv_jax.models import logits, read

METHODS = ("full", "snapkv(window=8)", "restkv(window=8, while_generating=true)")
TEXT = "".join(f"Line {i} says that {i * i} is the square of {i}. " for i in range(60))
LENGTH, COUNT = 96, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


def evaluate(output, model, *args):
    grid = ["--methods", *METHODS, "--budgets", "25%", "--lengths", str(LENGTH), "--prompts", str(COUNT)]
    given = ["--output", str(output), "--model", model, *grid, "--compilation-cache", "none", "--no-costs", *args]
    return main(["evaluate", *given])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, model, text):
    directory = tmp_path_factory.mktemp("sweep") / "out"
    assert evaluate(directory, model, "--tasks", "divergence", "--text", text, "--batch-size", "2", "--quiet") == 0
    return directory


def divergence_by_hand(decoder, params, piece, policy):
    """Teacher-forced, token by token, against one forward pass over the whole text."""
    tokens = jnp.asarray([[*piece.prefix, *piece.following]])
    of_all = jax.nn.log_softmax(logits(decoder, params, read(decoder, params, tokens)[0])[0, LENGTH:])
    _, cache = rk.prefill(decoder, params, jnp.asarray([piece.prefix]), None, policy, NUM_FOLLOWING)
    found = []
    for token, full in zip(piece.following, np.asarray(of_all, np.float64), strict=True):
        scores, cache = rk.decode_step(decoder, params, jnp.asarray([token]), cache)
        evicted = np.asarray(jax.nn.log_softmax(scores)[0], np.float64)
        found.append((np.exp(full) * (full - evicted)).sum())
    return np.mean(found)


def test_divergences_are_those_of_decoding_by_hand(sweep, model):
    decoder, params, tokenizer = rk.load_model(model, dtype=jnp.float32)
    seed = prompt_set_seed(0, "divergence", LENGTH, None)
    pieces = cut_pieces(tokenizer, TEXT, LENGTH, COUNT, seed)
    lines = read_lines(sweep)
    for config, policy in policies(Grid(methods=METHODS, budgets=("25%",)), LENGTH).items():
        found = lines["divergence", LENGTH, None, COUNT - 1].divergences[config.label]
        if config.label == "full":
            assert found == 0
            continue
        expected = divergence_by_hand(decoder, params, pieces[-1], policy)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-7) and expected > 1e-5, config.label


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
    expected = f"{nats[label].mean():.3f} ± {nats[label].std(ddof=1) / COUNT**0.5:.3f}"
    assert evaluate(sweep, model, "--tasks", "divergence", "--text", text, "--batch-size", "2") == 0
    assert expected in capsys.readouterr().out
    report = (sweep / "report.md").read_text()
    assert expected in report and "nats per token" in report and "## Scores" not in report
    by_config = {
        cell.config: dict(enumerate(values.nats)) for cell, values in results.divergences.items() if cell.config.budget
    }
    standings = rank_divergences(by_config, list(by_config))
    best = min(by_config, key=lambda config: nats[config.label].mean())
    assert [config for config, standing in standings.items() if standing.is_best] == [best]


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
