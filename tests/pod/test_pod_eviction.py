"""Distant tokens thinned: one set of positions per block, by the sum of its layers' scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pod import GROUPS, NEW, SHARING, decode, prompts, tiny

import restkv_jax as rk
from restkv_jax.caches.shared_keeper import _add_reachable
from restkv_jax.eviction.select import UNREACHABLE
from restkv_jax.models.decoder import Hooks, positions_of, read


@pytest.mark.slow
@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_a_budget_for_all_distant_tokens_evicts_nothing(name):
    policy = rk.METHODS[name](budget=40, window=8)
    assert rk.bucket_length(66) - SHARING.proximal > 40, "or nothing would be chosen"
    lengths = (66, 20, 2)
    _, scores, cache = decode(SHARING, policy, lengths)
    _, expected, whole = decode(SHARING, lengths=lengths)
    np.testing.assert_array_equal(
        rk.kept_positions(cache), np.asarray(rk.kept_positions(whole))[..., : cache.num_slots]
    )
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def window_attention(model, params, tokens, mask, window):
    """What the window's queries give every token as decoding will read it, [L, B, K, T]; numpy, in float64."""

    def observe(view, memory, state):
        shown = view.queries.vectors, memory.pairs.keys, memory.leader_keys
        return tuple(whole.at[view.index].set(x) for whole, x in zip(state, shown, strict=True))

    batch, length = tokens.shape
    empty = tuple(jnp.zeros((4, batch, 2, *shape, 8)) for shape in ((2, window), (length,), (length,)))
    hooks, sharing = Hooks(observe=observe, num_queries=window), model.clone(sharing=SHARING)
    shown = jax.jit(lambda p: read(sharing, p, jnp.asarray(tokens), mask, hooks, empty)[1])(params)
    queries, own, leaders = (np.asarray(x, np.float64) for x in shown)
    sums, places = np.zeros((4, batch, 2, length)), np.asarray(positions_of(mask))
    for layer, row, head in np.ndindex(4, batch, 4):
        distant = (places[row] >= 3) & (places[row] < mask[row].sum() - 24)
        keys = np.where(distant[:, None], leaders[layer, row, head // 2], own[layer, row, head // 2])
        mass = np.exp(queries[layer, row, head // 2, head % 2] @ keys.T)
        mass *= (places[row] >= 0) & (places[row] <= places[row, -window:, None])
        sums[layer, row, head // 2] += (mass / mass.sum(-1, keepdims=True)).sum(0) / 2
    return sums


def test_eviction_keeps_the_best_of_the_blocks_summed_scores():
    """Positions against SnapKV's scores summed over a block's layers by brute force; values are each layer's own."""
    (model, params), (tokens, mask) = tiny(), prompts((90, 60))
    policy = rk.snapkv(12, window=8, pooling="none")
    _, cache = rk.prefill(model, params, tokens, mask, policy, NEW, sharing=SHARING)
    _, whole = rk.prefill(model, params, tokens, mask, None, NEW, sharing=SHARING)
    scores = window_attention(model, params, tokens, jnp.asarray(mask), 8)
    kept, leader = np.asarray(cache.slot_positions())[..., 27 : 27 + 12], np.array(GROUPS.leader)
    for layer, row, head in np.ndindex(4, 2, 2):
        block = leader[:, head] == leader[layer, head]
        distant = np.arange(3, mask[row].sum() - 24)
        summed = scores[block, row, head].sum(0)[mask[row]][distant]
        best = np.sort(distant[np.argsort(-summed)[:12]])
        np.testing.assert_array_equal(kept[layer, row, head], best)
        number = GROUPS.blocks[layer, head]
        ours, every = (np.asarray(x.distant_keys)[0, 0, row, number] for x in (cache, whole))
        np.testing.assert_array_equal(ours[:12], every[best - 3])
        values = whole.distant_values[layer, row, head, best - 3]
        np.testing.assert_array_equal(cache.distant_values[layer, row, head, :12], values)


@pytest.mark.slow
def test_every_policy_from_one_reading_of_the_prompts():
    (model, params), (tokens, mask) = tiny(), prompts()
    policies = rk.full(), rk.snapkv(12, window=8)
    full, evicted = rk.generate_each(model, params, tokens, mask, policies, NEW, sharing=SHARING)
    np.testing.assert_array_equal(full.tokens, decode(SHARING)[0])
    np.testing.assert_array_equal(evicted.tokens[1:], full.tokens[1:], "rows without distant tokens lose nothing")
    assert evicted.cache.num_slots == 27 + 12 + NEW


def test_a_layer_whose_window_hides_a_key_adds_nothing_to_its_score():
    hidden, padding = UNREACHABLE, -np.inf
    first = jnp.array([1.0, hidden, 2.0, hidden, padding])
    second = jnp.array([3.0, 4.0, hidden, hidden, padding])
    np.testing.assert_array_equal(_add_reachable(first, second), [4.0, 4.0, 2.0, hidden, padding])
