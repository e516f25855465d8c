"""Prints the tables of docs/embedded.md: `python scripts/embedded_table.py build/embedded build/embedded-4096`.

Of the sweeps that `restkv evaluate` left in the directories, the prompts whose answer was exact: all that was asked,
and nothing else.
"""

import pathlib

from restkv_jax.commands.options import parse
from restkv_jax.evaluate.accuracy import wilson_interval
from restkv_jax.evaluate.grid import CacheConfig, parse_method
from restkv_jax.evaluate.results import read_results

Exact = dict[tuple[str, int], dict[CacheConfig, tuple[int, int]]]
"""Exact answers and prompts by task and length, and by method and budget."""


def read_exact(directories: tuple[pathlib.Path, ...]) -> Exact:
    """Counts over all depths."""
    counts: Exact = {}
    for directory in directories:
        for cell, scores in read_results(directory).cells.items():
            by_config = counts.setdefault((cell.task, cell.length), {})
            right, total = by_config.get(cell.config, (0, 0))
            by_config[cell.config] = right + int(scores.exact.sum()), total + len(scores.exact)
    return counts


def cell_text(counts: tuple[int, int] | None) -> str:
    """A share and its 95 % Wilson interval, in %."""
    if not counts or not counts[1]:
        return ""
    low, high = wilson_interval(*counts)
    return f"{counts[0] / counts[1]:.1%} ({100 * low:.1f} to {100 * high:.1f})".replace("%", "")


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Prints Markdown."""
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")


def main(directories: tuple[pathlib.Path, ...]) -> None:
    """Prints the full cache by length, then every length's methods by budget.

    Args:
      directories: of the sweeps.
    """
    counts = read_exact(directories)
    tasks, lengths = dict.fromkeys(task for task, _ in counts), sorted({length for _, length in counts})
    full = {
        scenario: {config.method: n for config, n in found.items() if not config.budget}
        for scenario, found in counts.items()
    }
    print("Full cache:\n")
    rows = [[f"`{task}`", *(cell_text(full.get((task, n), {}).get("full")) for n in lengths)] for task in tasks]
    print_table(["prompts", *(f"{length:,} tokens" for length in lengths)], rows)
    for length in lengths:
        small = [config for task in tasks for config in counts.get((task, length), {}) if config.budget]
        methods, budgets = dict.fromkeys(e.method for e in small), dict.fromkeys(e.budget for e in small)
        if not small:
            continue
        print(f"\n{length:,} tokens:\n")
        rows = [
            [
                f"`{task}`",
                budget,
                *(cell_text(counts[task, length].get(CacheConfig(method, budget))) for method in methods),
            ]
            for task in tasks
            if (task, length) in counts
            for budget in budgets
        ]
        print_table(["prompts", "cache", *(f"`{parse_method(method).name}`" for method in methods)], rows)


if __name__ == "__main__":
    parse(main)
