"""Choosing by counts equals choosing by a stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from restkv_jax.kernels.top import places, top_mask

SPECIAL = [-np.inf, np.inf, -1.0, -0.0, 0.0, 1e-40, 1.0, 3.5, -2e30, 2e30]
VALUES = st.one_of(st.sampled_from(SPECIAL), st.floats(-2, 2, width=32).map(lambda x: round(x, 1)))


marked = jax.jit(top_mask, static_argnums=(1, 2))


def by_sort(values, count, num_axes):
    flat = values.reshape(*values.shape[: values.ndim - num_axes], -1)
    order = np.argsort(-flat, axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    return (rank < count).reshape(values.shape)


@settings(deadline=None, max_examples=60)
@given(
    num_axes=st.integers(1, 3),
    count=st.sampled_from([1, 7, 61]),
    values=arrays.arrays(np.float32, (2, 3, 4, 5), elements=VALUES.map(np.float32)),
)
def test_marks_what_a_stable_sort_puts_first(num_axes, count, values):
    values = values + np.float32(0)  # -0 and 0 are equals for both
    np.testing.assert_array_equal(marked(jnp.asarray(values), count, num_axes), by_sort(values, count, num_axes))


@pytest.mark.parametrize("count", [1, 3, 6, 9])
def test_places_ascend_and_missing_ones_are_beyond(count):
    mask = np.random.default_rng(0).random((2, 3, 6)) < 0.5
    found = np.asarray(places(jnp.asarray(mask), count))
    for row, of_row in zip(mask.reshape(-1, 6), found.reshape(-1, count), strict=True):
        marked = np.flatnonzero(row)[:count]
        np.testing.assert_array_equal(of_row, np.pad(marked, (0, count - len(marked)), constant_values=6))
