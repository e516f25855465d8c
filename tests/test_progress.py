"""Progress off a terminal: plain lines at a sensible rate."""

import pytest
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from restkv_jax import progress


@pytest.fixture
def run(monkeypatch, capsys):
    """Counts to 100, a second each; returns the lines on standard error."""

    def run(**options):
        now = [0.0]
        columns = TextColumn("counting"), BarColumn(), MofNCompleteColumn()
        with progress.make_progress(*columns, get_time=lambda: now[0], **options) as shown:
            task = shown.add_task("", total=100)
            for done in range(101):
                now[0] = float(done)
                shown.update(task, completed=done)
        return capsys.readouterr().err.splitlines()

    return run


def test_lines_at_a_sensible_rate(run):
    assert run() == [f"counting {done:>3}/100" for done in (1, 31, 61, 91, 100)]


def test_quiet_is_quiet(run):
    assert run(quiet=True) == []


def test_a_terminal_has_a_bar(run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert any("━" in line for line in run())
