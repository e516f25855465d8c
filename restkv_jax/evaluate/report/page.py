"""The report of a sweep: one HTML file, the same as Markdown, and pictures."""

import base64
import dataclasses
import importlib.resources
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure

from restkv_jax.evaluate.grid import Grid, cache_configs, conditions, is_file
from restkv_jax.evaluate.report.descriptions import describe
from restkv_jax.evaluate.report.plots import plot_accuracy, plot_costs, plot_divergence, plot_needle_map
from restkv_jax.evaluate.report.summary import (
    SIGNIFICANT,
    Estimates,
    Pair,
    base_configs,
    collect,
    collect_divergences,
    count_prompts,
    depth_cells,
    estimate_all,
    parse_pair,
    rank_overall,
    variants,
)
from restkv_jax.evaluate.report.tables import (
    FROM_BEST,
    FROM_FULL,
    cost_tables,
    divergence_tables,
    error_tables,
    findings,
    nats_difference,
    pair_tables,
    ranking_table,
    rate_table,
    reading_table,
    score_tables,
)
from restkv_jax.evaluate.results import Results, read_results, replace_text, writing

TITLE = "What evicting the KV cache costs in answers"
KEPT = "kept.png"
DPI = 150


class Picture(NamedTuple):
    """A picture beside the report: the name of its file, and what it shows in words."""

    file: str
    caption: str


class Selection(NamedTuple):
    """What a report shows of a sweep: which pairs of methods it compares, and which methods it draws.

    By default variants are compared with their base, and are in no other table and no picture.
    """

    pairs: Sequence[Pair] = ()
    drawn: Sequence[str] | None = None


def select(grid: Grid, pairs: Sequence[str] = (), drawn: Sequence[str] = ()) -> Selection:
    """What a report shows, by names.

    Raises:
      ValueError: a pair that is not of this form, or methods that the grid does not have.
    """
    for method in drawn:
        if method not in grid.methods:
            raise ValueError(f"method {method!r} cannot be drawn; the sweep has {', '.join(grid.methods)}")
    return Selection([parse_pair(text, grid) for text in pairs], tuple(drawn) or None)


def write_report(
    directory: pathlib.Path,
    kept: Figure | None = None,
    title: str = TITLE,
    results: Results | None = None,
    selection: Selection = Selection(),  # noqa: B008
    command: str | None = None,
) -> pathlib.Path:
    """Writes report.html, which needs no other file, report.md and the pictures into the directory of a sweep.

    Args:
      directory: of the results, finished or not.
      kept: the picture of what is kept of one prompt, as `restkv_jax.plot.plot_kept` draws it; kept.png if there is one
        already, none otherwise.
      title: of the report.
      results: to report on; those of the directory if left out.
      selection: what to show of them.
      command: that measures all again; `restkv evaluate` with the grid if left out.

    Returns:
      the path of report.html.

    Raises:
      ValueError: no sweep in the directory, none of its prompts measured yet, files that are damaged or cannot be
        written.
    """
    results = read_results(directory) if results is None else results
    if not results.cells and not results.divergences:
        raise ValueError(f"{str(directory)!r} has no results yet; run `restkv evaluate` first")
    estimates = estimate_all(collect(results))
    with writing(directory):
        content = _content(results, estimates, selection.pairs)
        content |= _draw(directory, results, estimates, kept, selection.drawn)
    content |= {"title": title, "command": command or rerun_command(results.grid, directory)}
    templates = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda name: (importlib.resources.files("restkv_jax.evaluate.report") / name).read_text("utf-8")
        ),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["markdown"] = escape_markdown
    templates.filters["data_uri"] = lambda file: data_uri(directory / file)
    for name in ("report.md", "report.html"):
        replace_text(directory / name, templates.get_template(f"{name}.jinja").render(content))
    return directory / "report.html"


def rerun_command(grid: Grid, directory: pathlib.Path) -> str:
    """The command line that measures the same grid."""
    words = ["restkv", "evaluate"]
    for field in dataclasses.fields(grid):
        value = getattr(grid, field.name)
        if value is True:
            words.append("--" + field.name)
        elif value not in (None, (), False) or (value == 0 and value is not False):
            words += ["--" + field.name, *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join([*words, "--output", directory.resolve().name])


def missing_prompts(results: Results) -> list[str]:
    """What an unfinished sweep still lacks: the tasks and lengths with the prompts that they have."""
    counts = count_prompts(results)
    expected: dict[tuple[str, int], int] = {}
    found: dict[tuple[str, int], int] = {}
    for condition in conditions(results.grid):
        expected[condition[:2]] = expected.get(condition[:2], 0) + results.grid.prompts
        found[condition[:2]] = found.get(condition[:2], 0) + counts.get(condition, 0)
    missing = [
        f"{task} at {length:,} tokens: {found[task, length]:,} of {number:,} prompts"
        for (task, length), number in expected.items()
        if found[task, length] < number
    ]
    of_files = count_own_prompts(results)
    for task, count in of_files.items():
        file = results.files.get(task)
        if file is not None and file.num_prompts is not None and count < file.num_prompts:
            missing.append(f"{task}: {count:,} of {file.num_prompts:,} prompts")
        elif not count:
            missing.append(f"{task}: no prompts yet")
    return missing


def count_own_prompts(results: Results) -> dict[str, int]:
    """How many prompts of each file of one's own are measured."""
    counts = count_prompts(results)
    return {
        task: sum(count for condition, count in counts.items() if condition[0] == task)
        for task in results.grid.tasks
        if is_file(task)
    }


def data_uri(path: pathlib.Path) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def escape_markdown(text: Any) -> str:
    """Text that Markdown, also in a table, shows as it is."""
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", str(text))


def _content(results: Results, estimates: Estimates, pairs: Sequence[Pair]) -> dict[str, Any]:
    """What both templates fill in, apart from the pictures."""
    grid = results.grid
    scores, columns = collect(results), cache_configs(grid) if pairs else base_configs(grid)
    divergences, compared = collect_divergences(results), pairs or variants(grid)
    rankings = {
        "Share of the answers said": rank_overall(scores, columns),
        "Prompts answered exactly: all answers and nothing else": rank_overall(collect(results, "exact"), columns),
    }
    return {
        "grid": grid,
        "tasks": {task: describe(task) for task in grid.tasks},
        "missing": missing_prompts(results),
        "makes_prompts": bool(conditions(grid)),
        "own_prompts": count_own_prompts(results),
        "has_full": any(config.budget is None for by_config in scores.values() for config in by_config),
        "has_percentages": any(budget.endswith("%") for budget in grid.budgets),
        "has_slots": any(not budget.endswith("%") for budget in grid.budgets),
        "from_full": FROM_FULL,
        "from_best": FROM_BEST,
        "significant": f"{100 * SIGNIFICANT:g}",
        "chat": grid.chat,
        "asks_after": grid.ask == "after",
        "findings": findings(grid, next(iter(rankings.values()))),
        "score_tables": score_tables(grid, scores, estimates, columns),
        "divergence_tables": divergence_tables(grid, divergences, columns),
        "rankings": [ranking_table(grid, ranking, name) for name, ranking in rankings.items() if ranking],
        "pairs_title": "Pairs of methods" if pairs else "Variants",
        "pair_tables": pair_tables(grid, scores, compared),
        "nats_pair_tables": pair_tables(grid, divergences, compared, nats_difference),
        "error_tables": error_tables(grid, results.errors),
        "cost_tables": cost_tables(grid, results.costs) if results.costs else [],
        "reading_table": reading_table(results.read_seconds),
        "rate_table": rate_table(results.costs) if results.costs else None,
        "device": results.costs.device if results.costs else None,
    }


def _draw(
    directory: pathlib.Path,
    results: Results,
    estimates: Estimates,
    kept: Figure | None,
    drawn: Sequence[str] | None,
) -> dict[str, Any]:
    """Writes the pictures; those that the results have nothing for are left out."""
    accuracy = None
    if estimates:
        accuracy = Picture("accuracy.png", "The share of the answers said by each method as its budget grows.")
        plot_accuracy(results, estimates, drawn).savefig(directory / accuracy.file, dpi=DPI)
    divergence = None
    if results.divergences:
        divergence = Picture("divergence.png", "The divergence from the full cache of each method as its budget grows.")
        plot_divergence(results, drawn).savefig(directory / divergence.file, dpi=DPI)
    tasks = list(depth_cells(results))
    maps = []
    for task in tasks:
        name = re.sub(r"\W+", "_", task)
        file = "needle_map.png" if len(tasks) == 1 else f"needle_map_{name}.png"
        maps.append(Picture(file, f"{task}: where in the prompt, and at which length, the needle is found."))
        plot_needle_map(results, task, drawn).savefig(directory / file, dpi=DPI)
    costs = None
    if results.costs is not None and results.costs.costs:
        costs = Picture("costs.png", "Bytes of the cache and time as the budget grows.")
        plot_costs(results, drawn).savefig(directory / costs.file, dpi=DPI)
    if kept is not None:
        kept.savefig(directory / KEPT, dpi=DPI)
    caption = (
        "One prompt: each row is a layer, each column a position in the prompt; the darker, the more of the layer's "
        "heads keep it. White is evicted."
    )
    has_kept = (directory / KEPT).is_file()
    return {
        "accuracy_picture": accuracy,
        "divergence_picture": divergence,
        "map_pictures": maps,
        "costs_picture": costs,
        "kept_picture": Picture(KEPT, caption) if has_kept else None,
    }
