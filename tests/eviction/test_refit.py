"""Least-squares refit of the kept values: against the definition in float64, and what it promises."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import restkv_jax as rk
from restkv_jax.eviction.refit import window_outputs
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.models.config import UNLIMITED

HEADS, KV_HEADS, LENGTH, DIM, MODEL_DIM, WINDOW, BUDGET = 4, 2, 60, 8, 20, 8, 20
METHODS = {
    "snapkv": rk.snapkv(BUDGET, WINDOW),
    "restkv": rk.restkv(BUDGET, WINDOW),
    "laprox": rk.laprox(BUDGET, WINDOW),
    "random": rk.random(BUDGET, WINDOW),
    "h2o": rk.h2o(BUDGET, WINDOW),
}


def arrays_of(seed, sharpness=1.0):
    normal = np.random.default_rng(seed).standard_normal
    shapes = (2, HEADS, LENGTH, DIM), (2, KV_HEADS, LENGTH, DIM), (2, KV_HEADS, LENGTH, DIM), (HEADS, DIM, MODEL_DIM)
    queries, keys, values, projection = (normal(shape).astype(np.float32) for shape in shapes)
    return sharpness * queries, keys, values, projection


def evict(policy, queries, keys, values, projection, mask=None):
    queries = queries[:, :, -policy.num_queries(LENGTH) :]
    return rk.evict_layer(policy, queries, keys, values, projection, mask)


def attention_rows(queries, keys, positions, head):
    """Attention of the window's queries of a KV head's group over kept keys, float64 [G w, N]; row 0 of the batch."""
    group = HEADS // KV_HEADS
    window = queries[0, head * group : (head + 1) * group, -WINDOW:].astype(np.float64)
    logits = window @ np.asarray(keys, np.float64)[0, head].T / np.sqrt(DIM)
    places = np.asarray(positions)[0, head]
    seen = (places >= 0) & (places <= np.arange(LENGTH - WINDOW, LENGTH)[:, None])
    weights = np.where(seen, np.exp(logits - logits.max()), 0.0)
    return (weights / weights.sum(-1, keepdims=True)).reshape(group * WINDOW, -1)


def outputs_of(queries, keys, values, head):
    everything = np.broadcast_to(np.arange(LENGTH), (1, KV_HEADS, LENGTH))
    return attention_rows(queries, keys, everything, head) @ values[0, head].astype(np.float64)


@pytest.mark.parametrize("ridge", [1e-3, 1e-1])
@pytest.mark.parametrize("head", range(KV_HEADS))
def test_equals_ridge_regression_in_float64(ridge, head):
    arrays = queries, keys, values, _ = arrays_of(0)
    plain = evict(METHODS["snapkv"], *arrays)
    refitted = evict(METHODS["snapkv"].replace(refit=rk.LeastSquares(ridge)), *arrays)
    attention = attention_rows(queries, plain.keys, plain.positions, head)
    missing = outputs_of(queries, keys, values, head) - attention @ np.asarray(plain.values)[0, head]
    penalty = np.sqrt(ridge * (attention**2).sum() / len(attention)) * np.eye(attention.shape[1])
    stacked = np.concatenate([missing, np.zeros((len(penalty), DIM))])
    expected = np.linalg.lstsq(np.concatenate([attention, penalty]), stacked, rcond=None)[0]
    np.testing.assert_allclose(refitted.values[0, head] - plain.values[0, head], expected, rtol=1e-2, atol=1e-3)
    np.testing.assert_array_equal(refitted.positions, plain.positions)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@given(seed=st.integers(0, 2**16), sharpness=st.sampled_from([0.3, 1.0, 5.0]), ridge=st.sampled_from([1e-3, 0.1, 10.0]))
@settings(max_examples=8, deadline=None)
def test_the_windows_error_never_grows(name, seed, sharpness, ridge):
    arrays = queries, keys, values, _ = arrays_of(seed, sharpness)
    plain = evict(METHODS[name], *arrays)
    refitted = evict(METHODS[name].replace(refit=rk.LeastSquares(ridge)), *arrays)
    for head in range(KV_HEADS):
        attention = attention_rows(queries, plain.keys, plain.positions, head)
        wanted = outputs_of(queries, keys, values, head)
        before, after = (
            np.linalg.norm(attention @ np.asarray(ev.values)[0, head] - wanted) for ev in (plain, refitted)
        )
        assert after <= before * 1.0001 + 1e-5


def test_nothing_is_missing_where_everything_is_kept():
    queries, outputs, everything = refit_arguments(1, kept=LENGTH)
    refitted = rk.LeastSquares(1e-3)(queries, outputs, everything)
    np.testing.assert_allclose(refitted, everything.values, atol=1e-3)


def test_padding_changes_nothing_and_rows_are_apart():
    queries, keys, values, projection = arrays_of(2)
    policy = METHODS["snapkv"].replace(refit=rk.LeastSquares())
    both = evict(policy, queries, keys, values, projection)
    padding = ((0, 0), (0, 0), (5, 0), (0, 0))
    padded = [np.pad(x[1:], padding, constant_values=2.0) for x in (keys, values)]
    mask = np.arange(LENGTH + 5)[None] >= 5
    alone = rk.evict_layer(policy, queries[1:, :, -WINDOW:], *padded, projection, mask)
    np.testing.assert_allclose(alone.values[0], both.values[1], rtol=1e-3, atol=1e-4)


def test_a_prompt_shorter_than_the_window_is_left_alone():
    queries, keys, values, projection = arrays_of(3)
    mask = np.arange(LENGTH)[None] >= np.array([[LENGTH - 3], [0]])
    kept = evict(METHODS["snapkv"].replace(refit=rk.LeastSquares()), queries, keys, values, projection, mask)
    plain = evict(METHODS["snapkv"], queries, keys, values, projection, mask)
    np.testing.assert_allclose(kept.values[0], plain.values[0], atol=1e-3)
    assert np.isfinite(kept.values).all()


def test_bfloat16_values_keep_their_dtype():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in arrays_of(4)]
    ev = evict(METHODS["snapkv"].replace(refit=rk.LeastSquares()), *arrays)
    assert ev.values.dtype == jnp.bfloat16
    assert np.isfinite(ev.values.astype(jnp.float32)).all()


def refit_arguments(seed, dtype=jnp.float32, kept=16):
    """Arguments of a refit that keeps the last `kept` of the keys."""
    queries, keys, values, _ = arrays_of(seed)
    keys, values = jnp.asarray(keys, dtype), jnp.asarray(values, dtype)
    vectors = jnp.asarray(queries[:, :, -WINDOW:] / np.sqrt(DIM), dtype).reshape(2, KV_HEADS, -1, WINDOW, DIM)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, KV_HEADS, LENGTH))
    shown = Queries(vectors, positions[:, 0, -WINDOW:], jnp.int32(UNLIMITED))
    outputs = window_outputs(shown, Pairs(keys, values, positions))
    return shown, outputs, Pairs(keys[:, :, -kept:], values[:, :, -kept:], positions[:, :, -kept:])


@pytest.mark.parametrize("kept", [WINDOW, 40])
@pytest.mark.parametrize("ridge", [1e-30, 1e-7])
def test_a_ridge_below_rounding_stays_finite(ridge, kept):
    """Also where fewer keys than query rows leave `A A^T` singular."""
    queries, outputs, pairs = refit_arguments(5, kept=kept)
    refitted = rk.LeastSquares(ridge)(queries, outputs, pairs)
    before, after = (
        np.linalg.norm(window_outputs(queries, pairs._replace(values=values)) - outputs)
        for values in (pairs.values, refitted)
    )
    assert after <= before


def test_a_huge_ridge_changes_nothing():
    queries, outputs, pairs = refit_arguments(6)
    np.testing.assert_allclose(rk.LeastSquares(1e12)(queries, outputs, pairs), pairs.values, atol=1e-6)


def test_bfloat16_values_are_rounded_once():
    arguments = refit_arguments(7, jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arguments)
    expected = rk.LeastSquares()(*wide).astype(jnp.bfloat16)
    refitted = rk.LeastSquares()(*arguments)
    # float32 sums in another order may move what lies within 1e-7 of the middle between two bfloat16 numbers.
    assert np.mean(np.asarray(refitted == expected)) > 0.99


def test_vmap_and_jit_give_what_a_plain_call_gives():
    queries, outputs, pairs = arguments = refit_arguments(8)
    refit = jax.jit(lambda refit, *arrays: refit(*arrays), static_argnums=0)

    def one_row(vectors, places, outputs, pairs):
        outputs, pairs = jax.tree.map(lambda x: x[None], (outputs, pairs))
        return rk.LeastSquares()(Queries(vectors[None], places[None], queries.sliding_window), outputs, pairs)[0]

    mapped = jax.vmap(one_row)(queries.vectors, queries.positions, outputs, pairs)
    plain = rk.LeastSquares()(*arguments)
    np.testing.assert_allclose(mapped, plain, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(refit(rk.LeastSquares(), *arguments), plain, rtol=1e-3, atol=1e-4)


def test_a_cpu_solves_one_system_at_a_time():
    """Batched LAPACK calls wait for the threads that run them: two of them in one program may never end."""
    program = jax.jit(jax.vmap(rk.LeastSquares()))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), refit_arguments(9))
    text = program.lower(*stacked).compile().as_text()
    calls = re.findall(r"f32\[([\d,]*)\].*custom-call.*(?:potrf|trsm)", text)
    assert calls
    assert all(int(np.prod([int(n) for n in shape.split(",")][:-2])) == 1 for shape in calls)


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ridge_that_leaves_the_system_singular_is_refused(ridge):
    with pytest.raises(ValueError, match="ridge="):
        rk.LeastSquares(ridge)
