"""Budgets that differ by layer and head: against brute force, and through prefill and decoding in pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import restkv_jax as rk
from restkv_jax.caches.dense import KVCache
from restkv_jax.eviction.allocation import AdaptiveHeads, ModelWide, Pyramid
from restkv_jax.eviction.select import keep_shares, prefix_scores, score
from restkv_jax.models.decoder import Hooks, read

LAYERS, KV_HEADS, BUDGET, WINDOW, NEW = 3, 2, 24, 8, 6
CONFIG = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": KV_HEADS, "head_dim": 8,
    "max_position_embeddings": 512,
}  # fmt: skip
POLICIES = {
    "laprox": rk.laprox(BUDGET, WINDOW, candidates=1000).replace(page_size=8),
    "laprox-layer": rk.laprox(BUDGET, WINDOW, scope="layer", candidates=1000).replace(page_size=8),
    "pyramidkv": rk.pyramidkv(BUDGET, WINDOW).replace(page_size=8),
    "adakv": rk.adakv(BUDGET, WINDOW).replace(page_size=8),
    "restkv-model": rk.restkv(BUDGET, WINDOW, allocation="model").replace(page_size=16),
}


@functools.cache
def tiny_model(sliding_window=None):
    config = CONFIG | ({"model_type": "mistral", "sliding_window": sliding_window} if sliding_window else {})
    model = rk.build_model(config)
    return model, rk.init_params(model, jax.random.key(0), dtype=jnp.float32)


def prompts(*lengths):
    rng, longest = np.random.default_rng(3), max(lengths)
    tokens = rng.integers(3, 97, (len(lengths), longest))
    mask = np.arange(longest) >= longest - np.array(lengths)[:, None]
    return np.where(mask, tokens, 0), mask


def full_prefix(scores):
    return jnp.full(scores.shape[:3], scores.shape[3])


def layer_scores(model, params, tokens, mask, policy):
    """Unnormalised scores of all layers, [L, B, K, T - w]."""

    def observe(view, memory, scores):
        pairs = memory.pairs
        return scores.at[view.index].set(prefix_scores(policy, view, pairs, score(policy, view, pairs)))

    empty = jnp.zeros((LAYERS, len(tokens), KV_HEADS, tokens.shape[1] - policy.window))
    hooks = Hooks(observe=observe, num_queries=policy.window)
    return read(model, params, jnp.asarray(tokens), jnp.asarray(mask), hooks, empty)[1]


def kept_sets(cache):
    """Kept prompt positions, [l][b][k] to a sorted list."""
    kept = np.asarray(rk.kept_positions(cache))
    return {index: kept[index][kept[index] >= 0].tolist() for index in np.ndindex(kept.shape[:3])}


@pytest.mark.slow
@given(seed=st.integers(0, 999), sizes=st.sampled_from([(1, 1, 8), (1, 4, 21), (4, 1, 30), (3, 2, 13)]))
@settings(max_examples=30, deadline=None)
def test_model_wide_selection_keeps_the_best_of_the_whole_model(seed, sizes):
    layers, heads, budget = sizes
    scores = np.random.default_rng(seed).random((layers, 2, heads, 40)).astype(np.float32)
    policy = rk.laprox(16, window=4).replace(page_size=8, budget=budget)
    keep = np.asarray(keep_shares(policy, scores, full_prefix(scores), jnp.arange(layers), layers))
    count = min(layers * heads * (budget - 4), layers * heads * 40)
    for row in range(2):
        best = np.sort(scores[:, row].ravel())[-count:]
        np.testing.assert_array_equal(np.sort(scores[:, row][keep[:, row]]), best)


@pytest.mark.slow
def test_model_wide_budget_through_prefill_against_brute_force():
    model, params = tiny_model()
    tokens, mask = prompts(80, 80)
    policy = POLICIES["laprox"]
    plain = np.asarray(layer_scores(model, params, tokens, mask, rk.laprox(BUDGET, WINDOW, scope="layer")))
    normalised = plain / plain.sum((2, 3), keepdims=True)
    cache = rk.prefill(model, params, tokens, mask, policy, NEW)[1]
    kept, prefix = kept_sets(cache), 80 - WINDOW
    quota = LAYERS * KV_HEADS * (BUDGET - WINDOW)
    for row in range(2):
        threshold = np.sort(normalised[:, row].ravel())[-quota]
        total = 0
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                expected = np.flatnonzero(normalised[layer, row, head] >= threshold)
                ours = kept[layer, row, head]
                assert ours == [*expected, *range(prefix, 80)]
                total += len(ours)
        assert total == quota + LAYERS * KV_HEADS * WINDOW
    assert len(set(map(len, kept.values()))) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_rows_equal_what_they_give_alone(name):
    model, params = tiny_model()
    tokens, mask = prompts(90, 20)
    policy = POLICIES[name].replace(candidates=None)
    together = rk.generate(model, params, tokens, mask, policy, NEW, eos_token_ids=())
    kept = kept_sets(together.cache)
    for row in range(2):
        real = tokens[row : row + 1, mask[row]]
        alone = rk.generate(model, params, real, None, policy, NEW, eos_token_ids=())
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        ours = {index: places for index, places in kept.items() if index[1] == row}
        assert {(layer, row, head): places for (layer, _, head), places in kept_sets(alone.cache).items()} == ours


def as_dense(cache):
    """The same pairs in a `KVCache` as wide as the longest head."""
    table = np.minimum(np.asarray(cache.page_table), cache.num_pages - 1)
    shape = (*cache.lengths.shape, -1)
    pool_keys, pool_values, pool_positions = (np.asarray(x)[0, 0] for x in (cache.keys, cache.values, cache.positions))
    used = np.arange(table.shape[-1] * cache.page_size) < np.asarray(cache.lengths)[..., None]
    keys, values = (x[table].reshape(*shape, x.shape[-1]) for x in (pool_keys, pool_values))
    positions = np.where(used, pool_positions[table].reshape(shape), -1)
    same = {name: jnp.array(getattr(cache, name)) for name in ("lengths", "prompt_lengths", "next_positions")}
    return KVCache(keys=jnp.asarray(keys), values=jnp.asarray(values), positions=jnp.asarray(positions), **same)


@pytest.mark.slow
@pytest.mark.parametrize("sliding_window", [None, 40])
@pytest.mark.parametrize("name", ["laprox", "adakv"])
def test_decoding_on_pages_equals_decoding_on_the_same_pairs_in_a_dense_cache(name, sliding_window):
    model, params = tiny_model(sliding_window)
    tokens, mask = prompts(90, 60)
    logits, cache = rk.prefill(model, params, tokens, mask, POLICIES[name], NEW)
    dense = as_dense(cache)
    for _ in range(NEW):
        token = jnp.argmax(logits, axis=-1)
        logits, cache = rk.decode_step(model, params, token, cache, POLICIES[name])
        expected, dense = rk.decode_step(model, params, token, dense, rk.full())
        np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_memory_follows_the_total(name):
    """The pool has room for the budgets, one partial page per layer, row and head, and the new tokens, no more."""
    model, params = tiny_model()
    tokens, mask = prompts(100, 100)
    policy = POLICIES[name]
    cache = rk.prefill(model, params, tokens, mask, policy, NEW)[1]
    heads = cache.lengths.size
    slack = 1.02 if name == "pyramidkv" else 1
    assert cache.positions.size <= heads * (slack * BUDGET + NEW + policy.page_size)
    assert int(cache.lengths.sum()) <= slack * heads * BUDGET
    pages = np.asarray(cache.page_table)
    given_out = pages[pages < cache.num_pages]
    assert len(set(given_out)) == len(given_out)


@pytest.mark.slow
def test_append_keeps_what_was_there_and_refuses_when_full():
    model, params = tiny_model()
    tokens, mask = prompts(90, 90)
    policy = POLICIES["laprox"]
    logits, cache = rk.prefill(model, params, tokens, mask, policy, max_new_tokens=1)
    before = kept_sets(cache)
    with pytest.raises(ValueError, match="the cache is full"):
        for _ in range(policy.page_size + 1):
            logits, cache = rk.decode_step(model, params, jnp.argmax(logits, -1), cache, policy)
    assert kept_sets(cache) == before


def test_few_candidates_bound_what_a_head_can_get():
    model, params = tiny_model()
    tokens, mask = prompts(100)
    few = POLICIES["laprox"].replace(candidates=BUDGET)
    cache = rk.prefill(model, params, tokens, mask, few, NEW)[1]
    assert int(cache.lengths.max()) <= BUDGET + WINDOW
    assert int(cache.lengths.sum()) == LAYERS * KV_HEADS * BUDGET


@given(
    seed=st.integers(0, 9999),
    allocation=st.sampled_from([Pyramid(), Pyramid(even_if_short=True), AdaptiveHeads(0.2), ModelWide()]),
    spread=st.sampled_from([0.1, 5.0]),
    prefix=st.sampled_from([5, 23, 60]),
)
@settings(max_examples=60, deadline=None)
def test_a_head_never_wins_more_than_it_carries(seed, allocation, spread, prefix):
    """Not even where one head has all of the best keys, and others have fewer keys than their share."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, prefix + 1, (LAYERS, 1, 3))
    scores = rng.random((LAYERS, 1, 3, prefix)) * np.exp(spread * rng.normal(size=(LAYERS, 1, 3, 1)))
    scores = np.where(np.arange(prefix) < lengths[..., None], scores, -np.inf).astype(np.float32)
    shares = allocation.counts(scores, lengths, 20, 8, jnp.arange(LAYERS), LAYERS)
    assert int(shares.max()) <= allocation.most_per_head(20, 8, LAYERS, 3)


def test_no_more_candidates_are_carried_than_a_head_can_win():
    assert rk.pyramidkv(128, 32).num_candidates(4096, 32, 8) == 2 * 96 - 96 // 20
    assert rk.adakv(128, 32).num_candidates(4096, 32, 3) == 3 * 96
    assert rk.adakv(128, 32).num_candidates(4096, 32, 8) == 4 * 128
    assert rk.laprox(128, 32).num_candidates(4096, 32, 8) == 4 * 128
    assert rk.laprox(128, 32, candidates=200).num_candidates(100, 32, 8) == 100 - 32


@pytest.mark.slow
def test_prompts_within_the_budget_are_kept_whole():
    model, params = tiny_model()
    tokens, mask = prompts(100, BUDGET, 3)
    for policy in POLICIES.values():
        cache = rk.prefill(model, params, tokens, mask, policy, NEW)[1]
        np.testing.assert_array_equal(cache.lengths[:, 1:], np.broadcast_to([[BUDGET], [3]], (LAYERS, 2, KV_HEADS)))


@pytest.mark.slow
def test_generation_under_the_callers_jit_and_streamed():
    model, params = tiny_model()
    tokens, mask = prompts(90, 60)
    policy = POLICIES["laprox"]
    plain = rk.generate(model, params, tokens, mask, policy, NEW, eos_token_ids=())
    jitted = jax.jit(rk.generate, static_argnames=("model", "policy", "max_new_tokens", "eos_token_ids"))
    compiled = jitted(model, params, tokens, mask, policy=policy, max_new_tokens=NEW, eos_token_ids=())
    streamed = np.stack(list(rk.stream(model, params, tokens, mask, policy, NEW, eos_token_ids=())), axis=1)
    np.testing.assert_array_equal(compiled.tokens, plain.tokens)
    np.testing.assert_array_equal(streamed, plain.tokens)


@pytest.mark.slow
def test_prefill_needs_less_memory_than_the_full_cache():
    model, params = tiny_model()
    tokens = jnp.zeros((1, 8192), jnp.int32)

    def peak(policy):
        lowered = jax.jit(rk.prefill, static_argnums=(0, 4, 5)).lower(model, params, tokens, None, policy, NEW)
        memory = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    full_cache = 2 * LAYERS * KV_HEADS * 8192 * 8 * 4
    snapkv = rk.snapkv(64, WINDOW)
    assert peak(snapkv.replace(allocation=ModelWide())) - peak(snapkv) < full_cache / 8


def pyramid_shares(policy, prefix, num_layers):
    lengths = jnp.full((num_layers, 1, 1), prefix)
    given = jnp.zeros((num_layers, 1, 1, 1)), lengths, policy.budget, policy.window, jnp.arange(num_layers), num_layers
    return np.asarray(policy.allocation.counts(*given))[:, 0, 0]


def authors_pyramid(prefix, mean, layer, num_layers):
    """The line that the authors' code draws, from the layer's number."""
    least = mean // 20
    most = 2 * mean - least
    if most >= prefix:
        most, least = prefix, 2 * mean - prefix
    return most - layer * ((most - least) // (num_layers - 1))


@pytest.mark.parametrize("prefix", [10, 32, 33, 40, 56, 60, 62, 63, 64, 200])
@pytest.mark.parametrize("num_layers", [2, 8, 30])
@pytest.mark.parametrize("make", [rk.pyramidkv, lambda b, w: rk.restkv(b, w, allocation="pyramid")])
def test_a_pyramid_falls_linearly_and_keeps_the_mean(make, num_layers, prefix):
    policy, mean = make(40, 8), 32
    shares = pyramid_shares(policy, prefix, num_layers)
    if prefix <= mean:
        np.testing.assert_array_equal(shares, prefix)
    elif make is rk.pyramidkv and prefix + 8 < 2 * mean:
        np.testing.assert_array_equal(shares, mean)
    else:
        np.testing.assert_array_equal(
            shares[:2], [authors_pyramid(prefix, mean, layer, num_layers) for layer in (0, 1)]
        )
        assert (np.diff(shares) <= 0).all() and np.ptp(np.diff(shares)) <= 1
        assert shares[-1] == 2 * mean - shares[0]
        assert mean <= shares.mean() < mean + 0.5
        assert shares.sum() <= policy.allocation.most(40, 8, num_layers, 1)


def test_a_pyramid_over_heads_that_hold_less_than_others():
    """As after an earlier eviction: no head is given more than it has, and the sum stays within the budget's."""
    lengths = jnp.array([[[60, 20]], [[30, 64]], [[8, 3]]])
    given = jnp.zeros((3, 1, 2, 1)), lengths, 40, 8, jnp.arange(3), 3
    np.testing.assert_array_equal(Pyramid().counts(*given)[:, 0], [[60, 20], [30, 32], [1, 1]])


def test_adaptive_heads_follow_their_scores():
    scores = np.stack([np.linspace(1, 2, 50), np.linspace(0, 1, 50)])[None, None].astype(np.float32)

    def shares(floor, num_layers=1):
        given = scores, full_prefix(scores), 18, 8, jnp.arange(1), num_layers
        return AdaptiveHeads(floor).counts(*given)[0, 0].tolist()

    assert shares(0.0) == [20, 0]
    assert shares(0.2) == [18, 2]
    assert shares(1.0) == [10, 10]
    assert shares(0.25) == [18, 2], "the place that rounding loses goes to the best other key"
    assert shares(0.25, num_layers=2) == [17, 2], "one layer of two is as the authors have it"


@pytest.mark.slow
@given(
    seed=st.integers(0, 9999),
    floor=st.sampled_from([0.0, 0.2, 0.77, 1.0]),
    heads=st.sampled_from([1, 2, 5]),
    mean=st.integers(1, 30),
)
@settings(max_examples=60, deadline=None)
def test_adaptive_heads_keep_the_whole_budget(seed, floor, heads, mean):
    """Also where heads hold different numbers of keys, as after an earlier eviction."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 41, (2, 1, heads))
    scores = np.where(np.arange(40) < lengths[..., None], rng.random((2, 1, heads, 40)), -np.inf).astype(np.float32)
    given = jnp.asarray(scores), jnp.asarray(lengths), mean + 4, 4, jnp.arange(2), 2
    counts = np.asarray(AdaptiveHeads(floor).counts(*given))
    assert (counts <= lengths).all()
    np.testing.assert_array_equal(counts.sum((1, 2)), np.minimum(heads * mean, lengths.sum((1, 2))))
    plain = np.asarray(AdaptiveHeads(floor).counts(*given[:5], 3))
    assert np.abs(counts - plain).sum() == abs(counts.sum((1, 2)) - plain.sum((1, 2))).sum(), (
        "only added, or only left out"
    )


@pytest.mark.parametrize("window", [20, 32])
@pytest.mark.slow
def test_adakv_keeps_a_prompt_that_fits_and_the_whole_budget_beside_it(window):
    model, params = tiny_model()
    tokens, mask = prompts(150, 64, 63)
    policy = rk.adakv(64, window)
    lengths = np.asarray(rk.prefill(model, params, tokens, mask, policy, NEW)[1].lengths)
    np.testing.assert_array_equal(lengths[:, 0].sum(-1), KV_HEADS * 64)
    np.testing.assert_array_equal(lengths[:, 1], 64)
    np.testing.assert_array_equal(lengths[:, 2], 63)
    keys = np.random.default_rng(0).standard_normal((1, KV_HEADS, 64, 8)).astype(np.float32)
    layer = rk.evict_layer(policy, keys, keys, keys, np.ones((KV_HEADS, 8, 4), np.float32), num_layers=3)
    np.testing.assert_array_equal(layer.lengths, 64)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: rk.laprox(128, candidates=100), "candidates=100 must be at least budget=128"),
        (lambda: rk.laprox(128).replace(page_size=12), "page_size=12"),
        (lambda: rk.restkv(128, allocation="model", while_generating=True), "exclude each other"),
        (lambda: rk.streaming_llm(128).replace(allocation=ModelWide()), "choose another allocation or scorer"),
        (lambda: rk.restkv(128, allocation="heads"), "allocation='heads' is unknown"),
        (lambda: rk.laprox(128, scope="head"), "scope='head' is unknown"),
        (lambda: AdaptiveHeads(1.5), "floor=1.5"),
        (lambda: rk.full().replace(allocation=ModelWide()), "needs a budget"),
    ],
)
def test_bad_policies_are_refused_at_once(make, match):
    with pytest.raises(ValueError, match=match):
        make()
