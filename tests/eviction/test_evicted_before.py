"""Scores of pairs that an earlier eviction left: other positions in every KV head, queries of the new tokens only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import restkv_jax as rk
from restkv_jax.eviction.methods.compactor import leverages, non_causal_attention
from restkv_jax.eviction.pooling import AdaptivePooling
from restkv_jax.eviction.select import prefix_scores, score
from restkv_jax.eviction.temporal import ema_weights, query_weights
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.models.config import UNLIMITED
from restkv_jax.models.decoder import LayerView
from restkv_jax.models.rope import Rope

KV_HEADS, GROUP, DIM, NEW, WINDOW, LAST = 2, 2, 8, 12, 6, 90
HELD = 40, 27
"""Pairs of each KV head, the new tokens' included; the places before them are empty."""
SCORERS = {
    "restkv": rk.restkv(20, WINDOW),
    "restkv, before": rk.restkv(20, WINDOW, order="before"),
    "attention": rk.restkv(20, WINDOW, criterion="attention"),
    "averaged": rk.restkv(20, WINDOW, pooling="avg"),
    "maximum": rk.snapkv(20, WINDOW, pooling="max"),
    "laprox": rk.laprox(20, WINDOW, scope="layer"),
    "h2o": rk.h2o(20, WINDOW),
    "knorm": rk.knorm(20, WINDOW),
    "keydiff": rk.keydiff(20, WINDOW),
    "expected_attention": rk.expected_attention(20, WINDOW, sinks=0),
    "streaming_llm": rk.streaming_llm(20),
}


def arrays_of(seed, new=NEW):
    """A layer's view and pairs, one row."""
    rng = np.random.default_rng(seed)
    normal, most = rng.standard_normal, max(HELD)
    positions = np.full((1, KV_HEADS, most), -1)
    for head, held in enumerate(HELD):
        old = np.sort(rng.choice(LAST - NEW, held - NEW, replace=False))
        positions[0, head, most - held :] = [*old, *range(LAST - NEW, LAST)]
    queries = Queries(
        jnp.asarray(normal((1, KV_HEADS, GROUP, NEW, DIM)), jnp.float32), jnp.arange(LAST - NEW, LAST)[None], UNLIMITED
    )
    pairs = Pairs(*jnp.asarray(normal((2, 1, KV_HEADS, most, DIM)), jnp.float32), jnp.asarray(positions))
    rope = Rope(jnp.asarray([[1.0, 0.3, 0.1, 0.03]]), 1.0)
    projection = jnp.asarray(normal((KV_HEADS, GROUP, DIM, 10)), jnp.float32)
    return LayerView(0, queries.last(new), projection, rope=rope), pairs


def of_head(view, pairs, head):
    """One KV head alone, without empty places."""
    one = slice(head, head + 1)
    queries = view.queries.replace(vectors=view.queries.vectors[:, one])
    held = [x[:, one, -HELD[head] :] for x in pairs]
    return view._replace(queries=queries, output_projection=view.output_projection[one]), Pairs(*held)


@functools.partial(jax.jit, static_argnums=0)
def scores_of(policy, view, pairs):
    view = view.last(policy.num_queries(pairs.keys.shape[2]))
    return prefix_scores(policy, view, pairs, score(policy, view, pairs))


@pytest.mark.parametrize("name", SCORERS)
def test_every_kv_head_is_scored_as_alone(name):
    view, pairs = arrays_of(0)
    together = scores_of(SCORERS[name], view, pairs)
    window = SCORERS[name].window
    for head, held in enumerate(HELD):
        alone = scores_of(SCORERS[name], *of_head(view, pairs, head))[0, 0]
        np.testing.assert_allclose(together[0, head, -(held - window) :], alone, rtol=2e-5, atol=1e-6)
        assert (together[0, head, : max(HELD) - held] == -jnp.inf).all()


def test_the_mean_over_heads_of_tova_is_of_each_place():
    view, pairs = arrays_of(1)
    both = scores_of(rk.tova(20, WINDOW), view, pairs)
    alone = [scores_of(rk.tova(20, WINDOW), *of_head(view, pairs, head))[0, 0] for head in range(KV_HEADS)]
    empty = np.zeros(max(HELD) - min(HELD))
    expected = (alone[0] + np.concatenate([empty, alone[1]])) / 2
    np.testing.assert_allclose(both[0, 0], expected, rtol=1e-5)


@pytest.mark.slow
def test_compactors_parts_of_every_kv_head_are_as_alone():
    view, pairs = arrays_of(2)
    prefix = max(HELD) - WINDOW
    sketch = jnp.eye(DIM)

    def parts(view, pairs, prefix):
        counted = jnp.broadcast_to(pairs.positions >= 0, pairs.keys.shape[:3])[..., :prefix]
        return leverages(view, pairs, counted, sketch), non_causal_attention(view.queries, pairs, counted, 16)

    together = parts(view, pairs, prefix)
    for head, held in enumerate(HELD):
        for whole, alone in zip(together, parts(*of_head(view, pairs, head), held - WINDOW), strict=True):
            np.testing.assert_allclose(whole[0, head, -(held - WINDOW) :], alone[0, 0], rtol=1e-4, atol=1e-6)


def test_keys_whose_queries_are_gone_are_judged_by_the_first_there_are():
    """One chunk of old keys and one of new ones, against brute force."""
    view, pairs = arrays_of(3)
    view, pairs = of_head(view, pairs, 0)
    old, new = HELD[0] - NEW, NEW - WINDOW
    counted = jnp.ones((1, 1, old + new), bool)
    received = np.asarray(non_causal_attention(view.queries, pairs, counted, old))[0, 0]
    vectors, keys = (np.asarray(x, np.float64) for x in (view.queries.vectors[0, 0, :, :new], pairs.keys[0, 0]))
    expected = np.zeros(old + new)
    for start in (0, old):
        block = np.zeros((old, DIM))
        block[: len(keys[start : old + new][:old])] = keys[start : old + new][:old]
        judges = np.zeros((GROUP, old, DIM))
        judges[:, :new] = vectors
        logits = np.einsum("gqd,nd->gqn", judges, block) * DIM**0.5
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        mass = (weights / weights.sum(-1, keepdims=True)).sum(1).mean(0)
        expected[start : start + old] = mass[: len(expected) - start]
    expected *= np.linalg.norm(pairs.values[0, 0, : old + new], axis=-1)
    expected = np.convolve(expected, np.ones(3) / 3, "same")
    np.testing.assert_allclose(received, expected, rtol=1e-4)


def test_random_scores_depend_on_head_and_position_only():
    view, pairs = arrays_of(4)
    whole = pairs._replace(positions=jnp.arange(LAST)[None, None], keys=jnp.zeros((1, KV_HEADS, LAST, DIM)))
    policy = rk.random(20, WINDOW, seed=3)
    every = np.asarray(scores_of(policy, view, whole._replace(values=whole.keys)))
    some = np.asarray(scores_of(policy, view, pairs))
    for head, held in enumerate(HELD):
        positions = pairs.positions[0, head, -held:-WINDOW]
        np.testing.assert_array_equal(some[0, head, -(held - WINDOW) :], every[0, head, positions])
    assert len(set(every.ravel().tolist())) == every.size


def test_sinks_are_known_by_their_positions():
    view, pairs = arrays_of(5)
    sinks = (pairs.positions >= 0) & (pairs.positions < 40)
    scores = scores_of(rk.expected_attention(40 + WINDOW, WINDOW, sinks=40), view, pairs)
    others = ~sinks & (pairs.positions >= 0)
    assert sinks[..., :-WINDOW].any(-1).all() and others[..., :-WINDOW].any(-1).all()
    lowest = jnp.where(sinks[..., :-WINDOW], scores, jnp.inf).min()
    assert lowest >= jnp.where(others[..., :-WINDOW], scores, 0).max() + 1


@pytest.mark.parametrize(
    "name", ["restkv", "restkv, before", "attention", "laprox", "h2o", "keydiff", "expected_attention"]
)
def test_fewer_new_tokens_than_the_window(name):
    """A row's new tokens, padded to those of a longer one, are what they are alone."""
    view, pairs = arrays_of(6)
    alone = scores_of(SCORERS[name], view.last(3), pairs)
    padded = view.queries.last(5)
    padded = padded.replace(positions=jnp.where(jnp.arange(5) < 2, -1, padded.positions))
    np.testing.assert_allclose(
        scores_of(SCORERS[name], view._replace(queries=padded), pairs), alone, rtol=2e-5, atol=1e-6
    )


AVERAGES = {
    "ema": lambda n: ema_weights(n, 0.3),
    "mean": lambda n: np.full(n, 1 / n),
    "last": lambda n: np.eye(n)[-1],
    "inverse_ema": lambda n: ema_weights(n, 0.3)[::-1],
}


@pytest.mark.parametrize("temporal", AVERAGES)
def test_the_average_of_a_row_begins_with_its_first_query(temporal):
    positions = jnp.array([[-1, -1, 7, 8, 9], [5, 6, 7, 8, 9]])
    of_three, of_five = (AVERAGES[temporal](n) for n in (3, 5))
    np.testing.assert_allclose(query_weights(temporal, positions, 0.3), [[0, 0, *of_three], of_five], rtol=1e-6)


def test_drift_beyond_the_keys_that_are_left_is_clipped():
    view, pairs = arrays_of(7)
    far = Pairs(pairs.keys, pairs.values, jnp.where(pairs.positions >= 0, pairs.positions * 10_000, -1))
    queries = view.queries.replace(positions=view.queries.positions * 10_000)
    pooling = AdaptivePooling(kernel_size=3, scale=20)
    width, _ = pooling.width_and_shift(view._replace(queries=queries.last(WINDOW)), far, 10)
    assert (width > 2 * (max(HELD) // 20) + 1).all(), "or nothing would be clipped"
    raw = jnp.abs(pairs.keys[:, :, None, :-WINDOW, 0])
    smoothed = pooling(raw, view._replace(queries=queries), far, 10)
    of_tokens = jnp.where(far.positions[:, :, None, :-WINDOW] >= 0, raw, 0)
    assert smoothed.max() <= of_tokens.max() and smoothed.min() >= 0
