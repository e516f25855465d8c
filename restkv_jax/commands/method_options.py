"""The options of a method, which are the parameters of its preset, beside those of a command."""

import argparse
import dataclasses
import inspect
import itertools
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from cyclopts import Group, Parameter

from restkv_jax.commands.options import FLAT, as_usage_error, parse
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.presets import find_preset, make_policy, takes_budget

OF_ANY: dict[str, Any] = {
    "sinks": Annotated[int | None, Parameter(help="first tokens of the prompt, always kept.")],
    "refit": Annotated[float | None, Parameter(help="ridge of a least-squares correction of the kept values.")],
    "candidates": Annotated[
        int | None, Parameter(help="keys that each layer and KV head carries to a selection over all layers.")
    ],
    "page_size": Annotated[int | None, Parameter(help="slots of a page, where budgets differ by layer or head.")],
}
"""Fields of a policy that are options of any method with a budget; `make_policy` takes them."""

Options = TypeVar("Options", bound=Any)


def parse_with_method(
    command_options: type[Options], args: Sequence[str], program: str
) -> tuple[Options, EvictionPolicy]:
    """A command's options, a dataclass with a field `method`, and the policy of the method that `--method` names.

    Raises:
      UsageError: an unknown method or option, or a value that cannot be.
    """
    options, chosen = parse_method(command_options, args, program)
    with as_usage_error():
        return options, make_policy(options.method, chosen)


def parse_method(
    command_options: type[Options],
    args: Sequence[str],
    program: str,
    before: Mapping[str, Any] = types.MappingProxyType({}),
) -> tuple[Options, dict[str, Any]]:
    """As `parse_with_method`, with the method's options as `make_policy` takes them.

    Args:
      command_options: the dataclass.
      args: of the command line.
      program: the command, for help and messages.
      before: a `method`, and its `method_options`, that count where the command line gives no other.
    """
    method = given_option(args, "method", before.get("method", command_options.method)) or ""
    defaults = before.get("method_options", {}) if method == before.get("method") else {}
    with as_usage_error():
        method_class = _options_of(method, command_options, defaults)
    group = Group(f"Method {method}", help=_first_line(find_preset(method)))
    shown = Parameter(name="*", group=group, parse=None if dataclasses.fields(method_class) else False)

    def command(
        options: Any = command_options(),  # noqa: B008
        *,
        method_options: Any = method_class(),  # noqa: B008
    ) -> tuple[Options, dict[str, Any]]:
        parameters = inspect.signature(find_preset(method)).parameters
        names = {name: _option_name(method, name, command_options) for name in (*parameters, *_of_any(method))}
        given = {name: getattr(method_options, option) for name, option in names.items()}
        return options, {name: value for name, value in given.items() if name in parameters or value is not None}

    command.__annotations__ |= {
        "options": Annotated[command_options, FLAT],
        "method_options": Annotated[method_class, shown],
    }
    command.__doc__ = _first_line(command_options)
    options, chosen = parse(command, args, program, f" of --method {method}")
    return dataclasses.replace(options, method=method), chosen


def given_option(args: Sequence[str], name: str, default: str | None = None) -> str | None:
    """The value of an option that has to be known before the others are parsed; None, or `default`, if not given."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument(f"--{name}", nargs="?", default=default)
    return getattr(first.parse_known_args(list(itertools.takewhile(lambda arg: arg != "--", args)))[0], name)


def _options_of(method: str, command_options: type, defaults: Mapping[str, Any]) -> type:
    """A dataclass with the parameters, defaults and docstring of a method's preset and what all have; budgets as text.

    `defaults` take the place of the preset's. A parameter whose name is taken by an option of the command gets the
    method's as a prefix.
    """
    preset = find_preset(method)
    fields = []
    for parameter in inspect.signature(preset).parameters.values():
        annotation, default = parameter.annotation, defaults.get(parameter.name, parameter.default)
        if parameter.name == "budget":
            annotation, default = Annotated[str, Parameter(metavar="TOKENS|PERCENT%")], str(default)
        fields.append((_option_name(method, parameter.name, command_options), annotation, default))
    for name, kind in _of_any(method).items():
        fields.append((_option_name(method, name, command_options), kind, defaults.get(name)))
    namespace = {"__doc__": preset.__doc__, "__module__": __name__}
    return dataclasses.make_dataclass(f"{method}_options", fields, namespace=namespace, frozen=True)


def _of_any(method: str) -> dict[str, Any]:
    """The options that a method has besides those of its preset, with their types."""
    own = inspect.signature(find_preset(method)).parameters
    given = {*own, "refit"} if "ridge" in own else own  # that one has its own correction
    return {name: kind for name, kind in OF_ANY.items() if name not in given} if takes_budget(method) else {}


def _option_name(method: str, parameter: str, command_options: type) -> str:
    taken = {field.name for field in dataclasses.fields(command_options)}
    return f"{method}_{parameter}" if parameter in taken else parameter


def _first_line(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]
