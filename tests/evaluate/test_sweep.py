"""Sweeps as a user types them: grids, batches, resumption, several processes, bad input."""

import errno
import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time

import filelock
import numpy as np
import pytest
import tiny
from emulated import environment

pytest.importorskip("wonderwords")
pytest.importorskip("yaml")

import jax.numpy as jnp

import restkv_jax as rk
from restkv_jax.commands import evaluate as commands
from restkv_jax.commands.cli import main
from restkv_jax.evaluate import generate_texts, make_prompts
from restkv_jax.evaluate import sweep as sweeping
from restkv_jax.evaluate.batching import even_size
from restkv_jax.evaluate.grid import Grid
from restkv_jax.evaluate.results import read_lines, read_results
from restkv_jax.evaluate.sweep import (
    PromptSet,
    RunSettings,
    batches,
    encode_prompts,
    prompt_set_seed,
    prompt_sets,
)

ROOT = pathlib.Path(__file__).parents[2]
METHODS = "--methods full snapkv laprox --budgets 25%"
SMALL = shlex.split(f"{METHODS} --lengths 256 --prompts 5 --batch-size 2 --seed 3 --no-costs --no-errors")


def evaluate(output, *args):
    return main(["evaluate", "--output", str(output), "--compilation-cache", "none", "--quiet", *SMALL, *args])


def said(directory):
    return {item: line.said for item, line in read_lines(directory).items()}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A finished sweep of two tasks."""
    directory = tmp_path_factory.mktemp("sweep") / "out"
    assert evaluate(directory, "--tasks", "single", "multikey") == 0
    return directory


@pytest.mark.slow
def test_every_prompt_is_answered_as_alone(sweep):
    model, params, tokenizer = rk.load_model(dtype=jnp.float32)
    lines = read_lines(sweep)
    assert len(lines) == 10
    prompts = make_prompts("multikey", tokenizer, 256, 5, prompt_set_seed(3, "multikey", 256, None))
    alone = {"snapkv 25%": rk.snapkv(64), "laprox 25%": rk.laprox(64), "full": rk.full()}
    texts = generate_texts(model, params, tokenizer, prompts, list(alone.values()), batch_size=1)
    for label, expected in zip(alone, texts, strict=True):
        found = [lines["multikey", 256, None, i].said[label] for i in range(5)]
        assert found == expected
    results = read_results(sweep)
    assert {(cell.task, cell.config.label) for cell in results.cells} == {
        (task, label) for task in ("single", "multikey") for label in alone
    }
    for scores in results.cells.values():
        np.testing.assert_array_equal(scores.index, np.arange(5))
    assert (sweep / "report.html").is_file()


@pytest.mark.slow
def test_batches_of_another_size_give_the_same(sweep, tmp_path):
    assert evaluate(tmp_path / "out", "--tasks", "single", "multikey", "--batch-size", "5", "--together", "1") == 0
    assert said(tmp_path / "out") == said(sweep)


def test_a_broken_last_line_is_redone(sweep, tmp_path):
    (tmp_path / "sweep.json").write_text((sweep / "sweep.json").read_text())
    lines = (sweep / "results-0.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results-0.jsonl").write_text("".join(lines[:3]) + lines[3][:50])
    assert evaluate(tmp_path, "--tasks", "single", "multikey") == 0
    assert said(tmp_path) == said(sweep)
    assert set(map(str.rstrip, lines[:3])) < set((tmp_path / "results-0.jsonl").read_text().splitlines())


def test_results_of_another_grid_are_refused(sweep, capsys):
    before = (sweep / "results-0.jsonl").read_text()
    assert evaluate(sweep, "--tasks", "single") == 2
    message = capsys.readouterr().err
    assert "holds results of another sweep" in message and "tasks ['single', 'multikey'] there" in message
    assert (sweep / "results-0.jsonl").read_text() == before


def test_a_sweep_with_options_of_another_version_is_refused(sweep, tmp_path, capsys):
    described = json.loads((sweep / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps(described | {"grid": described["grid"] | {"newer": 1}}))
    assert evaluate(tmp_path, "--tasks", "single", "multikey") == 2
    assert "holds results of another sweep (newer 1 there, None here)" in capsys.readouterr().err


def test_a_length_too_small_for_a_task_is_refused_before_anything_is_measured(tmp_path, capsys):
    assert evaluate(tmp_path / "out", "--tasks", "single", "common_words", "--lengths", "128") == 2
    assert "num_tokens=128 cannot hold what task='common_words' asks" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_own_prompts_are_bucketed_and_what_cannot_be_read_is_named(tmp_path, capsys):
    own = tmp_path / "own.jsonl"
    values = [{"prompt": f"The answer is {i}. " * (5 + 40 * i), "answers": [str(i)]} for i in range(3)]
    own.write_text("".join(json.dumps(value) + "\n" for value in values))
    missing, empty = str(tmp_path / "missing.jsonl"), tmp_path / "empty.jsonl"
    empty.write_text('{"prompt": "Who?", "answers": "nobody"}\n')
    assert evaluate(tmp_path / "out", "--tasks", missing, str(empty), str(own)) == 0
    errors = capsys.readouterr().err
    assert f"task {missing!r} is left out" in errors
    assert f"task {str(empty)!r} is left out" in errors and '"answers", a list' in errors
    lines = read_lines(tmp_path / "out")
    assert sorted(item.index for item in lines) == [0, 1, 2]
    for item, line in lines.items():
        assert line.prompt_tokens <= item.length == rk.bucket_length(line.prompt_tokens)
    own.write_text(own.read_text() + '{"prompt": "More?", "answers": ["no"]}\n')
    assert evaluate(tmp_path / "out", "--tasks", missing, str(empty), str(own)) == 2
    assert "the files" in capsys.readouterr().err


def test_batches_are_no_larger_than_there_are_prompts(sweep):
    assert [even_size(count, 8) for count in (1, 4, 8, 9, 23)] == [1, 4, 8, 5, 8]
    sizes = [size for _, _, size in batches([PromptSet("single", 256, None, 23)], RunSettings(10))]
    assert sizes == [8, 8, 7]
    lines = read_lines(sweep).values()
    assert {bool(line.read_seconds) for line in lines} == {True}, "2, 2 and 1 of 5 prompts"


def test_report_and_table_come_before_what_else_is_measured(tmp_path, monkeypatch, capsys):
    def measure_costs(*args):
        assert "Scores" in (tmp_path / "out" / "report.md").read_text()
        assert "25%" in capsys.readouterr().out
        raise ValueError("seen")

    monkeypatch.setattr(commands, "measure_costs", measure_costs)
    args = ["--output", str(tmp_path / "out"), *SMALL, "--costs", "--tasks", "single"]
    assert main(["evaluate", "--compilation-cache", "none", *args]) == 2
    report = (tmp_path / "out" / "report.html").read_text()
    assert "One prompt: each row is a layer" in report and "Reading a prompt of a batch" in report


def test_places_that_cannot_be_written_are_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "out", pathlib.Path("/proc/absent/out")):
        assert evaluate(place, "--tasks", "single") == 2
        err = capsys.readouterr().err
        assert str(place) in err and "give" in err and err.count("\n") == 1


def test_a_full_disk_is_one_line_and_the_sweep_goes_on_from_there(sweep, tmp_path, capsys, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert evaluate(tmp_path, "--tasks", "single", "multikey") == 2
    err = capsys.readouterr().err
    assert f"{str(tmp_path / 'results-0.jsonl')!r} cannot be written (No space left on device)" in err
    assert "the same command goes on" in err and err.count("\n") == 1
    assert evaluate(tmp_path, "--tasks", "single", "multikey") == 0
    assert said(tmp_path) == said(sweep)


def test_options_that_would_not_count_are_refused(tmp_path, capsys):
    dense, params, tokenizer = rk.load_model(str(tiny.write_model(tmp_path / "model")))
    shared = dense.clone(sharing=rk.pod.Sharing(rk.pod.LayerGroups([[0, 0], [0, 0]]), 4, 32))
    rk.save_model(tmp_path / "adapted", shared, params, tokenizer)
    for options, words in {
        ("--coordinator", "localhost:1"): "go with --distributed, which is missing",
        ("--process-id", "1"): "go with --distributed, which is missing",
        ("--model", str(tmp_path / "adapted"), "--errors"): "--errors is for models that do not share keys",
    }.items():
        assert evaluate(tmp_path / "out", "--tasks", "single", *options) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    assert evaluate(tmp_path / "out", "--tasks", "multivalue", "divergence", "--depths", "0.5") == 2
    err = capsys.readouterr().err
    assert "depths are only for tasks that ask for one needle" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_results_that_another_process_writes_are_one_line(tmp_path, capsys):
    with filelock.FileLock(tmp_path / "results-0.lock"):
        assert evaluate(tmp_path, "--tasks", "single") == 2
    err = capsys.readouterr().err
    assert f"another process writes {str(tmp_path / 'results-0.jsonl')!r}; wait for it" in err and err.count("\n") == 1


def test_a_file_that_fails_while_prompts_are_measured_is_named(tmp_path, capsys, monkeypatch):
    def measure(*_):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "weights.safetensors")

    monkeypatch.setattr(sweeping, "measure_batch", measure)
    assert evaluate(tmp_path, "--tasks", "single") == 2
    err = capsys.readouterr().err
    assert "weights.safetensors" in err and "results" not in err


def test_needle_depths_are_measured_where_a_task_has_one_needle(tmp_path):
    grid = Grid(tasks=("single", "multiquery"), depths=(0.0, 0.5, 1.0), prompts=7)
    _, _, tokenizer = rk.load_model(dtype=jnp.float32)
    found = {(prompt_set.task, prompt_set.depth): prompt_set.num_prompts for prompt_set in prompt_sets(grid, tokenizer)}
    assert found == {("single", 0.0): 7, ("single", 0.5): 7, ("single", 1.0): 7, ("multiquery", None): 7}


def test_no_two_places_ask_for_the_same_needles():
    grid = Grid(tasks=("single", "multikey"), lengths=(256, 512), depths=(0.0, 1.0), prompts=3)
    _, _, tokenizer = rk.load_model(dtype=jnp.float32)
    found = [encode_prompts(grid, tokenizer, prompt_set).prompts for prompt_set in prompt_sets(grid, tokenizer)]
    answers = [prompt.answers for prompts in found for prompt in prompts.values()]
    assert len(set(answers)) == len(answers) == 24


def start(output, *args, devices=1):
    command = [sys.executable, "-m", "restkv_jax.commands.cli", "evaluate", "--output", str(output), *SMALL, *args]
    command += ["--compilation-cache", str(output) + "-programs"]
    given = environment(devices, JAX_ENABLE_COMPILATION_CACHE="true")
    return subprocess.Popen(command, env=given, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_results(sweep, tmp_path):
    for run in range(3):
        process = start(tmp_path / "out", "--tasks", "single", "multikey", "--quiet")
        while process.poll() is None and run < 2:
            time.sleep(0.02)
            if (tmp_path / "out").is_dir() and len(read_lines(tmp_path / "out")) > 3 * run:
                process.send_signal(signal.SIGKILL)
                break
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert said(tmp_path / "out") == said(sweep)
    tables = [read_results(directory).cells for directory in (sweep, tmp_path / "out")]
    assert list(tables[0]) == list(tables[1])
    for one, other in zip(*(table.values() for table in tables), strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def start_two(output, *args):
    """Two processes with four devices each, on whose mesh two devices share the weights."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    joined = "--distributed", "--coordinator", coordinator, "--num-processes", "2", "--quiet", "--model-parallel", "2"
    return [start(output, *args, *joined, "--process-id", str(p), devices=4) for p in range(2)]


@pytest.mark.slow
def test_two_processes_of_four_devices_give_what_one_device_gives(sweep, tmp_path):
    for process in start_two(tmp_path / "out", "--tasks", "single", "multikey"):
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors
    assert [path.name for path in (tmp_path / "out").glob("*.jsonl")] == ["results-0.jsonl"]
    assert (tmp_path / "out" / "report.html").is_file()
    assert said(tmp_path / "out") == said(sweep)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_within_a_minute_and_the_sweep_goes_on(sweep, tmp_path, killed):
    processes = start_two(tmp_path / "out", "--tasks", "single", "multikey")
    while not ((tmp_path / "out").is_dir() and read_lines(tmp_path / "out")):
        time.sleep(0.05)
        assert all(process.poll() is None for process in processes)
    processes[killed].send_signal(signal.SIGKILL)
    died = time.monotonic()
    _, errors = processes[1 - killed].communicate(timeout=60)
    assert processes[1 - killed].returncode != 0 and time.monotonic() - died < 60
    assert "another process has ended" in errors or "distributed" in errors, errors
    processes[killed].communicate()
    assert evaluate(tmp_path / "out", "--tasks", "single", "multikey") == 0
    assert said(tmp_path / "out") == said(sweep)
