"""`python -m scripts.bench_kernels` as its user types it."""

import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

import restkv_jax as rk
from restkv_jax.models.checkpoint import EMBEDDED
from restkv_jax.planning.uses import kernel_uses

ROOT = pathlib.Path(__file__).parents[2]


def bench(*options):
    command = [sys.executable, "-m", "scripts.bench_kernels", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_times_what_runs_here(tmp_path):
    done = bench("--length", 256, "--dtype", "float32", "--rounds", 2, "--output", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    assert "attention of a prompt" in done.stdout and "scores of restkv by query" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["device"] == "cpu" and len(found["kernels"]) >= 8
    for line in found["kernels"]:
        assert line["implementation"] == "reference" and line["of_reference"] == 1 and line["seconds"] > 0
        assert line["of_roofline"] is None  # of a CPU nothing is known


@pytest.mark.slow
def test_unknown_slice():
    done = bench("--topology", "v9:2x2")
    assert done.returncode == 2 and "v9" in done.stderr and "Traceback" not in done.stderr


def test_bytes_that_cannot_be_avoided():
    config = rk.build_model(EMBEDDED).config
    heads, group, dim = (
        config.num_key_value_heads,
        config.num_attention_heads // config.num_key_value_heads,
        config.head_dim,
    )
    found = {use.purpose: use for use in kernel_uses(config, 4096, jnp.bfloat16)}
    keys = 2 * heads * 4096 * dim
    small = 2**18  # queries and positions
    scores = 4 * heads * group * 4096
    assert 2 * keys + scores <= found["scores of snapkv"].least_bytes() <= 2 * keys + scores + small
    gram = 4 * heads * group * dim**2
    assert 0 <= found["scores of restkv"].least_bytes() - (4 * keys + scores + gram) <= small
    chunk = 2 * heads * group * 1024 * dim
    assert 0 <= found["attention of a prompt"].least_bytes() - (2 * keys + 2 * chunk) <= small
    assert found["attention of a prompt"].operations == 4 * heads * group * 1024 * 4096 * dim
