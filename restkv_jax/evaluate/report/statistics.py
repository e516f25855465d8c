"""How sure a mean of scores is, and whether two methods differ on the same prompts."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from restkv_jax.evaluate.accuracy import wilson_interval

LATTICE = math.lcm(*range(1, 17))
"""Shares of up to 16 answers are whole multiples of one part of this."""
STEPS = 200_000
"""Most steps between the least and the greatest sum of a distribution that `paired_test` writes out."""


class Interval(NamedTuple):
    """Limits of a confidence interval."""

    low: float
    high: float


def bootstrap_interval(
    *groups: np.ndarray,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Interval:
    """Bootstrap interval of the mean score, or of the mean over groups of their means.

    The method is BCa (Efron 1987) as in `scipy.stats.bootstrap`; each group is resampled by itself. Where all scores of
    every group are equal, resampling finds no spread. There the share of prompts that could still differ is taken to be
    Wilson's limit for 0 of N, and these to have the lowest or the highest score: for shares that are all 0 or all 1
    this is Wilson's interval.

    Args:
      groups: scores float [N] of one or more groups of prompts.
      confidence: of the interval, between 0 and 1.
      num_resamples: bootstrap samples.
      seed: of the resampling.
      limits: lowest and highest possible score, -1 and 1 for differences of shares; those of scores without limits are
        the mean where it is beyond.

    Raises:
      ValueError: no group, an empty one or one of another shape; `confidence` out of range.
    """
    samples = [np.asarray(group, float) for group in groups]
    if not samples or any(sample.ndim != 1 or not sample.size for sample in samples):
        raise ValueError(f"groups have shapes {[s.shape for s in samples]}; give at least one, each of scores [N]")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1")
    if all(np.ptp(sample) == 0 for sample in samples):
        return _interval_of_equal_scores(samples, confidence, limits)
    # scipy takes no group of one score: twice the same has no spread either.
    samples = [np.repeat(sample, 2) if sample.size == 1 else sample for sample in samples]
    found = scipy.stats.bootstrap(
        samples,
        _mean_of_means,
        n_resamples=num_resamples,
        confidence_level=confidence,
        method="BCa",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def _mean_of_means(*samples: np.ndarray, axis: int = -1) -> np.ndarray | float:
    return sum(sample.mean(axis=axis) for sample in samples) / len(samples)


def _interval_of_equal_scores(
    samples: Sequence[np.ndarray], confidence: float, limits: tuple[float, float]
) -> Interval:
    mean = float(_mean_of_means(*samples))
    different = wilson_interval(0, sum(sample.size for sample in samples), confidence)[1]
    low, high = min(limits[0], mean), max(limits[1], mean)
    return Interval(*(mean + different * (limit - mean) for limit in (low, high)))


def paired_test(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p value that two methods score the same prompts alike on average: the sign-flip permutation test.

    Under the hypothesis each difference of a pair could as well have the opposite sign (Fisher 1935). The distribution
    of their sum over all signs is written out: exactly where scores are shares of few answers, which for scores of 0
    and 1 is the exact McNemar test; otherwise of differences that are rounded to one part in `STEPS` of the sum of
    their sizes.

    Args:
      a: scores float [N] of one method.
      b: scores float [N] of the other on the same prompts, in the same order.

    Raises:
      ValueError: scores that are not pairs, or none.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(f"a has shape {a.shape} and b {b.shape}; give scores [N] of the same prompts, at least one")
    steps = _in_steps(a - b)
    return _p_of_steps(steps[steps != 0])


def _in_steps(differences: np.ndarray) -> np.ndarray:
    """Differences as whole numbers whose sizes sum up to `STEPS` at most, or little more where they are rounded."""
    parts = differences * LATTICE
    steps = np.rint(parts).astype(np.int64)
    if np.allclose(steps, parts, rtol=0, atol=1e-3):
        steps //= max(1, np.gcd.reduce(steps))
        if np.abs(steps).sum() <= STEPS:
            return steps
    return np.rint(differences * (STEPS / np.abs(differences).sum())).astype(np.int64)


def _p_of_steps(steps: np.ndarray) -> float:
    """Probability that the sum of whole numbers with random signs is as far from 0 as the given one, or further."""
    sizes = np.abs(steps)
    chances = np.ones(1)  # of the sum of the numbers that got a plus: 0, 1, ...
    for size in sizes:
        without, chances = chances / 2, np.zeros(chances.size + size)
        chances[: without.size] += without
        chances[size:] += without
    sums = 2 * np.arange(chances.size) - sizes.sum()
    return float(min(1.0, chances[np.abs(sums) >= abs(steps.sum())].sum()))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's correction (1979): p values float [M] that hold for all comparisons of a table at once.

    Args:
      p_values: [M] of single comparisons.
    """
    given = np.asarray(p_values, float)
    order = np.argsort(given)
    stepped = np.maximum.accumulate(given[order] * np.arange(given.size, 0, -1))
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted
