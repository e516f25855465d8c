"""The time that compilation takes."""

from restkv_jax.timing import union_length


def test_intervals_that_overlap_count_once():
    assert union_length([]) == 0
    assert union_length([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7
