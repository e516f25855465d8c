"""The options of `restkv evaluate`, from the command line and from a file."""

import pathlib
import shlex
import subprocess

import pytest

pytest.importorskip("wonderwords")
pytest.importorskip("yaml")

import yaml

from restkv_jax.commands.evaluate import parse_evaluate
from restkv_jax.commands.options import UsageError
from restkv_jax.evaluate.grid import Grid, cache_configs, policies

ROOT = pathlib.Path(__file__).parents[2]


def test_a_grid_comes_from_a_file_and_the_command_line_goes_before(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(
        "tasks: [haystack]\nmethods: [full, restkv(temporal=mean)]\nbudgets: [2%, 64]\nprompts: 7\nchat: true\n"
        "ask: after\n"
    )
    options, grid = parse_evaluate(
        ["--output", "out", "--grid", str(file), "--prompts", "9", "--lengths", "512", "1024"]
    )
    assert grid == Grid(
        ("haystack",), ("full", "restkv(temporal=mean)"), ("2%", "64"), (512, 1024), prompts=9, chat=True, ask="after"
    )
    assert [config.label for config in cache_configs(grid)] == [
        "full",
        "restkv(temporal=mean) 2%",
        "restkv(temporal=mean) 64",
    ]
    made = policies(grid, 1024)
    assert [policy.budget for policy in made.values()] == [None, 20, 64]
    assert [policy.window for policy in made.values()][1:] == [10, 32], "half of the budget where it would not fit"
    assert (options.batch_size, options.costs, options.errors, options.rates) == (10, True, False, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [single]\n", "task is not an option; did you mean --tasks"),
        ("- single\n", "must be a mapping"),
        ("prompts: many\n", 'unable to convert "many" into int'),
        ("prompts: 2.5\n", "is not an integer"),
        ("depths: [deep]\n", 'unable to convert "deep" into float'),
        ("ask: later\n", 'Invalid value "later"'),
        ("tasks: [", "cannot be read"),
    ],
)
def test_a_file_that_is_no_grid_is_refused(tmp_path, text, message):
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"grid\.yaml") as error:
        parse_evaluate(["--output", "out", "--grid", str(file)])
    assert message in str(error.value)


@pytest.mark.parametrize("bucket", [[], ["gs://mine"]])
def test_the_commands_for_a_tpu_vm_are_those_that_there_are(bucket):
    script, grid_file = ROOT / "scripts" / "tpu_vm_evaluate.sh", ROOT / "docs" / "report" / "grid.yaml"
    shown = ["bash", script, "pod", "zone", "some/model", "my.yaml", *bucket]
    out = subprocess.run(shown, capture_output=True, text=True, check=True).stdout
    assert subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0
    by_hand = [
        shlex.split(line)[-1].removeprefix("--command=").split() for line in out.splitlines() if "env/bin" in line
    ]
    _, job = yaml.safe_load_all(out.partition("<<'YAML'\n")[2].partition("\nYAML\n")[0])
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    commands = [command for command in by_hand if command[0] == "env/bin/restkv"] + [container["command"]]
    assert len(commands) == 3
    for command in commands:
        _, subcommand, *arguments = command
        assert subcommand == "evaluate"
        arguments[arguments.index("--grid") + 1] = str(grid_file)
        options, grid = parse_evaluate(arguments)
        assert grid.model == "some/model" and options.batch_size == 64
    assert out.count("my.yaml") == 3, "every machine gets the grid"
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"/grid", "/results"} and len(pod["volumes"]) == 2
    puts = [line for line in out.splitlines() if "rsync sweep" in line]
    assert len(puts) == 4 * len(bucket) and all("--worker=0" in line for line in puts), (
        "hosts that do not write put nothing"
    )


def test_the_script_for_a_tpu_vm_says_what_it_needs():
    script = ROOT / "scripts" / "tpu_vm_evaluate.sh"
    found = subprocess.run(["bash", script], capture_output=True, text=True)
    assert found.returncode == 2 and "usage:" in found.stdout
