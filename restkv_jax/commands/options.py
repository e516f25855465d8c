"""Command-line options, made by tyro from dataclasses and from the signatures of the methods' presets."""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from restkv_jax.eviction.methods.registry import METHODS
from restkv_jax.eviction.policy import EvictionPolicy


class UsageError(Exception):
    """Input that cannot work; its one line names the argument, its value and a remedy."""


@contextlib.contextmanager
def as_usage_error(prefix: str = "") -> Iterator[None]:
    """What the library refuses becomes a `UsageError`."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        raise UsageError(f"{prefix}{error}") from error


@dataclasses.dataclass(frozen=True)
class Budget:
    """Slots per layer and KV head: a number of tokens, or a percentage of the prompt's."""

    amount: float
    is_percentage: bool = False

    def __str__(self) -> str:
        return f"{self.amount:g}%" if self.is_percentage else str(int(self.amount))

    def slots(self, prompt_tokens: int) -> int:
        """Slots for a prompt of this many tokens, to the nearest."""
        return round(self.amount * prompt_tokens / 100) if self.is_percentage else int(self.amount)


def parse_budget(text: str) -> Budget:
    """Reads "128" or "10%".

    Raises:
      UsageError: anything else, or a percentage outside of (0, 100].
    """
    if re.fullmatch(r"[1-9]\d*", text):
        return Budget(int(text))
    if re.fullmatch(r"\d+(\.\d+)?%", text) and 0 < float(text[:-1]) <= 100:
        return Budget(float(text[:-1]), is_percentage=True)
    raise UsageError(
        f"--budget {text!r} is no budget; give a number of tokens such as 128, "
        "or a percentage of the prompt above 0% and up to 100% such as 10%"
    )


_BudgetArgument = Annotated[
    Budget,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="TOKENS|PERCENT%",
        instance_from_str=lambda texts: parse_budget(texts[0]),
        is_instance=lambda value: isinstance(value, Budget),
        str_from_instance=lambda budget: [str(budget)],
    ),
]


DType = Literal["auto", "bfloat16", "float32", "float16"]
"""Of weights and cache; "auto" is bfloat16, on a CPU float32."""


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """Prompt and model.

    Args:
      prompt: the prompt; read from --file or from standard input if left out.
      file: text file that holds the prompt.
      model: directory of a checkpoint in Hugging Face's layout, or id of a model on its hub; the model that comes
        with the package if left out.
      dtype: of weights and cache; "auto" is bfloat16, on a CPU float32.
    """

    prompt: tyro.conf.Positional[str | None] = None
    file: pathlib.Path | None = None
    model: str | None = None
    dtype: DType = "auto"


@dataclasses.dataclass(frozen=True)
class GenerateOptions(PromptOptions):
    """Generates from a prompt on a small cache and prints the answer as it comes.

    Args:
      method: how to choose what the cache keeps; `restkv generate --method NAME --help` lists the method's options,
        `restkv methods` all methods.
      max_new_tokens: most tokens to generate.
      temperature: divides the logits; greedy decoding without it, --top-k and --top-p.
      top_k: draw among the k best tokens.
      top_p: draw among the best tokens that hold this probability mass.
      seed: of the random draws.
      quiet: print nothing but the answer.
    """

    method: str = "restkv"
    max_new_tokens: int = 64
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    quiet: bool = False


@dataclasses.dataclass(frozen=True)
class PlotOptions(PromptOptions):
    """Draws which positions of a prompt each layer keeps and which are evicted.

    Args:
      methods: one panel each, with the method's default options.
      budget: slots per layer and KV head, in tokens or as a percentage of the prompt.
      highlight: part of the prompt to mark, such as the sentence that holds the answer.
      output: picture to write; the suffix chooses the format (png, pdf, svg).
    """

    methods: tuple[str, ...] = ("restkv", "snapkv", "streaming_llm")
    budget: _BudgetArgument = Budget(10, is_percentage=True)
    highlight: str | None = None
    output: pathlib.Path = pathlib.Path("kept.png")


class Command(NamedTuple):
    """A parsed command line: the command's options and those of the chosen method's preset."""

    options: Any
    method_options: Any = None


def parse_generate(args: Sequence[str]) -> Command:
    """Options of `restkv generate`; those of the method depend on `--method`.

    Raises:
      UsageError: an unknown method or option, or a value of the wrong kind.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", nargs="?", default=GenerateOptions.method)
    before_separator = list(itertools.takewhile(lambda arg: arg != "--", args))
    name = first.parse_known_args(before_separator)[0].method or ""
    method_class = options_of_method(name)

    def command(
        general: tyro.conf.OmitArgPrefixes[GenerateOptions], method: tyro.conf.OmitArgPrefixes[method_class]
    ) -> Command:
        return Command(general, method)

    return parse(command, args, "restkv generate", (GenerateOptions, method_class), f" of --method {name}")


def parse_plot(args: Sequence[str]) -> Command:
    """Options of `restkv plot`.

    Raises:
      UsageError: an unknown method or option, or a value of the wrong kind.
    """
    options = parse(PlotOptions, args, "restkv plot", (PlotOptions,))
    for name in options.methods:
        find_method(name)
    return Command(options)


def find_method(name: str) -> Callable[..., EvictionPolicy]:
    """The preset of a method.

    Raises:
      UsageError: an unknown name; suggests near ones.
    """
    if name in METHODS:
        return METHODS[name]
    raise UsageError(f"--method {name!r} is unknown; {suggest(name, METHODS)}")


def options_of_method(name: str) -> type:
    """A dataclass with the parameters, defaults and docstring of a method's preset.

    `budget` becomes a `Budget`; a parameter whose name is taken by a general option gets the method's as a prefix.
    """
    preset = find_method(name)
    fields = []
    for parameter in inspect.signature(preset).parameters.values():
        annotation, default = parameter.annotation, parameter.default
        if parameter.name == "budget":
            annotation, default = _BudgetArgument, parse_budget(str(default))
        field = (_option_name(name, parameter.name), annotation)
        fields.append(field if default is inspect.Parameter.empty else (*field, default))
    return dataclasses.make_dataclass(f"{name} options", fields, namespace={"__doc__": preset.__doc__}, frozen=True)


def _option_name(method: str, parameter: str) -> str:
    taken = {field.name for field in dataclasses.fields(GenerateOptions)}
    return f"{method}_{parameter}" if parameter in taken else parameter


def make_policy(name: str, options: Any, prompt_tokens: int | None = None) -> EvictionPolicy | None:
    """The policy for a prompt of this many tokens; None if it is needed and not given.

    Raises:
      UsageError: options that exclude each other, with the numbers that a percentage comes to.
    """
    parameters = inspect.signature(find_method(name)).parameters
    values = {parameter: getattr(options, _option_name(name, parameter)) for parameter in parameters}
    budget = values.get("budget")
    if budget is None:
        return _checked(find_method(name), values)
    if budget.is_percentage and prompt_tokens is None:
        return None
    values["budget"] = slots = budget.slots(prompt_tokens or 0)
    if not budget.is_percentage:
        return _checked(find_method(name), values)
    computed = f"--budget {budget} of a prompt of {prompt_tokens:,} tokens is {slots:,} slots: "
    return _checked(find_method(name), values, computed)


def _checked(preset: Callable[..., EvictionPolicy], values: dict[str, Any], computed: str = "") -> EvictionPolicy:
    try:
        return preset(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{computed if 'budget=' in str(error) else ''}{error}") from error


def parse(target: Any, args: Sequence[str], program: str, classes: Sequence[type], of: str = "") -> Any:
    """Runs tyro on a class or function; what it prints about bad input in a box becomes a line.

    Args:
      target: makes what is returned.
      args: after the program's name.
      program: the command, for help and messages.
      classes: dataclasses with the known options.
      of: what an unknown option is no option of, for the message.

    Raises:
      UsageError: an unknown option, or a value of the wrong kind.
    """
    errors = io.StringIO()
    config = (tyro.conf.DisallowNone,)
    try:
        with contextlib.redirect_stderr(errors):
            parsed, unknown = tyro.cli(target, prog=program, args=args, return_unknown_args=True, config=config)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(f"{_first_part_of_box(errors.getvalue())}; see `{program} --help`") from stop
    sys.stderr.write(errors.getvalue())
    if unknown:
        _refuse(unknown, classes, of)
    return parsed


def _refuse(unknown: Sequence[str], classes: Sequence[type], of: str) -> None:
    option = next((arg for arg in unknown if arg.startswith("-")), None)
    if option is None:
        raise UsageError(f"unexpected argument {unknown[0]!r}; quote a prompt that has spaces")
    names = [field.name for one in classes for field in dataclasses.fields(one) if field.name != "prompt"]
    options = ["--" + name.replace("_", "-") for name in names]
    raise UsageError(f"{option.partition('=')[0]} is no option{of}; {suggest(option.partition('=')[0], options)}")


def suggest(name: str, known: Iterable[str]) -> str:
    """What was perhaps meant by a name, and what there is: the end of a message."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=2)
    return (f"did you mean {' or '.join(near)}? " if near else "") + f"known: {', '.join(known)}"


def _first_part_of_box(text: str) -> str:
    """The text of a drawn box, below its title and up to its first rule, on one line."""
    rows = [row.strip("│╭╮╰╯| ") for row in text.splitlines()[1:]]
    parts = [" ".join(group) for is_rule, group in itertools.groupby(rows, _is_rule) if not is_rule]
    return " ".join(parts[0].split()).removeprefix("Error parsing ").rstrip(".") if parts else "bad arguments"


def _is_rule(row: str) -> bool:
    return bool(re.fullmatch("[─-]+", row))
