"""Several devices give what one gives, to rounding."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from emulated import environment


@pytest.mark.slow
def test_data_and_tensor_parallel_is_the_same_training(tmp_path):
    script = pathlib.Path(__file__).with_name("adapt_on_meshes.py")
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(
        command, env=environment(4, PYTHONPATH=str(script.parents[1])), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, share in json.loads(done.stdout).items():
        assert share == (1 if name.endswith("norm") else 0.5), name

    def metrics(name):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return np.array([[line["loss"], line["gradient_norm"]] for line in lines])

    assert metrics("one").shape == (4, 2)
    np.testing.assert_allclose(metrics("four"), metrics("one"), rtol=1e-5)
