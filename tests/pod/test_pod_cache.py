"""The shared cache: its bytes, in place under jit, rows that have ended, full; what is skipped of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pod import CONFIG, GROUPS, NEW, SHARING, prompts, tiny

import restkv_jax as rk
from restkv_jax.generation.decoding import feed
from restkv_jax.generation.passes import Plan, read_prompt
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.models.config import UNLIMITED
from restkv_jax.pod import LayerGroups, Sharing


@pytest.mark.slow
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
@pytest.mark.parametrize("length", [256, 512])
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
    model = rk.build_model(CONFIG | {"num_hidden_layers": 10}).clone(sharing=sharing)
    params = jax.eval_shape(lambda key: rk.init_params(model, key), jax.random.key(0))
    tokens, mask = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1, length), bool)
    plan = Plan((rk.full(),), 8, 256, length)
    cache = read_prompt.lower(model, params, tokens, mask, None, plan).out_info[1][0]
    token, active = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1,), bool)
    return cache, feed.lower(model, params, token, cache, active).compile().memory_analysis()


@pytest.mark.parametrize("skip_threshold", [None, 0.7])
def test_decoding_rewrites_the_cache_in_place(skip_threshold):
    groups = LayerGroups(np.arange(10)[:, None] // 3 * 3 + np.zeros((1, 2), int))
    cache, memory = lowered_step(Sharing(groups, sink=4, recent=60, skip_threshold=skip_threshold))
    assert memory.alias_size_in_bytes >= rk.cache_bytes(cache)
    assert memory.temp_size_in_bytes < rk.cache_bytes(cache) / 4


@pytest.mark.slow
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
    new = Pairs(jnp.ones((2, 2, 1, 8)), jnp.ones((2, 2, 1, 8)), cache.next_positions[:, None, None])
    after = jax.jit(lambda c: c.append(1, new))(cache)
    np.testing.assert_array_equal(after.slot_positions(), before)
    jax.tree.map(np.testing.assert_array_equal, after, cache)


@pytest.mark.slow
def test_skipping_everything_leaves_non_leaders_their_proximal_tokens():
    """What a layer that follows would read of distant tokens changes nothing; leaders go on reading theirs."""
    model, params = tiny()
    groups = LayerGroups([[0, 0], [0, 0], [2, 2], [3, 3]])
    never = Sharing(groups, sink=3, recent=24, skip_threshold=1.0)
    _, cache = rk.prefill(model, params, *prompts(), max_new_tokens=4, sharing=never)

    def step(**changes):
        copy = jax.tree.map(jnp.copy, cache).replace(**changes)
        return rk.decode_step(model, params, jnp.array([5, 6, 7]), copy)

    read, after_reading = step()
    plain, _ = step(sharing=dataclasses.replace(never, skip_threshold=None), skips=None)
    always = dataclasses.replace(never, skip_threshold=0.0)
    skipped, after_skipping = step(sharing=always)
    np.testing.assert_allclose(read, plain, atol=1e-5)
    assert (np.abs(skipped - plain).max(-1) > 1e-3).tolist() == [True, False, False]
    np.testing.assert_array_equal(after_reading.skipped_share, 0)
    np.testing.assert_array_equal(after_skipping.skipped_share, [0.25, 0, 0])
    np.testing.assert_array_equal(after_skipping.skips.total, [8, 0, 0])
    unread, _ = step(sharing=always, distant_values=cache.distant_values.at[1].set(9.0))
    np.testing.assert_array_equal(unread, skipped)


def test_leaders_gates_decide_what_is_skipped():
    """The noted share is the brute-force one, the least of the group, and skipping follows it."""
    model, params = tiny(num_hidden_layers=1)
    sharing = Sharing(LayerGroups.dense(1, 2), sink=3, recent=24, skip_threshold=0.5)
    tokens, mask = prompts((60, 50))
    _, cache = rk.prefill(model, params, tokens, mask, max_new_tokens=4, sharing=sharing)
    full = rk.prefill(model, params, tokens, mask, max_new_tokens=4)[1]
    vectors = np.random.default_rng(0).standard_normal((2, 2, 2, 1, 8)).astype(np.float32) * 3 / np.sqrt(8)
    cache = cache.replace(next_positions=cache.next_positions - 1)

    @jax.jit
    def attend(cache):
        return cache.memory(0).attend(Queries(jnp.asarray(vectors), cache.next_positions[:, None], UNLIMITED))

    context, (gates, _) = attend(cache)
    for row, head in np.ndindex(2, 2):
        length = int(mask[row].sum())
        keys, values = (np.asarray(x, np.float64)[0, row, head, :length] for x in (full.keys, full.values))
        near = (np.arange(length) < 3) | (np.arange(length) >= length - 24)
        shares = []
        for member in range(2):
            mass = np.exp(keys @ vectors[row, head, member, 0])
            shares.append(mass[near].sum() / mass.sum())
            np.testing.assert_allclose(context[row, head, member, 0], mass @ values / mass.sum(), atol=1e-5)
        np.testing.assert_allclose(gates[row, head], min(shares), rtol=1e-4)
