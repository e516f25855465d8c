"""`restkv ask`: questions about a document that `restkv read` has read."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from restkv_jax.caches.base import repeat_rows
from restkv_jax.caches.stored import load_cache
from restkv_jax.commands.answering import AnswerOptions, check_answer, read_note, with_own
from restkv_jax.commands.options import MeshOptions, UsageError, as_usage_error, chosen_mesh, parse
from restkv_jax.commands.progress import show_while
from restkv_jax.generation.encoding import encode_continuation, encode_question, pad_left
from restkv_jax.generation.text import decode_text
from restkv_jax.loading import DType, load_checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskOptions(AnswerOptions, MeshOptions):
    """Asks questions about a document, all of them at once, each as if it were the only one.

    Args:
      cache: the file that `restkv read` wrote.
      questions: one or several, each in quotes.
      model: where the model is that has read the document; as it was given to `restkv read` by default.
      dtype: of weights and cache; "auto" is that of the file.
    """

    cache: pathlib.Path = dataclasses.field(kw_only=False)
    questions: Annotated[tuple[str, ...], Parameter(name="questions")] = dataclasses.field(default=(), kw_only=False)
    model: str | None = None
    dtype: DType = "auto"


def run(args: Sequence[str]) -> None:
    """Prints the answers, a single one as it comes."""
    options = parse(AskOptions, args, "restkv ask")
    chosen = check_answer(options)
    if not options.questions:
        raise UsageError("no question; give one or several, each in quotes, after the file")
    with as_usage_error():
        note = read_note(options.cache)
    if "messages" in note:
        raise UsageError(f"{str(options.cache)!r} holds a chat; `restkv chat --resume` goes on with it")
    with as_usage_error(), show_while("loading the model and the cache"):
        dtype = note.get("dtype", "auto") if options.dtype == "auto" else options.dtype
        mesh = chosen_mesh(options.model_parallel, options.data_parallel)
        loaded = load_checkpoint(options.model or note.get("model"), dtype, dense=note.get("dense", False), mesh=mesh)
        cache = load_cache(options.cache, loaded.model, loaded.params)
        encode = encode_continuation if note.get("raw") else encode_question
        rows = [encode(loaded.tokenizer, question) for question in options.questions]
        cache = repeat_rows(cache, len(rows))
    if options.sample:
        chosen = with_own(loaded.model.config.sampling, chosen)
    with as_usage_error():
        tokens, mask = pad_left(rows, max(map(len, rows)))
        answers = decode_text(*loaded, tokens, mask, None, options.max_new_tokens, cache=cache, **chosen)
    _print(options.questions, answers)


def _print(questions: Sequence[str], answers: Any) -> None:
    steps = iter(answers)
    with show_while("reading the questions, which compiles what is new"):
        first = next(steps)
    if len(questions) == 1:
        print(*first, end="", flush=True)
        for pieces in steps:
            print(*pieces, end="", flush=True)
        print()
        return
    for _ in steps:
        pass
    for question, row in zip(questions, answers.rows, strict=True):
        print(f"{question}\n  {row.text.strip()}\n")
