"""KeyDiff, Expected Attention and Compactor: with other families, in batches, in tiles, with all kinds of caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import restkv_jax as rk
from restkv_jax.eviction.methods import expected_attention
from restkv_jax.eviction.methods.compactor import LeverageAndAttention, leverages
from restkv_jax.eviction.methods.expected_attention import query_moments
from restkv_jax.kernels import scores
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.models.config import UNLIMITED
from restkv_jax.models.decoder import Hooks, LayerView, read
from restkv_jax.models.rope import Rope
from restkv_jax.pod import LayerGroups, Sharing

BUDGET, NEW = 24, 4
BASE = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "initializer_range": 0.3, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
MODELS = {
    "llama": BASE,
    "layers without RoPE and windows": BASE
    | {
        "model_type": "smollm3", "pad_token_id": 0, "no_rope_layers": [1, 0, 1, 0],
        "use_sliding_window": True, "sliding_window": 40,
    },
    "rotations and windows that differ, norms": BASE
    | {
        "model_type": "gemma3_text", "query_pre_attn_scalar": 20, "sliding_window": 30, "sliding_window_pattern": 3,
        "rope_local_base_freq": 100.0,
    },
    "half of the head turns": BASE | {"model_type": "phi3", "pad_token_id": 0, "partial_rotary_factor": 0.5},
}  # fmt: skip
POLICIES = {
    "keydiff": rk.keydiff(BUDGET),
    "expected_attention": rk.expected_attention(BUDGET, future=64),
    "compactor": rk.compactor(BUDGET, chunk_size=16),
}


@functools.cache
def tiny(name):
    model = rk.build_model(MODELS[name])
    return model, rk.init_params(model, jax.random.key(0), dtype=jnp.float32)


def prompts(*lengths):
    rng, longest = np.random.default_rng(3), max(lengths)
    mask = np.arange(longest) >= longest - np.array(lengths)[:, None]
    return np.where(mask, rng.integers(3, 97, mask.shape), 0), mask


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("layers without RoPE and windows", marks=pytest.mark.slow),
        "rotations and windows that differ, norms",
        pytest.param("half of the head turns", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.slow
def test_rows_equal_what_they_give_alone(name, family):
    model, params = tiny(family)
    tokens, mask = prompts(78, 50)
    logits, cache = rk.prefill(model, params, tokens, mask, POLICIES[name], NEW)
    alone, own_cache = rk.prefill(model, params, tokens[1:, mask[1]], None, POLICIES[name], NEW)
    np.testing.assert_allclose(logits[1], alone[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(rk.kept_positions(cache)[:, 1], rk.kept_positions(own_cache)[:, 0])


@pytest.mark.parametrize("family", MODELS)
def test_the_view_shows_how_queries_were_turned(family):
    """The same texts at other positions have the same keys and queries once these are turned back."""
    model, params = tiny(family)
    tokens, _ = prompts(12)

    def moments(shift):
        def observe(view, memory, state):
            means, _ = query_moments(view.queries, view.rope, sinks=0)
            return state.at[view.index].set(means)

        positions = jnp.arange(12)[None] + shift
        empty, hooks = jnp.zeros((4, 1, 2, 2, 8)), Hooks(observe=observe, num_queries=12)
        return jax.jit(lambda p: read(model, p, jnp.asarray(tokens), None, hooks, empty, positions=positions)[1])(
            params
        )

    np.testing.assert_allclose(moments(100), moments(0), atol=2e-4)


def layer_of(length, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    positions = jnp.asarray(np.where(np.arange(length) < 5, -1, np.arange(length) - 5))[None]
    queries = Queries(jnp.asarray(rng.standard_normal((1, 2, 2, length, dim)), jnp.float32), positions, UNLIMITED)
    pairs = Pairs(*jnp.asarray(rng.standard_normal((2, 1, 2, length, dim)), jnp.float32), positions[:, None])
    rope = Rope(jnp.asarray([0.7 ** np.arange(dim // 2)], jnp.float32), 1.0)
    return LayerView(0, queries, jnp.zeros((2, 2, dim, 4)), rope=rope), pairs


@pytest.mark.parametrize("name", POLICIES)
def test_tiles_change_nothing(name, monkeypatch):
    view, pairs = layer_of(133)
    scorer = POLICIES[name].scorer
    whole = scorer(view, pairs, 4)[..., 5:]
    monkeypatch.setattr(scores.tiles, "LEAST_TILE", 10)
    monkeypatch.setattr(scores.tiles, "ELEMENTS_AT_ONCE", 1)
    monkeypatch.setattr(expected_attention, "QUERIES_AT_ONCE", 10)
    np.testing.assert_allclose(scorer(view, pairs, 4)[..., 5:], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_temporaries_do_not_grow_with_the_prompt(name):
    """But for some numbers per query head and token: copies of the keys would be 64 per KV head."""

    def temporaries(length):
        shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
        queries = Queries(shape(1, 2, 2, length, 64), shape(1, length, dtype=jnp.int32), UNLIMITED)
        pairs = Pairs(*(shape(1, 2, length, 64) for _ in range(2)), shape(1, 1, length, dtype=jnp.int32))
        view = LayerView(0, queries, None, rope=Rope(shape(1, 32), 1.0))
        policy = rk.METHODS[name]()
        compiled = jax.jit(lambda view, pairs: policy.scorer(view, pairs, policy.window)).lower(view, pairs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(131072) - temporaries(65536) < 65536 * 2 * 4 * 16


def test_as_many_sketched_dimensions_as_there_are_need_no_luck():
    view, pairs = layer_of(60)
    counted = jnp.broadcast_to(pairs.positions >= 8, (1, 2, 60))[..., :56]
    exact = leverages(view, pairs, counted, jnp.eye(8))
    x = np.asarray(pairs.keys, np.float64)
    for seed in range(3):
        sketched = leverages(view, pairs, counted, LeverageAndAttention(sketch_dimension=32, seed=seed).sketch(8))
        np.testing.assert_allclose(sketched[counted], exact[counted], rtol=5e-3)
    np.testing.assert_allclose(exact[counted].reshape(2, -1).sum(1), np.full(2, x.shape[-1]), rtol=1e-2)


def test_a_sketch_estimates_the_leverage():
    """Of 64 dimensions 48 are drawn, as by default: the outliers are found all the same."""
    view, pairs = layer_of(600, dim=64)
    outliers = np.array([100, 222, 431])
    pairs = pairs._replace(keys=pairs.keys.at[:, :, outliers].multiply(3))
    counted = jnp.broadcast_to(pairs.positions >= 8, (1, 2, 600))[..., :596]
    exact = np.asarray(leverages(view, pairs, counted, jnp.eye(64)))[0, :, 20:]
    for seed in range(4):
        sketched = np.asarray(leverages(view, pairs, counted, LeverageAndAttention(seed=seed).sketch(64)))[0, :, 20:]
        for head in range(2):
            assert set(np.argsort(sketched[head])[-3:]) == set(outliers - 20)
            assert np.corrcoef(sketched[head], exact[head])[0, 1] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [
        rk.expected_attention(BUDGET, future=64).replace(allocation=rk.AdaptiveHeads(), page_size=8),
        rk.expected_attention(BUDGET, future=64).replace(allocation=rk.ModelWide(), page_size=8),
        rk.compactor(BUDGET, chunk_size=16).replace(allocation=rk.AdaptiveHeads(normalize=False), page_size=8),
        rk.keydiff(BUDGET).replace(allocation=rk.AdaptiveHeads(normalize=False), page_size=8),
        rk.compactor(BUDGET, chunk_size=16).replace(allocation=rk.Pyramid(), page_size=8),
    ],
    ids=lambda policy: f"{type(policy.scorer).__name__}-{type(policy.allocation).__name__}",
)
def test_shares_that_differ(policy):
    model, params = tiny("llama")
    tokens, mask = prompts(78, 50)
    logits, cache = rk.prefill(model, params, tokens, mask, policy, NEW)
    total = 4 * 2 * BUDGET
    pyramid = isinstance(policy.allocation, rk.Pyramid)
    assert total <= np.asarray(cache.lengths)[:, 0].sum() <= total + 4 * pyramid
    alone, own_cache = rk.prefill(model, params, tokens[1:, mask[1]], None, policy, NEW)
    np.testing.assert_allclose(logits[1], alone[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(cache.lengths[:, 1], own_cache.lengths[:, 0])


@pytest.mark.parametrize("name", ["keydiff", "compactor"])
def test_allocations_that_divide_by_sums_refuse_scores_of_any_sign(name):
    with pytest.raises(ValueError, match="choose another allocation or scorer"):
        POLICIES[name].replace(allocation=rk.ModelWide())


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_distant_tokens_of_shared_keys_are_thinned(name):
    model, params = tiny("llama")
    sharing = Sharing(LayerGroups([[0, 0], [0, 1], [2, 1], [2, 1]]), sink=3, recent=16)
    tokens, mask = prompts(78, 60)
    _, cache = rk.prefill(model, params, tokens, mask, POLICIES[name], NEW, sharing=sharing)
    _, alone = rk.prefill(model, params, tokens[1:, mask[1]], None, POLICIES[name], NEW, sharing=sharing)
    kept = np.asarray(rk.kept_positions(cache))
    np.testing.assert_array_equal(kept[:, 1], np.asarray(rk.kept_positions(alone))[:, 0])
    assert ((kept >= 0).sum(-1) == 3 + 16 + BUDGET).all()


@pytest.mark.parametrize("name", ["expected_attention", "compactor"])
def test_scorers_of_all_queries_say_so(name):
    keys = np.ones((1, 2, 50, 8), np.float32)
    with pytest.raises(ValueError, match="looks at all queries, needs 50 of a prompt of 50 tokens"):
        rk.evict_layer(POLICIES[name], keys[:, :, -10:], keys, keys, np.ones((2, 8, 4), np.float32))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rk.expected_attention(future=0), "future=0 must be at least 1"),
        (lambda: rk.expected_attention(sinks=-1), "sinks=-1"),
        (lambda: rk.expected_attention(epsilon=-0.5), "epsilon=-0.5 must not be negative"),
        (lambda: rk.expected_attention(use_covariance="no"), "use_covariance='no'"),
        (lambda: rk.compactor(chunk_size=0), "chunk_size=0"),
        (lambda: rk.compactor(sketch_dimension=0), "sketch_dimension=0"),
        (lambda: rk.compactor(blending=float("nan")), "blending=nan must be finite"),
    ],
)
def test_options_that_make_no_sense_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
