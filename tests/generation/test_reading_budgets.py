"""Budgets where prompts are read: percentages, budgets of a few slots, and budgets that hold the prompt."""

import functools

import jax
import numpy as np
import pytest
import test_generate

import restkv_jax as rk
from restkv_jax.generation.reading import cache_shapes
from restkv_jax.pod import LayerGroups, Sharing

NEW = 5
LENGTH = 112  # the bucket of 100 tokens


@functools.cache
def model_and_prompts():
    model, params = test_generate.tiny()
    return model, params, *test_generate.prompts()


def assert_same(generation, expected):
    jax.tree.map(np.testing.assert_array_equal, generation, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["snapkv", "laprox", "streaming_llm"])
def test_a_percentage_is_of_the_bucket(name):
    arguments, preset = model_and_prompts(), rk.METHODS[name]
    assert rk.bucket_length(arguments[2].shape[1]) == LENGTH
    of_number = rk.generate(*arguments, preset(budget=56), NEW)
    of_percentage = rk.generate(*arguments, preset(budget="50%"), NEW)
    assert_same(of_percentage, of_number)
    assert_same(rk.generate_each(*arguments, (preset(budget="50%"), rk.full()), NEW)[0].tokens, of_number.tokens)
    assert_same(np.stack(list(rk.stream(*arguments, preset(budget="50%"), NEW)), 1), of_number.tokens)
    compiled = jax.jit(rk.generate, static_argnames=("model", "policy", "max_new_tokens"))
    assert_same(compiled(*arguments, policy=preset(budget="50%"), max_new_tokens=NEW).tokens, of_number.tokens)
    shapes = cache_shapes(*arguments, preset(budget="50%"), NEW)
    assert shapes == cache_shapes(*arguments, preset(budget=56), NEW)


@pytest.mark.slow
def test_with_shared_keys_a_percentage_is_of_the_bucket_too():
    arguments = model_and_prompts()
    sharing = Sharing(LayerGroups([[0, 0], [0, 0], [2, 2]]), sink=4, recent=16)
    of_number = rk.generate(*arguments, rk.snapkv(28, window=8), NEW, sharing=sharing)
    assert_same(rk.generate(*arguments, rk.snapkv("25%", window=8), NEW, sharing=sharing), of_number)


@pytest.mark.slow
def test_a_cache_that_evicts_while_generating_takes_its_policy_back():
    model, params, tokens, mask = model_and_prompts()
    policy = rk.restkv(budget="25%", window=8, while_generating=True)
    scores, cache = rk.prefill(model, params, tokens, mask, policy, NEW)
    assert cache.num_slots == LENGTH // 4
    token = scores.argmax(-1)
    with pytest.raises(ValueError, match="policy is not the one that the cache was made with"):
        rk.decode_step(model, params, token, cache, policy.replace(window=9))
    rk.decode_step(model, params, token, cache, policy)


def num_kept(cache):
    """Of the prompts' tokens, int [L, B, K]."""
    return (np.asarray(rk.kept_positions(cache)) >= 0).sum(-1)


SMALL = ("laprox", "adakv", "pyramidkv", "h2o", "tova", "while generating")


@pytest.mark.filterwarnings("ignore:budget=")
@pytest.mark.parametrize("name", ["restkv", *(pytest.param(x, marks=pytest.mark.slow) for x in SMALL)])
def test_a_few_slots_are_a_budget(name):
    preset = functools.partial(rk.restkv, while_generating=True) if name == "while generating" else rk.METHODS[name]
    budgets = 1, 2, 3
    for budget, out in zip(
        budgets, rk.generate_each(*model_and_prompts(), tuple(map(preset, budgets)), NEW), strict=True
    ):
        assert (np.asarray(out.lengths) == NEW).all()
        if name == "while generating":
            assert out.cache.num_slots == budget
        else:
            kept = num_kept(out.cache)
            rounded = 1 if name == "adakv" else 0
            assert (kept >= 1).all() and (kept.mean((0, 2)) <= budget + rounded).all()


@pytest.mark.slow
def test_a_budget_that_holds_the_prompt_evicts_nothing():
    model, params, tokens, mask = model_and_prompts()
    everything = rk.generate(model, params, tokens, mask, max_new_tokens=NEW)
    names = "restkv", "laprox", "adakv", "pyramidkv", "h2o", "streaming_llm"
    policies = [rk.METHODS[name](budget=budget) for name in names for budget in (100, 105, "90%", "100%", 200)]
    for policy, out in zip(policies, rk.generate_each(model, params, tokens, mask, tuple(policies), NEW), strict=True):
        np.testing.assert_array_equal(out.tokens, everything.tokens, err_msg=str(policy))
        np.testing.assert_array_equal(num_kept(out.cache), np.broadcast_to(mask.sum(1)[None, :, None], (3, 3, 2)))
