"""Prefill, decoding and generation on small random models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import restkv_jax as rk
from restkv_jax.caches.evicting import UNSEEN, update_importance
from restkv_jax.generation.decoding import feed
from restkv_jax.generation.passes import Plan, read_prompt
from restkv_jax.generation.sampling import sample
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.models.decoder import logits, read
from restkv_jax.models.layer import rms_norm

CONFIG = dict(
    model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    initializer_range=0.3, eos_token_id=None, bos_token_id=None,
)  # fmt: skip
BUDGET, NEW = 40, 6
SIZED = {name: preset(budget=BUDGET) for name, preset in rk.METHODS.items() if name != "full"}
POLICIES = {"full": rk.full(), **SIZED, "generating": rk.restkv(BUDGET, while_generating=True)}


@functools.cache
def tiny(num_hidden_layers=3, num_attention_heads=4):
    changes = dict(num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads)
    model = rk.build_model(CONFIG | changes)
    return model, rk.init_params(model, jax.random.key(0))


@functools.cache
def prompts(lengths=(100, 50, 20), seed=0):
    tokens = np.random.default_rng(seed).integers(0, CONFIG["vocab_size"], (len(lengths), max(lengths)))
    mask = np.arange(max(lengths)) >= max(lengths) - np.array(lengths)[:, None]
    return np.where(mask, tokens, 7), mask


@pytest.mark.parametrize("name", ["full", "restkv", "h2o", "streaming_llm", "generating"])
@pytest.mark.slow
def test_rows_of_a_batch_give_what_they_give_alone(name):
    model, params = tiny()
    tokens, mask = prompts()
    together = rk.generate(model, params, tokens, mask, POLICIES[name], NEW)
    kept = np.asarray(rk.kept_positions(together.cache))
    for row, real in enumerate(mask[1:], start=1):
        alone = rk.generate(model, params, tokens[row : row + 1, real], None, POLICIES[name], NEW)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        alone_kept = np.asarray(rk.kept_positions(alone.cache))[:, 0]
        slots = min(kept.shape[-1], alone_kept.shape[-1])
        np.testing.assert_array_equal(alone_kept[..., :slots], kept[:, row, :, :slots])
        assert (kept[:, row, :, slots:] == -1).all()
        if name == "generating":
            np.testing.assert_allclose(
                alone.cache.importance[:, 0], together.cache.importance[:, row], rtol=1e-3, atol=1e-5
            )


def test_decoding_on_the_full_cache_equals_plain_causal_attention():
    model, params = tiny()
    tokens, mask = prompts()
    out = rk.generate(model, params, tokens, mask, max_new_tokens=NEW)
    whole = np.concatenate([tokens, out.tokens], axis=1)
    whole_mask = np.concatenate([mask, np.ones_like(out.tokens, bool)], axis=1)
    scores = logits(model, params, read(model, params, whole, whole_mask)[0])
    np.testing.assert_array_equal(scores[:, -NEW - 1 : -1].argmax(-1), out.tokens)


def test_a_budget_as_long_as_the_prompt_is_the_full_cache_exactly():
    model, params = tiny()
    tokens, mask = prompts()
    reference, full_cache = rk.prefill(model, params, tokens, mask)
    for name in ("restkv", "streaming_llm"):
        scores, cache = rk.prefill(model, params, tokens, mask, rk.METHODS[name](budget=tokens.shape[1] + 50))
        np.testing.assert_array_equal(scores, reference)
        jax.tree.map(np.testing.assert_array_equal, cache, full_cache)


@pytest.mark.parametrize("more", [0, 1])
def test_a_budget_that_just_holds_the_prompt_keeps_all_of_it(more):
    model, params = tiny()
    tokens, mask = prompts()
    policy = rk.snapkv(budget=tokens.shape[1] + more)
    assert policy.budget < rk.bucket_length(tokens.shape[1]), "or nothing would be selected"
    reference, full_cache = rk.prefill(model, params, tokens, mask)
    scores, cache = rk.prefill(model, params, tokens, mask, policy)
    np.testing.assert_array_equal(scores, reference)
    held = policy.budget
    for name in ("keys", "values", "positions"):
        np.testing.assert_array_equal(getattr(cache, name)[:, :, :, :held], getattr(full_cache, name)[:, :, :, :held])
    np.testing.assert_array_equal(cache.lengths, full_cache.lengths)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [rk.restkv(24, window=8), rk.restkv(24, window=8, while_generating=True)])
def test_rows_with_a_sliding_window_give_what_they_give_alone(policy):
    model = rk.build_model(CONFIG | {"model_type": "mistral", "sliding_window": 40})
    _, params = tiny()
    tokens, mask = prompts()
    together = rk.generate(model, params, tokens, mask, policy, 10)
    for row in (1, 2):
        alone = rk.generate(model, params, tokens[row : row + 1, mask[row]], None, policy, 10)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_array_equal(alone.cache.positions[:, 0], together.cache.positions[:, row])


@pytest.mark.slow
def test_chunked_prefill_is_the_same_to_rounding():
    model, params = tiny()
    tokens, mask = prompts()
    policy = rk.restkv(BUDGET)
    scores, cache = rk.prefill(model, params, tokens, mask, policy)
    chunked_scores, chunked = rk.prefill(model, params, tokens, mask, policy, chunk_size=16)
    np.testing.assert_allclose(chunked_scores, scores, atol=1e-4)
    np.testing.assert_array_equal(rk.kept_positions(chunked), rk.kept_positions(cache))
    np.testing.assert_allclose(chunked.values, cache.values, atol=1e-4)


def test_eviction_matters_and_keeps_what_evict_layer_says():
    model, params = tiny(num_hidden_layers=1)
    tokens, _ = prompts((100,))
    policy = rk.snapkv(BUDGET, window=8)
    _, cache = rk.prefill(model, params, tokens, None, policy)
    _, full_cache = rk.prefill(model, params, tokens)
    positions = np.asarray(rk.kept_positions(cache))[0, 0, :, :BUDGET]
    assert positions[0, 0] > 0 or (np.diff(positions) > 1).any()
    layer_keys = np.asarray(full_cache.keys)[0, 0, :, :100]
    np.testing.assert_array_equal(cache.keys[0, 0, :, :BUDGET], layer_keys[np.arange(2)[:, None], positions])


@pytest.mark.slow
def test_gradients_are_finite_with_padding_and_lengths_that_no_block_divides():
    model, params = tiny(num_hidden_layers=1)
    tokens = np.arange(1021)[None] % 61
    mask = np.arange(1021)[None] >= 300

    def normed(params, tokens, mask=None):
        hidden, _ = read(model, params, tokens, mask)
        return rms_norm(hidden, params["final_norm"], model.config.rms_norm_eps)

    padded, alone = jax.jit(normed)(params, tokens, mask), normed(params, tokens[:, 300:])
    np.testing.assert_allclose(padded[:, 300:], alone, atol=1e-4)
    gradient = jax.jit(jax.grad(lambda p: normed(p, tokens, mask).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_stream_yields_the_tokens_of_generate():
    model, params = tiny()
    tokens, mask = prompts()
    for policy in (rk.restkv(BUDGET), POLICIES["generating"]):
        out = rk.generate(model, params, tokens, mask, policy, NEW)
        streamed = np.stack(list(rk.stream(model, params, tokens, mask, policy, NEW)), axis=1)
        np.testing.assert_array_equal(streamed, out.tokens)


def test_prefill_and_decode_step_give_the_tokens_of_generate():
    model, params = tiny()
    tokens, mask = prompts()
    policy = rk.restkv(BUDGET)
    scores, cache = rk.prefill(model, params, tokens, mask, policy, max_new_tokens=NEW)
    chosen = [scores.argmax(-1)]
    for _ in range(NEW - 1):
        scores, cache = rk.decode_step(model, params, chosen[-1], cache, policy)
        chosen.append(scores.argmax(-1))
    np.testing.assert_array_equal(np.stack(chosen, 1), rk.generate(model, params, tokens, mask, policy, NEW).tokens)


def test_generate_works_under_the_callers_jit_and_compiles_once_per_bucket():
    model, params = tiny()
    policy = rk.restkv(BUDGET)
    # A function of its own: jit keeps one cache for all wrappers of rk.generate.
    fresh = functools.wraps(rk.generate)(lambda *args, **kwargs: rk.generate(*args, **kwargs))
    jitted = jax.jit(fresh, static_argnames=("model", "policy", "max_new_tokens"))
    tokens, mask = prompts()
    inside = jitted(model, params, tokens, mask, policy=policy, max_new_tokens=NEW)
    outside = rk.generate(model, params, tokens, mask, policy=policy, max_new_tokens=NEW)
    np.testing.assert_array_equal(inside.tokens, outside.tokens)
    jitted(model, params, tokens + 1, mask, policy=policy, max_new_tokens=NEW)
    assert jitted._cache_size() == 1


def test_lengths_of_one_bucket_share_a_program():
    model, params = tiny()
    programs = set()
    for length in (97, 100, 112, 113):
        rk.prefill(model, params, np.full((1, length), 5), policy=rk.snapkv(BUDGET), max_new_tokens=3)
        programs.add(read_prompt._cache_size())
    assert len(programs) == 2


@pytest.mark.slow
def test_rows_end_at_any_end_of_sequence_token_and_are_padded():
    model, params = tiny()
    tokens, mask = prompts()
    free = np.asarray(rk.generate(model, params, tokens, mask, max_new_tokens=12).tokens)
    eos = (int(free[0, 3]), int(free[1, 5]))
    ended_model = rk.build_model(CONFIG | {"eos_token_id": list(eos), "pad_token_id": 60})
    out = rk.generate(ended_model, params, tokens, mask, max_new_tokens=12)
    streamed = np.stack(list(rk.stream(ended_model, params, tokens, mask, max_new_tokens=12)), axis=1)
    np.testing.assert_array_equal(streamed, np.asarray(out.tokens)[:, : streamed.shape[1]])
    for row, length in zip(range(len(free)), out.lengths, strict=True):
        first = next((i + 1 for i, token in enumerate(free[row]) if token in eos), 12)
        assert length == first
        np.testing.assert_array_equal(out.tokens[row, :first], free[row, :first])
        assert (out.tokens[row, first:] == 60).all()
    # The last token of each row was never fed back.
    np.testing.assert_array_equal(out.cache.next_positions, mask.sum(1) + out.lengths - 1)


def test_while_generating_holds_the_budget_and_keeps_the_recent_window():
    model, params = tiny()
    tokens, mask = prompts((100, 30))
    policy = rk.restkv(BUDGET, window=8, while_generating=True)
    out = rk.generate(model, params, tokens, mask, policy, max_new_tokens=70)
    assert out.cache.num_slots == BUDGET
    np.testing.assert_array_equal(out.cache.lengths, BUDGET)
    positions = np.sort(out.cache.positions, axis=-1)
    assert (np.diff(positions, axis=-1) > 0).all()
    for row, last in enumerate(mask.sum(1) + 70 - 2):
        recent = np.arange(last - 8 + 1, last + 1)
        np.testing.assert_array_equal(positions[:, row, :, -8:], np.broadcast_to(recent, (3, 2, 8)))
    assert np.isfinite(out.cache.importance).all()
    assert (np.asarray(out.cache.importance) >= 0).all()


@pytest.mark.parametrize(("sinks", "kept"), [(2, 2), (6, 4), (30, 4)])
@pytest.mark.parametrize("cache_dtype", [None, "int8(group_size=4, residual=4)"])
def test_while_generating_keeps_the_window_and_the_sinks_that_it_leaves_room_for(sinks, kept, cache_dtype):
    model, params = tiny()
    policy = rk.restkv(8, window=4, while_generating=True).replace(sinks=sinks)
    out = rk.generate(model, params, *prompts((6,)), policy, max_new_tokens=14, cache_dtype=cache_dtype)
    positions = np.sort(out.cache.slot_positions(), axis=-1)
    last = 6 + 14 - 2
    expected = [*range(kept), *range(last - 3, last + 1)]
    assert all(set(expected) <= set(head) for head in positions.reshape(-1, 8).tolist())


def test_while_generating_in_fewer_slots_than_the_window_keeps_the_most_recent():
    model, params = tiny()
    policy = rk.restkv(200, window=100, while_generating=True)
    _, cache = rk.prefill(model, params, *prompts((6,)), policy, max_new_tokens=4)
    assert cache.num_slots < 100
    for _ in range(cache.num_slots + 5):
        _, cache = rk.decode_step(model, params, np.array([1]), cache)
    last = int(cache.next_positions[0])
    recent = np.arange(last - cache.num_slots, last)
    np.testing.assert_array_equal(np.sort(cache.positions, -1), np.broadcast_to(recent, cache.positions.shape))


@pytest.mark.slow
def test_while_generating_replaces_the_slot_of_least_importance():
    model, params = tiny(num_hidden_layers=1)
    tokens, _ = prompts((100,))
    policy = rk.restkv(BUDGET, window=8, while_generating=True)
    _, cache = rk.prefill(model, params, tokens, None, policy)
    before, scores = np.array(cache.positions[0, 0]), np.array(cache.importance[0, 0])
    _, cache = rk.decode_step(model, params, np.array([1]), cache, policy)
    for head in range(2):
        old = before[head] <= 100 - 8
        victim = np.flatnonzero(old)[scores[head][old].argmin()]
        changed = np.flatnonzero(np.asarray(cache.positions[0, 0, head]) != before[head])
        np.testing.assert_array_equal(changed, [victim])
        assert cache.positions[0, 0, head, victim] == 100


def test_importance_is_the_moving_average_of_removal_errors():
    """Against the recursion over exact deletions, slots that a query does not see left out."""
    rng = np.random.default_rng(0)
    window, slots, dim = 5, 9, 8
    queries, keys, values = (
        rng.standard_normal((1, n, t, dim)).astype(np.float32) for n, t in ((2, window), (1, slots), (1, slots))
    )
    projection = rng.standard_normal((2, dim, 20)).astype(np.float32)
    positions = np.array([0, 4, 9, 11, 20, 21, 22, 23, 24])
    scaled = jnp.asarray(queries[:, None] / np.sqrt(dim))
    pairs = Pairs(jnp.asarray(keys), jnp.asarray(values), jnp.asarray(positions)[None, None])
    policy = rk.restkv(BUDGET, window, alpha=0.4, group_reduce="max")
    gram = policy.scorer.gram(jnp.asarray(projection[None]))
    window_queries = Queries(scaled, jnp.asarray(positions)[None, -window:], 2**30)
    importance = update_importance(jnp.full((1, 1, slots), UNSEEN), window_queries, pairs, gram, policy)[0, 0]
    expected = np.full(slots, np.nan)
    for query in range(window):
        seen = np.flatnonzero(positions <= positions[-window + query])
        errors = []
        for head in range(2):
            logits = queries[0, head, query].astype(np.float64) @ keys[0, 0, seen].T / np.sqrt(dim)
            weights = np.exp(logits)
            outputs = [
                (weights[kept] / weights[kept].sum()) @ values[0, 0, seen[kept]]
                for kept in (np.arange(len(seen)) != deleted for deleted in range(len(seen)))
            ]
            whole = (weights / weights.sum()) @ values[0, 0, seen]
            errors.append(np.linalg.norm((np.array(outputs) - whole) @ projection[head], axis=1))
        new = np.max(errors, axis=0)
        expected[seen] = np.where(np.isnan(expected[seen]), new, 0.4 * new + 0.6 * expected[seen])
    np.testing.assert_allclose(importance, expected, rtol=1e-4)


def test_sampling_is_reproducible_and_greedy_at_zero_temperature():
    model, params = tiny()
    tokens, mask = prompts()
    draw = functools.partial(rk.generate, model, params, tokens, mask, rk.restkv(BUDGET), NEW)
    greedy = draw().tokens
    np.testing.assert_array_equal(draw(key=jax.random.key(1), temperature=0.0).tokens, greedy)
    np.testing.assert_array_equal(draw(temperature=0.0).tokens, greedy)
    first, second = draw(key=jax.random.key(1)).tokens, draw(key=jax.random.key(1)).tokens
    np.testing.assert_array_equal(first, second)
    assert (first != draw(key=jax.random.key(2)).tokens).any()
    np.testing.assert_array_equal(draw(key=jax.random.key(3), top_k=1).tokens, greedy)
    np.testing.assert_array_equal(draw(key=jax.random.PRNGKey(1)).tokens, first)


def test_rows_and_steps_are_drawn_independently():
    model, params = tiny()
    tokens = np.tile(prompts((30,))[0], (2, 1))
    key = jax.random.key(5)
    draw = functools.partial(rk.generate, model, params, tokens, None, None, 30, temperature=1e6)
    out = np.asarray(draw(key=key).tokens)
    assert (out[0] != out[1]).any()
    by_row = jnp.stack([jax.random.fold_in(key, row) for row in range(2)])
    np.testing.assert_array_equal(out, draw(key=by_row).tokens)
    assert all(len(set(row)) > 10 for row in out.tolist()), "a step that drew as the one before would repeat its token"


@given(seed=st.integers(0, 999), top_k=st.integers(1, 8), top_p=st.floats(0.05, 1.0))
@settings(max_examples=30, deadline=None)
def test_truncated_sampling_draws_only_allowed_tokens(seed, top_k, top_p):
    scores = np.random.default_rng(seed).standard_normal(8).astype(np.float32) * 3
    keys = jax.random.split(jax.random.key(seed), 200)
    drawn = set(np.asarray(sample(jnp.broadcast_to(scores, (200, 8)), keys, 1.0, top_k, top_p)).tolist())
    order = np.argsort(-scores)[:top_k]
    share = np.exp(scores[order] - scores.max())
    share /= share.sum()
    allowed = order[: int((np.cumsum(share) - share < top_p).sum())]
    assert drawn <= set(allowed.tolist())


def test_sampling_follows_the_tempered_softmax():
    scores = np.array([2.0, 1.0, 0.0, -1.0], np.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = np.bincount(sample(jnp.broadcast_to(scores, (20_000, 4)), keys, 0.5), minlength=4) / 20_000
    np.testing.assert_allclose(drawn, jax.nn.softmax(scores / 0.5), atol=0.02)


@given(length=st.integers(1, 200_000))
def test_buckets_are_few_and_waste_at_most_a_fifth(length):
    bucket = rk.bucket_length(length)
    assert bucket >= length and bucket == rk.bucket_length(bucket)
    assert length <= 64 or bucket - length < bucket / 5
    assert len({rk.bucket_length(n) for n in range(1025, 2049)}) == 4


def lowered_prefill(policy, num_layers, length=2048):
    model = rk.build_model(CONFIG | {"num_hidden_layers": num_layers})
    params = jax.eval_shape(lambda key: rk.init_params(model, key), jax.random.key(0))
    tokens, mask = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1, length), bool)
    return model, params, read_prompt.lower(model, params, tokens, mask, None, Plan((policy,), 8, 256, length))


def decode_memory(policy, num_layers, length):
    """The cache's shapes and what the compiler says of a decode step's memory."""
    model, params, prefilled = lowered_prefill(policy, num_layers, length)
    token, active = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1,), bool)
    cache = prefilled.out_info[1][0]
    return cache, feed.lower(model, params, token, cache, active).compile().memory_analysis()


@pytest.mark.parametrize("policy", [rk.restkv(64), rk.restkv(64, while_generating=True), rk.h2o(64)])
@pytest.mark.slow
def test_prefill_never_holds_more_than_one_layers_keys_and_values(policy):
    shallow, deep = (lowered_prefill(policy, num_layers)[2].compile().memory_analysis() for num_layers in (2, 10))
    layer_pairs = 2 * 2048 * 2 * 8 * 4
    grown = deep.temp_size_in_bytes - shallow.temp_size_in_bytes
    assert grown < layer_pairs, "eight more layers must not cost even one layer's keys and values"


@pytest.mark.parametrize("policy", [rk.full(), rk.laprox(1024)], ids=["dense", "paged"])
def test_decoding_rewrites_the_cache_in_place(policy):
    cache, memory = decode_memory(policy, 10, 2048)
    assert memory.alias_size_in_bytes >= rk.cache_bytes(cache)
    assert memory.temp_size_in_bytes < rk.cache_bytes(cache) / 4


def test_decoding_does_not_depend_on_the_length_of_the_prompt():
    _, short = decode_memory(rk.restkv(64), 2, 256)
    _, long = decode_memory(rk.restkv(64), 2, 4096)
    assert short.temp_size_in_bytes == long.temp_size_in_bytes
    assert short.argument_size_in_bytes == long.argument_size_in_bytes


def test_cache_bytes_and_shapes_follow_the_budget():
    model, params = tiny()
    tokens, mask = prompts()
    _, cache = rk.prefill(model, params, tokens, mask, rk.restkv(BUDGET), max_new_tokens=NEW)
    assert cache.keys.shape == (3, 3, 2, BUDGET + NEW, 8)
    assert rk.cache_bytes(cache) == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert rk.kept_positions(cache).shape == cache.positions.shape


@pytest.mark.slow
def test_bfloat16_runs_and_keeps_logits_and_importance_in_float32():
    model, params = tiny()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tokens, mask = prompts()
    out = rk.generate(model, half, tokens, mask, POLICIES["generating"], 3)
    scores, _ = jax.eval_shape(lambda: rk.prefill(model, half, tokens, mask, POLICIES["generating"]))
    assert scores.dtype == jnp.float32 and out.cache.keys.dtype == jnp.bfloat16
    assert out.cache.importance.dtype == out.cache.gram.dtype == jnp.float32


@pytest.mark.slow
def test_generating_with_every_policy_at_once_gives_what_each_gives():
    model = rk.build_model(CONFIG)
    params = rk.init_params(model, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(3, CONFIG["vocab_size"], (2, 100))
    policies = (
        *(rk.full(), rk.restkv(48), rk.h2o(40, window=8), rk.laprox(40, window=8), rk.streaming_llm(30)),
        *(rk.restkv(40), rk.snapkv(40), rk.restkv(40, while_generating=True)),  # scores and rows that are shared
    )
    each = rk.generate_each(model, params, tokens, policies=policies, max_new_tokens=5, eos_token_ids=())
    for policy, together in zip(policies, each, strict=True):
        alone = rk.generate(model, params, tokens, policy=policy, max_new_tokens=5, eos_token_ids=())
        np.testing.assert_array_equal(together.tokens, alone.tokens)
        np.testing.assert_array_equal(rk.kept_positions(together.cache), rk.kept_positions(alone.cache))
    with pytest.raises(ValueError, match="policies is empty"):
        rk.generate_each(model, params, tokens)


@pytest.mark.parametrize("name", ["full", "laprox", "generating"])
@pytest.mark.slow
def test_a_single_token(name):
    """`max_new_tokens=1` is the prefill's token: no step is decoded."""
    (model, params), (tokens, mask) = tiny(), prompts()
    logits, _ = rk.prefill(model, params, tokens, mask, POLICIES[name], 1)
    out = rk.generate(model, params, tokens, mask, POLICIES[name], 1)
    np.testing.assert_array_equal(out.tokens[:, 0], logits.argmax(-1))
    assert out.tokens.shape == (3, 1) and (out.lengths == 1).all()
    (each,) = rk.generate_each(model, params, tokens, mask, (POLICIES[name],), 1)
    np.testing.assert_array_equal(each.tokens, out.tokens)
    np.testing.assert_array_equal(
        np.stack(list(rk.stream(model, params, tokens, mask, POLICIES[name], 1))), out.tokens.T
    )
