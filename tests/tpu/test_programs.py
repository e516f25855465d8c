"""Programs of real shapes, compiled for TPUs that are not there: what they hold, read and send.

Layers are scanned, so a program takes as long to compile with all layers as with few, and all are there. Prompts are
shorter than those that the slices are for, which take minutes to compile: `docs/scale.md` has those.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: make test-tpu"),
]
CONFIGS = pathlib.Path(__file__).parents[2] / "docs" / "scale"
CASES = {
    "8B on v5e, 1 x 8": "llama_3.1_8b v5e:2x4 --method restkv",
    "8B on v5e, 2 x 4, pages": "llama_3.1_8b v5e:2x4 --method laprox --batch-size 2 --model-parallel 4",
    "8B on v6e, 1 x 8, shared keys": "llama_3.1_8b v6e:2x4 --method snapkv --pod-groups GROUPS",
    "8B on v5e, 1 x 16": "llama_3.1_8b v5e:4x4 --method restkv",
    "70B on v6e, 1 x 8": "llama_3.1_70b v6e:2x4 --method restkv",
    "70B on v5p, 1 x 8, int8": "llama_3.1_70b v5p:2x2x2 --method restkv --cache-dtype int8",
}


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Blocks of four layers for one half of the KV heads and of two for the other."""
    import restkv_jax as rk

    model = rk.build_model(CONFIGS / "llama_3.1_8b.json")
    blocks = [[layer - layer % (4 if head % 2 else 2) for head in range(8)] for layer in range(32)]
    path = tmp_path_factory.mktemp("groups") / "groups.json"
    rk.pod.LayerGroups(blocks).save(path, model)
    return path


def plan(model, topology, *options):
    # without the flags of the other tests, by which compilers optimise nothing
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    arguments = ["--model", CONFIGS / f"{model}.json", "--topology", topology, "--length", 4096, "--budget", 1024]
    command = [sys.executable, "-m", "restkv_jax", "plan", "--json", *map(str, arguments), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_a_slice_holds_reads_and_sends_no_more_than_it_must(case, groups):
    found = plan(*CASES[case].replace("GROUPS", str(groups)).split())
    assert len(found) == 2
    for name, one in found.items():
        assert one["prefill"]["fits"] and one["step"]["fits"], name
        held = one["weights"] + one["cache"]
        assert one["step"]["total"] <= 1.02 * held + 2**28, f"{name}: the cache is not rewritten in place"
        assert one["step"]["read"] <= 1.1 * one["step"]["floor"], name
        assert one["step"]["sent"] <= 1.05 * one["step"]["megatron"], (name, one["step"]["collectives"])
        assert one["prefill"]["sent"] <= 1.05 * one["prefill"]["megatron"], (name, one["prefill"]["collectives"])
        assert not {"all-to-all", "ragged-all-to-all"} & set(one["prefill"]["collectives"]), name
        assert set(one["step"]["collectives"]) == {"all-reduce"}, name


def test_what_does_not_fit_is_said():
    found = plan("llama_3.1_70b", "v5e:2x2")
    for one in found.values():
        assert not one["prefill"]["fits"] and not one["step"]["fits"]
        assert one["step"]["total"] > one["available"]
