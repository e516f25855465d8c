"""Text files to one file of token ids, once."""

import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from restkv_jax.generation.encoding import encode_beginning, encode_continuation
from restkv_jax.models.files import written_whole

PIECE = 2**20
"""Characters that go through the tokenizer together, so that a file need not fit into memory."""


def tokenize_files(paths: Sequence[pathlib.Path], tokenizer: Any, directory: pathlib.Path) -> np.memmap:
    """Ids of all documents one after the other, int32 [N], from `directory` where they were written before.

    A file is one document; a `.jsonl` file is one document per line, in its field "text". Each starts with the
    tokenizer's token for the beginning, if it adds that to texts, and ends with its token for the end, if it has one.
    Files that changed, by size or time, are tokenized again.

    Raises:
      ValueError: files without text, bytes that are no UTF-8, a line without "text", a tokenizer that marks neither
        beginning nor end.
    """
    begin, end = _separators(tokenizer)
    path = directory / f"tokens-{_key(paths, tokenizer)}.int32"
    if not path.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as unfinished, unfinished.open("wb") as file:
            for ids in _encode(paths, tokenizer, begin, end):
                np.asarray(ids, np.int32).tofile(file)
    return np.memmap(path, np.int32, mode="r")


def _encode(paths: Sequence[pathlib.Path], tokenizer: Any, begin: list[int], end: list[int]) -> Iterator[list[int]]:
    for path in paths:
        empty = True
        try:
            for document in _documents(path):
                yield begin
                for number, piece in enumerate(document):
                    empty = empty and not piece.strip()
                    yield encode_continuation(tokenizer, piece) if number else encode_beginning(tokenizer, piece)
                yield end
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(path)!r} cannot be read as text ({error}); give text in UTF-8") from error
        if empty:
            raise ValueError(f"{str(path)!r} is empty; give files with some text")


def _documents(path: pathlib.Path) -> Iterator[Iterator[str]]:
    """Each document in pieces that end with a line."""
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix != ".jsonl":
            yield iter(lambda: "".join(file.readlines(PIECE)), "")
            return
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError(f"{text!r:.40} is not a string")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{str(path)!r}, line {number}, is no JSON object with a string "text"') from error
            yield iter([text])


def _separators(tokenizer: Any) -> tuple[list[int], list[int]]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    begin = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
    end = [] if eos is None else [eos]
    if not begin and not end:
        raise ValueError("the tokenizer marks neither beginning nor end of a text; give token arrays instead of text")
    return begin, end


def _key(paths: Sequence[pathlib.Path], tokenizer: Any) -> str:
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr((files, vocabulary)).encode()).hexdigest()[:16]
