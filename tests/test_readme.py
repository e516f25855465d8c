"""The README's examples run as they stand."""

import pathlib
import re
import shlex

import pytest

import restkv_jax as rk
from restkv_jax.commands.cli import main

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_examples_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(rk.METHODS, "value_norm", None)  # taken out again afterwards
    namespace = {"__name__": "readme"}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    for line in "".join(blocks("shell")).splitlines():
        if line.startswith("restkv "):
            assert main(shlex.split(line)[1:]) == 0, line
    assert namespace["answer"].strip() == "4821937"
    assert (tmp_path / "kept.png").is_file()
    assert main(["generate", "--file", "prompt.txt", "--method", "value_norm", "--budget", "9%", "--window", "16"]) == 0


def test_every_method_is_in_the_table():
    table = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert sorted(table) == sorted(rk.METHODS)


def test_named_targets_exist():
    makefile = (pathlib.Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "".join(blocks("shell")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
