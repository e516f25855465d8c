"""How far a long run is: a bar on a terminal, plain lines now and then in a file or pipe."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID

SECONDS_BETWEEN_LINES = 30


def make_progress(*columns: ProgressColumn, quiet: bool = False, **options: Any) -> Progress:
    """Progress on standard error, a context manager as rich's.

    Args:
      columns: of the bar; lines go without the `BarColumn`s.
      quiet: shows nothing.
      options: of `rich.progress.Progress`.
    """
    console = Console(stderr=True)
    kind = Progress if quiet or console.is_terminal else ProgressLines
    return kind(*columns, console=console, disable=quiet, **options)


class ProgressLines(Progress):
    """A line for the first progress, for the last, and at most every `SECONDS_BETWEEN_LINES` between."""

    def __init__(self, *columns: ProgressColumn, disable: bool = False, **options: Any):
        super().__init__(*(c for c in columns if not isinstance(c, BarColumn)), disable=True, **options)
        self._next_line = 0.0

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """As rich's; prints a line where it is time."""
        super().update(task_id, **changes)
        task, now = self._tasks[task_id], self.get_time()
        if task.completed and (task.finished or now >= self._next_line):
            self._next_line = now + SECONDS_BETWEEN_LINES
            self.console.print(self.make_tasks_table([task]))
