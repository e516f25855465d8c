"""A run that is killed, or whose disk is full, goes on and ends as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

import restkv_jax as rk
from restkv_jax.commands.cli import main
from restkv_jax.pod import LayerGroups
from restkv_jax.pod.adaptation import runs

STEPS = 24


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Arguments of a run, all but its output."""
    directory = tmp_path_factory.mktemp("inputs")
    model = rk.load_model(tiny.write_model(directory / "model"))[0]
    LayerGroups([[0, 0], [0, 1]]).save(directory / "groups.json", model)
    (directory / "text.txt").write_text("".join(chr(97 + i * i % 23) for i in range(1500)))
    args = ["pod", "adapt", "--model", directory / "model", "--groups", directory / "groups.json", "--sink", 2]
    args += ["--recent", 6, "--data", directory / "text.txt", "--sequence-length", 32, "--batch-size", 4]
    args += ["--steps", STEPS, "--checkpoint-every", 2, "--learning-rate", 1e-3, "--save-dtype", "float32"]
    return [str(arg) for arg in args]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The output of a run that nothing disturbs."""
    output = tmp_path_factory.mktemp("whole")
    assert main([*command, "--output", str(output)]) == 0
    return output


def metrics(output):
    """Steps with their losses, and without the speed."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) | {"tokens_per_second": None} for line in lines if line.endswith("}")]


def assert_same_end(output, whole):
    weights = "model/model.safetensors"
    assert (output / weights).read_bytes() == (whole / weights).read_bytes()
    assert metrics(output) == metrics(whole)
    assert [line["step"] for line in metrics(output)] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(command, whole, tmp_path):
    rng = random.Random(0)
    output, cache = tmp_path / "run", tmp_path / "compiled"
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    for last in (5, 11, 17):
        process = subprocess.Popen(
            [sys.executable, "-m", "restkv_jax.commands.cli", *command, "--output", str(output), "--quiet"],
            env=environment,
        )
        while len(metrics(output)) < last and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert metrics(output)[-1]["step"] < STEPS
    assert main([*command, "--output", str(output)]) == 0
    assert_same_end(output, whole)
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [str(STEPS - 2), str(STEPS)]
    assert not list(output.glob(".*"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting needs root")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.slow
def test_full_disk_leaves_the_last_checkpoint(capsys, monkeypatch, command, whole, small_disk):
    def save(manager, state, position, configuration, save=runs.save):
        if position.step == 8:
            manager.wait_until_finished()
            with pytest.raises(OSError), (small_disk / "ballast").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        save(manager, state, position, configuration)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save", save)
        assert main([*command, "--output", str(small_disk / "run"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("restkv: error: ") and error.count("\n") == 1 and "No space left on device" in error
    assert f"the checkpoint of step 6 in {str(small_disk / 'run' / 'checkpoints')!r} is complete" in error

    (small_disk / "ballast").unlink()
    assert main([*command, "--output", str(small_disk / "run"), "--quiet"]) == 0
    assert_same_end(small_disk / "run", whole)


def test_checkpoint_of_another_configuration(capsys, command, whole):
    before = (whole / "model" / "model.safetensors").read_bytes()
    args = [*command, "--output", str(whole), "--seed", "3", "--recent", "5", "--train", "query"]
    assert main(args) == 2
    error = capsys.readouterr().err
    assert "adaptation.seed is 0 there and 3 here" in error and "sharing.recent is 6 there and 5 here" in error
    assert "adaptation.train is '.*' there and 'query' here" in error and "weights" not in error
    assert (whole / "model" / "model.safetensors").read_bytes() == before


def test_other_weights_or_data_are_another_configuration(capsys, command, whole, tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(400) % 200)
    other = tiny.write_model(tmp_path / "model")
    model, params, tokenizer = rk.load_model(other, "float32")
    params["layers"]["input_norm"] *= 1.5
    rk.save_model(other, model, params, tokenizer)
    replaced = {command[3]: str(other), command[command.index("--data") + 1]: str(tmp_path / "tokens.npy")}
    assert main([*[replaced.get(arg, arg) for arg in command], "--output", str(whole)]) == 2
    error = capsys.readouterr().err
    assert "weights is" in error and "data.checksum is" in error and "adaptation" not in error


def test_finished_run_writes_its_model_again(command, whole):
    before = (whole / "model" / "model.safetensors").read_bytes()
    (whole / "model" / "model.safetensors").write_bytes(b"")
    assert main([*command, "--output", str(whole), "--quiet"]) == 0
    assert (whole / "model" / "model.safetensors").read_bytes() == before
