"""`restkv generate`: an answer on a small cache, and what it cost."""

import argparse
import dataclasses
import functools
import inspect
import itertools
import time
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
from cyclopts import Group, Parameter
from rich.console import Console
from rich.table import Table

from restkv_jax.caches.base import cache_bytes
from restkv_jax.caches.paged import PagedCache
from restkv_jax.commands.options import (
    FLAT,
    LONG_PROMPT,
    PromptOptions,
    UsageError,
    as_usage_error,
    parse,
    print_notice,
)
from restkv_jax.commands.prompts import LoadedPrompt, encode_turn, load_prompt
from restkv_jax.eviction.methods.full import full
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.presets import find_preset, make_policy
from restkv_jax.generation.checks import check_sampling
from restkv_jax.generation.detokenising import check_stop
from restkv_jax.generation.encoding import encode_text
from restkv_jax.generation.reading import bucket_length, cache_shapes
from restkv_jax.generation.text import decode_text
from restkv_jax.models.sampling_defaults import SamplingDefaults
from restkv_jax.timing import CompilationClock


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(PromptOptions):
    """Generates from a prompt on a small cache and prints the answer as it comes.

    Args:
      method: how to choose what the cache keeps; `restkv generate --method NAME --help` lists the method's options,
        `restkv methods` all methods.
      max_new_tokens: most tokens to generate.
      stop: a string before which the answer ends; may be given several times.
      sample: draw with the model's own temperature, top-k, top-p and min-p; options given here go before them.
      temperature: divides the logits; greedy decoding without it and the other options of drawing.
      top_k: draw among the k best tokens.
      top_p: draw among the best tokens that hold this probability mass.
      min_p: draw among the tokens that are at least this times as probable as the best.
      seed: of the random draws.
      system: what the model is told before the prompt, in a chat template.
      raw: read the prompt as it is, not as a turn in the chat template that the model's tokenizer may have.
      quiet: print nothing but the answer.
    """

    method: str = "restkv"
    max_new_tokens: int = 64
    stop: Annotated[tuple[str, ...], Parameter(consume_multiple=False)] = ()
    sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    system: str | None = None
    raw: bool = False
    quiet: bool = False


SAMPLING = ("temperature", "top_k", "top_p", "min_p")
"""Options of drawing, by their names in `generate`."""


class Timing(NamedTuple):
    """Seconds: compilation, the first token (prefill) without it, the other tokens without it; number of tokens."""

    compilation: float
    first: float
    rest: float
    num_tokens: int


def run(args: Sequence[str]) -> None:
    """Streams the answer, then says what it cost."""
    options, method_options = parse_generate(args)
    with as_usage_error():
        make_policy(options.method, method_options, LONG_PROMPT)
        check_stop(options.stop)
    sampling = _sampling(options)
    if options.raw and options.system is not None:
        raise UsageError("--system and --raw are both given; a system prompt needs the chat template")
    encode = encode_text if options.raw else functools.partial(encode_turn, system=options.system)
    prompt = load_prompt(options, encode)
    with as_usage_error():
        policy = make_policy(options.method, method_options, prompt.tokens.shape[1])
    if options.sample:
        sampling = _with_own(prompt.loaded.model.config.sampling, sampling)
    timing = _print_answer(prompt, policy, options, sampling)
    if not options.quiet:
        Console().print(_cost_table(prompt, policy, options, timing, _described(sampling)))


def parse_generate(args: Sequence[str]) -> tuple[GenerateOptions, dict[str, Any]]:
    """The command's options and those of the method that `--method` names.

    Raises:
      UsageError: an unknown method or option, or a value of the wrong kind.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", nargs="?", default=GenerateOptions.method)
    method = first.parse_known_args(list(itertools.takewhile(lambda arg: arg != "--", args)))[0].method or ""
    with as_usage_error():
        method_class = _options_of(method)
    group = Group(f"Method {method}", help=_first_line(find_preset(method)))
    shown = Parameter(name="*", group=group, parse=None if dataclasses.fields(method_class) else False)

    def command(
        options: Annotated[GenerateOptions, FLAT] = GenerateOptions(),
        *,
        method_options: Any = method_class(),  # noqa: B008
    ) -> tuple[GenerateOptions, dict[str, Any]]:
        parameters = inspect.signature(find_preset(method)).parameters
        return options, {name: getattr(method_options, _option_name(method, name)) for name in parameters}

    command.__annotations__["method_options"] = Annotated[method_class, shown]
    command.__doc__ = _first_line(GenerateOptions)
    return parse(command, args, "restkv generate", f" of --method {method}")


def _options_of(method: str) -> type:
    """A dataclass with the parameters, defaults and docstring of a method's preset; budgets as text.

    A parameter whose name is taken by an option of the command gets the method's as a prefix.
    """
    preset = find_preset(method)
    fields = []
    for parameter in inspect.signature(preset).parameters.values():
        annotation, default = parameter.annotation, parameter.default
        if parameter.name == "budget":
            annotation, default = Annotated[str, Parameter(metavar="TOKENS|PERCENT%")], str(default)
        fields.append((_option_name(method, parameter.name), annotation, default))
    namespace = {"__doc__": preset.__doc__, "__module__": __name__}
    return dataclasses.make_dataclass(f"{method}_options", fields, namespace=namespace, frozen=True)


def _option_name(method: str, parameter: str) -> str:
    taken = {field.name for field in dataclasses.fields(GenerateOptions)}
    return f"{method}_{parameter}" if parameter in taken else parameter


def _first_line(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def _sampling(options: GenerateOptions) -> dict[str, Any]:
    """Keyword arguments of `decode_text`, checked before the model is loaded."""
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens} must be at least 1")
    given = {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}
    if not given and not options.sample:
        return {}
    if not 0 <= options.seed < 2**32:
        raise UsageError(f"--seed {options.seed} must be in [0, 2**32)")
    key = jax.random.key(options.seed)
    with as_usage_error():
        check_sampling(key, *(given.get(name) for name in SAMPLING))
    return given | {"key": key}


def _with_own(own: SamplingDefaults, given: dict[str, Any]) -> dict[str, Any]:
    """Those that are given, and the model's own for the others."""
    if not own.options:
        print_notice(f"--sample: the model has no sampling settings of its own; taken: {_described(given)}")
    return own.options | given


def _described(sampling: dict[str, Any]) -> str:
    if not sampling:
        return "greedy"
    return ", ".join(f"{name}={value:g}" for name, value in ({"temperature": 1} | sampling).items() if name != "key")


def _print_answer(
    prompt: LoadedPrompt, policy: EvictionPolicy, options: GenerateOptions, sampling: dict[str, Any]
) -> Timing:
    """Prints the answer as it comes."""
    model, params, tokenizer = prompt.loaded
    encoded = (prompt.tokens, None, policy, options.max_new_tokens)
    with CompilationClock() as clock:
        start = time.perf_counter()
        with as_usage_error():
            text = decode_text(model, params, tokenizer, *encoded, stop=options.stop, **sampling)
        steps = iter(text)
        print(*next(steps), end="", flush=True)
        first, first_compilation = time.perf_counter() - start, clock.seconds
        for pieces in steps:
            print(*pieces, end="", flush=True)
        print()
        rest = time.perf_counter() - start - first
        rest_compilation = clock.seconds - first_compilation
    return Timing(clock.seconds, first - first_compilation, rest - rest_compilation, len(text.rows[0].tokens))


def _cost_table(
    prompt: LoadedPrompt, policy: EvictionPolicy, options: GenerateOptions, timing: Timing, sampling: str
) -> Table:
    """Slots and bytes as they are allocated, against the full cache's for the same prompt, and times."""
    length = prompt.tokens.shape[1]
    model, params, _ = prompt.loaded
    cache, everything = (
        cache_shapes(model, params, prompt.tokens, None, one, options.max_new_tokens) for one in (policy, full())
    )
    bytes_, full_bytes = cache_bytes(cache), cache_bytes(everything)
    rest = timing.num_tokens - 1
    on_average = " (on average)" if isinstance(cache, PagedCache) else ""
    table = Table(show_header=False)
    table.add_row("method", options.method)
    table.add_row("sampling", sampling)
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
        f"Slots are allocated per layer and KV head{on_average}, with {options.max_new_tokens:,} for new tokens; "
        f"the full cache holds the prompt padded to {bucket_length(length):,} tokens."
    )
    return table
