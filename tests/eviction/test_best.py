"""What `rk.best` adds to the published methods: sinks and queries to come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG

import restkv_jax as rk
from restkv_jax.eviction.select import LARGEST, judge, weighed_scores
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.models.config import UNLIMITED
from restkv_jax.models.decoder import LayerView

HEADS, KV_HEADS, LENGTH, DIM, BUDGET, WINDOW = 4, 2, 48, 8, 20, 6


def arrays_of(seed):
    """Queries of the window, keys, values and the output projection."""
    normal = np.random.default_rng(seed).standard_normal
    heads = (HEADS, WINDOW), (KV_HEADS, LENGTH), (KV_HEADS, LENGTH)
    return *(normal((1, *shape, DIM)).astype(np.float32) for shape in heads), normal((HEADS, DIM, 20))


def test_sinks_are_kept_whatever_their_scores_and_change_no_others_order():
    arrays = arrays_of(11)
    arrays[2][:, :, :4] *= 1e-6  # as the values of sinks are small
    plain, kept = (rk.evict_layer(rk.laprox(BUDGET, WINDOW, scope="layer").replace(sinks=n), *arrays) for n in (0, 4))
    assert not np.isin(np.arange(4), plain.positions).any()
    assert np.isin(np.arange(4), kept.positions[0, 0]).all() and np.isin(np.arange(4), kept.positions[0, 1]).all()
    assert int(kept.lengths.sum()) == int(plain.lengths.sum()) == KV_HEADS * BUDGET
    for head in range(KV_HEADS):  # fewer of the others, the best ones
        others = set(np.asarray(kept.positions[0, head])) - set(range(4))
        scores = np.asarray(kept.scores[0, head])
        chosen = sorted(n for n in others if 0 <= n < LENGTH - WINDOW)
        assert min(scores[chosen]) >= max(np.delete(scores, [*range(4), *chosen]))


@pytest.mark.parametrize("allocation", [rk.ModelWide(), rk.AdaptiveHeads()])
def test_sinks_do_not_count_in_the_sums_that_scores_are_divided_by(allocation):
    policy = rk.snapkv(BUDGET, WINDOW).replace(allocation=allocation)
    scores = jnp.asarray(np.random.default_rng(12).random((1, KV_HEADS, LENGTH - WINDOW)), jnp.float32)
    positions = jnp.arange(LENGTH)[None, None]

    def weighed(scores, positions):
        every = jnp.broadcast_to(jnp.arange(scores.shape[-1]), scores.shape)
        return weighed_scores(policy, scores, positions, every)

    found = weighed(scores.at[..., 0].set(LARGEST), positions)
    assert (found[..., 0] == LARGEST).all()
    np.testing.assert_allclose(found[..., 1:], weighed(scores[..., 1:], positions[..., 1:]), rtol=1e-6)


def test_sinks_leave_room_for_the_window_alone_where_the_budget_is_small():
    ev = rk.evict_layer(rk.snapkv(8, 6).replace(sinks=4), *arrays_of(13))
    np.testing.assert_array_equal(ev.positions[0, 0], [0, 1, *range(LENGTH - 6, LENGTH)])


@pytest.mark.parametrize("allocation", [rk.ModelWide(), rk.AdaptiveHeads(floor=0.0), rk.Pyramid(), rk.Uniform()])
def test_every_head_keeps_the_sinks_that_its_share_has_room_for(allocation):
    model, params = random_model()
    tokens = np.random.default_rng(19).integers(0, 64, (1, 100))
    _, cache = rk.prefill(model, params, tokens, None, rk.laprox(12, 8).replace(sinks=8, allocation=allocation))
    kept = np.asarray(rk.kept_positions(cache))[:, 0]
    counts = (kept >= 0).sum(-1)
    for layer, head in np.ndindex(kept.shape[:2]):
        np.testing.assert_array_equal(kept[layer, head, : counts[layer, head] - 8], np.arange(counts[layer, head] - 8))
    if not isinstance(allocation, rk.Pyramid):
        assert (counts == 12).all()


@pytest.mark.parametrize("preset", [rk.expected_attention, rk.compactor])
def test_sinks_of_a_method_are_kept_and_score_nothing(preset):
    arrays = arrays_of(20)
    every = np.random.default_rng(20).standard_normal((1, HEADS, LENGTH, DIM)).astype(np.float32)
    ev = rk.evict_layer(preset(BUDGET, sinks=3), every, *arrays[1:])
    np.testing.assert_array_equal(ev.positions[..., :3], np.broadcast_to(np.arange(3), (1, KV_HEADS, 3)))
    assert (ev.scores[..., :3] > LARGEST).all() and (np.abs(ev.scores[..., 3:]) < 1e3).all()


def test_one_budget_for_the_model_does_not_depend_on_the_size_of_a_layers_values():
    """Sinks that count in the sums of the scores would tell large values from small ones."""
    _, keys, values, projection = arrays_of(21)
    every = np.random.default_rng(21).standard_normal((1, HEADS, LENGTH, DIM)).astype(np.float32)
    policy = rk.expected_attention(BUDGET, sinks=4).replace(allocation=rk.ModelWide())
    small, large = (rk.evict_layer(policy, every, keys, size * values, projection) for size in (0.1, 10.0))
    np.testing.assert_array_equal(small.positions, large.positions)


def random_model():
    model = rk.build_model(CONFIG)
    return model, rk.init_params(model, jax.random.key(0), dtype=jnp.float32)


def columns(queries, keys, values, projection, positions):
    """`rms(A[:, n]) ||v[n] W_h||` in float64, [H, T], for queries [H, w, D] at positions."""
    group, found = HEADS // KV_HEADS, []
    for head in range(HEADS):
        logits = queries[head].astype(np.float64) @ keys[0, head // group].T / np.sqrt(DIM)
        weights = np.where(np.arange(LENGTH) <= np.asarray(positions)[:, None], np.exp(logits), 0)
        attention = weights / weights.sum(-1, keepdims=True)
        norms = np.linalg.norm(values[0, head // group] @ projection[head], axis=-1)
        found.append(np.sqrt((attention**2).mean(0)) * norms)
    return np.stack(found)


def test_scores_are_those_of_the_window_and_of_queries_to_come():
    _, keys, values, projection = arrays_of(14)
    queries = np.random.default_rng(15).standard_normal((1, HEADS, LENGTH, DIM)).astype(np.float32)
    policy = rk.best(BUDGET, WINDOW, kernel_size=1, weight=0.7, future=30)
    ev = rk.evict_layer(policy, queries, keys, values, projection)
    now = columns(queries[0, :, -WINDOW:], keys, values, projection, np.arange(LENGTH - WINDOW, LENGTH))
    later = columns(queries[0, :, -30:], keys, values, projection, np.full(30, LENGTH))
    expected = (now + 0.7 * later)[:, 4 : LENGTH - WINDOW].reshape(KV_HEADS, -1, LENGTH - WINDOW - 4).mean(1)
    np.testing.assert_allclose(ev.scores[0, :, 4:], expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("future", [64, 512])  # less and more than the padded prompts have
@pytest.mark.parametrize("allocation", [rk.AdaptiveHeads(), rk.Uniform(), rk.ModelWide()])
def test_a_model_reads_and_reads_on_with_fewer_tokens_than_are_asked_again(allocation, future):
    model, params = random_model()
    tokens = jnp.asarray(np.random.default_rng(16).integers(0, 64, (2, 100)), jnp.int32)
    mask = jnp.arange(100)[None] >= jnp.array([[0], [30]])
    policy = rk.best(24, future=future).replace(allocation=allocation)
    _, cache = rk.prefill(model, params, tokens, mask, policy)
    logits, cache = rk.extend(model, params, tokens[:, :20], None, cache, policy)
    assert np.isfinite(logits).all()
    held = (np.asarray(rk.kept_positions(cache)) >= 0).sum(-1)
    np.testing.assert_array_equal(held.mean((0, 2)), [24, 24])
    _, alone = rk.prefill(model, params, tokens[1:, 30:], None, policy)
    logits_alone, _ = rk.extend(model, params, tokens[1:, :20], None, alone, policy)
    np.testing.assert_allclose(logits[1:], logits_alone, rtol=1e-3, atol=1e-3)


def test_outputs_after_the_prompt_are_nearer_than_without_correction():
    """What the refit is for, on queries that it has not seen: those of tokens that follow."""
    model, params = random_model()
    tokens = jnp.asarray(np.random.default_rng(17).integers(0, 64, (4, 160)), jnp.int32)

    def divergence(policy):
        _, cache = rk.prefill(model, params, tokens[:, :128], None, policy)
        logits, _ = rk.extend(model, params, tokens[:, 128:], None, cache, rk.full())
        return jax.nn.log_softmax(logits)

    exact, plain, corrected = map(divergence, (rk.full(), rk.best(24).replace(refit=None), rk.best(24)))
    kl = [(jnp.exp(exact) * (exact - x)).sum(-1).mean() for x in (plain, corrected)]
    assert kl[1] < 0.7 * kl[0]


def test_queries_to_come_do_not_score_while_tokens_are_generated():
    foresight = rk.best(BUDGET).foresight
    with pytest.raises(ValueError, match="foresight and while_generating=True exclude each other"):
        rk.restkv(BUDGET, WINDOW, while_generating=True).replace(foresight=foresight)


def test_what_policies_share_of_a_prompt_is_found_once():
    _, keys, values, projection = arrays_of(18)
    queries = jax.random.normal(jax.random.key(18), (1, KV_HEADS, HEADS // KV_HEADS, LENGTH, DIM))
    shown = Queries(queries, jnp.arange(LENGTH)[None], UNLIMITED)
    view = LayerView(0, shown, jnp.asarray(projection).reshape(KV_HEADS, -1, *projection.shape[1:]))
    pairs, known = Pairs(jnp.asarray(keys), jnp.asarray(values), jnp.arange(LENGTH)[None, None]), {}
    first = judge(rk.best(BUDGET, WINDOW, future=30), view, pairs, known)
    other_budget = judge(rk.best(BUDGET + 5, WINDOW, future=30), view, pairs, known)
    assert other_budget.scores is first.scores and other_budget.asked is first.asked
    other_ridge = judge(rk.best(BUDGET, WINDOW, weight=0.1, ridge=1.0, future=30), view, pairs, known)
    assert other_ridge.scores is not first.scores and other_ridge.asked is first.asked
    for differing in (rk.best(BUDGET, WINDOW + 1, future=30), rk.best(BUDGET, WINDOW, future=20)):
        found = judge(differing, view, pairs, known)
        alone = judge(differing, view, pairs, {})
        assert found.scores is not first.scores and found.asked is not first.asked
        jax.tree.map(np.testing.assert_array_equal, found, alone)
