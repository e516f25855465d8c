"""What a user meets first: programs kept on disk, what the terminal says, and packages that are not there."""

import os
import pty
import subprocess
import sys
import warnings

import jax
import pytest
import tiny

from restkv_jax.commands.cli import main
from restkv_jax.commands.programs import keep_programs

COMMAND = [sys.executable, "-m", "restkv_jax", "generate", "Here we go. " * 9, "--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def programs(monkeypatch):
    """JAX's setting before and after is that there is none."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_users_cache(programs, monkeypatch, tmp_path, recwarn):
    monkeypatch.setenv("HOME", str(tmp_path))
    keep_programs()
    assert programs() == str(tmp_path / ".cache" / "restkv-jax")
    keep_programs()
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    keep_programs()
    assert programs() == "elsewhere" and not recwarn.list


def test_a_place_that_cannot_be_written_to_is_a_warning(programs, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="programs are not kept: '.*file' cannot be written to; set JAX_COMPILATION"):
        keep_programs()
    assert programs() is None


@pytest.mark.slow
def test_a_command_keeps_its_programs_and_finds_them_again(model, tmp_path):
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    kept, said = [], []
    for _ in range(2):
        done = subprocess.run([*COMMAND, "--model", model, "--quiet"], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        said.append(done.stdout)
        kept.append({path.name for path in (tmp_path / "restkv-jax").glob("jit__begin*-cache")})
    assert kept[0] and kept[0] == kept[1] and said[0] == said[1]


@pytest.mark.slow
def test_the_terminal_says_what_is_being_done(model):
    def run(*options):
        ours, theirs = pty.openpty()
        done = subprocess.run([*COMMAND, "--model", model, *options], stdout=subprocess.PIPE, stderr=theirs)
        os.close(theirs)
        said = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the end of a terminal
                break
            if not part:
                break
            said += part
        os.close(ours)
        assert done.returncode == 0
        return done.stdout, said.decode()

    out, said = run()
    assert "loading the model" in said and "reading the prompt" in said
    answer, nothing = run("--quiet")
    assert answer and out.startswith(answer) and nothing == ""


def test_a_warning_is_said_once(monkeypatch, capsys):
    def run(args):
        for text in ("a", "b", "a"):
            with warnings.catch_warnings():  # after which Python forgets what it has shown
                warnings.warn(text, stacklevel=1)

    monkeypatch.setattr("restkv_jax.commands.methods.run", run)
    assert main(["methods"]) == 0
    assert capsys.readouterr().err == "restkv: warning: a\nrestkv: warning: b\n"


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib" or "plot" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", "x"]) == 2
    expected = "restkv: error: `restkv plot` needs the package 'matplotlib': pip install 'restkv-jax[plot]'\n"
    assert capsys.readouterr() == ("", expected)
