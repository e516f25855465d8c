"""Queries to come: the same vectors as before RoPE, turned to the positions after the prompt."""

import jax.numpy as jnp
import numpy as np
import pytest

import restkv_jax as rk
from restkv_jax.kernels.pairs import Queries
from restkv_jax.models.config import UNLIMITED
from restkv_jax.models.decoder import LayerView
from restkv_jax.models.rope import Rope, apply_rope

LENGTH, DIM = 30, 8


def view_of(first, rope):
    """A row whose first token has place `first`, and the vectors before RoPE."""
    normal = np.random.default_rng(first).standard_normal
    before = jnp.asarray(normal((1, 2, 3, LENGTH, DIM)), jnp.float32)
    positions = jnp.maximum(jnp.arange(LENGTH)[None] - first, -1)
    vectors = before if rope is None else apply_rope(before, positions, rope)
    return LayerView(0, Queries(vectors, positions, UNLIMITED), jnp.zeros((2, 3, DIM, 4)), rope=rope), before


@pytest.mark.parametrize("factor", [1.0, 1.3])
@pytest.mark.parametrize("first", [0, 26])
def test_future_queries_are_what_the_model_would_ask_there(first, factor):
    rope = Rope(0.5 ** jnp.arange(DIM // 2, dtype=jnp.float32)[None], factor)
    view, before = view_of(first, rope)
    found = rk.FutureQueries(6, horizon=4)(view)
    last = LENGTH - 1 - first
    is_token = np.arange(LENGTH - 6, LENGTH) >= first
    expected = last + 1 + np.maximum(np.cumsum(is_token) - 1, 0) % 4
    np.testing.assert_array_equal(found.positions[0], np.where(is_token, expected, -1))
    turned = apply_rope(before[..., -6:, :], jnp.asarray(expected)[None], rope)
    np.testing.assert_allclose(found.vectors[..., is_token, :], turned[..., is_token, :], atol=1e-5)


def test_without_a_rotation_only_positions_change():
    view, before = view_of(0, None)
    found = rk.FutureQueries(1000, horizon=64)(view)
    np.testing.assert_array_equal(found.vectors, before)
    np.testing.assert_array_equal(found.positions[0], np.arange(LENGTH, 2 * LENGTH))


@pytest.mark.parametrize("field", ["count", "horizon"])
def test_at_least_one(field):
    with pytest.raises(ValueError, match=f"{field}=0 must be at least 1"):
        rk.FutureQueries(**{field: 0})
