"""Policies by the name of their method, with options and budgets as files and command lines give them."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from restkv_jax.eviction.budgets import parse_budget
from restkv_jax.eviction.methods.registry import METHODS
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.refit import LeastSquares

POLICY_OPTIONS = ("refit", "candidates", "page_size", "sinks")
"""Fields of a policy that `make_policy` takes for any method; `refit` as the ridge of its least squares, or None."""


def make_policy(method: str, options: Mapping[str, Any]) -> EvictionPolicy:
    """The policy of a method.

    Args:
      method: name in `METHODS`.
      options: parameters of the method's preset and `POLICY_OPTIONS`, by name; `budget` as `parse_budget` reads it.

    Raises:
      ValueError: an unknown method or option, with near ones, or a value that the preset refuses.
    """
    check_options(method, options)
    values = dict(options)
    parameters = inspect.signature(find_preset(method)).parameters
    changes = {name: values.pop(name) for name in POLICY_OPTIONS if name in values and name not in parameters}
    try:
        if "budget" in values:
            values["budget"] = parse_budget(values["budget"])
        if changes.get("refit") is not None and "ridge" in parameters:
            raise ValueError(f"{method} has a correction of its own; give its ridge, or refit=None for none")
        if "refit" in changes:
            changes["refit"] = None if changes["refit"] is None else LeastSquares(changes["refit"])
        return METHODS[method](**values).replace(**changes)
    except TypeError as error:
        raise ValueError(str(error)) from error


def find_preset(method: str) -> Callable[..., EvictionPolicy]:
    """The preset of a method.

    Raises:
      ValueError: an unknown name; suggests near ones.
    """
    if method in METHODS:
        return METHODS[method]
    raise ValueError(f"method={method!r} is unknown; {suggest(method, METHODS)}")


def check_options(method: str, options: Mapping[str, Any], others: Iterable[str] = ()) -> None:
    """Refuses options that a method does not have.

    Args:
      method: name in `METHODS`.
      options: by name.
      others: names that could have been meant instead.

    Raises:
      ValueError: an unknown method or option, with near ones, or a flag that is neither true nor false.
    """
    parameters = inspect.signature(find_preset(method)).parameters
    for name, value in options.items():
        if name not in parameters and name not in POLICY_OPTIONS:
            raise ValueError(
                f"{name} is not an option of method={method}; {suggest(name, [*parameters, *POLICY_OPTIONS, *others])}"
            )
        is_flag = name in parameters and isinstance(parameters[name].default, bool)
        if is_flag and not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be true or false")


def takes_budget(method: str) -> bool:
    """Whether a method has a budget; the full cache has none."""
    return "budget" in inspect.signature(find_preset(method)).parameters


def suggest(name: str, known: Iterable[str]) -> str:
    """What was perhaps meant by a name, and what there is: the end of a message."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.65)
    return (f"did you mean {' or '.join(near)}? " if near else "") + f"known: {', '.join(known)}"
