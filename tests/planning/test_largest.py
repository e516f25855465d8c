"""The most rows that fit, against trying all."""

import pytest

from restkv_jax.planning.largest import largest_rows


@pytest.mark.parametrize("unit", [1, 2, 8])
@pytest.mark.parametrize(
    "total_of",
    [lambda rows: 5 + 3 * rows, lambda rows: 3 * rows + (rows > 10) * 7, lambda rows: 90 + rows / 8, lambda rows: 101],
    ids=["linear", "step", "nearly full", "too large"],
)
def test_the_most_rows_are_those_that_trying_all_finds(total_of, unit):
    tried = []

    def noted(rows):
        tried.append(rows)
        return total_of(rows)

    every = [rows for rows in range(0, 200, unit) if rows == 0 or total_of(rows) <= 100]
    assert largest_rows(noted, 100, unit) == every[-1]
    assert len(tried) == len(set(tried)) <= 5
