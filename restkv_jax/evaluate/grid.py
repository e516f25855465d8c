"""What a sweep measures: tasks, methods with options, budgets and lengths, from options or a YAML file."""

import ast
import dataclasses
import inspect
import itertools
import operator
from typing import Any, NamedTuple, get_args

from restkv_jax.commands.options import DType, UsageError, as_usage_error, find_method, parse_budget, suggest
from restkv_jax.evaluate.tasks import TASKS
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.refit import LeastSquares


@dataclasses.dataclass(frozen=True)
class Grid:
    """Everything that the results of a sweep depend on.

    Args:
      tasks: names in `TASKS`, or files of own prompts: JSON lines with "prompt" and "answers".
      methods: names in `METHODS`, with options in parentheses: `restkv(temporal=mean)`; besides the method's own,
        `refit=0.01` (the ridge of the least squares), `candidates` and `page_size`. "full" has no budgets.
      budgets: slots per layer and KV head, such as "128" or "5%" of the length.
      lengths: tokens of the prompts that tasks make.
      depths: where the needle stands, from 0 to 1; with any, tasks with one needle are measured at each, as for a map.
      prompts: prompts per task, length and depth.
      seed: of the prompts.
      model: directory of a checkpoint in Hugging Face's layout, or id of a model on its hub; the model that comes with
        the package if left out.
      dtype: of weights and cache; "auto" is bfloat16, on a CPU float32.
    """

    tasks: tuple[str, ...] = ("single", "multikey", "haystack")
    methods: tuple[str, ...] = ("full", "restkv", "laprox", "snapkv", "streaming_llm")
    budgets: tuple[str, ...] = ("5%", "10%", "20%")
    lengths: tuple[int, ...] = (1024,)
    depths: tuple[float, ...] = ()
    prompts: int = 100
    seed: int = 0
    model: str | None = None
    dtype: DType = "auto"


class Method(NamedTuple):
    """A method as a grid names it: the preset's name, and options that differ from its defaults."""

    name: str
    options: dict[str, Any]


POLICY_OPTIONS = ("refit", "candidates", "page_size")
"""Fields of a policy that any method takes as options here; `refit` by the ridge of its least squares."""


WHOLE = operator.index, "a whole number"
FIELD_TYPES = {"lengths": WHOLE, "prompts": WHOLE, "seed": WHOLE, "depths": (float, "a number")}
"""What makes a value read from a file one of a grid's, or refuses it, and its name; strings by default."""


class Entry(NamedTuple):
    """One column of a sweep: the method and the budget as the grid has them; None for the full cache."""

    method: str
    budget: str | None

    @property
    def label(self) -> str:
        """`restkv 5%`, or `full`."""
        return self.method if self.budget is None else f"{self.method} {self.budget}"


def check_grid(grid: Grid) -> None:
    """Refuses what cannot be measured, before anything is loaded.

    Raises:
      UsageError: an unknown task, method or option, with near ones; a budget that is none or above a length; numbers
        out of range.
    """
    for name in ("tasks", "methods", "lengths"):
        if not getattr(grid, name):
            raise UsageError(f"{name} is empty; give at least one")
    for task in grid.tasks:
        if task not in TASKS and not is_file(task):
            raise UsageError(f"task {task!r} is unknown; {suggest(task, TASKS)}; or a file of prompts, *.jsonl")
    if grid.prompts < 1:
        raise UsageError(f"prompts={grid.prompts} must be at least 1")
    for name in ("tasks", "lengths", "depths"):
        if len(set(getattr(grid, name))) < len(getattr(grid, name)):
            raise UsageError(f"{name} are given twice; leave one out")
    if grid.dtype not in get_args(DType):
        raise UsageError(f"dtype {grid.dtype!r} is unknown; {suggest(str(grid.dtype), get_args(DType))}")
    for depth in grid.depths:
        if not 0 <= depth <= 1:
            raise UsageError(f"depth {depth} must be between 0, the beginning of the prompt, and 1, its end")
    budgets = [parse_budget(budget) for budget in grid.budgets]
    entries(grid)
    for length in grid.lengths if grid_places(grid) else ():
        if length < 1:
            raise UsageError(f"length {length} must be at least 1 token")
        for budget in budgets:
            if budget.slots(length) > length:
                raise UsageError(f"budget {budget} is above the context of {length} tokens; lower it, or leave it out")
        policies(grid, length)


def is_file(task: str) -> bool:
    """Whether a task is a file of own prompts."""
    return task.endswith(".jsonl")


def grid_places(grid: Grid) -> list[tuple[str, int, float | None]]:
    """Task, length and depth of the prompts that are made; tasks that ask for more than a needle have no depth."""
    found = []
    for task in grid.tasks:
        if not is_file(task):
            depths = grid.depths if getattr(TASKS[task], "asks_one", False) else ()
            found += itertools.product([task], grid.lengths, depths or (None,))
    return found


def entries(grid: Grid) -> list[Entry]:
    """The columns of a sweep, in the grid's order."""
    found = []
    for text in grid.methods:
        sized = "budget" in inspect.signature(find_method(parse_method(text).name)).parameters
        found += [Entry(text, budget) for budget in grid.budgets] if sized else [Entry(text, None)]
    if len(set(found)) < len(found):
        raise UsageError("methods or budgets are given twice; leave one out")
    return found


def policies(grid: Grid, length: int) -> dict[Entry, EvictionPolicy]:
    """The policies of a sweep for prompts of `length` tokens.

    A window that the method has by default shrinks to half of a small budget.

    Raises:
      UsageError: options or budgets that a method refuses.
    """
    return {entry: make_policy_of(entry, length) for entry in entries(grid)}


def make_policy_of(entry: Entry, length: int) -> EvictionPolicy:
    """The policy of one column for prompts of `length` tokens."""
    method = parse_method(entry.method)
    preset, options = find_method(method.name), dict(method.options)
    parameters = inspect.signature(preset).parameters
    prefix = f"method {entry.label!r} at {length:,} tokens: "
    changes = {name: options.pop(name) for name in POLICY_OPTIONS if name in options}
    if entry.budget is not None:
        options["budget"] = slots = parse_budget(entry.budget).slots(length)
        if "window" in parameters and "window" not in options:
            options["window"] = max(1, min(parameters["window"].default, slots // 2))
    try:
        if "refit" in changes:
            changes["refit"] = LeastSquares(changes["refit"])
        return preset(**options).replace(**changes)
    except (TypeError, ValueError) as error:
        raise UsageError(prefix + str(error)) from error


def parse_method(text: str) -> Method:
    """Reads `restkv` or `restkv(temporal=mean, alpha=0.5)`.

    Raises:
      UsageError: an unknown method or option, with near ones; anything that is not of this form.
    """
    wrong = f"method {text!r} must be a name, or a name with options as in restkv(temporal=mean, alpha=0.5)"
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise UsageError(wrong) from error
    call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
    if not isinstance(call.func, ast.Name) or call.args or any(k.arg is None for k in call.keywords):
        raise UsageError(wrong)
    name = call.func.id
    parameters = inspect.signature(find_method(name)).parameters
    options = {}
    for keyword in call.keywords:
        known = [*(p for p in parameters if p != "budget"), *POLICY_OPTIONS]
        if keyword.arg not in known:
            raise UsageError(f"method {text!r}: {keyword.arg!r} is no option of {name}; {suggest(keyword.arg, known)}")
        with as_usage_error(f"method {text!r}: "):
            options[keyword.arg] = _value(keyword.value)
        default = parameters[keyword.arg].default if keyword.arg in parameters else None
        if isinstance(default, bool) and not isinstance(options[keyword.arg], bool):
            raise UsageError(f"method {text!r}: {keyword.arg} must be true or false")
    return Method(name, options)


def _value(node: ast.expr) -> Any:
    """A bare name is a string, but for true and false."""
    if isinstance(node, ast.Name):
        return {"true": True, "false": False}.get(node.id, node.id)
    return ast.literal_eval(node)


def from_mapping(values: Any, source: str) -> dict[str, Any]:
    """The fields of a `Grid` in a mapping that was read from a file.

    Raises:
      UsageError: no mapping, or a field that a grid does not have, with near ones.
    """
    fields = {field.name: field for field in dataclasses.fields(Grid)}
    if not isinstance(values, dict):
        raise UsageError(f"{source} must hold fields such as `tasks: [single]`")
    found = {}
    for name, value in values.items():
        if name not in fields:
            raise UsageError(f"{source}: {name!r} is no field of a grid; {suggest(str(name), fields)}")
        several = isinstance(fields[name].default, tuple)
        if several and not isinstance(value, (list, tuple)):
            raise UsageError(f"{source}: {name} must be a list, as in `{name}: [{value}]`")
        convert, kind = FIELD_TYPES.get(name, (str, "text"))
        try:
            values = [convert(one) for one in (value if several else [value])]
        except (TypeError, ValueError) as error:
            raise UsageError(f"{source}: {name}: {value!r} is not {kind}") from error
        found[name] = tuple(values) if several else None if value is None else values[0]
    return found
