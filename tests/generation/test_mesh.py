"""On a mesh of emulated devices every method gives what one device gives, and moves no keys, values or cache."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("on_meshes.py")


@pytest.mark.slow
@pytest.mark.parametrize(("data", "model"), [(1, 4), (2, 2)])
def test_every_method_on_a_mesh(data, model):
    command = [sys.executable, str(SCRIPT), str(data), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[2], check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) > 10
    for line in lines:
        assert line["tokens"] and line["kept"] and line["error"] < 1e-5, line
        assert not line["decode"], line
        # budgets that layers and heads share are compared by counts of a few integers
        assert all(shape.startswith("s32") for shape in line["prefill"]), line
