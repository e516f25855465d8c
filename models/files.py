"""Small files of a checkpoint, JSON objects in UTF-8 whatever the locale; files that are never half-written."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ValueError: what is not JSON in UTF-8, is nested too deeply, or is not an object; a git-lfs pointer.
      OSError: a file that cannot be read.
    """
    refuse_pointer(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is not valid JSON of a checkpoint: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a JSON {type(fields).__name__} where an object belongs; download it again")
    return fields


def write_json(path: pathlib.Path, fields: dict[str, Any]) -> None:
    """Writes a JSON object."""
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def written_whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file to write beside `path`, whose place it takes once the block ends; nothing is left of it if it fails."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def refuse_pointer(path: pathlib.Path) -> None:
    """Refuses what git clones in place of a large file.

    Raises:
      ValueError: a git-lfs pointer.
    """
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository, or download "
                "the model with `hf download`"
            )


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
