"""What `rk.best` adds to the published methods: sinks, scores that partly stay, windows that follow the budget."""

import jax.numpy as jnp
import numpy as np
import pytest

import restkv_jax as rk
from restkv_jax.eviction.pooling import SuccessorPooling
from restkv_jax.eviction.select import LARGEST, weighed_scores
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


@pytest.mark.parametrize(("budget", "window"), [(20, 8), (51, 8), (102, 17), (204, 32), (1024, 32)])
def test_a_window_that_is_a_part_of_the_budget(budget, window):
    assert rk.best(budget).window == window
    assert rk.best(f"{100 * budget / 2048}%").resolved(2048).window == window
    assert rk.best(max(budget, 32), window=24).window == 24


def test_a_part_of_a_score_stays_with_its_key():
    scores = np.random.default_rng(14).random((1, 1, 1, 40)).astype(np.float32)
    pairs = Pairs(np.zeros((1, 1, 42, 2)), np.zeros((1, 1, 42, 2)), np.arange(42)[None, None])
    view = LayerView(0, Queries(np.zeros((1, 1, 1, 2, 2)), np.array([[40, 41]]), UNLIMITED), None)
    spread, mixed = (SuccessorPooling(12, own)(jnp.asarray(scores), view, pairs, 4) for own in (0.0, 0.3))
    np.testing.assert_allclose(mixed, 0.3 * scores + 0.7 * np.asarray(spread), rtol=1e-6)
