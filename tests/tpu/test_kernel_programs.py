"""Kernels compile for every TPU, and read keys and values as often as they must."""

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
SCRIPT = pathlib.Path(__file__).with_name("kernel_programs.py")
KEYS = VALUES = 8 * 131072 * 128 * 2
WRITTEN = 8 * 4 * 131072 * 4
"""Bytes of a layer's keys, of its values, and of scores of all query heads."""
BESIDE = (2 * 2 * 2 + 4) * 131072 * 8
"""Bytes of the scales of quantised keys, one per channel of 64 tokens, and values, one per 64 channels; positions."""
LEAST = {
    "column_sums": 2 * KEYS,
    "column_row_norms": 2 * KEYS + VALUES,
    "averaged_attention_removal_error": 2 * KEYS + 2 * VALUES,
    "averaged_removal_error": 2 * KEYS + 2 * VALUES,
    "attention_centres": 8 * KEYS,  # once for as many queries as the chip holds the attention of
    "read_quantised int8": (KEYS + VALUES) / 2 + BESIDE,
    "read_quantised_pages int8": (KEYS + VALUES) / 2 + BESIDE,
    "read_quantised int4": (KEYS + VALUES) / 4 + BESIDE,
    "read_quantised_pages int4": (KEYS + VALUES) / 4 + BESIDE,
}


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_programs_read_what_they_must_and_sort_nothing(topology):
    # without the flags of the other tests, by which compilers optimise nothing
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[2]), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, str(SCRIPT), topology], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {one["name"]: one for one in map(json.loads, done.stdout.splitlines())}
    assert not any(one["sorts"] for one in found.values())
    selection = found.pop("selection")
    kept = 2 * 8 * 1024 * 128 * 2
    assert kept < selection["read"] + selection["written"] < 25 * kept, (
        "scores stay in the chip, or pass it a few times"
    )
    assert found.keys() == LEAST.keys()
    for name, one in found.items():
        gathered = BESIDE * ("pages" in name)  # what is beside the codes is taken out of its pages first
        assert LEAST[name] <= one["read"] <= 1.1 * (LEAST[name] + gathered), name
        assert one["written"] <= 3 * WRITTEN, name  # scores once or twice, and what is of queries, padded to registers
