"""A reduce-scatter by steps leaves every device its own part of the sums."""

import itertools

import numpy as np
import pytest

from restkv_jax.kernels.partition import scatter_steps


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6, 8, 12, 16, 64])
@pytest.mark.parametrize("ring", [1, 2, 4, 8, float("inf")])
def test_steps_of_a_reduce_scatter(devices, ring):
    rng = np.random.default_rng(devices)
    parts = rng.integers(-9, 9, (devices, 2 * devices)).astype(np.float32)
    sums, sent = list(parts), 0.0
    for groups in scatter_steps(devices, ring):
        assert sorted(itertools.chain(*groups)) == list(range(devices))
        assert all(len(group) == len(groups[0]) for group in groups)
        sent += len(sums[0]) * (1 - 1 / len(groups[0]))
        for group in groups:
            for device, part in zip(group, np.split(sum(sums[i] for i in group), len(group)), strict=True):
                sums[device] = part
    np.testing.assert_array_equal(sums, np.split(parts.sum(0), devices))
    assert sent == pytest.approx(2 * (devices - 1))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_ring_is_no_larger_than_asked(size):
    assert max(len(group) for groups in scatter_steps(16, size) for group in groups) == size
