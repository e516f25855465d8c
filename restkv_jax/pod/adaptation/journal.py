"""What a run shows of itself: metrics as JSON lines, and its progress."""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator
from typing import IO, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from restkv_jax.models.files import written_whole
from restkv_jax.pod.adaptation.recipe import Adaptation
from restkv_jax.pod.adaptation.training import Metrics, learning_rate
from restkv_jax.progress import make_progress

COLUMNS = (
    TextColumn("training"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("{task.fields[status]}"),
    TimeElapsedColumn(),
    TextColumn("left:"),
    TimeRemainingColumn(),
)


class Journal:
    """Metrics of the steps, each fetched from the device when the next is under way there.

    A line holds `step` (from 1), `loss` (mean per token, in nats), `gradient_norm` (before clipping), `learning_rate`
    and `tokens_per_second`.
    """

    def __init__(self, file: IO[str] | None, bar: Progress, adaptation: Adaptation):
        self._file, self._bar, self._rate = file, bar, learning_rate(adaptation)
        self._tokens = adaptation.batch_size * (adaptation.sequence_length or 0)
        self._pending: tuple[int, Metrics] | None = None
        self._fetched_at = time.monotonic()

    def record(self, step: int, metrics: Metrics) -> None:
        """Takes a step's metrics and writes those of the step before.

        Raises:
          FloatingPointError: the loss of the step before is not finite.
        """
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Waits for the last step and writes its metrics.

        Raises:
          FloatingPointError: its loss is not finite.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        loss, norm = float(metrics.loss), float(metrics.gradient_norm)
        now, before = time.monotonic(), self._fetched_at
        self._fetched_at = now
        if not math.isfinite(loss + norm):
            raise FloatingPointError(
                f"step {step} has loss {loss} and gradient norm {norm}; lower learning_rate, or lengthen warmup"
            )
        rate: Any = self._rate(step - 1)
        line = {"step": step, "loss": loss, "gradient_norm": norm, "learning_rate": float(rate)}
        line["tokens_per_second"] = round(self._tokens / (now - before), 1)
        if self._file is not None:
            print(json.dumps(line), file=self._file, flush=True)
            os.fsync(self._file.fileno())
        status = f"loss {loss:.4f}, {line['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._bar.task_ids[0], completed=step, status=status)


@contextlib.contextmanager
def open_journal(path: pathlib.Path | None, adaptation: Adaptation, done: int, quiet: bool) -> Iterator[Journal]:
    """The journal of a run.

    Args:
      path: file of JSON lines, to which later steps are appended; None writes none.
      adaptation: how the run trains.
      done: steps before, whose lines are kept.
      quiet: shows no progress.
    """
    with contextlib.ExitStack() as stack:
        file = None
        if path is not None:
            _forget_after(path, done)
            file = stack.enter_context(path.open("a"))
        bar = stack.enter_context(make_progress(*COLUMNS, quiet=quiet))
        bar.add_task("", total=adaptation.steps, completed=done, status="")
        yield Journal(file, bar, adaptation)


def _forget_after(path: pathlib.Path, done: int) -> None:
    """Removes the lines of later steps, which come again, and one that a killed run left unfinished."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= done:
                kept.append(line)
    with written_whole(path) as unfinished:
        unfinished.write_text("".join(f"{line}\n" for line in kept))
