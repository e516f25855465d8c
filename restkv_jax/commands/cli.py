"""The command line: finds the command, imports it and runs it."""

import functools
import importlib
import importlib.metadata
import os
import sys
import types
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from restkv_jax.commands.options import UsageError, print_notice
from restkv_jax.commands.programs import keep_programs


class Command(NamedTuple):
    """What a command does, the extra whose packages it needs, and whether it compiles programs."""

    summary: str
    extra: str | None = None
    compiles: bool = True


COMMANDS = {
    "generate": Command("generate from a prompt on a small cache and print the answer as it comes"),
    "read": Command("read a document once into a small cache that is kept in a file"),
    "ask": Command("ask questions about a document that was read, all at once"),
    "chat": Command("chat on one cache that never exceeds its budget"),
    "devices": Command("list the devices, and what computes attention and scores on them", compiles=False),
    "methods": Command("list the methods, their references and their options", compiles=False),
    "plot": Command("draw which positions of a prompt are kept and which are evicted", "plot"),
    "evaluate": Command("measure tasks x methods x budgets x lengths in one sweep, with a report", "eval"),
    "report": Command("write the report of a sweep as HTML, Markdown and pictures", "eval", compiles=False),
    "lm-eval": Command(
        "run tasks of lm-evaluation-harness on a small cache, with its own options: `restkv lm-eval run --help`",
        "harness",
    ),
    "plan": Command("compile for a slice of TPUs that need not be there: what fits, what moves", compiles=False),
    "pod": Command("share keys of distant tokens across layers: `restkv pod --help`", "train"),
}
"""By name; the module of a command has its name, and a function `run` that takes the arguments after it."""

USAGE = f"""usage: restkv COMMAND [OPTIONS]

Long prompts on a small KV cache.

commands:
{chr(10).join(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items())}

`restkv COMMAND --help` lists a command's options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: arguments after the program's name; those of the process by default.

    Returns:
      the exit code: 0; 2 for input that cannot work, with one line on standard error.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    # transformers advises to install PyTorch, which nothing here needs
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        with warnings.catch_warnings():
            say_once = functools.cache(lambda text: print_notice(f"warning: {text}"))
            warnings.showwarning = lambda message, *rest, **options: say_once(str(message))
            run_command(args)
    except UsageError as error:
        print_notice(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run_command(args: Sequence[str]) -> None:
    """Imports the module of the command that the first argument names, and runs it with the others.

    Raises:
      UsageError: no such command, one whose packages are not installed, or what the command refuses.
    """
    name = args[0] if args else None
    if name in ("--help", "-h"):
        print(USAGE)
    elif name == "--version":
        print(importlib.metadata.version("restkv-jax"))
    elif name in COMMANDS:
        command = _import_command(name)
        if COMMANDS[name].compiles:
            keep_programs()
        command.run(args[1:])
    else:
        given = "no command given" if name is None else f"command {name!r} is unknown"
        raise UsageError(f"{given}; known: {', '.join(COMMANDS)}; see `restkv --help`")


def _import_command(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(f"restkv_jax.commands.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("restkv_jax"):
            raise
        needed = f"`restkv {name}` needs the package {error.name.partition('.')[0]!r}"
        raise UsageError(f"{needed}: pip install 'restkv-jax[{COMMANDS[name].extra}]'") from error


if __name__ == "__main__":
    sys.exit(main())
