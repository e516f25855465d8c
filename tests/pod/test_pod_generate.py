"""Generation with shared keys: against the whole-sequence pass, alone and in batches; bad combinations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pod import GROUPS, NEW, SHARING, decode, prompts, tiny, windowed

import restkv_jax as rk
from restkv_jax.models.decoder import logits, read
from restkv_jax.pod import LayerGroups, Sharing


@pytest.mark.slow
@pytest.mark.parametrize(("sink", "recent", "sliding_window"), [(3, 24, None), (3, 24, 30), (0, 1, None)])
def test_decoding_equals_the_whole_sequence_pass(sink, recent, sliding_window):
    """Greedy tokens and logits, over the border of the recent window, in rows of different lengths."""
    (model, params), (tokens, mask) = tiny(**windowed(sliding_window)), prompts()
    sharing = Sharing(GROUPS, sink, recent)
    chosen, scores, cache = decode(sharing, sliding_window=sliding_window)
    whole = np.concatenate([tokens, chosen], axis=1)
    whole_mask = np.concatenate([mask, np.ones_like(chosen, bool)], axis=1)
    hidden = jax.jit(lambda p: read(model.clone(sharing=sharing), p, whole, whole_mask)[0])(params)
    expected = logits(model, params, hidden)[:, -NEW - 1 : -1]
    np.testing.assert_allclose(scores, expected, atol=2e-4)
    np.testing.assert_array_equal(chosen, expected.argmax(-1))
    np.testing.assert_array_equal(cache.distant_lengths, np.maximum(mask.sum(1) + NEW - 1 - sharing.proximal, 0))
    kept = np.asarray(rk.kept_positions(cache))
    for row, length in enumerate(mask.sum(1)):
        assert (kept[:, row, :, :length] == np.arange(length)).all() and (kept[:, row, :, length:] == -1).all()


@pytest.mark.slow
def test_one_block_per_layer_is_the_full_cache():
    chosen, scores, _ = decode(Sharing(LayerGroups.dense(4, 2), sink=3, recent=24))
    full_chosen, full_scores, _ = decode(None)
    np.testing.assert_allclose(scores, full_scores, atol=2e-4)
    np.testing.assert_array_equal(chosen, full_chosen)


@pytest.mark.parametrize("recent", [77, 4080])
def test_sinks_and_recent_tokens_beyond_the_prompt_make_everything_proximal(recent):
    chosen, scores, cache = decode(Sharing(GROUPS, sink=3, recent=recent))
    full_chosen, full_scores, full_cache = decode(None)
    np.testing.assert_allclose(scores, full_scores, atol=2e-4)
    np.testing.assert_array_equal(chosen, full_chosen)
    assert cache.num_slots == full_cache.num_slots
    assert rk.cache_bytes(cache) <= rk.cache_bytes(full_cache)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [None, rk.snapkv(12, window=8)], ids=["all", "snapkv"])
def test_rows_of_a_batch_give_what_they_give_alone(policy):
    model, params = tiny()
    tokens, mask = prompts((90, 60, 20))
    sharing = Sharing(GROUPS, sink=3, recent=24, skip_threshold=0.4)
    together = rk.generate(model, params, tokens, mask, policy, NEW, sharing=sharing)
    kept = np.asarray(rk.kept_positions(together.cache))
    row = 1
    alone = rk.generate(model, params, tokens[row : row + 1, mask[row]], None, policy, NEW, sharing=sharing)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    alone_kept = np.asarray(rk.kept_positions(alone.cache))[:, 0]
    np.testing.assert_array_equal(alone_kept, kept[:, row, :, : alone_kept.shape[-1]])
    np.testing.assert_array_equal(alone.cache.skips.skipped[0], together.cache.skips.skipped[row])
    assert 0 < together.cache.skipped_share[row] < 0.5


def test_generate_stream_and_the_callers_jit_give_the_tokens_of_single_steps():
    model, params = tiny()
    tokens, mask = prompts()
    chosen, _, _ = decode(SHARING)
    jitted = jax.jit(rk.generate, static_argnames=("model", "policy", "max_new_tokens", "sharing"))
    out = jitted(model, params, tokens, mask, max_new_tokens=NEW, sharing=SHARING)
    np.testing.assert_array_equal(out.tokens, chosen)
    streamed = np.stack(list(rk.stream(model, params, tokens, mask, max_new_tokens=NEW, sharing=SHARING)), axis=1)
    np.testing.assert_array_equal(streamed, chosen)


@pytest.mark.parametrize(("sharing", "policy", "error", "words"), [
    ("groups", None, TypeError, "sharing='groups' must be a restkv_jax.pod.Sharing"),
    (Sharing(LayerGroups.dense(3, 2)), None, ValueError, "3 layers and 2 KV heads, but this one has 4 and 2"),
    (SHARING, rk.restkv(40, while_generating=True), ValueError, "while_generating=True does not go with sharing"),
    (SHARING, rk.adakv(40), ValueError, "policy.allocation=.* does not go with sharing"),
    (SHARING, rk.snapkv(40).replace(refit=rk.LeastSquares()), ValueError, "policy.refit=.* does not go with"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(sharing, policy, error, words):
    model, params = tiny()
    params = jax.eval_shape(lambda: params)  # shapes: nothing is computed before the error
    with pytest.raises(error, match=words):
        rk.generate(model, params, *prompts(), policy, NEW, sharing=sharing)
    if isinstance(sharing, Sharing):
        with pytest.raises(error, match=words):
            rk.generate(model.clone(sharing=sharing), params, *prompts(), policy, NEW)


def test_a_step_with_another_sharing_is_refused():
    model, params = tiny()
    _, cache = rk.prefill(model, params, *prompts(), max_new_tokens=4, sharing=SHARING)
    with pytest.raises(ValueError, match="sharing is not the one that the cache was made with"):
        rk.decode_step(model, params, jnp.ones(3, int), cache, sharing=Sharing(GROUPS, sink=4, recent=24))
