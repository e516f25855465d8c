"""How many rows fit, from as few compilations as can be."""

import math
from collections.abc import Callable

MARGIN = 1.02
"""What the line says to be this much too large is not compiled."""


def largest_rows(total_of: Callable[[int], float], available: float, unit: int = 1) -> int:
    """The largest multiple of `unit` rows that fits, 0 if none does.

    Memory is nearly linear in the rows, so each next number comes from the line through the two before.

    Args:
      total_of: bytes per device of a number of rows, also of those that do not fit.
      available: bytes per device.
      unit: of rows.
    """
    low, high, guess = 0, math.inf, 1
    known: list[tuple[int, float]] = []
    while low < guess < high:
        known.append((guess, total_of(guess * unit)))
        if known[-1][1] <= available:
            low = guess
        else:
            high = guess
        guess = _next(known[-2:], available, low, high)
    return low * unit


def _next(known: list[tuple[int, float]], available: float, low: int, high: float) -> int:
    """What to try between `low`, which fits, and `high`, which does not; `low` where nothing is left."""
    if len(known) == 1:
        return min(low + 1, 2)
    (a, x), (b, y) = known
    slope = (y - x) / (b - a)
    if slope <= 0 or x + slope * (low + 1 - a) > MARGIN * available:
        return low
    return int(min(max(a + (available - x) / slope, low + 1), high - 1))
