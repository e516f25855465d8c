"""The options of a method, which are the parameters of its preset, beside those of a command."""

import argparse
import dataclasses
import inspect
import itertools
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from cyclopts import Group, Parameter

from restkv_jax.commands.options import FLAT, as_usage_error, parse
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.presets import find_preset, make_policy

Options = TypeVar("Options", bound=Any)


def parse_with_method(
    command_options: type[Options], args: Sequence[str], program: str
) -> tuple[Options, EvictionPolicy]:
    """A command's options, a dataclass with a field `method`, and the policy of the method that `--method` names.

    Raises:
      UsageError: an unknown method or option, or a value that cannot be.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", nargs="?", default=command_options.method)
    method = first.parse_known_args(list(itertools.takewhile(lambda arg: arg != "--", args)))[0].method or ""
    with as_usage_error():
        method_class = _options_of(method, command_options)
    group = Group(f"Method {method}", help=_first_line(find_preset(method)))
    shown = Parameter(name="*", group=group, parse=None if dataclasses.fields(method_class) else False)

    def command(
        options: Any = command_options(),  # noqa: B008
        *,
        method_options: Any = method_class(),  # noqa: B008
    ) -> tuple[Options, dict[str, Any]]:
        parameters = inspect.signature(find_preset(method)).parameters
        names = {name: _option_name(method, name, command_options) for name in parameters}
        return options, {name: getattr(method_options, option) for name, option in names.items()}

    command.__annotations__ |= {
        "options": Annotated[command_options, FLAT],
        "method_options": Annotated[method_class, shown],
    }
    command.__doc__ = _first_line(command_options)
    options, chosen = parse(command, args, program, f" of --method {method}")
    with as_usage_error():
        return options, make_policy(method, chosen)


def _options_of(method: str, command_options: type) -> type:
    """A dataclass with the parameters, defaults and docstring of a method's preset; budgets as text.

    A parameter whose name is taken by an option of the command gets the method's as a prefix.
    """
    preset = find_preset(method)
    fields = []
    for parameter in inspect.signature(preset).parameters.values():
        annotation, default = parameter.annotation, parameter.default
        if parameter.name == "budget":
            annotation, default = Annotated[str, Parameter(metavar="TOKENS|PERCENT%")], str(default)
        fields.append((_option_name(method, parameter.name, command_options), annotation, default))
    namespace = {"__doc__": preset.__doc__, "__module__": __name__}
    return dataclasses.make_dataclass(f"{method}_options", fields, namespace=namespace, frozen=True)


def _option_name(method: str, parameter: str, command_options: type) -> str:
    taken = {field.name for field in dataclasses.fields(command_options)}
    return f"{method}_{parameter}" if parameter in taken else parameter


def _first_line(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]
