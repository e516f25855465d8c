"""The numbers of a report: means with intervals, comparisons on the same prompts, rankings."""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from restkv_jax.evaluate.grid import CacheConfig, Grid, cache_configs, parse_method
from restkv_jax.evaluate.report.statistics import Interval, bootstrap_interval, holm, paired_test
from restkv_jax.evaluate.results import Results
from restkv_jax.eviction.presets import takes_budget

SIGNIFICANT = 0.05
"""Corrected p values below this are called differences."""

Score = Literal["match", "exact"]
ByPrompt = dict[tuple[float | None, int], float]
"""Scores by the depth and the number of their prompts."""


class Scenario(NamedTuple):
    """The prompts of one task and length, at all depths."""

    task: str
    length: int


class Estimate(NamedTuple):
    """A mean and its 95 % interval; the number of prompts."""

    mean: float
    interval: Interval
    count: int


Estimates = dict[Scenario, dict[CacheConfig, Estimate]]
"""Means with intervals by task and length, and configuration."""
Ranking = dict[str, dict[str | None, Estimate]]
"""Means over tasks and lengths by method and budget; over a method's budgets under None."""


class Pair(NamedTuple):
    """Two methods of a grid that are compared at each budget."""

    ours: str
    theirs: str

    def at(self, budget: str) -> tuple[CacheConfig, CacheConfig]:
        """Both with that budget; the full cache without one."""
        ours, theirs = (CacheConfig(m, budget if takes_budget(parse_method(m).name) else None) for m in self)
        return ours, theirs


class Comparison(NamedTuple):
    """How much higher a configuration scores than another on the same prompts, and the corrected p value of that."""

    difference: Estimate
    p: float


class Standing(NamedTuple):
    """A configuration in its table: whether its mean is the best of its budget; whether it differs from the full cache,
    and from the best of its budget.
    """

    estimate: Estimate
    is_best: bool
    differs_from_full: bool
    differs_from_best: bool


def base_of(method: str, grid: Grid) -> str | None:
    """The method of the grid that this one is a variant of; None if it is none, or the grid lacks that one."""
    name = parse_method(method).name
    return name if method != name and name in grid.methods else None


def base_configs(grid: Grid) -> list[CacheConfig]:
    """The columns of a sweep that are not variants of others, the full cache first."""
    return sorted(
        (e for e in cache_configs(grid) if base_of(e.method, grid) is None), key=lambda e: e.budget is not None
    )


def variants(grid: Grid) -> list[Pair]:
    """Every variant with its base."""
    bases = {method: base_of(method, grid) for method in grid.methods}
    return [Pair(method, base) for method, base in bases.items() if base is not None]


def parse_pair(text: str, grid: Grid) -> Pair:
    """Reads `restkv > snapkv(kernel_size=21)`.

    Raises:
      ValueError: anything else, or a method that the grid does not have.
    """
    pair = Pair(*text.split(" > ")) if text.count(" > ") == 1 else None
    if pair is None or not set(pair) <= set(grid.methods):
        known = ", ".join(grid.methods)
        raise ValueError(f"pair {text!r} must name two methods of the sweep, as in 'a > b'; it has {known}")
    return pair


def collect(results: Results, score: Score = "match") -> dict[Scenario, dict[CacheConfig, ByPrompt]]:
    """The scores of every task and length, by configuration and prompt, in the order of the results."""
    found: dict[Scenario, dict[CacheConfig, ByPrompt]] = {}
    for cell, scores in results.cells.items():
        by_prompt = found.setdefault(Scenario(cell.task, cell.length), {}).setdefault(cell.config, {})
        pairs = zip(scores.index.tolist(), getattr(scores, score).tolist(), strict=True)
        by_prompt.update({(cell.depth, index): float(value) for index, value in pairs})
    return found


def collect_divergences(results: Results) -> dict[Scenario, dict[CacheConfig, ByPrompt]]:
    """As `collect`, the divergences of the tasks without answers."""
    found: dict[Scenario, dict[CacheConfig, ByPrompt]] = {}
    for cell, values in results.divergences.items():
        by_prompt = found.setdefault(Scenario(cell.task, cell.length), {}).setdefault(cell.config, {})
        by_prompt.update({(cell.depth, i): n for i, n in zip(values.index.tolist(), values.nats.tolist(), strict=True)})
    return found


def standard_error(values: Iterable[float]) -> float:
    """Of the mean; not a number for a single value."""
    sample = np.fromiter(values, float)
    return float(sample.std(ddof=1) / np.sqrt(sample.size)) if sample.size > 1 else math.nan


def estimate(*groups: Iterable[float], limits: tuple[float, float] = (0.0, 1.0)) -> Estimate:
    """Mean over groups of their means, with its interval."""
    samples = [np.fromiter(group, float) for group in groups]
    mean = float(np.mean([sample.mean() for sample in samples]))
    return Estimate(mean, bootstrap_interval(*samples, num_resamples=1000, limits=limits), sum(map(len, samples)))


def estimate_nats(values: Collection[float]) -> Estimate:
    """The mean of divergences; the interval is one standard error to each side."""
    mean, error = float(np.mean(list(values))), standard_error(values)
    return Estimate(mean, Interval(mean - error, mean + error), len(values))


def estimate_all(scores: Mapping[Scenario, Mapping[CacheConfig, ByPrompt]]) -> Estimates:
    """Means with intervals of every configuration at every task and length."""
    return {
        scenario: {config: estimate(values.values()) for config, values in by_config.items()}
        for scenario, by_config in scores.items()
    }


def pair(a: ByPrompt, b: ByPrompt) -> tuple[np.ndarray, np.ndarray]:
    """The scores float [N] of the prompts that both have."""
    shared = [prompt for prompt in a if prompt in b]
    return np.array([a[prompt] for prompt in shared]), np.array([b[prompt] for prompt in shared])


def rank_divergences(
    by_config: Mapping[CacheConfig, ByPrompt], columns: Sequence[CacheConfig]
) -> dict[CacheConfig, Standing]:
    """As `rank_within` for divergences, of which the lowest is best; intervals are one standard error to each side."""
    lower_is_better = {e: {prompt: -nats for prompt, nats in values.items()} for e, values in by_config.items()}
    estimates = {config: estimate_nats(values.values()) for config, values in by_config.items()}
    negated = {config: e._replace(mean=-e.mean) for config, e in estimates.items()}
    ranked = rank_within(lower_is_better, negated, columns)
    return {config: standing._replace(estimate=estimates[config]) for config, standing in ranked.items()}


def rank_within(
    by_config: Mapping[CacheConfig, ByPrompt], estimates: Mapping[CacheConfig, Estimate], columns: Sequence[CacheConfig]
) -> dict[CacheConfig, Standing]:
    """Which configurations are best at their budget, and which differ from the full cache and from the best.

    All tests of the table are corrected together.

    Args:
      by_config: scores at one task and length.
      estimates: their means.
      columns: the configurations of the table.
    """
    present = [config for config in columns if config in by_config]
    full = next((config for config in present if config.budget is None), None)
    best = {
        budget: max((e for e in present if e.budget == budget), key=lambda e: estimates[e].mean)
        for budget in {config.budget for config in present if config.budget is not None}
    }
    tests = {(e, full) for e in present if full is not None and e != full}
    tests |= {(e, best[e.budget]) for e in present if e.budget is not None and e != best[e.budget]}
    ordered = sorted(tests, key=lambda test: (present.index(test[0]), present.index(test[1])))
    pairs = [pair(by_config[a], by_config[b]) for a, b in ordered]
    p_values = holm([paired_test(*scores) if scores[0].size else 1.0 for scores in pairs])
    differs = {test for test, p in zip(ordered, p_values, strict=True) if p < SIGNIFICANT}
    return {
        e: Standing(
            estimates[e],
            e.budget is not None and estimates[e].mean == estimates[best[e.budget]].mean,
            (e, full) in differs,
            e.budget is not None and (e, best.get(e.budget)) in differs,
        )
        for e in present
    }


def common_scenarios(
    scores: Mapping[Scenario, Mapping[CacheConfig, ByPrompt]], columns: Iterable[CacheConfig]
) -> list[Scenario]:
    """The tasks and lengths at which there are prompts that all of these configurations have."""
    return [
        scenario
        for scenario, by_config in scores.items()
        if set.intersection(*(set(by_config.get(config, ())) for config in columns))
    ]


def rank_overall(scores: Mapping[Scenario, Mapping[CacheConfig, ByPrompt]], columns: Sequence[CacheConfig]) -> Ranking:
    """Means over tasks and lengths by method and budget, the best method first; each task and length counts the same.

    Args:
      scores: from `collect`.
      columns: configurations to rank.

    Returns:
      empty if no task and length has prompts of all configurations.
    """
    scenarios = common_scenarios(scores, columns)
    if not scenarios:
        return {}
    ranking: Ranking = {}
    for method in dict.fromkeys(config.method for config in columns):
        own = [config for config in columns if config.method == method]
        groups = [[_mean_over(own, scores[scenario])] for scenario in scenarios]
        ranking[method] = {None: estimate(*(group[0] for group in groups))}
        if own[0].budget is not None:
            for config in own:
                ranking[method][config.budget] = estimate(
                    *(scores[scenario][config].values() for scenario in scenarios)
                )
    return dict(sorted(ranking.items(), key=lambda item: -item[1][None].mean))


def _mean_over(columns: Sequence[CacheConfig], by_config: Mapping[CacheConfig, ByPrompt]) -> list[float]:
    """The mean score of each prompt that all of these configurations have."""
    first, *others = (by_config[config] for config in columns)
    shared = [prompt for prompt in first if all(prompt in other for other in others)]
    return [float(np.mean([by_config[config][prompt] for config in columns])) for prompt in shared]


def compare(
    scores: Mapping[Scenario, Mapping[CacheConfig, ByPrompt]],
    pairs: Sequence[Pair],
    budgets: Sequence[str],
    scenarios: Sequence[Scenario],
) -> dict[tuple[Pair, str], Comparison]:
    """Every pair at every budget on the same prompts; each task and length counts the same in the mean.

    All tests are corrected together.

    Args:
      scores: from `collect` or `collect_divergences`.
      pairs: of methods.
      budgets: of both.
      scenarios: tasks and lengths over which to take the mean; those without prompts of both are left out.
    """
    found = {}
    for compared, budget in itertools.product(pairs, budgets):
        a, b = compared.at(budget)
        both = [scenario for scenario in scenarios if {a, b} <= scores[scenario].keys()]
        samples = [shared for s in both if (shared := pair(scores[s][a], scores[s][b]))[0].size]
        if samples:
            differences = [ours - theirs for ours, theirs in samples]
            # A mean of means: in the sum that is tested a scenario of few prompts has the weight of the others.
            most = max(each.size for each in differences)
            weighed = np.concatenate([each * (most / each.size) for each in differences])
            found[compared, budget] = (
                estimate(*differences, limits=(-1.0, 1.0)),
                paired_test(weighed, np.zeros_like(weighed)),
            )
    p_values = holm([p for _, p in found.values()])
    return {key: Comparison(d, float(p)) for (key, (d, _)), p in zip(found.items(), p_values, strict=True)}


def count_prompts(results: Results) -> dict[tuple[str, int, float | None], int]:
    """How many prompts there are at every task, length and depth that has some."""
    found: dict[tuple[str, int, float | None], int] = {}
    for cell, values in [*results.cells.items(), *results.divergences.items()]:
        found[cell[:3]] = max(found.get(cell[:3], 0), values.index.size)
    return found


def depth_cells(results: Results) -> dict[str, dict[CacheConfig, dict[tuple[float, int], float]]]:
    """Mean share of answers said by task, configuration, depth and length, of the tasks that have depths."""
    found: dict[str, dict[CacheConfig, dict[tuple[float, int], float]]] = {}
    for cell, scores in results.cells.items():
        if cell.depth is not None:
            by_config = found.setdefault(cell.task, {})
            by_config.setdefault(cell.config, {})[cell.depth, cell.length] = float(scores.match.mean())
    return found
