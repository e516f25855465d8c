"""Eviction of one layer: identities from the paper against brute force, and properties of every method."""

import functools
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import restkv_jax as rk
from restkv_jax.eviction.layer import evict as evict_pairs
from restkv_jax.eviction.methods.restkv import Reconstruction
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.pooling import (
    AdaptivePooling,
    AnswerPooling,
    AveragePooling,
    MaxPooling,
    NoPooling,
    SuccessorPooling,
    window_mean,
)
from restkv_jax.eviction.select import judge
from restkv_jax.eviction.temporal import ema_weights
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.scores import output_gram, removal_errors
from restkv_jax.kernels.top import top_mask
from restkv_jax.models.config import UNLIMITED
from restkv_jax.models.decoder import LayerView

HEADS, KV_HEADS, LENGTH, DIM, MODEL_DIM = 4, 2, 48, 8, 20
BUDGET, WINDOW = 20, 6
EVICTING = sorted(set(rk.METHODS) - {"full"})
CROSSES_ZERO = {"keydiff", "compactor"}
"""Methods whose scores have both signs, so that near zero only an absolute error means something."""
EVENLY = sorted(set(EVICTING) - {"adakv", "best", "laprox", "pyramidkv"})


@functools.cache
def policy_of(name):
    preset = rk.METHODS[name]
    sized = {"budget": BUDGET} | ({} if name == "streaming_llm" else {"window": WINDOW})
    return preset(**sized, **({"scale": 8} if name == "restkv" else {}))


def arrays_of(seed, heads=HEADS, kv_heads=KV_HEADS, length=LENGTH):
    normal = np.random.default_rng(seed).standard_normal
    shapes = (1, heads, length, DIM), (1, kv_heads, length, DIM), (1, kv_heads, length, DIM), (heads, DIM, MODEL_DIM)
    return tuple(normal(shape).astype(np.float32) for shape in shapes)


def evict(policy, queries, keys, values, projection, mask=None):
    return rk.evict_layer(policy, queries[:, :, -policy.num_queries(LENGTH) :], keys, values, projection, mask)


def exact_deletion(logits, values, projection):
    """Change of the projected output when each key is deleted, from the definition in float64; [w, T]."""
    errors = np.zeros(logits.shape)
    for deleted in range(logits.shape[1]):
        rest = np.delete(np.arange(logits.shape[1]), deleted)
        before, after = (softmax(logits[:, kept]) @ values[kept] for kept in (slice(None), rest))
        errors[:, deleted] = np.linalg.norm((after - before) @ projection, axis=1)
    return errors


def softmax(logits):
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


@given(seed=st.integers(0, 2**16), sharpness=st.sampled_from([1.0, 10.0, 40.0]))
@settings(max_examples=30, deadline=None)
def test_removal_error_is_the_exact_change_of_a_heads_output(seed, sharpness):
    """Also where one key holds nearly all attention: logits tens apart."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, DIM)).astype(np.float32) for n in (3, 9, 9))
    q *= sharpness
    projection = rng.standard_normal((1, DIM, MODEL_DIM)).astype(np.float32)
    queries = Queries(jnp.asarray(q / np.sqrt(DIM))[None, None, None], jnp.full((1, 3), 8), UNLIMITED)
    pairs = Pairs(jnp.asarray(k)[None, None], jnp.asarray(v)[None, None], jnp.arange(9)[None, None])
    errors = removal_errors(queries, pairs, output_gram(projection[None]))[0, 0, 0]
    expected = exact_deletion(q.astype(np.float64) @ k.T / np.sqrt(DIM), v.astype(np.float64), projection[0])
    np.testing.assert_allclose(errors, expected, rtol=5e-4, atol=1e-6)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("gap", [5.0, 15.0, 30.0, 200.0])
@pytest.mark.parametrize(
    "how", [{}, {"tau": 0.0}, {"tau": 0.5}, {"temporal": "last", "tau": 0.5}, {"tau": 2.0}], ids=str
)
def test_a_key_that_takes_all_attention_is_kept(order, gap, how):
    queries, keys, values, projection = arrays_of(0, heads=2, kv_heads=2)
    queries[..., 0], keys[..., 0] = 1.0, 0.0
    keys[:, :, 3, 0] = gap * np.sqrt(DIM)
    policy = policy_of("restkv").replace(scorer=Reconstruction(order=order, **how), pooling=NoPooling())
    ev = evict(policy, queries, keys, values, projection)
    assert np.isfinite(ev.scores).all()
    np.testing.assert_array_equal(np.asarray(ev.scores).argmax(-1), 3)


AVERAGES = {
    "ema": ema_weights(WINDOW, 0.3),
    "mean": np.full(WINDOW, 1 / WINDOW),
    "last": np.eye(WINDOW)[-1],
    "inverse_ema": ema_weights(WINDOW, 0.3)[::-1],
}


@pytest.mark.parametrize(("temporal", "order", "tau"), [
    ("ema", "before", 1.0), ("mean", "before", 1.0), ("ema", "after", 1.0),
    ("last", "before", 2.0), ("inverse_ema", "after", 0.5), ("ema", "after", 0.0),
])  # fmt: skip
def test_restkv_scores_against_brute_force(temporal, order, tau):
    queries, keys, values, projection = arrays_of(11, heads=2, kv_heads=2)
    scorer = Reconstruction(temporal=temporal, order=order, tau=tau)
    ev = evict(policy_of("restkv").replace(scorer=scorer, pooling=NoPooling()), queries, keys, values, projection)
    weights, prefix = AVERAGES[temporal], LENGTH - WINDOW
    for head in range(2):
        logits = queries[0, head, -WINDOW:].astype(np.float64) @ keys[0, head].T / np.sqrt(DIM)
        logits = np.where(np.arange(LENGTH) <= np.arange(prefix, LENGTH)[:, None], logits, -np.inf)
        if order == "before":
            every = softmax(logits)[:, :prefix]
            errors = exact_deletion(logits, values[0, head].astype(np.float64), projection[head])[:, :prefix]
            expected = weights @ (errors**tau * (every / (1 - every)) ** (1 - tau))
        else:
            attention = weights @ softmax(logits)[:, :prefix]
            moved = attention @ values[0, head, :prefix] - values[0, head, :prefix]
            expected = attention / (1 - attention) * np.linalg.norm(moved @ projection[head], axis=-1) ** tau
        np.testing.assert_allclose(ev.scores[0, head], expected, rtol=1e-4)


def test_laprox_scores_are_norms_of_columns_times_projected_values():
    queries, keys, values, projection = arrays_of(12)
    policy = rk.laprox(BUDGET, WINDOW, pooling="none", scope="layer")
    ev = evict(policy, queries, keys, values, projection)
    prefix, expected = LENGTH - WINDOW, np.zeros((HEADS, LENGTH - WINDOW))
    for head in range(HEADS):
        kv_head = head // (HEADS // KV_HEADS)
        logits = queries[0, head, -WINDOW:].astype(np.float64) @ keys[0, kv_head].T / np.sqrt(DIM)
        attention = softmax(np.where(np.arange(LENGTH) <= np.arange(prefix, LENGTH)[:, None], logits, -np.inf))
        projected = values[0, kv_head].astype(np.float64) @ projection[head]
        for n in range(prefix):
            # the Frobenius norm of the column-row pair itself
            expected[head, n] = np.linalg.norm(np.outer(attention[:, n], projected[n]))
    np.testing.assert_allclose(ev.scores[0], expected.reshape(KV_HEADS, -1, prefix).mean(1), rtol=1e-4)
    assert (np.asarray(ev.lengths).sum(-1) == KV_HEADS * BUDGET).all()


def test_gram_form_equals_projecting_the_values():
    *_, projection = arrays_of(0)
    x = np.random.default_rng(1).standard_normal((HEADS, 30, DIM)).astype(np.float32)
    squared = jnp.einsum("htd,hde,hte->ht", x, output_gram(projection[None])[0], x)
    np.testing.assert_allclose(jnp.sqrt(squared), np.linalg.norm(x @ projection, axis=-1), rtol=1e-5)


def test_without_reconstruction_the_attention_alone_is_smoothed():
    queries, keys, values, projection = arrays_of(3)
    preset = rk.restkv(BUDGET, WINDOW, criterion="attention", pooling="none", group_reduce="mean")
    scores = evict(preset, queries, keys, values, projection).scores[0]
    logits = np.einsum("kgtd,knd->kgtn", queries[0].reshape(KV_HEADS, -1, LENGTH, DIM)[:, :, -WINDOW:], keys[0])
    seen = np.arange(LENGTH) <= np.arange(LENGTH - WINDOW, LENGTH)[:, None]
    attention = np.exp(np.where(seen, logits / DIM**0.5, -np.inf))
    attention /= attention.sum(-1, keepdims=True)
    expected = np.einsum("t,kgtn->kgn", ema_weights(WINDOW, 0.3), attention).mean(1)
    np.testing.assert_allclose(scores, expected[:, : LENGTH - WINDOW], rtol=1e-4)
    with pytest.raises(ValueError, match="criterion='loss' is unknown"):
        rk.restkv(criterion="loss")


@given(alpha=st.floats(0.01, 1), length=st.integers(1, 40), seed=st.integers(0, 99))
@settings(deadline=None)
def test_ema_weights_equal_the_recursion(alpha, length, seed):
    x = np.random.default_rng(seed).random(length)
    average = x[0]
    for value in x[1:]:
        average = alpha * value + (1 - alpha) * average
    np.testing.assert_allclose(ema_weights(length, alpha) @ x, average, rtol=1e-5)


@pytest.mark.parametrize("name", EVENLY)
@given(seed=st.integers(0, 2**16))
@settings(max_examples=5, deadline=None)
def test_kept_positions_ascend_hold_the_window_and_fill_the_budget(name, seed):
    policy = policy_of(name)
    ev = evict(policy, *arrays_of(seed))
    assert ev.positions.shape == (1, KV_HEADS, BUDGET)
    assert (np.diff(ev.positions, axis=-1) > 0).all()
    np.testing.assert_array_equal(ev.positions[..., -policy.window :], np.broadcast_to(
        np.arange(LENGTH - policy.window, LENGTH), (1, KV_HEADS, policy.window)))  # fmt: skip
    np.testing.assert_array_equal(ev.lengths, BUDGET)
    best = np.sort(ev.scores, axis=-1)[..., -(BUDGET - policy.window) :]
    kept = np.asarray(ev.positions)[..., : BUDGET - policy.window]
    np.testing.assert_array_equal(np.sort(np.take_along_axis(np.asarray(ev.scores), kept, -1), -1), best)


@pytest.mark.parametrize("name", EVENLY)
def test_pairs_are_those_of_the_positions(name):
    _, keys, values, _ = arrays = arrays_of(2)
    ev = evict(policy_of(name), *arrays)
    for held, full in ((ev.keys, keys), (ev.values, values)):
        np.testing.assert_array_equal(held, np.take_along_axis(full, np.asarray(ev.positions)[..., None], axis=2))


@pytest.mark.parametrize("name", sorted(set(EVICTING) - {"random"}))
@given(seed=st.integers(0, 2**16))
@settings(max_examples=5, deadline=None)
def test_permuting_heads_permutes_the_result(name, seed):
    queries, keys, values, projection = arrays_of(seed)
    ev = evict(policy_of(name), queries, keys, values, projection)
    swapped_heads = np.array([2, 3, 0, 1])
    swapped = evict(
        policy_of(name), queries[:, swapped_heads], keys[:, ::-1], values[:, ::-1], projection[swapped_heads]
    )
    np.testing.assert_allclose(swapped.scores[:, ::-1], ev.scores, rtol=1e-5, atol=1e-5 * (name in CROSSES_ZERO))
    np.testing.assert_array_equal(swapped.positions[:, ::-1], ev.positions)


@pytest.mark.parametrize(("name", "padding"), [("restkv", 1), *((name, 16) for name in EVENLY)])
@given(seed=st.integers(0, 2**16))
@settings(max_examples=5, deadline=None)
def test_padding_changes_nothing(name, padding, seed):
    arrays = arrays_of(seed)
    alone = evict(policy_of(name), *arrays)
    garbage = lambda x: np.concatenate([np.full_like(x[:, :, :padding], 3.0), x], axis=2)  # noqa: E731
    queries, keys, values, projection = arrays
    queries = garbage(queries) if policy_of(name).scorer.all_queries else queries[:, :, -policy_of(name).window :]
    mask = np.arange(LENGTH + padding)[None] >= padding
    padded = rk.evict_layer(policy_of(name), queries, garbage(keys), garbage(values), projection, mask)
    np.testing.assert_array_equal(padded.positions, alone.positions)
    np.testing.assert_array_equal(padded.keys, alone.keys)
    atol = 1e-5 * (name in CROSSES_ZERO)
    np.testing.assert_allclose(padded.scores[..., padding:], alone.scores, rtol=1e-5, atol=atol)
    assert (padded.scores[..., :padding] == -np.inf).all()


@pytest.mark.parametrize(
    ("name", "length"),
    [
        *(("restkv", length) for length in (3, WINDOW)),
        *(pytest.param(name, WINDOW + 1, marks=pytest.mark.slow) for name in EVENLY),
        *((name, BUDGET) for name in EVENLY),
    ],
)
def test_prompts_within_the_budget_are_kept_whole(name, length):
    queries, keys, values, projection = arrays_of(5, length=length)
    ev = evict(policy_of(name), queries, keys, values, projection)
    np.testing.assert_array_equal(ev.lengths, length)
    expected = np.pad(np.arange(length), (0, BUDGET - length), constant_values=-1)
    np.testing.assert_array_equal(ev.positions, np.broadcast_to(expected, ev.positions.shape))
    np.testing.assert_array_equal(ev.keys[:, :, :length], keys)
    assert not ev.keys[:, :, length:].any()


@pytest.mark.parametrize(("reduce", "expected"), [("mean", np.mean), ("max", np.max)])
def test_query_heads_of_a_group_are_reduced_after_pooling(reduce, expected):
    queries, keys, values, projection = arrays_of(6)
    policy = policy_of("restkv").replace(group_reduce=reduce)
    grouped = evict(policy, queries, keys, values, projection).scores
    repeated = evict(policy, queries, keys.repeat(2, 1), values.repeat(2, 1), projection).scores
    np.testing.assert_allclose(grouped, expected(repeated.reshape(1, KV_HEADS, 2, -1), axis=2), rtol=1e-5)


@given(data=st.data(), length=st.integers(1, 60), widest=st.integers(1, 40), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
@pytest.mark.slow
def test_window_mean_is_exact_over_twelve_orders_of_magnitude(data, length, widest, seed):
    width = data.draw(st.integers(1, widest))
    left = data.draw(st.integers(0, width - 1))
    scores = (10 ** np.random.default_rng(seed).uniform(-12, 0, length)).astype(np.float32)
    extended = np.pad(scores.astype(np.float64), (left, width - 1 - left), mode="edge")
    exact = [extended[n : n + width].mean() for n in range(length)]
    mean = jax.jit(window_mean, static_argnums=3)(scores, width, left, widest)
    np.testing.assert_allclose(mean, exact, rtol=1e-6)


@given(seed=st.integers(0, 999), length=st.integers(1, 50), levels=st.integers(1, 40), data=st.data())
@settings(max_examples=40, deadline=None)
@pytest.mark.slow
def test_top_mask_marks_what_top_k_takes(seed, length, levels, data):
    count = data.draw(st.integers(1, length))
    drawn = np.random.default_rng(seed).integers(-1, levels, length)
    values = np.where(drawn < 0, -1, (drawn / levels) ** 8).astype(np.float32)
    expected = np.zeros(length, bool)
    expected[np.asarray(jax.lax.top_k(values, count)[1])] = True
    np.testing.assert_array_equal(top_mask(jnp.asarray(values), count), expected)


def brute_force_width_and_shift(queries, keys, count, kernel_size, scale):
    """Width and shift of one head from the definition, in float64."""
    window, length = queries.shape[0], keys.shape[0]
    logits = queries.astype(np.float64) @ keys.T / np.sqrt(queries.shape[1])
    visible = np.arange(length)[None] <= np.arange(length - window, length)[:, None]
    centres = np.argsort(-np.where(visible, logits, -np.inf), axis=1)[:, :count].mean(axis=1)
    drift = centres[: window // 2].mean() - centres[window // 2 :].mean()
    width = max(kernel_size, 2 * int(abs(drift) // scale) + 1)
    return width, int(np.floor(drift / scale)) + (0 if drift > 0 else 1)


def test_adaptive_width_and_shift_follow_the_drift_of_attention():
    seen = set()
    for seed in range(6):
        queries, keys, values, projection = arrays_of(seed, heads=2, kv_heads=2)
        mask = np.ones((1, LENGTH), bool)
        pooling = AdaptivePooling(kernel_size=3, scale=1)
        policy = EvictionPolicy(BUDGET, WINDOW, rk.snapkv(BUDGET, WINDOW).scorer, pooling)
        pooled = evict(policy, queries, keys, values, projection, mask).scores
        plain = evict(policy.replace(pooling=NoPooling()), queries, keys, values, projection).scores
        for head in range(2):
            args = queries[0, head, -WINDOW:], keys[0, head], BUDGET - WINDOW, 3, 1
            width, shift = brute_force_width_and_shift(*args)
            seen.add((width, np.sign(shift)))
            padded = np.pad(np.asarray(plain[0, head]), (width // 2 - shift, width // 2 + shift), mode="edge")
            expected = [padded[n : n + width].mean() for n in range(LENGTH - WINDOW)]
            np.testing.assert_allclose(pooled[0, head], expected, rtol=1e-5)
    assert len(seen) > 3, "the drawn cases must exercise several widths and both directions"


@pytest.mark.parametrize(("pooling", "count", "size", "before", "edge", "reduce"), [
    (AveragePooling(5), 14, 5, 2, 0.0, np.mean), (MaxPooling(7), 14, 7, 3, -np.inf, np.max),
    (SuccessorPooling(12), 14, 12, 9, 0.0, np.mean), (SuccessorPooling(1), 14, 1, 0, 0.0, np.mean),
    (AnswerPooling(21), 70, 21, 10, 0.0, np.mean), (AnswerPooling(21), 53, 15, 10, 0.0, np.mean),
    (AnswerPooling(21), 43, 12, 9, 0.0, np.mean), (AnswerPooling(21), 12, 3, 2, 0.0, np.mean),
    (AnswerPooling(21), 1, 1, 0, 0.0, np.mean), (AnswerPooling(1), 14, 1, 0, 0.0, np.mean),
    (AnswerPooling(5, share=1.0), 4, 4, 2, 0.0, np.mean),
])  # fmt: skip
def test_fixed_pooling_against_brute_force(pooling, count, size, before, edge, reduce):
    queries, keys, values, projection = arrays_of(7, heads=2, kv_heads=2, length=80)
    policy = EvictionPolicy(count + WINDOW, WINDOW, rk.snapkv(BUDGET, WINDOW).scorer, pooling)
    pooled = evict(policy, queries, keys, values, projection).scores
    plain = np.asarray(evict(policy.replace(pooling=NoPooling()), queries, keys, values, projection).scores)
    padded = np.pad(plain, ((0, 0), (0, 0), (before, size - 1 - before)), constant_values=edge)
    windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=-1)
    np.testing.assert_allclose(pooled, reduce(windows, axis=-1), rtol=1e-5)


def test_h2o_sums_causal_attention_over_all_queries():
    queries, keys, values, projection = arrays_of(8, heads=2, kv_heads=2, length=150)
    policy = rk.h2o(BUDGET, WINDOW)
    ev = rk.evict_layer(policy, queries, keys, values, projection)
    logits = np.einsum("htd,hnd->htn", queries[0], keys[0]) / np.sqrt(DIM)
    weights = np.exp(logits) * np.tri(150)
    expected = (weights / weights.sum(-1, keepdims=True)).sum(1)[:, : 150 - WINDOW]
    np.testing.assert_allclose(ev.scores[0], expected, rtol=1e-4)


def test_knorm_keeps_the_keys_of_smallest_norm():
    arrays = arrays_of(30)
    ev = evict(policy_of("knorm"), *arrays)
    norms = np.linalg.norm(arrays[1][0, :, :-WINDOW], axis=-1)
    np.testing.assert_allclose(ev.scores[0], -norms, rtol=1e-5)
    best = np.sort(np.argsort(norms, axis=-1)[:, : BUDGET - WINDOW], axis=-1)
    np.testing.assert_array_equal(ev.positions[0, :, : BUDGET - WINDOW], best)


def test_tova_looks_at_the_last_query_alone_and_at_all_heads():
    queries, keys, values, projection = arrays_of(31)
    ev = evict(policy_of("tova"), queries, keys, values, projection)
    logits = np.einsum("hd,hnd->hn", queries[0, :, -1], np.repeat(keys[0], HEADS // KV_HEADS, axis=0)) / DIM**0.5
    attention = np.asarray(jax.nn.softmax(logits)).mean(0)[:-WINDOW]
    np.testing.assert_allclose(ev.scores[0], np.tile(attention, (KV_HEADS, 1)), rtol=1e-4)


def test_random_scores_differ_by_seed_layer_and_head():
    view = LayerView(0, Queries(jnp.zeros((1, 2, 1, 1, 8)), jnp.array([[39]]), UNLIMITED), jnp.zeros((2, 1, 8, 4)))
    pairs = Pairs(*jnp.zeros((2, 1, 2, 40, 8)), jnp.arange(40)[None, None])
    of = lambda seed, layer: np.asarray(rk.random(seed=seed).scorer(view._replace(index=layer), pairs, 4))  # noqa: E731
    drawn = [of(0, 0), of(1, 0), of(0, 1)]
    assert len({float(x[0, head, 0, 0]) for x in drawn for head in range(2)}) == 6
    np.testing.assert_array_equal(drawn[0], of(0, 0))
    assert all(((x >= 0) & (x < 1)).all() for x in drawn)


@pytest.mark.parametrize("name", EVICTING)
def test_in_bfloat16_scores_are_computed_in_float32(name):
    normal, dim = np.random.default_rng(32).standard_normal, 16  # of which the scale of logits is a power of two
    shapes = (1, HEADS, LENGTH, dim), (1, KV_HEADS, LENGTH, dim), (1, KV_HEADS, LENGTH, dim), (HEADS, dim, MODEL_DIM)
    arrays = [jnp.asarray(normal(shape), jnp.bfloat16) for shape in shapes]
    found = evict(policy_of(name), *arrays)
    expected = evict(policy_of(name), *(x.astype(jnp.float32) for x in arrays))
    tolerance = {"rtol": 1e-4, "atol": 1e-4 if name in CROSSES_ZERO else 0}
    np.testing.assert_allclose(found.scores, expected.scores, **tolerance)
    np.testing.assert_array_equal(found.positions, expected.positions)


def test_streaming_llm_keeps_sinks_and_the_most_recent():
    ev = evict(rk.streaming_llm(12, sinks=4), *arrays_of(9))
    np.testing.assert_array_equal(ev.positions[0, 0], [0, 1, 2, 3, *range(LENGTH - 8, LENGTH)])


def shapes_within(jaxpr):
    """Shapes of all intermediate arrays, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from shapes_within(inner)


@pytest.mark.parametrize("name", [*EVICTING, "restkv-before"])
def test_no_array_of_projected_values_or_of_all_pairs_of_tokens(name):
    length, heads, kv_heads, dim, model_dim = 4096, 16, 4, 4, 1024
    of_options = {"restkv-before": rk.restkv(128, 16, order="before"), "best": rk.best(128, future=128)}
    policy = of_options[name] if name in of_options else rk.METHODS[name](budget=128)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    pairs = shape(1, kv_heads, length, dim)
    queries = shape(1, heads, policy.num_queries(length), dim)
    jaxpr = jax.make_jaxpr(lambda *a: rk.evict_layer(policy, *a))(queries, pairs, pairs, shape(heads, dim, model_dim))
    largest = max(int(np.prod(s)) for s in shapes_within(jaxpr.jaxpr))
    assert largest < min(length * length, heads * length * model_dim) // 2


@pytest.mark.parametrize(("make", "words"), [
    (lambda: rk.restkv(budget=0), "budget=0 must be at least 1"),
    (lambda: rk.restkv(budget="64"), "budget='64' is not a budget; give a number of tokens such as 128, or a perc"),
    (lambda: rk.restkv(budget="0%"), "budget='0%' is not a budget"),
    (lambda: rk.restkv(budget="101%"), "budget='101%' is not a budget"),
    (lambda: rk.snapkv(budget=8, window=0), "window=0"),
    (lambda: rk.restkv(temporal="sum"), "temporal='sum'.*'ema'"),
    (lambda: rk.restkv(order="during"), "order='during'.*'after'"),
    (lambda: rk.restkv(pooling="median"), "pooling='median'.*'adaptive'"),
    (lambda: rk.restkv(kernel_size=4), "kernel_size=4 must be odd"),
    (lambda: rk.restkv(scale=0), "scale=0"),
    (lambda: rk.restkv(alpha=0), "alpha=0"),
    (lambda: rk.restkv(tau=-1), "tau=-1 must not be negative"),
    (lambda: rk.restkv(group_reduce="min"), "group_reduce='min'"),
    (lambda: rk.streaming_llm(budget=4, sinks=4), "budget=4 must exceed sinks=4"),
    (lambda: rk.streaming_llm(sinks=-1), "sinks=-1"),
    (lambda: rk.snapkv().replace(scorer=None), "budget=128 needs a scorer"),
    (lambda: rk.snapkv().replace(while_generating=True), "WindowAttention does not score query by query"),
    (lambda: rk.full().replace(while_generating=True), "while_generating=True needs a budget"),
])  # fmt: skip
def test_options_that_make_no_sense_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("budget", [64.0, True])
def test_budgets_are_integers(budget):
    with pytest.raises(TypeError, match=f"budget={budget!r} (must be an integer|is not a budget; give a number)"):
        EvictionPolicy(budget, scorer=rk.snapkv().scorer)


@pytest.mark.parametrize("mask", [np.ones((1, 3), bool), np.arange(LENGTH)[None] < 20, np.zeros((1, LENGTH), bool)])
def test_masks_that_make_no_sense_are_refused(mask):
    with pytest.raises(ValueError, match="mask has"):
        evict(policy_of("snapkv"), *arrays_of(10), mask)


def test_shapes_that_do_not_agree_are_named():
    queries, keys, values, projection = arrays_of(10)
    for name, message, arrays in (
        ("output_projection", "must have (4, 8, 20)", (queries, keys, values, projection[:2])),
        ("values", "must have (1, 2, 48, 8)", (queries, keys, values[:, :, 1:], projection)),
        ("queries", "must have (1, 4, 6, 8)", (queries[..., 1:], keys, values, projection)),
        ("keys", "must have 4 axes", (queries, keys[0], values, projection)),
        ("queries", "not a multiple of the 2 of keys", (queries[:, :3], keys, values, projection[:3])),
    ):
        with pytest.raises(ValueError, match=f"^{name} .*{re.escape(message)}"):
            evict(policy_of("snapkv"), *arrays)


@pytest.mark.parametrize("name", ["h2o", "knorm", "random", "restkv"])
def test_keys_that_the_sliding_window_hides_from_later_tokens_give_way(name):
    queries, keys, values, projection = arrays_of(12)
    queries = queries if policy_of(name).scorer.all_queries else queries[:, :, -WINDOW:]
    positions = jnp.arange(LENGTH)[None]
    vectors = jnp.asarray(queries / np.sqrt(DIM)).reshape(1, KV_HEADS, -1, *queries.shape[2:])
    shown = Queries(vectors, positions[:, -queries.shape[2] :], 30)
    view = LayerView(0, shown, jnp.asarray(projection).reshape(KV_HEADS, -1, DIM, MODEL_DIM))
    pairs = Pairs(jnp.asarray(keys), jnp.asarray(values), positions[:, None])
    policy = policy_of(name)
    kept = evict_pairs(policy, view, pairs, BUDGET, 1, judge(policy, view, pairs, {})).positions
    assert (kept > LENGTH - 30).all(), "30 tokens are within reach, more than the budget"


@pytest.mark.parametrize("name", ["restkv", "tova", "streaming_llm"])
def test_of_more_queries_than_the_window_the_last_judge(name):
    queries, keys, values, projection = arrays_of(10)
    ev = evict(policy_of(name), queries, keys, values, projection)
    more = rk.evict_layer(policy_of(name), queries[:, :, -2 * WINDOW :], keys, values, projection)
    np.testing.assert_array_equal(more.scores, ev.scores)
    np.testing.assert_array_equal(more.positions, ev.positions)


def test_fewer_queries_than_the_window_are_refused():
    queries, keys, values, projection = arrays_of(10)
    with pytest.raises(ValueError, match=f"policy.window={WINDOW}"):
        rk.evict_layer(policy_of("snapkv"), queries[:, :, -2:], keys, values, projection)


def test_replace_changes_one_field():
    policy = rk.restkv(budget=128)
    assert policy.replace(budget=256) == rk.restkv(budget=256)
    with pytest.warns(UserWarning, match="window=32, which shrinks to 8"):
        small = rk.restkv(16)
    assert small.replace(sinks=1).replace(budget=256) == rk.restkv(256).replace(sinks=1)
    assert small.replace(window=4, budget=256) == rk.restkv(256, window=4)
    with pytest.warns(UserWarning, match="window=32, which shrinks to 6"):
        assert rk.laprox(12).replace(budget=1024) == rk.laprox(1024)
    with pytest.warns(UserWarning, match="shrinks") as said:
        assert rk.adakv(16).window == 8
    assert len(said) == 1
    assert hash(policy) == hash(rk.restkv(budget=128))


def test_a_scorer_of_all_queries_is_refused_fewer():
    queries, keys, values, projection = arrays_of(12)
    with pytest.raises(ValueError, match=f"policy.scorer, which looks at all queries, needs {LENGTH} of a prompt"):
        rk.evict_layer(policy_of("h2o"), queries[:, :, -WINDOW:], keys, values, projection)


@pytest.mark.parametrize("name", ["restkv", "laprox", "snapkv", "knorm"])
@pytest.mark.parametrize("fault", ["large values", "NaN in a key"])
def test_scores_that_are_not_finite_leave_more_than_the_window(name, fault):
    queries, keys, values, projection = map(np.array, arrays_of(12))
    if fault == "large values":
        values[..., : LENGTH // 2, :] = 1e20
    else:
        keys[:, 0, 3] = np.nan
    policy = policy_of(name).replace(allocation=rk.Uniform())
    kept = rk.evict_layer(policy, queries[:, :, -WINDOW:], keys, values, projection)
    np.testing.assert_array_equal(kept.lengths, BUDGET)
    assert np.isfinite(kept.scores).all()
