"""The command line: `restkv generate` and the other commands, with those of the extras."""

import dataclasses
import importlib
import importlib.metadata
import inspect
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import docstring_parser
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from restkv_jax.caches.base import cache_bytes
from restkv_jax.caches.paged import PagedCache
from restkv_jax.commands.loading import load_checkpoint
from restkv_jax.commands.options import (
    GenerateOptions,
    PlotOptions,
    PromptOptions,
    UsageError,
    as_usage_error,
    make_policy,
    options_of_method,
    parse_generate,
    parse_plot,
)
from restkv_jax.eviction.methods.full import full
from restkv_jax.eviction.methods.registry import METHODS
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.checks import check_sampling
from restkv_jax.generation.generating import stream
from restkv_jax.generation.reading import bucket_length, cache_shapes, prefill
from restkv_jax.models import Decoder
from restkv_jax.timing import CompilationClock

USAGE = """usage: restkv COMMAND [OPTIONS]

Long prompts on a small KV cache.

commands:
  generate   generate from a prompt on a small cache and print the answer as it comes
  methods    list the methods, their references and their options
  plot       draw which positions of a prompt are kept and which are evicted
  evaluate   measure tasks x methods x budgets x lengths in one sweep, with a report
  report     write the report of a sweep as HTML, Markdown and pictures
  lm-eval    run tasks of lm-evaluation-harness on a small cache, with its own options: `restkv lm-eval run --help`
  pod        share keys of distant tokens across layers: `restkv pod --help`

`restkv COMMAND --help` lists a command's options."""


class Loaded(NamedTuple):
    """A model, its parameters, its tokenizer, the prompt and the prompt's tokens, int32 [1, T]."""

    model: Decoder
    params: Any
    tokenizer: Any
    prompt: str
    tokens: np.ndarray


class Timing(NamedTuple):
    """Seconds: compilation, the first token (prefill) without it, the other tokens without it; number of tokens."""

    compilation: float
    first: float
    rest: float
    num_tokens: int


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
            warnings.showwarning = lambda message, *rest, **options: _complain(f"warning: {message}")
            _find_command(args)(args[1:])
    except UsageError as error:
        _complain(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _find_command(args: list[str]) -> Callable[[Sequence[str]], None]:
    commands = {
        "generate": run_generate,
        "methods": run_methods,
        "plot": run_plot,
        "evaluate": _of_extra("evaluate", "commands.evaluate", "eval"),
        "report": _of_extra("report", "commands.evaluate", "eval"),
        "lm-eval": _of_extra("lm-eval", "commands.lm_eval", "harness"),
        "pod": _of_extra("pod", "commands.pod", "train"),
    }
    if args and args[0] in ("--help", "-h"):
        return lambda rest: print(USAGE)
    if args and args[0] == "--version":
        return lambda rest: print(importlib.metadata.version("restkv-jax"))
    if not args or args[0] not in commands:
        given = f"command {args[0]!r} is unknown" if args else "no command given"
        raise UsageError(f"{given}; known: {', '.join(commands)}; see `restkv --help`")
    return commands[args[0]]


def run_generate(args: Sequence[str]) -> None:
    """`restkv generate`: streams the answer, then says what it cost."""
    options, method_options = parse_generate(args)
    make_policy(options.method, method_options)
    sampling = _sampling(options)
    loaded = _load(options)
    policy = make_policy(options.method, method_options, loaded.tokens.shape[1])
    timing = _print_answer(loaded, policy, options.max_new_tokens, sampling)
    if not options.quiet:
        Console().print(_cost_table(loaded, options.method, policy, options.max_new_tokens, timing))


def _of_extra(command: str, module: str, extra: str) -> Callable[[Sequence[str]], None]:
    """A command whose module needs the packages of an extra: they are imported when it runs."""

    def run(args: Sequence[str]) -> None:
        try:
            found = importlib.import_module(f"restkv_jax.{module}")
        except ModuleNotFoundError as error:
            if error.name.startswith("restkv_jax"):
                raise
            needed = f"`restkv {command}` needs the package {error.name!r}"
            raise UsageError(f"{needed}: pip install 'restkv-jax[{extra}]'") from error
        getattr(found, f"run_{command.replace('-', '_')}")(args)

    return run


def run_methods(args: Sequence[str]) -> None:
    """`restkv methods`: every method's reference and options with defaults."""
    if args and args[0] not in ("--help", "-h"):
        raise UsageError(f"unexpected argument {args[0]!r}: `restkv methods` takes none")
    console = Console(highlight=False)
    for name, preset in METHODS.items():
        documentation = docstring_parser.parse(inspect.getdoc(preset) or "")
        console.print(f"[bold]{name}[/bold]  {documentation.short_description}", soft_wrap=True)
        table = Table.grid(padding=(0, 2))
        for parameter in inspect.signature(preset).parameters.values():
            text = next((p.description for p in documentation.params if p.arg_name == parameter.name), "")
            table.add_row("", f"{parameter.name}={parameter.default}", text)
        console.print(table)


def run_plot(args: Sequence[str]) -> None:
    """`restkv plot`: writes the picture of what each method keeps of a prompt."""
    from restkv_jax.plot import plot_kept, token_span

    options = parse_plot(args).options
    _check_output(options.output)
    _plot_policies(options)
    loaded = _load(options)
    spans = {}
    with as_usage_error("--highlight: "):
        if options.highlight is not None:
            spans = {"highlighted text": token_span(loaded.tokenizer, loaded.prompt, options.highlight)}
    caches = {}
    for name, policy in _plot_policies(options, loaded.tokens.shape[1]).items():
        with as_usage_error():
            _, cache = prefill(loaded.model, loaded.params, loaded.tokens, policy=policy)
        caches[f"{name}, budget {options.budget}" if policy.budget else name] = cache
    plot_kept(caches, spans=spans).savefig(options.output, dpi=150)
    print(f"wrote {options.output}")


def _plot_policies(options: PlotOptions, prompt_tokens: int | None = None) -> dict[str, EvictionPolicy | None]:
    policies = {}
    for name in options.methods:
        method_options = options_of_method(name)()
        if hasattr(method_options, "budget"):
            method_options = dataclasses.replace(method_options, budget=options.budget)
        policies[name] = make_policy(name, method_options, prompt_tokens)
    return policies


def _check_output(path: pathlib.Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    if not path.resolve().parent.is_dir():
        raise UsageError(f"--output {str(path)!r}: there is no directory {str(path.resolve().parent)!r}; make it first")
    suffixes = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in suffixes:
        raise UsageError(f"--output {str(path)!r} has no suffix of a picture; choose from {', '.join(suffixes)}")


def _load(options: PromptOptions) -> Loaded:
    """Reads the prompt, loads the model and encodes the one for the other."""
    prompt = _read_prompt(options)
    model, params, tokenizer = load_checkpoint(options.model, options.dtype)
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise UsageError("the prompt is empty: the tokenizer makes no token of it")
    return Loaded(model, params, tokenizer, prompt, np.asarray([ids], np.int32))


def _read_prompt(options: PromptOptions) -> str:
    if options.prompt is not None and options.file is not None:
        raise UsageError(f"PROMPT and --file {str(options.file)!r} are both given; leave one out")
    source = "PROMPT" if options.file is None else f"--file {str(options.file)!r}"
    try:
        if options.prompt is not None:
            prompt = options.prompt
        elif options.file is not None:
            prompt = options.file.read_text(encoding="utf-8")
        elif sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no PROMPT; give it as an argument, with --file PATH, or on standard input")
        else:
            source, prompt = "standard input", sys.stdin.read()
        # bytes that are no text come as lone surrogates from arguments and standard input
        prompt.encode("utf-8")
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{source} cannot be read as text ({error}); give text in UTF-8") from error
    if not prompt.strip():
        raise UsageError(f"{source} is empty; give a prompt with some text")
    return prompt


def _sampling(options: GenerateOptions) -> dict[str, Any]:
    """Keyword arguments of `stream`, checked before the model is loaded."""
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens} must be at least 1")
    sampling = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    if all(value is None for value in sampling.values()):
        return {}
    if not 0 <= options.seed < 2**32:
        raise UsageError(f"--seed {options.seed} must be in [0, 2**32)")
    key = jax.random.key(options.seed)
    with as_usage_error():
        check_sampling(key, **sampling)
    return sampling | {"key": key}


def _print_answer(loaded: Loaded, policy: EvictionPolicy, max_new_tokens: int, sampling: dict[str, Any]) -> Timing:
    """Prints the answer as it comes."""
    from transformers import TextStreamer

    printer = TextStreamer(loaded.tokenizer, skip_special_tokens=True)
    with CompilationClock() as clock:
        start = time.perf_counter()
        with as_usage_error():
            steps = stream(
                loaded.model, loaded.params, loaded.tokens, policy=policy, max_new_tokens=max_new_tokens, **sampling
            )
        printer.put(next(steps))
        first, first_compilation = time.perf_counter() - start, clock.seconds
        num_tokens = 1
        for token in steps:
            printer.put(token)
            num_tokens += 1
        printer.end()
        rest = time.perf_counter() - start - first
        rest_compilation = clock.seconds - first_compilation
    return Timing(clock.seconds, first - first_compilation, rest - rest_compilation, num_tokens)


def _cost_table(loaded: Loaded, method: str, policy: EvictionPolicy, max_new_tokens: int, timing: Timing) -> Table:
    """Slots and bytes as they are allocated, against the full cache's for the same prompt, and times."""
    length = loaded.tokens.shape[1]
    model, params, tokens = loaded.model, loaded.params, loaded.tokens
    cache, everything = (cache_shapes(model, params, tokens, None, p, max_new_tokens) for p in (policy, full()))
    bytes_, full_bytes = cache_bytes(cache), cache_bytes(everything)
    rest = timing.num_tokens - 1
    on_average = " (on average)" if isinstance(cache, PagedCache) else ""
    table = Table(show_header=False)
    table.add_row("method", method)
    table.add_row("prompt tokens", f"{length:,}")
    table.add_row("cache slots", f"{cache.num_slots:,} (full cache: {everything.num_slots:,})")
    table.add_row("cache bytes", f"{bytes_:,} ({bytes_ / full_bytes:.1%} of the full cache's {full_bytes:,})")
    table.add_row("compilation", f"{timing.compilation:.2f} s, not in the times below")
    table.add_row("time to first token", f"{timing.first:.2f} s")
    table.add_row(
        "tokens per second", f"{rest / timing.rest:.1f} ({rest} after the first)" if rest else "one token only"
    )
    table.add_row("device", jax.devices()[0].device_kind)
    table.caption = (
        f"Slots are allocated per layer and KV head{on_average}, with {max_new_tokens:,} for new tokens; "
        f"the full cache holds the prompt padded to {bucket_length(length):,} tokens."
    )
    return table


def _complain(text: str) -> None:
    print(f"restkv: {' '.join(text.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
