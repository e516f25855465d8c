"""Several sweeps of the same prompts as one, of all their tasks, methods, budgets and lengths."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TypeVar

from restkv_jax.evaluate.grid import Grid
from restkv_jax.evaluate.results import Cell, Divergences, File, Results, Scores
from restkv_jax.eviction.budgets import budget_slots, parse_budget

UNITED = ("tasks", "methods", "budgets", "lengths")
"""In what sweeps may differ; prompts are the same wherever task and length are."""

Values = TypeVar("Values", Scores, Divergences)


def combine(sweeps: Sequence[Results]) -> Results:
    """Sweeps as one; of a cell that several have, the one with most prompts. Costs and errors are those of the first.

    The times in which prompts were read for all configurations are left out where sweeps have other configurations.

    Raises:
      ValueError: sweeps of other models or prompts, by name what differs.
    """
    grid = _unite([sweep.grid for sweep in sweeps])
    if len({sweep.weights for sweep in sweeps}) > 1:
        raise ValueError("the model's weights are not the same in all sweeps; report on each by itself")
    files: dict[str, File] = {}
    for path, file in itertools.chain.from_iterable(sweep.files.items() for sweep in sweeps):
        if files.setdefault(path, file).digest != file.digest:
            raise ValueError(f"the file {path!r} is not the same in all sweeps; report on each by itself")
    alike = len({(sweep.grid.methods, sweep.grid.budgets) for sweep in sweeps}) == 1
    cells, divergences = (_most([getattr(sweep, name) for sweep in sweeps]) for name in ("cells", "divergences"))
    seconds = sweeps[0].read_seconds if alike else {}
    return sweeps[0]._replace(grid=grid, cells=cells, divergences=divergences, read_seconds=seconds, files=files)


def _unite(grids: Sequence[Grid]) -> Grid:
    for field in dataclasses.fields(Grid):
        values = {getattr(grid, field.name) for grid in grids}
        if field.name not in UNITED and len(values) > 1:
            given = ", ".join(sorted(map(repr, values)))
            raise ValueError(f"{field.name} is not the same in all sweeps ({given}); report on each by itself")
    found = {name: tuple(dict.fromkeys(x for grid in grids for x in getattr(grid, name))) for name in UNITED}
    shortest = min(found["lengths"])
    found["budgets"] = tuple(sorted(found["budgets"], key=lambda text: budget_slots(parse_budget(text), shortest)))
    return dataclasses.replace(grids[0], **found)


def _most(of_each: Sequence[Mapping[Cell, Values]]) -> dict[Cell, Values]:
    found: dict[Cell, Values] = {}
    for cells in of_each:
        found |= {
            cell: values
            for cell, values in cells.items()
            if cell not in found or values.index.size > found[cell].index.size
        }
    return found
