"""Generation with shared keys: against the whole-sequence pass, in batches, its memory, skipping, eviction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import restkv_jax as rk
from restkv_jax.generate import _decode_step, _prefill
from restkv_jax.models import logits
from restkv_jax.pod import LayerGroups, Sharing

CONFIG = dict(
    model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    initializer_range=0.3, eos_token_id=None, bos_token_id=None,
)  # fmt: skip
NEW = 16
GROUPS = LayerGroups([[0, 0], [0, 1], [2, 1], [2, 1]])
SHARING = Sharing(GROUPS, sink=3, recent=24)


@functools.cache
def tiny(**changes):
    model = rk.build_model(CONFIG | changes)
    return model, rk.init_params(model, jax.random.key(0))


@functools.cache
def prompts(lengths=(60, 20, 2)):
    """One prompt with distant tokens, one that gets some while decoding, one that never leaves the sink and ring."""
    tokens = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (len(lengths), max(lengths)))
    mask = np.arange(max(lengths)) >= max(lengths) - np.array(lengths)[:, None]
    return np.where(mask, tokens, 7), mask


def decode(model, params, sharing, policy=None, new=NEW, lengths=(60, 20, 2)):
    """Greedy tokens [B, new], logits [B, new, V], and the cache."""
    tokens, mask = prompts(lengths)
    scores, cache = rk.prefill(model, params, tokens, mask, policy, new, sharing=sharing)
    every, chosen = [scores], [scores.argmax(-1)]
    for _ in range(new - 1):
        scores, cache = rk.decode_step(model, params, chosen[-1], cache, policy, sharing)
        every.append(scores)
        chosen.append(scores.argmax(-1))
    return np.stack(chosen, 1), np.stack(every, 1), cache


@pytest.mark.parametrize("sliding_window", [None, 30])
def test_decoding_equals_the_whole_sequence_pass(sliding_window):
    """Greedy tokens and logits, over the border of the recent window, in rows of different lengths."""
    model, params = tiny(**({"model_type": "mistral", "sliding_window": 30} if sliding_window else {}))
    tokens, mask = prompts()
    chosen, scores, cache = decode(model, params, SHARING)
    whole = np.concatenate([tokens, chosen], axis=1)
    whole_mask = np.concatenate([mask, np.ones_like(chosen, bool)], axis=1)
    hidden = rk.pod.hidden_states(model, params, whole, SHARING, whole_mask)
    expected = logits(model, params, hidden)[:, -NEW - 1 : -1]
    np.testing.assert_allclose(scores, expected, atol=2e-4)
    np.testing.assert_array_equal(chosen, expected.argmax(-1))
    np.testing.assert_array_equal(cache.distant_lengths, np.maximum(mask.sum(1) + NEW - 1 - 27, 0))
    kept = np.asarray(rk.kept_positions(cache))
    for row, length in enumerate(mask.sum(1)):
        assert (kept[:, row, :, :length] == np.arange(length)).all() and (kept[:, row, :, length:] == -1).all()


def test_one_block_per_layer_is_the_full_cache():
    model, params = tiny()
    dense = Sharing(LayerGroups.dense(4, 2), sink=3, recent=24)
    chosen, scores, _ = decode(model, params, dense)
    full_chosen, full_scores, _ = decode(model, params, None)
    np.testing.assert_allclose(scores, full_scores, atol=2e-4)
    np.testing.assert_array_equal(chosen, full_chosen)


@pytest.mark.parametrize("recent", [100, 4080])
def test_sinks_and_recent_tokens_beyond_the_prompt_make_everything_proximal(recent):
    model, params = tiny()
    chosen, scores, cache = decode(model, params, Sharing(GROUPS, sink=3, recent=recent))
    full_chosen, full_scores, full_cache = decode(model, params, None)
    np.testing.assert_allclose(scores, full_scores, atol=2e-4)
    np.testing.assert_array_equal(chosen, full_chosen)
    assert cache.num_slots == full_cache.num_slots
    assert rk.cache_bytes(cache) <= rk.cache_bytes(full_cache)


@pytest.mark.parametrize("policy", [None, rk.snapkv(12, window=8)], ids=["all", "snapkv"])
def test_rows_of_a_batch_give_what_they_give_alone(policy):
    model, params = tiny()
    tokens, mask = prompts((90, 60, 20))
    sharing = Sharing(GROUPS, sink=3, recent=24, skip_threshold=0.8)
    together = rk.generate(model, params, tokens, mask, policy, NEW, sharing=sharing)
    kept = np.asarray(rk.kept_positions(together.cache))
    for row in (1, 2):
        alone = rk.generate(model, params, tokens[row : row + 1, mask[row]], None, policy, NEW, sharing=sharing)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        alone_kept = np.asarray(rk.kept_positions(alone.cache))[:, 0]
        np.testing.assert_array_equal(alone_kept, kept[:, row, :, : alone_kept.shape[-1]])
        np.testing.assert_array_equal(alone.cache.skips.skipped[0], together.cache.skips.skipped[row])


def test_generate_stream_and_the_callers_jit_give_the_tokens_of_single_steps():
    model, params = tiny()
    tokens, mask = prompts()
    chosen, _, _ = decode(model, params, SHARING)
    jitted = jax.jit(rk.generate, static_argnames=("model", "policy", "max_new_tokens", "sharing"))
    out = jitted(model, params, tokens, mask, max_new_tokens=NEW, sharing=SHARING)
    np.testing.assert_array_equal(out.tokens, chosen)
    streamed = np.stack(list(rk.stream(model, params, tokens, mask, max_new_tokens=NEW, sharing=SHARING)), axis=1)
    np.testing.assert_array_equal(streamed, chosen)


def test_rows_that_have_ended_hand_nothing_over():
    model, params = tiny()
    tokens, mask = prompts()
    free = np.asarray(rk.generate(model, params, tokens, mask, max_new_tokens=NEW, sharing=SHARING).tokens)
    eos = int(free[0, 4])
    out = rk.generate(model, params, tokens, mask, max_new_tokens=NEW, sharing=SHARING, eos_token_ids=(eos,))
    first = [next((i + 1 for i, token in enumerate(row) if token == eos), NEW) for row in free]
    np.testing.assert_array_equal(out.lengths, first)
    held = (np.asarray(out.cache.slot_positions()) >= 0).sum(-1)
    np.testing.assert_array_equal(held, np.broadcast_to((mask.sum(1) + out.lengths - 1)[None, :, None], (4, 3, 2)))


@pytest.mark.parametrize("leader", [GROUPS.leader, [[0, 0]] * 4, LayerGroups.dense(4, 2).leader])
@pytest.mark.parametrize("length", [256, 1024])
def test_bytes_are_what_the_groups_say(leader, length):
    model, params = tiny(head_dim=32)
    sharing = Sharing(LayerGroups(leader), sink=4, recent=60)
    tokens = jax.ShapeDtypeStruct((2, length - NEW), jnp.int32)

    def held(sharing):
        prefill = functools.partial(rk.prefill, model, max_new_tokens=NEW, sharing=sharing)
        return rk.cache_bytes(jax.eval_shape(prefill, params, tokens)[1])

    slots = rk.bucket_length(length - NEW) + NEW
    fraction = sharing.groups.cache_fraction(slots, sharing.sink, sharing.recent)
    assert held(sharing) / held(None) == pytest.approx(fraction, rel=0.02)


@functools.cache
def lowered_step(sharing, length=2048):
    model = rk.build_model(CONFIG | {"num_hidden_layers": 10})
    params = jax.eval_shape(lambda key: rk.init_params(model, key), jax.random.key(0))
    tokens, mask = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1, length), bool)
    cache = _prefill.lower(model, params, tokens, mask, (rk.full(),), 8, 256, sharing).out_info[1][0]
    token, active = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1,), bool)
    return cache, _decode_step.lower(model, params, token, cache, active, rk.full()).compile().memory_analysis()


@pytest.mark.parametrize("skip_threshold", [None, 0.7])
def test_decoding_rewrites_the_cache_in_place(skip_threshold):
    groups = LayerGroups(np.arange(10)[:, None] // 3 * 3 + np.zeros((1, 2), int))
    cache, memory = lowered_step(Sharing(groups, sink=4, recent=60, skip_threshold=skip_threshold))
    assert memory.alias_size_in_bytes >= rk.cache_bytes(cache)
    assert memory.temp_size_in_bytes < rk.cache_bytes(cache) / 4


def test_a_full_cache_is_refused_and_kept():
    model, params = tiny()
    tokens, mask = prompts((64, 64))
    _, cache = rk.prefill(model, params, tokens, mask, max_new_tokens=2, sharing=SHARING)
    token = jnp.array([1, 2])
    for _ in range(2):
        _, cache = rk.decode_step(model, params, token, cache)
    with pytest.raises(ValueError, match="the cache is full"):
        rk.decode_step(model, params, token, cache)
    before = np.asarray(cache.slot_positions())
    after = jax.jit(lambda c: c.append(1, jnp.ones((2, 2, 8)), jnp.ones((2, 2, 8)), jnp.ones(2, bool), 1))(cache)
    np.testing.assert_array_equal(after.slot_positions(), before)
    jax.tree.map(np.testing.assert_array_equal, after, cache)


def test_skipping_everything_leaves_non_leaders_their_proximal_tokens():
    """Against a cache whose distant part is hidden from those layers; leaders go on reading theirs."""
    model, params = tiny()
    groups = LayerGroups([[0, 0], [0, 0], [2, 2], [3, 3]])
    never = Sharing(groups, sink=3, recent=24, skip_threshold=1.0)
    always = Sharing(groups, sink=3, recent=24, skip_threshold=0.0)
    tokens, mask = prompts()
    outs = {}
    for sharing in (never, always, Sharing(groups, sink=3, recent=24)):
        _, cache = rk.prefill(model, params, tokens, mask, max_new_tokens=4, sharing=sharing)
        outs[sharing.skip_threshold] = rk.decode_step(model, params, jnp.array([5, 6, 7]), cache)
    np.testing.assert_allclose(outs[1.0][0], outs[None][0], atol=1e-5)
    assert (np.abs(outs[0.0][0] - outs[None][0]).max(-1) > 1e-3).tolist() == [True, False, False]
    np.testing.assert_array_equal(outs[1.0][1].skipped_share, 0)
    np.testing.assert_array_equal(outs[0.0][1].skipped_share, [0.25, 0, 0])
    np.testing.assert_array_equal(outs[0.0][1].skips.total, [8, 0, 0])


def test_leaders_gates_decide_what_is_skipped():
    """The noted share is the brute-force one, the least of the group, and skipping follows it."""
    model, params = tiny(num_hidden_layers=1)
    sharing = Sharing(LayerGroups.dense(1, 2), sink=3, recent=24, skip_threshold=0.5)
    tokens, mask = prompts((60, 50))
    _, cache = rk.prefill(model, params, tokens, mask, max_new_tokens=4, sharing=sharing)
    full = rk.prefill(model, params, tokens, mask, max_new_tokens=4)[1]
    queries = np.random.default_rng(0).standard_normal((2, 4, 1, 8)).astype(np.float32) * 3
    cache = cache.replace(next_positions=cache.next_positions - 1)
    context, (gates, _) = cache.memory(jnp.int32(0)).attend(jnp.asarray(queries), cache.next_positions[:, None], 2**30)
    for row, head in np.ndindex(2, 2):
        length = int(mask[row].sum())
        keys, values = (np.asarray(x, np.float64)[0, row, head, :length] for x in (full.keys, full.values))
        near = (np.arange(length) < 3) | (np.arange(length) >= length - 24)
        shares = []
        for h in (2 * head, 2 * head + 1):
            mass = np.exp(keys @ queries[row, h, 0] / np.sqrt(8))
            shares.append(mass[near].sum() / mass.sum())
            np.testing.assert_allclose(context[row, h, 0], mass @ values / mass.sum(), atol=1e-5)
        np.testing.assert_allclose(gates[row, head], min(shares), rtol=1e-4)


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_a_budget_for_all_distant_tokens_evicts_nothing(name):
    model, params = tiny()
    policy = rk.METHODS[name](budget=40, window=8)
    assert rk.bucket_length(66) - SHARING.proximal > 40, "or nothing would be chosen"
    lengths = (66, 20, 2)
    _, scores, cache = decode(model, params, SHARING, policy, lengths=lengths)
    _, expected, whole = decode(model, params, SHARING, lengths=lengths)
    np.testing.assert_array_equal(
        rk.kept_positions(cache), np.asarray(rk.kept_positions(whole))[..., : cache.num_slots]
    )
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_eviction_keeps_the_best_of_the_blocks_summed_scores():
    """Positions against scores summed over the block's layers by brute force; values are each layer's own."""
    model, params = tiny()
    tokens, mask = prompts((90, 60))
    policy = rk.snapkv(12, window=8, pooling="none")
    _, cache = rk.prefill(model, params, tokens, mask, policy, NEW, sharing=SHARING)
    _, whole = rk.prefill(model, params, tokens, mask, rk.full(), NEW, sharing=SHARING)
    kept = np.asarray(cache.slot_positions())[..., 27 : 27 + 12]
    blocks, leader = GROUPS.blocks, np.array(GROUPS.leader)
    for layer, row, head in np.ndindex(4, 2, 2):
        places = kept[layer, row, head]
        assert (np.diff(places) > 0).all() and places.min() >= 3 and places.max() < mask[row].sum() - 24
        np.testing.assert_array_equal(places, kept[leader[layer, head], row, head])
        block = blocks[layer, head]
        slots = places - 3
        np.testing.assert_array_equal(cache.distant_keys[block, row, :12], whole.distant_keys[block, row, slots])
        values = whole.distant_values[layer, row, head, slots]
        np.testing.assert_array_equal(cache.distant_values[layer, row, head, :12], values)


@pytest.mark.parametrize(("sharing", "policy", "error", "words"), [
    ("groups", None, TypeError, "sharing='groups' must be a restkv_jax.pod.Sharing"),
    (Sharing(LayerGroups.dense(3, 2)), None, ValueError, "3 layers and 2 KV heads, but this one has 4 and 2"),
    (SHARING, rk.restkv(40, while_generating=True), ValueError, "while_generating=True does not go with sharing"),
    (SHARING, rk.adakv(40), ValueError, "policy.allocation=.* does not go with sharing"),
    (SHARING, rk.snapkv(40).replace(refit=rk.LeastSquares()), ValueError, "policy.refit=.* does not go with"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(sharing, policy, error, words):
    model, _ = tiny()
    with pytest.raises(error, match=words):
        rk.generate(model, None, *prompts(), policy, NEW, sharing=sharing)


def test_a_step_with_another_sharing_is_refused():
    model, params = tiny()
    _, cache = rk.prefill(model, params, *prompts(), max_new_tokens=4, sharing=SHARING)
    with pytest.raises(ValueError, match="sharing is not the one that the cache was made with"):
        rk.decode_step(model, params, jnp.ones(3, int), cache, sharing=Sharing(GROUPS, sink=4, recent=24))
