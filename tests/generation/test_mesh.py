"""On a mesh of emulated devices every method gives what one device gives, and moves no keys, values or cache."""

import json
import pathlib
import subprocess
import sys

import pytest
from emulated import environment

SCRIPT = pathlib.Path(__file__).with_name("on_meshes.py")


@pytest.mark.slow
def test_every_method_on_meshes():
    command = [sys.executable, str(SCRIPT), "1x8", "2x4", "8x1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(8), check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["mesh"] for line in lines} == {"1x8", "2x4", "8x1"} and len(lines) > 30
    for line in lines:
        assert line["tokens"] and line["kept"] and line["error"] < 1e-5, line
        # where two devices hold a KV head, pages and distant keys are read for all of its query heads on both
        queries = "f32[1,8,1,1,2,1" if line["mesh"] == "1x8" else "nothing"
        assert all(shape.startswith(queries) for shape in line["decode"]), line
        # budgets that layers and heads share are compared by counts of a few integers; tokens of a chunk are gathered
        rows = 8 // int(line["mesh"][0])
        stream = {f"f32[1,{rows},56,32]", f"f32[{rows},56,32]", f"f32[2,{rows},1,32]"}
        assert all(shape.startswith("s32") or shape in stream for shape in line["prefill"]), line
