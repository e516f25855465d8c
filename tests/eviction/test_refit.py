"""Least-squares refit of the kept values: against the definition in float64, and what it promises."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import restkv_jax as rk
from restkv_jax.eviction.refit import Asked, find_wanted
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.scores import read_pairs, tiles
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
    penalty = np.sqrt(ridge * (attention**2).sum() / attention.shape[1]) * np.eye(attention.shape[1])
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
    asked, everything = refit_arguments(1, kept=LENGTH)
    refitted = rk.LeastSquares(1e-3, mass_ridge=1e-3)(asked, everything)
    np.testing.assert_allclose(refitted.values, everything.values, atol=1e-3)
    np.testing.assert_allclose(refitted.keys, everything.keys, atol=1e-3)


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
    asked = Asked(shown, find_wanted(shown, Pairs(keys, values, positions)))
    return asked, Pairs(keys[:, :, -kept:], values[:, :, -kept:], positions[:, :, -kept:])


@pytest.mark.parametrize("kept", [WINDOW, 40])
@pytest.mark.parametrize("ridge", [1e-30, 1e-7])
def test_a_ridge_below_rounding_stays_finite(ridge, kept):
    """Also where fewer keys than query rows leave `A A^T` singular."""
    asked, pairs = refit_arguments(5, kept=kept)
    refitted = rk.LeastSquares(ridge)(asked, pairs)
    before, after = (np.linalg.norm(read_pairs(asked.queries, x)[0] - asked.wanted.outputs) for x in (pairs, refitted))
    assert after <= before


def test_tiles_of_keys_give_what_all_at_once_give(monkeypatch):
    arguments = refit_arguments(14, kept=40)
    assert WINDOW * HEADS // KV_HEADS < 40, "the system has as many rows as there are queries"
    whole = rk.LeastSquares(mass_ridge=0.1)(*arguments)
    monkeypatch.setattr(tiles, "ELEMENTS_AT_ONCE", 1)
    monkeypatch.setattr(tiles, "LEAST_TILE", 16)
    divided = rk.LeastSquares(mass_ridge=0.1)(*arguments)
    np.testing.assert_allclose(divided.keys, whole.keys, atol=1e-4)
    np.testing.assert_allclose(divided.values, whole.values, atol=1e-4)
    assert np.abs(whole.keys - arguments[1].keys).max() > 0.01


def test_a_huge_ridge_changes_nothing():
    asked, pairs = refit_arguments(6)
    refitted = rk.LeastSquares(1e12, mass_ridge=1e12)(asked, pairs)
    np.testing.assert_allclose(refitted.values, pairs.values, atol=1e-6)
    np.testing.assert_allclose(refitted.keys, pairs.keys, atol=1e-6)


def test_bfloat16_values_are_rounded_once():
    arguments = refit_arguments(7, jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arguments)
    expected = rk.LeastSquares()(*wide).values.astype(jnp.bfloat16)
    refitted = rk.LeastSquares()(*arguments).values
    # float32 sums in another order may move what lies within 1e-7 of the middle between two bfloat16 numbers.
    assert np.mean(np.asarray(refitted == expected)) > 0.99


def test_vmap_and_jit_give_what_a_plain_call_gives():
    (queries, wanted), pairs = arguments = refit_arguments(8)
    refit = jax.jit(lambda refit, *arrays: refit(*arrays), static_argnums=0)

    def one_row(vectors, places, wanted, pairs):
        wanted, pairs = jax.tree.map(lambda x: x[None], (wanted, pairs))
        asked = Asked(Queries(vectors[None], places[None], queries.sliding_window), wanted)
        return rk.LeastSquares()(asked, pairs).values[0]

    mapped = jax.vmap(one_row)(queries.vectors, queries.positions, wanted, pairs)
    plain = rk.LeastSquares()(*arguments).values
    np.testing.assert_allclose(mapped, plain, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(refit(rk.LeastSquares(), *arguments).values, plain, rtol=1e-3, atol=1e-4)


def test_a_cpu_solves_one_system_at_a_time():
    """Batched LAPACK calls wait for the threads that run them: two of them in one program may never end."""
    program = jax.jit(jax.vmap(rk.LeastSquares()))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), refit_arguments(9))
    text = program.lower(*stacked).compile().as_text()
    calls = re.findall(r"f32\[([\d,]*)\].*custom-call.*(?:potrf|trsm)", text)
    assert calls
    assert all(int(np.prod([int(n) for n in shape.split(",")][:-2])) == 1 for shape in calls)


@given(
    counts=st.lists(st.integers(0, 40), min_size=4, max_size=4),
    seed=st.integers(0, 2**16),
    mass_ridge=st.sampled_from([None, 0.1]),
)
@settings(max_examples=25, deadline=None)
def test_head_by_head_gives_what_all_at_once_give(counts, seed, mass_ridge):
    """Whatever places of which heads are empty, and however many; empty places keep what was in them."""
    asked, pairs = refit_arguments(15, kept=40)
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(40), (4, 1)), axis=1)
    keep = (order < np.array(counts)[:, None]).reshape(2, KV_HEADS, 40)
    kept = pairs._replace(positions=jnp.where(keep, pairs.positions, -1))
    refit = rk.LeastSquares(0.5, mass_ridge=mass_ridge)
    whole, divided = refit(asked, kept), refit.head_by_head(asked, kept)
    np.testing.assert_array_equal(divided.positions, whole.positions)
    np.testing.assert_allclose(divided.keys, whole.keys, atol=1e-4)
    np.testing.assert_allclose(divided.values, whole.values, atol=1e-4)
    np.testing.assert_array_equal(divided.values[~keep], pairs.values[~keep])


def test_heads_that_keep_few_pairs_cost_little():
    """Counted: the system of a head that keeps a quarter of its places has a quarter of their number."""
    asked, kept = refit_arguments(16, kept=40)
    program = jax.jit(rk.LeastSquares().head_by_head).lower(asked, kept).compile().as_text()
    systems = {int(n) for n in re.findall(r"f32\[(?:1,)*(\d+),\1\].*custom-call.*potrf", program)}
    rows = WINDOW * HEADS // KV_HEADS
    assert systems == {10, rows}, "10 of 40 places, and of more than there are rows the dual system"


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ridge_that_leaves_the_system_singular_is_refused(ridge):
    with pytest.raises(ValueError, match=r"^ridge="):
        rk.LeastSquares(ridge)
    with pytest.raises(ValueError, match=r"^mass_ridge="):
        rk.LeastSquares(mass_ridge=ridge)


def test_other_things_in_place_of_future_queries_are_refused():
    with pytest.raises(TypeError, match=r"future=64 must be a restkv_jax.FutureQueries"):
        rk.LeastSquares(future=64)


def exponentials(queries, keys):
    """Of one KV head, float64 [G r, N], without causality: for queries after all keys."""
    rows = np.asarray(queries.vectors, np.float64).reshape(*queries.vectors.shape[:2], -1, DIM)
    return np.exp(rows @ np.asarray(keys, np.float64).swapaxes(-1, -2))


def alike(seed, common, num=16, kept=20):
    """As `refit_arguments`, of queries after all keys that have much in common; the first of the keys are kept."""
    (shown, _), _ = refit_arguments(seed)
    _, keys, values, _ = arrays_of(seed)
    normal = np.random.default_rng(seed).standard_normal
    vectors = (normal((2, KV_HEADS, HEADS // KV_HEADS, num, DIM)) * 0.1 + common).astype(np.float32)
    shown = shown.replace(vectors=jnp.asarray(vectors), positions=jnp.full((2, num), LENGTH))
    pairs = Pairs(jnp.asarray(keys), jnp.asarray(values), jnp.broadcast_to(jnp.arange(LENGTH), keys.shape[:3]))
    return Asked(shown, find_wanted(shown, pairs)), jax.tree.map(lambda x: x[:, :, :kept], pairs), keys


def test_keys_carry_the_mass_of_those_that_are_evicted():
    """To the extent that queries are alike; with a direction that all share, nearly all of it."""
    common = 2 * np.eye(DIM)[0]
    asked, kept, keys = alike(10, common)
    shown, wanted = asked
    moved = rk.LeastSquares(1.0, mass_ridge=0.1)(asked, kept).keys
    whole, before, after = (exponentials(shown, x).sum(-1) for x in (keys, kept.keys, moved))
    np.testing.assert_allclose((np.exp(wanted.peaks.peak) * wanted.peaks.total).reshape(whole.shape), whole, rtol=1e-4)
    missing, missing_then = np.abs(1 - before / whole), np.abs(1 - after / whole)
    assert missing.mean() > 0.4
    assert missing_then.mean() < 0.15


def test_moved_keys_are_biases_along_the_common_direction():
    """Against the biases by brute force: weights from a ridge regression in float64, for queries that are the same in
    one direction, along which a moved key is exactly a bias.
    """
    (shown, _), kept, keys = alike(11, 0.0)
    shown = shown.replace(vectors=shown.vectors.at[..., 0].set(3.0))
    everything = Pairs(jnp.asarray(keys), kept.values, jnp.broadcast_to(jnp.arange(LENGTH), keys.shape[:3]))
    wanted = find_wanted(shown, everything._replace(values=jnp.asarray(keys)))
    moved = rk.LeastSquares(1.0, mass_ridge=0.1)(Asked(shown, wanted), kept).keys
    share = exponentials(shown, kept.keys) / exponentials(shown, keys).sum(-1, keepdims=True)
    for b, k in np.ndindex(*share.shape[:2]):
        e = share[b, k]
        penalty = np.sqrt(0.1 * (e**2).sum() / e.shape[1]) * np.eye(e.shape[1])
        target = np.concatenate([1 - e.sum(-1), np.zeros(len(penalty))])
        weights = np.clip(1 + np.linalg.lstsq(np.concatenate([e, penalty]), target, rcond=None)[0], 0.2, 20)
        expected = exponentials(shown, kept.keys)[b, k] * weights
        np.testing.assert_allclose(exponentials(shown, moved)[b, k], expected, rtol=0.02)


@pytest.mark.parametrize("count", [3, 40])
def test_future_queries_count_as_the_windows_do(count):
    """In float64: rows of the window and of the last queries, all of which see what is kept."""
    queries, keys, values, projection = arrays_of(12)
    future, ridge = rk.FutureQueries(count, horizon=5), 0.05
    policy = METHODS["snapkv"]
    plain = evict(policy, queries, keys, values, projection)
    refitted = evict(policy.replace(refit=rk.LeastSquares(ridge, future)), queries, keys, values, projection)
    np.testing.assert_array_equal(refitted.positions, plain.positions)
    group = HEADS // KV_HEADS
    for head in range(KV_HEADS):
        everything = np.broadcast_to(np.arange(LENGTH), (1, KV_HEADS, LENGTH))
        later = queries[0, head * group : (head + 1) * group, -count:].reshape(-1, DIM).astype(np.float64)

        def attention(keys, positions, head=head, later=later):
            weights = np.exp(later @ np.asarray(keys, np.float64)[0, head].T / np.sqrt(DIM))
            of_later = weights / weights.sum(-1, keepdims=True)
            return np.concatenate([attention_rows(queries, keys, positions, head), of_later])

        kept, missing = attention(plain.keys, plain.positions), attention(keys, everything) @ values[0, head]
        missing = missing - kept @ np.asarray(plain.values)[0, head]
        penalty = np.sqrt(ridge * (kept**2).sum() / kept.shape[1]) * np.eye(kept.shape[1])
        stacked = np.concatenate([missing, np.zeros((len(penalty), DIM))])
        expected = np.linalg.lstsq(np.concatenate([kept, penalty]), stacked, rcond=None)[0]
        np.testing.assert_allclose(refitted.values[0, head] - plain.values[0, head], expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("part", [
    {"refit": rk.LeastSquares(future=rk.FutureQueries(20))}, {"foresight": rk.Foresight(rk.FutureQueries(20), 0.4)},
])  # fmt: skip
def test_fewer_queries_than_are_asked_again_are_refused(part):
    queries, keys, values, projection = arrays_of(13)
    policy, (name,) = METHODS["snapkv"].replace(**part), part
    with pytest.raises(ValueError, match=rf"policy\.{name}, which asks earlier queries again, needs 20 of a prompt"):
        rk.evict_layer(policy, queries[:, :, -WINDOW:], keys, values, projection)


def test_with_few_slots_values_are_corrected_less():
    refit = rk.LeastSquares(0.5, mass_ridge=0.01, ample=50)
    assert [refit.within(budget).ridge for budget in (100, 50, 25, 5)] == [0.5, 0.5, 2.0, 50.0]
    assert refit.within(25).mass_ridge == 0.01
    few, plain = (rk.snapkv(20, 8).replace(refit=each) for each in (refit, rk.LeastSquares(0.5, mass_ridge=0.01)))
    arrays = arrays_of(0)
    expected = evict(plain.replace(refit=rk.LeastSquares(0.5 * 2.5**2, mass_ridge=0.01)), *arrays)
    np.testing.assert_array_equal(evict(few, *arrays).values, expected.values)
    assert not np.allclose(evict(plain, *arrays).values, expected.values)
    assert rk.best(20).correction.ridge == 0.5 * 2.5**2 and rk.best(51).correction.ridge == 0.5
