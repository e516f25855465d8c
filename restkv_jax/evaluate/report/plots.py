"""The pictures of a sweep: scores against budgets, needle maps, costs."""

from collections.abc import Collection, Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from restkv_jax.evaluate.grid import CacheConfig, cache_configs
from restkv_jax.evaluate.report.summary import (
    Estimate,
    Scenario,
    base_configs,
    collect,
    collect_divergences,
    depth_cells,
    estimate_all,
    estimate_nats,
)
from restkv_jax.evaluate.report.units import BYTES, SECONDS, unit_for
from restkv_jax.evaluate.results import Results
from restkv_jax.eviction.budgets import budget_slots, parse_budget

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
"""Okabe and Ito's colours for all kinds of colour vision; black is the full cache's, and yellow too faint on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p")
FULL_COLOR = "#000000"
DODGE = 0.006
"""Distance of neighbouring methods at one budget, as a share of the axis, so that their bars do not hide each other."""
MOST_ANNOTATED = 12
"""Depths and lengths up to which the cells of a needle map carry their numbers."""


class Style(NamedTuple):
    """How a method is drawn in all pictures."""

    color: str
    marker: str
    line: Any


class Series(NamedTuple):
    """What is drawn of one method: values [N] by budget, and their intervals [N] if they have any."""

    budgets: list[str]
    values: list[float]
    lows: list[float] | None = None
    highs: list[float] | None = None


def plot_accuracy(
    results: Results,
    estimates: Mapping[Scenario, Mapping[CacheConfig, Estimate]] | None = None,
    methods: Sequence[str] | None = None,
    title: str = "Share of the answers said, against the budget",
) -> Figure:
    """Draws a panel per task and length: the score of each method against its budget, with 95 % intervals.

    Args:
      results: of a sweep.
      estimates: its scores with intervals, if they are known already.
      methods: to draw besides the full cache; those that are not variants of others by default.
      title: of the figure.

    Returns:
      a figure, not shown and not registered with pyplot.

    Raises:
      ValueError: no results.
    """
    estimates = estimate_all(collect(results)) if estimates is None else estimates
    if not estimates:
        raise ValueError("results has no prompts; run the sweep first")
    styles, full = _styles(results, methods), _full_config(results)
    columns = _columns(estimates)
    figure, axes = _panels(len(estimates), columns, title)
    for axis, (scenario, by_config) in zip(axes, estimates.items(), strict=False):
        if full is not None and full in by_config:
            axis.axhline(by_config[full].mean, color=FULL_COLOR, linestyle="--", linewidth=1.2, zorder=1)
            axis.axhspan(*by_config[full].interval, color=FULL_COLOR, alpha=0.1, linewidth=0, zorder=0)
        series = {method: _estimates_of(results, by_config, method) for method in styles}
        _draw_lines(axis, series, styles, scenario.length)
        axis.set_title(f"{scenario.task}, {scenario.length:,} tokens", loc="left", fontsize=10)
        axis.set_ylim(-0.03, 1.03)
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    _label_outside(axes, columns, "budget", "answers said")
    has_full = any(full in by_config for by_config in estimates.values())
    _add_legend(figure, styles, has_full, "bars and band: 95 % intervals")
    return figure


def plot_divergence(
    results: Results,
    methods: Sequence[str] | None = None,
    title: str = "Divergence from the full cache, against the budget",
) -> Figure:
    """Draws a panel per task and length: the divergence of each method against its budget, with standard errors.

    Args:
      results: of a sweep with a task without answers.
      methods: to draw; those that are not variants of others by default.
      title: of the figure.

    Returns:
      a figure, not shown and not registered with pyplot.

    Raises:
      ValueError: no divergences.
    """
    found = collect_divergences(results)
    if not found:
        raise ValueError("results has no divergences; run a sweep with the task divergence first")
    styles, columns = _styles(results, methods), _columns(found)
    figure, axes = _panels(len(found), columns, title)
    for axis, (scenario, by_config) in zip(axes, found.items(), strict=False):
        estimates = {config: estimate_nats(values.values()) for config, values in by_config.items()}
        series = {method: _estimates_of(results, estimates, method) for method in styles}
        _draw_lines(axis, series, styles, scenario.length)
        axis.set_title(f"{scenario.task}, {scenario.length:,} tokens", loc="left", fontsize=10)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ScalarFormatter())
    _label_outside(axes, columns, "budget", "nats per token")
    _add_legend(figure, styles, False, "bars: one standard error to each side; lower is better")
    return figure


def plot_needle_map(
    results: Results, task: str | None = None, methods: Sequence[str] | None = None, title: str | None = None
) -> Figure:
    """Draws how well a needle is found by depth and length: a line of panels per method, a panel per budget.

    Args:
      results: of a sweep with depths.
      task: whose needles; the first that has depths by default.
      methods: to draw besides the full cache; those that are not variants of others by default.
      title: of the figure.

    Returns:
      a figure, not shown and not registered with pyplot.

    Raises:
      ValueError: the task was not measured at depths.
    """
    maps = depth_cells(results)
    task = next(iter(maps), None) if task is None else task
    if task not in maps:
        raise ValueError(f"task={task!r} has no depths in results; those that have: {', '.join(maps) or 'none'}")
    drawn = _styles(results, methods)
    by_config = {e: cells for e, cells in maps[task].items() if e.budget is None or e.method in drawn}
    lines = [[e for e in by_config if e.method == method] for method in dict.fromkeys(e.method for e in by_config)]
    lines = sorted(lines, key=lambda line: line[0].budget is not None)
    depths = sorted({depth for cells in by_config.values() for depth, _ in cells})
    lengths = sorted({length for cells in by_config.values() for _, length in cells})
    columns = max(map(len, lines))
    size = (1.6 + columns * max(1.3, 0.55 * len(lengths)), 1.5 + len(lines) * (0.45 + max(0.7, 0.22 * len(depths))))
    figure = Figure(figsize=(max(6.5, size[0]), size[1]), layout="constrained")
    axes = figure.subplots(len(lines), columns, squeeze=False, sharex=True, sharey=True)
    for line, row in zip(lines, axes, strict=True):
        for axis in row[len(line) :]:
            axis.set_visible(False)
        for axis, config in zip(row, line, strict=False):
            image = _draw_map(axis, by_config[config], depths, lengths)
            axis.set_title(config.label, loc="left", fontsize=9)
        row[0].set_ylabel("depth", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("length (tokens)", fontsize=9)
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", fraction=0.05, pad=0.02, aspect=50, shrink=0.6)
    bar.set_label("share of the answers said; depth 0% is the beginning of the prompt, 100% its end", fontsize=9)
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1))
    figure.suptitle(title or f"{task}: answers said, by length and depth of the needle", fontsize=13)
    return figure


def plot_costs(
    results: Results, methods: Sequence[str] | None = None, title: str = "What the cache costs, against the budget"
) -> Figure:
    """Draws a line of panels per length: bytes of a row's cache and, where they were measured, times, by budget.

    Args:
      results: of a sweep whose costs were measured.
      methods: to draw besides the full cache; those that are not variants of others by default.
      title: of the figure.

    Returns:
      a figure, not shown and not registered with pyplot.

    Raises:
      ValueError: no costs.
    """
    if results.costs is None or not results.costs.costs:
        raise ValueError("results.costs is empty; measure costs with the sweep first")
    costs = results.costs.costs
    styles, full = _styles(results, methods), _full_config(results)
    quantities = {
        "cache_bytes": ("cache of a prompt", BYTES),
        "token_seconds": ("time per token", SECONDS),
        "prefill_seconds": ("reading the prompt", SECONDS),
    }
    shown = [name for name in quantities if any(getattr(cost, name) is not None for cost in costs)]
    panels = [(length, name) for length in dict.fromkeys(cost.length for cost in costs) for name in shown]
    figure, axes = _panels(len(panels), len(shown), title)
    for axis, (length, name) in zip(axes, panels, strict=True):
        what, units = quantities[name]
        values = {c.label: getattr(c, name) for c in costs if c.length == length and getattr(c, name) is not None}
        unit = unit_for(max(values.values(), default=1), units)
        values = {label: value / unit.size for label, value in values.items()}
        if full is not None and full.label in values:
            axis.axhline(values[full.label], color=FULL_COLOR, linestyle="--", linewidth=1.2, zorder=1)
        _draw_lines(axis, {method: _costs_of(results, values, method) for method in styles}, styles, length)
        axis.set_title(f"{what}, {length:,} tokens", loc="left", fontsize=10)
        axis.set_ylim(0, 1.08 * max(values.values(), default=1))
        axis.set_ylabel(unit.name, fontsize=9)
    _label_outside(axes, len(shown), "budget")
    _add_legend(figure, styles, full is not None, f"measured on {results.costs.device}")
    return figure


def _styles(results: Results, methods: Sequence[str] | None) -> dict[str, Style]:
    if methods is None:
        methods = list(dict.fromkeys(e.method for e in base_configs(results.grid) if e.budget is not None))
    lines = ["-"] * len(COLORS) + [":"] * len(COLORS)
    looks = zip(cycle(COLORS), cycle(MARKERS), cycle(lines), strict=False)
    return {method: Style(*look) for method, look in zip(methods, looks, strict=False)}


def _full_config(results: Results) -> CacheConfig | None:
    return next((config for config in cache_configs(results.grid) if config.budget is None), None)


def _columns(scenarios: Collection[Scenario]) -> int:
    """Panels in a line: those of a task's lengths together, where they fit."""
    num_lengths = len({scenario.length for scenario in scenarios})
    return num_lengths * (4 // num_lengths) if 2 <= num_lengths <= 4 else min(3, len(scenarios))


def _panels(count: int, columns: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels in lines of `columns`."""
    lines = -(-count // columns)
    figure = Figure(figsize=(max(6.0, 0.6 + 3.1 * columns), 1.6 + 2.3 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=13)
    return figure, list(axes[:count])


def _label_outside(axes: Sequence[Axes], columns: int, x: str, y: str | None = None) -> None:
    """Labels the lowest panel of each column, and the first of each line."""
    for i, axis in enumerate(axes):
        if i + columns >= len(axes):
            axis.set_xlabel(x, fontsize=9)
        if i % columns == 0 and y is not None:
            axis.set_ylabel(y, fontsize=9)


def _estimates_of(results: Results, by_config: Mapping[CacheConfig, Estimate], method: str) -> Series:
    found = [by_config[e] for e in (CacheConfig(method, budget) for budget in results.grid.budgets) if e in by_config]
    budgets = [budget for budget in results.grid.budgets if CacheConfig(method, budget) in by_config]
    return Series(budgets, [f.mean for f in found], [f.interval.low for f in found], [f.interval.high for f in found])


def _costs_of(results: Results, values: Mapping[str, float], method: str) -> Series:
    budgets = [budget for budget in results.grid.budgets if CacheConfig(method, budget).label in values]
    return Series(budgets, [values[CacheConfig(method, budget).label] for budget in budgets])


def _draw_lines(axis: Axes, series: Mapping[str, Series], styles: Mapping[str, Style], length: int) -> None:
    """A line per method over the logarithm of its budgets' shares of the prompt."""
    budgets = list(dict.fromkeys(budget for one in series.values() for budget in one.budgets))
    x_of = {budget: np.log(budget_slots(parse_budget(budget), length) / length) for budget in budgets}
    low, high = (min(x_of.values()), max(x_of.values())) if x_of else (0.0, 1.0)
    width = max(high - low, 0.5)
    for i, (method, one) in enumerate(series.items()):
        x = np.array([x_of[budget] for budget in one.budgets]) + (i - (len(series) - 1) / 2) * DODGE * width
        order = np.argsort(x)
        y = np.array(one.values)[order]
        look = {"color": styles[method].color, "linewidth": 1.3}
        axis.plot(x[order], y, styles[method].line, marker=styles[method].marker, markersize=4, label=method, **look)
        if one.lows is not None and one.highs is not None:
            axis.vlines(x[order], np.array(one.lows)[order], np.array(one.highs)[order], alpha=0.55, **look)
    axis.set_xticks(list(x_of.values()), labels=budgets)
    axis.set_xlim(low - 0.12 * width, high + 0.12 * width)
    axis.set_axisbelow(True)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _add_legend(figure: Figure, styles: Mapping[str, Style], has_full: bool, note: str) -> None:
    handles = [Line2D([], [], color=FULL_COLOR, linestyle="--", linewidth=1.2, label="full cache")] if has_full else []
    handles += [
        Line2D([], [], color=s.color, linestyle=s.line, marker=s.marker, markersize=5, label=m)
        for m, s in styles.items()
    ]
    columns = _most_columns([str(handle.get_label()) for handle in handles], figure.get_figwidth())
    figure.set_figheight(figure.get_figheight() + 0.19 * max(0, -(-len(handles) // columns) - 3))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        title=note,
        title_fontsize=9,
        fontsize=9,
    )


def _most_columns(labels: Sequence[str], width: float) -> int:
    """Of a legend in letters of 9 points, within a width in inches; each column is as wide as its longest label."""
    line, letter = 0.65, 0.072
    for count in range(len(labels), 1, -1):
        columns = np.array_split(np.array([len(label) for label in labels]), count)
        if sum(line + letter * column.max() for column in columns) <= width:
            return count
    return 1


def _draw_map(axis: Axes, cells: Mapping[tuple[float, int], float], depths: list[float], lengths: list[int]) -> Any:
    """One method and budget, the beginning of the prompt at the top; returns the image."""
    scores = np.array([[cells.get((depth, length), np.nan) for length in lengths] for depth in depths])
    image = axis.imshow(scores, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="upper")
    axis.set_xticks(range(len(lengths)), labels=[f"{length:,}" for length in lengths], fontsize=8)
    axis.set_yticks(range(len(depths)), labels=[f"{depth:.0%}" for depth in depths], fontsize=8)
    if max(len(depths), len(lengths)) <= MOST_ANNOTATED:
        for (i, j), score in np.ndenumerate(scores):
            if not np.isnan(score):
                color = "black" if score > 0.5 else "white"
                axis.text(j, i, f"{100 * score:.0f}", ha="center", va="center", fontsize=7, color=color)
    return image
