"""Rotations undone: what queries and keys were before RoPE, and the mean of rotations to come."""

import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax.models.rope import Rope, apply_rope, undo_average_rope, undo_rope

ROWS, HEADS, LENGTH = 2, 3, 9
POSITIONS = jnp.asarray(np.random.default_rng(0).integers(0, 5000, (ROWS, HEADS, LENGTH)))
ROPES = {
    "usual": Rope(jnp.asarray([[1.0, 0.3, 0.02, 0.0]] * ROWS), 1.0),
    "part of the head": Rope(jnp.asarray([[1.0, 0.1]] * ROWS), 1.0),
    "attention factor": Rope(jnp.asarray([[1.0, 0.3, 0.02, 0.001]] * ROWS), 1.3),
    "rows differ": Rope(jnp.asarray([[1.0, 0.3, 0.02, 0.001], [0.5, 0.2, 0.01, 0.002]]), jnp.float32(0.9)),
    "none": None,
}


def draw(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


def applied(x, positions, rope):
    return x if rope is None else apply_rope(x, positions, rope)


@pytest.mark.parametrize("name", ROPES)
def test_undone_is_what_it_was(name):
    rope, queries = ROPES[name], draw(ROWS, HEADS, 2, LENGTH, 8)
    turned = applied(queries, POSITIONS[:, 0], rope)
    np.testing.assert_allclose(undo_rope(turned, POSITIONS[:, 0], rope), queries, atol=2e-6)


@pytest.mark.parametrize("name", ROPES)
def test_heads_whose_positions_differ(name):
    rope, keys = ROPES[name], draw(ROWS, HEADS, LENGTH, 8)
    turned = [applied(keys[:, head : head + 1], POSITIONS[:, head], rope) for head in range(HEADS)]
    np.testing.assert_allclose(undo_rope(jnp.concatenate(turned, 1), POSITIONS, rope), keys, atol=2e-6)


@pytest.mark.parametrize("name", ROPES)
def test_the_mean_logit_of_positions_to_come(name):
    rope, query, keys = ROPES[name], draw(ROWS, HEADS, 1, 8), draw(ROWS, HEADS, LENGTH, 8)
    first, count = jnp.asarray([100, 7]), 20
    logits = [applied(query, (first + step)[:, None], rope) @ jnp.swapaxes(keys, 2, 3) for step in range(count)]
    back = undo_average_rope(keys, first, count, rope)
    np.testing.assert_allclose(query @ jnp.swapaxes(back, 2, 3), jnp.stack(logits).mean(0), atol=1e-5)
