"""`restkv chat`: turn after turn on one cache that never exceeds its budget."""

import contextlib
import dataclasses
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from rich.console import Console

from restkv_jax.caches.base import cache_bytes
from restkv_jax.caches.stored import load_cache, save_cache
from restkv_jax.commands.answering import AnswerOptions, check_answer, read_note, with_own
from restkv_jax.commands.method_options import given_option, parse_method
from restkv_jax.commands.options import (
    CacheOptions,
    ModelOptions,
    UsageError,
    as_usage_error,
    chosen_mesh,
    print_notice,
)
from restkv_jax.commands.progress import show_while
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.presets import make_policy
from restkv_jax.generation.conversation import Conversation, answer, start_conversation
from restkv_jax.generation.encoding import has_template
from restkv_jax.loading import Loaded, load_checkpoint

HELP = (
    "/reset begins anew, /save FILE keeps the chat for --resume, /stats says what the cache holds; Ctrl-C ends an "
    "answer, Ctrl-D the chat"
)


NOTED = ("model", "dense", "dtype", "system", "cache_dtype")
"""Options that a chat which goes on takes from its file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions(AnswerOptions, CacheOptions, ModelOptions):
    """Chats on one cache that never exceeds its budget and the room for an answer, however long the chat gets.

    Args:
      method: how to choose what the cache keeps; `restkv chat --method NAME --help` lists the method's options.
      system: what the model is told before the first turn.
      resume: file that /save wrote, to go on with; by the model, the method and the dtypes of then where none is given.
      quiet: print nothing but the answers.
    """

    max_new_tokens: int = 256
    method: str = "restkv"
    system: str | None = None
    resume: pathlib.Path | None = None
    quiet: bool = False


class Chat:
    """A chat at the terminal: the model, how it answers, and the conversation so far."""

    def __init__(
        self,
        loaded: Loaded,
        policy: EvictionPolicy,
        options: ChatOptions,
        method_options: dict[str, Any],
        chosen: dict[str, Any],
    ):
        self.loaded = loaded
        self.policy = policy
        self.options = options
        self.method_options = method_options
        self.chosen = chosen
        self.reset()

    def reset(self) -> None:
        """Forgets what was said."""
        model, params, _ = self.loaded
        limits = self.policy, self.options.max_new_tokens, self.options.system
        self.conversation = start_conversation(model, params, *limits, self.options.cache_dtype)

    def answer(self, text: str) -> None:
        """Prints the answer to a turn as it comes; Ctrl-C ends it, and the chat goes on from there."""
        chosen = dict(self.chosen)
        if "key" in chosen:
            chosen["key"] = jax.random.fold_in(chosen["key"], self.conversation.num_tokens)
        chosen["cache_dtype"] = self.options.cache_dtype
        coming = answer(*self.loaded, self.conversation, text, self.policy, self.options.max_new_tokens, **chosen)
        pieces = iter(coming)
        with _on_interrupt(coming.end):
            with show_while("reading, which compiles what is new", quiet=self.options.quiet):
                first = next(pieces)
            print(first, end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
        print()
        self.conversation = coming.conversation

    def save(self, path: str) -> None:
        """Writes the conversation to a file."""
        cache = self.conversation.cache
        if cache is None or not self.conversation.messages:
            raise UsageError("/save: nothing was said yet")
        note = {name: getattr(self.options, name) for name in NOTED}
        note |= {"dtype": str(cache.dtype), "method": self.options.method, "method_options": self.method_options}
        note |= {"messages": self.conversation.messages, "unread": self.conversation.unread}
        size = save_cache(path, cache, self.loaded.model, self.loaded.params, note)
        print_notice(f"wrote {path}: {size:,} bytes")

    def resume(self, path: pathlib.Path) -> None:
        """Goes on with the conversation of a file."""
        note = read_note(path)
        cache = load_cache(path, self.loaded.model, self.loaded.params)
        self.conversation = Conversation(tuple(note["messages"]), cache, tuple(map(int, note.get("unread", ()))))

    def stats(self) -> str:
        """What the cache holds."""
        cache, turns = self.conversation.cache, len(self.conversation.messages) // 2
        if cache is None:
            return "the cache is empty"
        return (
            f"{turns} turns, {self.conversation.num_tokens:,} tokens; the cache holds up to {int(cache.most_held()):,} "
            f"of them per layer and KV head, in {cache.num_slots:,} slots of {cache_bytes(cache):,} bytes in all"
        )


def run(args: Sequence[str]) -> None:
    """Reads turns from standard input until it ends."""
    note = _note_of(args)
    options, method_options = parse_method(ChatOptions, args, "restkv chat", note)
    chosen = check_answer(options)
    if options.resume is not None and options.system is not None:
        raise UsageError("--resume and --system are both given; the chat that goes on has its own beginning")
    noted = {
        name: note[name] for name in NOTED if name in note and getattr(options, name) == getattr(ChatOptions, name)
    }
    options = dataclasses.replace(options, **noted)
    with as_usage_error():
        policy = make_policy(options.method, method_options)
    with as_usage_error(), show_while("loading the model", quiet=options.quiet):
        mesh = chosen_mesh(options.model_parallel, options.data_parallel)
        loaded = load_checkpoint(options.model, options.dtype, dense=options.dense, mesh=mesh)
        if not has_template(loaded.tokenizer):
            raise UsageError(
                f"the tokenizer of model {options.model!r} has no chat template, which a chat needs; take a chat "
                'model, such as --model "$(python scripts/fetch_smollm2.py)", or `restkv generate`'
            )
        if options.sample:
            chosen = with_own(loaded.model.config.sampling, chosen)
        chat = Chat(loaded, policy, options, method_options, chosen)
        if options.resume is not None:
            chat.resume(options.resume)
    if not options.quiet:
        print_notice(HELP)
    for line in _lines():
        try:
            with as_usage_error():
                _turn(chat, line)
        except UsageError as error:
            print_notice(f"error: {error}")


def _note_of(args: Sequence[str]) -> dict[str, Any]:
    """What the file says that a chat goes on from; nothing for a new one."""
    path = given_option(args, "resume")
    if path is None:
        return {}
    with as_usage_error():
        note = read_note(pathlib.Path(path))
    if not isinstance(note.get("messages"), list) or not isinstance(note.get("method_options", {}), dict):
        raise UsageError(f"--resume {path!r} holds a cache, but not a chat; `restkv ask` reads it")
    return note


def _turn(chat: Chat, line: str) -> None:
    command, _, rest = line.partition(" ")
    if command == "/reset":
        chat.reset()
    elif command == "/save":
        if not rest.strip():
            raise UsageError("/save needs a file, such as /save chat.cache")
        chat.save(rest.strip())
    elif command == "/stats":
        print_notice(chat.stats())
    elif command == "/help":
        print_notice(HELP)
    elif command.startswith("/"):
        raise UsageError(f"{command} is unknown; {HELP}")
    else:
        chat.answer(line)


def _lines() -> Iterator[str]:
    """The user's turns: lines at a terminal, where Ctrl-C drops what is typed, and lines of a pipe."""
    console = Console(stderr=True)
    while True:
        try:
            line = console.input("[bold]> [/bold]") if sys.stdin.isatty() else sys.stdin.readline()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        except EOFError:
            return
        if not sys.stdin.isatty() and not line:
            return
        if line.strip():
            yield line.strip()


@contextlib.contextmanager
def _on_interrupt(function: Callable[[], None]) -> Iterator[None]:
    """Calls a function at Ctrl-C instead of raising, so that no step is cut in two."""
    before = signal.signal(signal.SIGINT, lambda *_: function())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
