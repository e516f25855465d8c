"""`restkv lm-eval`: lm-evaluation-harness's own command with `restkv` among its models."""

import argparse
import contextlib
import difflib
import glob
import sys
from collections.abc import Iterator, Sequence

from lm_eval._cli import HarnessCLI  # which has no public name
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager
from lm_eval.utils import setup_logging

from restkv_jax.commands.options import UsageError, as_usage_error, print_notice
from restkv_jax.evaluate.harness.model import EMBEDDED
from restkv_jax.evaluate.harness.model_args import parse_model_args

TRIAL_TOKENS = 4096
"""Most tokens of the prompts that RULER's tasks make when it is tried whether they can be loaded."""


def run(args: Sequence[str]) -> None:
    """Hands over to the harness; tasks that cannot be loaded are named and left out, the others run.

    Args:
      args: the harness's own, and `--model-parallel` and `--data-parallel`; the model is `restkv` unless `--model`
        names another, and without `pretrained` it is the one that comes with the package.

    Raises:
      UsageError: arguments that cannot work, a task that there is not, or none that can be loaded.
    """
    setup_logging()
    harness = HarnessCLI()
    mesh, args = _mesh_options(args)
    with _process_arguments("restkv lm-eval", *args):  # the harness reads no others
        parsed = harness.parse_args()
    left_out: dict[str, str] = {}
    with as_usage_error():
        if parsed.command == "run":
            _set_model(parsed, mesh)
            parsed.tasks = _loadable_tasks(EvaluatorConfig.from_cli(parsed), left_out)
        harness.execute(parsed)
    for name, reason in left_out.items():
        _warn(name, reason)


@contextlib.contextmanager
def _process_arguments(*arguments: str) -> Iterator[None]:
    given, sys.argv = sys.argv, list(arguments)
    try:
        yield
    finally:
        sys.argv = given


def _mesh_options(args: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """The options of the mesh, which the harness does not know, and the others."""
    parser = argparse.ArgumentParser(prog="restkv lm-eval", add_help=False, allow_abbrev=False)
    for name in ("--model-parallel", "--data-parallel"):
        parser.add_argument(name, type=int, default=argparse.SUPPRESS)
    known, others = parser.parse_known_args(list(args))
    return vars(known), others


def _set_model(parsed: argparse.Namespace, mesh: dict[str, int]) -> None:
    """Fills in the default model and checks its arguments; a file of settings says itself which model it is for."""
    if mesh and (parsed.config is not None or parsed.model not in (None, "restkv")):
        given = " and ".join(f"--{name.replace('_', '-')}" for name in mesh)
        raise UsageError(f"{given}: only for the model restkv without --config; give it as model_args there")
    if parsed.config is None:
        parsed.model = parsed.model or "restkv"
        if parsed.model == "restkv":
            # tasks that make their own prompts find the tokenizer by this argument
            parsed.model_args = {"pretrained": EMBEDDED} | mesh | (parsed.model_args or {})
            parse_model_args(parsed.model_args)


def _loadable_tasks(config: EvaluatorConfig, left_out: dict[str, str]) -> list[str]:
    """Names and files of the tasks that can be loaded; the others go into `left_out`, by name with the reason."""
    metadata = dict(config.metadata)
    lengths = metadata.get("max_seq_lengths")
    if isinstance(lengths, list):
        metadata["max_seq_lengths"] = [min(TRIAL_TOKENS, *lengths)]
    manager = TaskManager(include_path=config.include_path, metadata=metadata)
    asked = config.tasks.split(",") if isinstance(config.tasks, str) else config.tasks
    found: dict[str, None] = {}
    unreachable: set[str] = set()
    for task in asked:
        names = manager.match_tasks([task]) or sorted(glob.glob(f"{task}/*.yaml") or glob.glob(task))
        if not names:
            near = " or ".join(difflib.get_close_matches(task, manager.all_tasks))
            advice = f"did you mean {near}?" if near else "`restkv lm-eval ls tasks` lists those that there are"
            raise UsageError(f"--tasks: {task!r} is unknown; {advice}")
        for name in names:
            found |= dict.fromkeys(_load(manager, name, left_out, unreachable))
    if not found:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
        raise UsageError(f"--tasks: none can be loaded: {reasons}")
    return list(found)


def _load(manager: TaskManager, name: str, left_out: dict[str, str], unreachable: set[str]) -> list[str]:
    """The name of what can be loaded, or, of a group or tag that cannot be loaded as a whole, of those members.

    A data set whose host does not answer is put into `unreachable`, and not waited for again.
    """
    entry = manager.task_index.get(name)
    settings = {} if entry is None or entry.cfg is None else entry.cfg
    dataset = settings.get("dataset_path") or name
    if dataset in unreachable:
        left_out[name] = f"the host of {dataset} does not answer"
        return []
    try:
        manager.load([name])
    except Exception as error:  # whatever a task's own code raises must not stop the others
        members = settings.get("task") if entry is None or entry.cfg is not None else sorted(entry.tags)
        if isinstance(members, list) and all(isinstance(m, str) and m in manager.task_index for m in members):
            return [one for member in members for one in _load(manager, member, left_out, unreachable)]
        left_out[name] = f"{type(error).__name__}: {error}"
        _warn(name, left_out[name])
        unreachable |= {dataset} if isinstance(error, ConnectionError) else set()
        return []
    return [name]


def _warn(name: str, reason: str) -> None:
    print_notice(f"warning: task {name} is left out: {reason}")
