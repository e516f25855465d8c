"""The tables of a report, ready to be printed."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from restkv_jax.evaluate.grid import CacheConfig, Grid, cache_configs
from restkv_jax.evaluate.report.summary import (
    SIGNIFICANT,
    ByPrompt,
    Comparison,
    Estimate,
    Pair,
    Ranking,
    Scenario,
    Standing,
    compare,
    rank_divergences,
    rank_within,
    standard_error,
)
from restkv_jax.evaluate.report.units import BYTES, SECONDS, Unit, text_of
from restkv_jax.evaluate.results import Cost, Costs, LayerErrors

FROM_FULL, FROM_BEST = "†", "‡"
"""Marks of a score that differs from the full cache's, and from the best one of its budget."""


class TableCell(NamedTuple):
    """What a cell says: the number, the lines below it, marks behind it; `shade` from 0 to 1 colours it."""

    text: str
    details: tuple[str, ...] = ()
    marks: str = ""
    is_strong: bool = False
    shade: float | None = None


class Row(NamedTuple):
    """A line of a table; a single cell with `spans` holds for all columns."""

    name: str
    cells: list[TableCell]
    spans: bool = False


class Table(NamedTuple):
    """A table: its title, the names of its columns and its rows."""

    title: str
    corner: str
    columns: list[str]
    rows: list[Row]


MINUS = "\N{MINUS SIGN}"
EMPTY = TableCell("-")


def score_tables(
    grid: Grid,
    scores: Mapping[Scenario, Mapping[CacheConfig, ByPrompt]],
    estimates: Mapping[Scenario, Mapping[CacheConfig, Estimate]],
    columns: Sequence[CacheConfig],
) -> dict[str, list[Table]]:
    """By task, a table per length: methods × budgets, the full cache first."""
    tables: dict[str, list[Table]] = {}
    for scenario, by_config in scores.items():
        standings = rank_within(by_config, estimates[scenario], columns)
        rows = [
            _row(method, own, {e: _standing_cell(standings[e]) for e in own if e in standings}, grid.budgets)
            for method, own in _by_method(columns).items()
        ]
        title = f"{scenario.length:,} tokens, {_count_text([s.estimate.count for s in standings.values()])}"
        tables.setdefault(scenario.task, []).append(Table(title, "method", [f"budget {b}" for b in grid.budgets], rows))
    return tables


def divergence_tables(
    grid: Grid, divergences: Mapping[Scenario, Mapping[CacheConfig, ByPrompt]], columns: Sequence[CacheConfig]
) -> list[Table]:
    """A table per task and length: the divergence from the full cache, methods × budgets.

    Of a sweep with quantised caches the full one, which is quantised too, has a line.
    """
    tables = []
    full = [config for config in columns if config.budget is None and grid.cache_dtype is not None]
    for scenario, by_config in divergences.items():
        sized = [config for config in columns if config.budget is not None]
        standings = rank_divergences(by_config, sized)
        rows = [
            Row(config.method, [TableCell(nats_text(float(np.mean(nats)), standard_error(nats)))], spans=True)
            for config in full
            if (nats := [*by_config.get(config, {}).values()])
        ]
        rows += [
            _row(method, own, {e: _nats_cell(standings[e]) for e in own if e in standings}, grid.budgets)
            for method, own in _by_method(sized).items()
        ]
        counts = _count_text([len(values) for values in by_config.values()])
        title = f"{scenario.task}, {scenario.length:,} tokens, {counts}, nats per token"
        tables.append(Table(title, "method", [f"budget {b}" for b in grid.budgets], rows))
    return tables


def nats_text(mean: float, error: float) -> str:
    """`0.1234 ± 0.0041`."""
    return f"{mean:.4f}" + ("" if np.isnan(error) else f" ± {error:.4f}")


def ranking_table(grid: Grid, ranking: Ranking, title: str) -> Table:
    """Methods by their mean over tasks, lengths and budgets, the full cache first."""
    sized = [row for row in ranking.values() if len(row) > 1]
    best = {budget: max((row[budget].mean for row in sized), default=None) for budget in grid.budgets}
    rows = []
    for method, row in sorted(ranking.items(), key=lambda item: len(item[1]) > 1):
        if len(row) == 1:
            rows.append(Row(method, [_score_cell(row[None])], spans=True))
            continue
        cells = [_score_cell(row[b], is_strong=row[b].mean == best[b]) for b in grid.budgets]
        rows.append(Row(method, [_score_cell(row[None]), *cells]))
    return Table(title, "method", ["mean over budgets", *(f"budget {b}" for b in grid.budgets)], rows)


def findings(grid: Grid, ranking: Ranking) -> list[str]:
    """A sentence per budget: the method that says most over all tasks and lengths, and the full cache."""
    full = next((row[None] for row in ranking.values() if len(row) == 1), None)
    against = f" (full cache: {_percent(full.mean)} %)" if full is not None else ""
    found = []
    for budget in grid.budgets:
        rows = {method: row[budget] for method, row in ranking.items() if budget in row}
        if rows:
            best = max(e.mean for e in rows.values())
            names = " and ".join(method for method, e in rows.items() if e.mean == best)
            found.append(f"Budget {budget}: {names}, with {_percent(best)} % of the answers{against}")
    return found


def pair_tables(
    grid: Grid,
    scores: Mapping[Scenario, Mapping[CacheConfig, ByPrompt]],
    pairs: Sequence[Pair],
    text: Callable[[float], str] | None = None,
) -> list[Table]:
    """Pairs of methods: a table over all tasks and lengths, then one per task.

    Args:
      grid: of the sweep.
      scores: or divergences.
      pairs: of methods.
      text: of a difference; in percentage points if left out.
    """
    tasks = list(dict.fromkeys(scenario.task for scenario in scores))
    groups = {"All tasks and lengths": list(scores)} if len(scores) > 1 else {}
    groups |= {task: [scenario for scenario in scores if scenario.task == task] for task in tasks}
    tables = []
    for title, scenarios in groups.items():
        compared = compare(scores, pairs, grid.budgets, scenarios)
        cells = {key: _comparison_cell(comparison, text or _points) for key, comparison in compared.items()}
        rows = [
            Row(f"{pair.ours} against {pair.theirs}", [cells.get((pair, budget), EMPTY) for budget in grid.budgets])
            for pair in pairs
            if any((pair, budget) in cells for budget in grid.budgets)
        ]
        if rows:
            tables.append(Table(title, "methods", [f"budget {b}" for b in grid.budgets], rows))
    return tables


def error_tables(grid: Grid, errors: Sequence[LayerErrors]) -> list[Table]:
    """A table per task and length: the error of the layers' attention, in the mean over layers, methods × budgets."""
    tables = []
    columns = [config for config in cache_configs(grid) if config.budget is not None]
    for task, length in dict.fromkeys((error.task, error.length) for error in errors):
        means = {e.label: float(np.mean(e.layers)) for e in errors if (e.task, e.length) == (task, length)}
        cells = {e: TableCell(_percent(means[e.label])) for e in columns if e.label in means}
        rows = [_row(method, own, cells, grid.budgets) for method, own in _by_method(columns).items()]
        tables.append(Table(f"{task}, {length:,} tokens", "method", [f"budget {b}" for b in grid.budgets], rows))
    return tables


def cost_tables(grid: Grid, costs: Costs) -> list[Table]:
    """A table per quantity and length that was measured: methods × budgets, with their share of the full cache's."""
    quantities = {
        "cache_bytes": ("Bytes of the cache of one prompt", BYTES),
        "token_seconds": ("Time per generated token of a batch", SECONDS),
        "prefill_seconds": ("Time to read the prompt", SECONDS),
    }
    lengths = dict.fromkeys(cost.length for cost in costs.costs)
    return [
        _cost_table(grid, [c for c in costs.costs if c.length == length], name, f"{title}, {length:,} tokens", units)
        for name, (title, units) in quantities.items()
        for length in lengths
        if any(getattr(c, name) is not None for c in costs.costs if c.length == length)
    ]


def reading_table(read_seconds: Mapping[int, float]) -> Table | None:
    """How long a prompt took to be read in the sweep, with the choices of all configurations; None if not known."""
    rows = [Row(f"{length:,} tokens", [TableCell(text_of(s, SECONDS))]) for length, s in read_seconds.items()]
    title = "Reading a prompt of a batch, once for all configurations"
    return Table(title, "prompt", ["time"], rows) if rows else None


def rate_table(costs: Costs) -> Table | None:
    """How fast the sweep went in each way; None if that was not measured."""
    rows = [Row(rate.how, [TableCell(f"{rate.prompts_per_second:.3g}")]) for rate in costs.rates]
    return Table("The same prompts in different ways", "way", ["prompts per second"], rows) if rows else None


def _cost_table(grid: Grid, costs: Sequence[Cost], name: str, title: str, units: tuple[Unit, ...]) -> Table:
    values = {cost.label: getattr(cost, name) for cost in costs if getattr(cost, name) is not None}
    columns = sorted(cache_configs(grid), key=lambda e: e.budget is not None)
    full = next((values.get(e.label) for e in columns if e.budget is None), None)
    rows = []
    for method, own in _by_method(columns).items():
        cells = {}
        for e in own:
            if e.label in values:
                share = f"{100 * values[e.label] / full:.0f} % of full" if full and e.budget is not None else None
                cells[e] = TableCell(text_of(values[e.label], units), (share,) if share else ())
        rows.append(_row(method, own, cells, grid.budgets))
    return Table(title, "method", [f"budget {b}" for b in grid.budgets], rows)


def _by_method(columns: Sequence[CacheConfig]) -> dict[str, list[CacheConfig]]:
    found: dict[str, list[CacheConfig]] = {}
    for config in columns:
        found.setdefault(config.method, []).append(config)
    return found


def _row(
    method: str, own: Sequence[CacheConfig], cells: Mapping[CacheConfig, TableCell], budgets: Sequence[str]
) -> Row:
    if own[0].budget is None:
        return Row(method, [cells.get(own[0], EMPTY)], spans=True)
    return Row(method, [cells.get(CacheConfig(method, budget), EMPTY) for budget in budgets])


def _score_cell(estimate: Estimate, marks: str = "", is_strong: bool = False) -> TableCell:
    low, high = estimate.interval
    return TableCell(
        _percent(estimate.mean), (f"{_percent(low)} to {_percent(high)}",), marks, is_strong, round(estimate.mean, 3)
    )


def _standing_cell(standing: Standing) -> TableCell:
    marks = FROM_FULL * standing.differs_from_full + FROM_BEST * standing.differs_from_best
    return _score_cell(standing.estimate, marks, standing.is_best)


def _nats_cell(standing: Standing) -> TableCell:
    mean, interval, _ = standing.estimate
    text = nats_text(mean, interval.high - mean)
    return TableCell(text, marks=FROM_BEST * standing.differs_from_best, is_strong=standing.is_best)


def _comparison_cell(comparison: Comparison, text: Callable[[float], str]) -> TableCell:
    (mean, (low, high), _), p = comparison
    p_text = "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
    return TableCell(text(mean), (f"{text(low)} to {text(high)}", p_text), is_strong=p < SIGNIFICANT)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _points(difference: float) -> str:
    return _signed(f"{100 * difference:+.1f}")


def nats_difference(difference: float) -> str:
    """`+0.012`."""
    return _signed(f"{difference:+.3f}")


def _signed(text: str) -> str:
    return text.replace("-", MINUS) if float(text) else text[1:]


def _count_text(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{high:,} prompts" if low == high else f"{low:,} to {high:,} prompts"
