"""The report of a sweep: one HTML file, the same as Markdown, and pictures."""

import base64
import dataclasses
import importlib.resources
import pathlib
import re
import shlex
from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure

from restkv_jax.evaluate.grid import Grid, conditions, is_file
from restkv_jax.evaluate.report.descriptions import describe
from restkv_jax.evaluate.report.plots import plot_accuracy, plot_costs, plot_needle_map
from restkv_jax.evaluate.report.summary import (
    SIGNIFICANT,
    Estimates,
    base_configs,
    collect,
    collect_divergences,
    count_prompts,
    depth_cells,
    estimate_all,
    rank_overall,
    variant_configs,
)
from restkv_jax.evaluate.report.tables import (
    FROM_BEST,
    FROM_FULL,
    cost_tables,
    divergence_tables,
    error_tables,
    findings,
    ranking_table,
    rate_table,
    reading_table,
    score_tables,
    variant_tables,
)
from restkv_jax.evaluate.results import Results, read_results, replace_text, writing

TITLE = "What evicting the KV cache costs in answers"
KEPT = "kept.png"
DPI = 150


class Picture(NamedTuple):
    """A picture beside the report: the name of its file, and what it shows in words."""

    file: str
    caption: str


def write_report(directory: pathlib.Path, kept: Figure | None = None, title: str = TITLE) -> pathlib.Path:
    """Writes report.html, which needs no other file, report.md and the pictures into the directory of a sweep.

    Args:
      directory: of the results, finished or not.
      kept: the picture of what is kept of one prompt, as `restkv_jax.plot.plot_kept` draws it; kept.png if there is one
        already, none otherwise.
      title: of the report.

    Returns:
      the path of report.html.

    Raises:
      ValueError: no sweep in the directory, none of its prompts measured yet, files that are damaged or cannot be
        written.
    """
    results = read_results(directory)
    if not results.cells and not results.divergences:
        raise ValueError(f"{str(directory)!r} has no results yet; run `restkv evaluate` first")
    estimates = estimate_all(collect(results))
    with writing(directory):
        content = _content(results, estimates) | _draw(directory, results, estimates, kept)
    content |= {"title": title, "command": rerun_command(results.grid, directory)}
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
    begun = {task for task, _, _ in counts}
    return missing + [f"{task}: no prompts yet" for task in results.grid.tasks if is_file(task) and task not in begun]


def data_uri(path: pathlib.Path) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def escape_markdown(text: Any) -> str:
    """Text that Markdown, also in a table, shows as it is."""
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", str(text))


def _content(results: Results, estimates: Estimates) -> dict[str, Any]:
    """What both templates fill in, apart from the pictures."""
    grid = results.grid
    scores, columns = collect(results), base_configs(grid)
    rankings = {
        "Share of the answers said": rank_overall(scores, columns),
        "Prompts answered exactly: all answers and nothing else": rank_overall(collect(results, "exact"), columns),
    }
    return {
        "grid": grid,
        "tasks": {task: describe(task) for task in grid.tasks},
        "missing": missing_prompts(results),
        "has_full": any(config.budget is None for by_config in scores.values() for config in by_config),
        "has_percentages": any(budget.endswith("%") for budget in grid.budgets),
        "has_slots": any(not budget.endswith("%") for budget in grid.budgets),
        "from_full": FROM_FULL,
        "from_best": FROM_BEST,
        "significant": f"{100 * SIGNIFICANT:g}",
        "chat": grid.chat,
        "asks_after": grid.ask == "after",
        "findings": findings(grid, next(iter(rankings.values()))),
        "score_tables": score_tables(grid, scores, estimates),
        "divergence_tables": divergence_tables(grid, collect_divergences(results)),
        "rankings": [ranking_table(grid, ranking, name) for name, ranking in rankings.items() if ranking],
        "variant_tables": variant_tables(grid, scores) if variant_configs(grid) else [],
        "error_tables": error_tables(grid, results.errors),
        "cost_tables": cost_tables(grid, results.costs) if results.costs else [],
        "reading_table": reading_table(results.read_seconds),
        "rate_table": rate_table(results.costs) if results.costs else None,
        "device": results.costs.device if results.costs else None,
    }


def _draw(directory: pathlib.Path, results: Results, estimates: Estimates, kept: Figure | None) -> dict[str, Any]:
    """Writes the pictures; those that the results have nothing for are left out."""
    accuracy = None
    if estimates:
        accuracy = Picture("accuracy.png", "The share of the answers said by each method as its budget grows.")
        plot_accuracy(results, estimates).savefig(directory / accuracy.file, dpi=DPI)
    tasks = list(depth_cells(results))
    maps = []
    for task in tasks:
        name = re.sub(r"\W+", "_", task)
        file = "needle_map.png" if len(tasks) == 1 else f"needle_map_{name}.png"
        maps.append(Picture(file, f"{task}: where in the prompt, and at which length, the needle is found."))
        plot_needle_map(results, task).savefig(directory / file, dpi=DPI)
    costs = None
    if results.costs is not None and results.costs.costs:
        costs = Picture("costs.png", "Bytes of the cache and time as the budget grows.")
        plot_costs(results).savefig(directory / costs.file, dpi=DPI)
    if kept is not None:
        kept.savefig(directory / KEPT, dpi=DPI)
    caption = (
        "One prompt: each row is a layer, each column a position in the prompt; the darker, the more of the layer's "
        "heads keep it. White is evicted."
    )
    has_kept = (directory / KEPT).is_file()
    return {
        "accuracy_picture": accuracy,
        "map_pictures": maps,
        "costs_picture": costs,
        "kept_picture": Picture(KEPT, caption) if has_kept else None,
    }
