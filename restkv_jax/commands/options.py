"""What the commands share: options, made by cyclopts from dataclasses and signatures, and errors of one line."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import cyclopts
import jax
from jax.sharding import Mesh

from restkv_jax.eviction.presets import suggest
from restkv_jax.loading import DType
from restkv_jax.models.mesh import make_mesh

Parsed = TypeVar("Parsed")

FLAT = cyclopts.Parameter(name="*")
"""Marks a dataclass whose fields are options themselves."""


class UsageError(Exception):
    """Input that cannot work; its one line names the argument, its value and a remedy."""


@contextlib.contextmanager
def as_usage_error(prefix: str = "") -> Iterator[None]:
    """What the library refuses becomes a `UsageError`."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        raise UsageError(f"{prefix}{error}") from error


def print_notice(text: str) -> None:
    """Prints a line for the user, apart from the command's output."""
    print(f"restkv: {' '.join(text.split())}", file=sys.stderr)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """The devices.

    Args:
      model_parallel: devices that share the weights.
      data_parallel: parts that the rows of a batch are divided into, each on devices of its own.
    """

    model_parallel: int = 1
    data_parallel: int = 1


def chosen_mesh(model_parallel: int, data_parallel: int | None) -> Mesh | None:
    """The mesh of options, None for one device.

    Args:
      model_parallel: devices that share the weights.
      data_parallel: parts of a batch; as many as there are devices for if None.

    Raises:
      UsageError: numbers for which there are not the devices.
    """
    given = "" if data_parallel is None else f" --data-parallel {data_parallel}"
    with as_usage_error(f"--model-parallel {model_parallel}{given}: "):
        if model_parallel == 1 and (data_parallel == 1 or (data_parallel is None and jax.device_count() == 1)):
            return None
        return make_mesh(data_parallel, model_parallel)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(MeshOptions):
    """The model.

    Args:
      model: directory of a checkpoint in Hugging Face's layout, a GGUF file, or id of a model on the hub; the model
        that comes with the package if left out.
      dtype: of weights and cache; "auto" is bfloat16, on a CPU float32.
      dense: leave out the sharing of keys that the model was adapted to.
    """

    model: str | None = None
    dtype: DType = "auto"
    dense: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The cache.

    Args:
      cache_dtype: store keys and values in "int8", "int4" or "float8_e4m3fn", the newest tokens excepted;
        "int4(group_size=32,residual=64)" says how many share a scale, and how many are the newest. In the model's dtype
        if left out.
    """

    cache_dtype: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The prompt.

    Args:
      prompt: the prompt; read from --file or from standard input if left out.
      file: text file that holds the prompt.
    """

    prompt: str | None = dataclasses.field(default=None, kw_only=False)
    file: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions(ModelOptions, TextOptions):
    """Prompt and model; the prompt first, so that it may stand without its name."""


def parse(
    command: Callable[..., Parsed],
    args: Sequence[str] | None = None,
    program: str = sys.argv[0],
    owner: str = "",
    config: Any = None,
) -> Parsed:
    """Calls a function or dataclass with the options that it has, or prints their help and exits.

    Args:
      command: what is called.
      args: after the program's name; those of the process by default.
      program: the command, for help and messages.
      owner: what an unknown option is not an option of, for the message.
      config: gives options that are not among `args`; see `cyclopts.App`.

    Raises:
      UsageError: an unknown option, or a value of the wrong kind.
    """
    defaults = cyclopts.Parameter(consume_multiple=True, negative_iterable=(), allow_repeating=True, converter=_convert)
    app = cyclopts.App(name=program, default_parameter=defaults, version_flags=(), config=config)
    app["--help"].group = "Parameters"
    app.default(command)
    try:
        chosen, bound, _ = app.parse_args(
            sys.argv[1:] if args is None else list(args), exit_on_error=False, print_error=False
        )
    except cyclopts.UnknownOptionError as error:
        source = "" if error.token.source == "cli" else f"{error.token.source}: "
        name = (error.token.keyword or error.token.value).strip("[]")
        known = [argument.name for argument in error.argument_collection if argument.name.startswith("--")]
        raise UsageError(f"{source}{name} is not an option{owner}; {suggest(name, known)}") from error
    except cyclopts.UnusedCliTokensError as error:
        raise UsageError(
            f"unexpected argument {(error.unused_tokens or ['?'])[0]!r}; quote a prompt that has spaces"
        ) from error
    except (cyclopts.CycloptsError, OSError) as error:
        raise UsageError(f"{str(error).rstrip('.')}; see `{program} --help`") from error
    if chosen is not command:
        chosen(*bound.args, **bound.kwargs)
        sys.exit(0)
    return command(*bound.args, **bound.kwargs)


def _convert(hint: Any, tokens: Sequence[cyclopts.Token]) -> Any:
    """As cyclopts does, which would round 2.5 to an integer."""
    if hint in (int, int | None, tuple[int, ...]) and any("." in token.value for token in tokens):
        source = f" from {tokens[-1].source}" * (tokens[-1].source != "cli")
        raise ValueError(f"{tokens[-1].value!r}{source} is not an integer")
    return cyclopts.convert(hint, tokens)
