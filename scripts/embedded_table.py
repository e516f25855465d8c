"""Prints the table of docs/embedded.md: `python scripts/embedded_table.py build/embedded build/embedded-4096`.

Of the sweeps that `restkv evaluate` left in the directories, the prompts whose answer was exact: all that was asked,
and nothing else.
"""

import pathlib

from restkv_jax.commands.options import parse
from restkv_jax.evaluate.accuracy import wilson_interval
from restkv_jax.evaluate.results import read_results

Exact = dict[tuple[str, int], tuple[int, int]]
"""Exact answers and prompts by task and length."""


def read_exact(directories: tuple[pathlib.Path, ...]) -> Exact:
    """Counts over all depths."""
    counts: Exact = {}
    for directory in directories:
        for cell, scores in read_results(directory).cells.items():
            if cell.config.budget is None:
                right, total = counts.get((cell.task, cell.length), (0, 0))
                counts[cell.task, cell.length] = right + int(scores.exact.sum()), total + len(scores.exact)
    return counts


def cell_text(counts: tuple[int, int] | None) -> str:
    """A share and its 95 % Wilson interval, in %."""
    if not counts or not counts[1]:
        return ""
    low, high = wilson_interval(*counts)
    return f"{counts[0] / counts[1]:.1%} ({100 * low:.1f} to {100 * high:.1f})".replace("%", "")


def main(directories: tuple[pathlib.Path, ...]) -> None:
    """Prints the exact answers of the full cache by task and length.

    Args:
      directories: of the sweeps.
    """
    counts = read_exact(directories)
    tasks, lengths = dict.fromkeys(task for task, _ in counts), sorted({length for _, length in counts})
    rows = [[f"`{task}`", *(cell_text(counts.get((task, n))) for n in lengths)] for task in tasks]
    for row in (["prompts", *(f"{length:,} tokens" for length in lengths)], ["---"] * (len(lengths) + 1), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    parse(main)
