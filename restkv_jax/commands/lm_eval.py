"""`restkv lm-eval`: lm-evaluation-harness's own command with `restkv` among its models."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from lm_eval._cli import HarnessCLI
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.utils import setup_logging

from restkv_jax.commands.options import UsageError
from restkv_jax.evaluate.harness import EMBEDDED
from restkv_jax.evaluate.harness.model_args import parse_model_args


def run_lm_eval(args: Sequence[str]) -> None:
    """Hands over to the harness; tasks that cannot be loaded are named and left out, the others run.

    Args:
      args: the harness's own; the model is `restkv` unless `--model` names another, and without `pretrained` it is the
        one that comes with the package.

    Raises:
      UsageError: arguments that cannot work, or no task that can be loaded.
    """
    setup_logging()
    with mock.patch.object(sys, "argv", ["restkv lm-eval", *args]):
        cli = HarnessCLI()
        parsed = cli.parse_args()
    # a file of settings says itself which model it is for
    if parsed.command == "run" and parsed.config is None:
        parsed.model = parsed.model or "restkv"
        if parsed.model == "restkv":
            # tasks that make their own prompts find the tokenizer by this argument
            parsed.model_args = {"pretrained": EMBEDDED} | (parsed.model_args or {})
            parse_model_args(parsed.model_args)
    left_out: dict[str, str] = {}
    with _shared_downloads(), mock.patch.object(TaskManager, "load", _tolerant(TaskManager.load, left_out)):
        cli.execute(parsed)
    for name, reason in left_out.items():
        _complain(name, reason)


def _tolerant(load: Callable[..., Any], left_out: dict[str, str]) -> Callable[..., Any]:
    """`TaskManager.load` that puts what cannot be loaded into `left_out`, by name with the reason."""

    def load_some(manager: TaskManager, tasks: Sequence[Any]) -> Any:
        found: list[Any] = []
        for task in tasks:
            _sort_out(lambda one: load(manager, [one]), manager, task, found, left_out)
        if not found:
            reasons = "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
            raise UsageError(f"--tasks: none can be loaded: {reasons}")
        return load(manager, found)

    return load_some


def _sort_out(load: Callable[[Any], Any], manager: TaskManager, task: Any, found: list, left_out: dict) -> None:
    """A group or tag that cannot be loaded as a whole is gone through member by member."""
    try:
        load(task)
    except Exception as error:  # whatever a task's own code raises must not stop the others
        members = _members(manager, task)
        for member in members:
            _sort_out(load, manager, member, found, left_out)
        if not members:
            name = task if isinstance(task, str) else task.get("task", task.get("group"))
            left_out[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            _complain(name, left_out[name])
    else:
        if task not in found:
            found.append(task)


def _members(manager: TaskManager, task: Any) -> list[str]:
    """Names of what a registered group or tag consists of; none where a group defines its members in place."""
    entry = manager.task_index.get(task) if isinstance(task, str) else None
    if entry is None:
        return []
    members = sorted(entry.tags) if entry.cfg is None else entry.cfg.get("task")
    by_name = isinstance(members, list) and all(isinstance(m, str) and m in manager.task_index for m in members)
    return members if by_name else []


@contextlib.contextmanager
def _shared_downloads() -> Iterator[None]:
    """Lets a task take its data, or its failure, from an earlier task of its name and data set.

    A task is loaded in its group, by itself, and for the run, and both making prompts and waiting for a hub that does
    not answer take minutes.
    """
    download = ConfigurableTask.download
    found: dict[tuple, Any] = {}
    failed: dict[tuple, Exception] = {}

    def share(self, *args, **kwargs):
        place = (str(self.DATASET_PATH or self.config.task),)
        task = (*place, self.config.task, str(self.DATASET_NAME), repr((args, kwargs)))
        for error in (failed.get(place), failed.get(task)):
            if error is not None:
                raise error
        if task not in found:
            try:
                download(self, *args, **kwargs)
            except Exception as error:
                # a place that cannot be reached has nothing else either
                failed[place if isinstance(error, ConnectionError) else task] = error
                raise
            found[task] = self.dataset
        self.dataset = found[task]

    with mock.patch.object(ConfigurableTask, "download", share):
        yield


def _complain(name: str, reason: str) -> None:
    print(f"restkv: warning: task {name} is left out: {reason}", file=sys.stderr)
