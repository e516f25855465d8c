"""Bad input: a clear error that names the argument, before anything is compiled."""

import jax
import numpy as np
import pytest

import restkv_jax as rk

CONFIG = dict(
    model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=100,
)  # fmt: skip
MODEL = rk.build_model(CONFIG)
PARAMS = jax.eval_shape(lambda key: rk.init_params(MODEL, key), jax.random.key(0))
"""Shapes only: an error that came after compilation or computation could not be the one expected."""

TOKENS = np.ones((2, 10), np.int32)
RIGHT_PADDED = np.arange(10)[None] < np.array([[10], [6]])
ALL_PADDING = np.arange(10)[None] >= np.array([[0], [10]])


@pytest.mark.parametrize("call", [rk.generate, rk.prefill, rk.stream])
@pytest.mark.parametrize(("changes", "error", "words"), [
    (dict(tokens=TOKENS[0]), ValueError, r"tokens has shape \(10,\)"),
    (dict(tokens=TOKENS[:, :0]), ValueError, "the prompt is empty"),
    (dict(tokens=TOKENS * 1.0), TypeError, "tokens has dtype float64"),
    (dict(tokens=TOKENS * 61), ValueError, r"tokens\[0, 0\]=61 is out of the vocabulary of 61"),
    (dict(tokens=-TOKENS), ValueError, r"tokens\[0, 0\]=-1 is out of the vocabulary"),
    (dict(mask=np.ones((2, 9), bool)), ValueError, r"mask has shape \(2, 9\)"),
    (dict(mask=RIGHT_PADDED), ValueError, "padding after real tokens in row 1; pad on the left"),
    (dict(mask=ALL_PADDING), ValueError, "row 1: the row is all padding"),
    (dict(max_new_tokens=0), ValueError, "max_new_tokens=0"),
    (dict(max_new_tokens=2.5), TypeError, "max_new_tokens=2.5"),
    (dict(tokens=[[1, 2], [3]]), ValueError, "tokens is not an array: do its rows differ in length"),
    (dict(policy="restkv"), TypeError, "policy='restkv' must be an EvictionPolicy"),
])  # fmt: skip
def test_prompts_that_make_no_sense(call, changes, error, words):
    with pytest.raises(error, match=words):
        call(MODEL, PARAMS, **({"tokens": TOKENS, "mask": None} | changes))


@pytest.mark.parametrize("call", [rk.generate, rk.stream])
@pytest.mark.parametrize(("options", "error", "words"), [
    (dict(temperature=0.5), ValueError, "pass key=jax.random.key"),
    (dict(key=0), TypeError, "key=0 must be a JAX random key"),
    (dict(key=jax.random.split(jax.random.key(0), 3)), ValueError, r"key has shape \(3,\), but there are 2 prompts"),
    (dict(key=jax.random.key(0), temperature=-1.0), ValueError, "temperature=-1.0"),
    (dict(key=jax.random.key(0), top_k=0), ValueError, "top_k=0"),
    (dict(key=jax.random.key(0), top_k=2.5), TypeError, "top_k=2.5"),
    (dict(key=jax.random.key(0), top_p=1.5), ValueError, "top_p=1.5"),
    (dict(key=jax.random.key(0), min_p=-0.1), ValueError, r"min_p=-0.1 must be in \[0, 1\]"),
    (dict(min_p=0.1), ValueError, "pass key=jax.random.key"),
    (dict(eos_token_ids=(3, 999)), ValueError, r"eos_token_ids\[1\]=999 is out of the vocabulary"),
])  # fmt: skip
def test_sampling_options_that_make_no_sense(call, options, error, words):
    with pytest.raises(error, match=words):
        call(MODEL, PARAMS, TOKENS, **options)


def test_chunk_size_must_be_positive():
    with pytest.raises(ValueError, match="chunk_size=0"):
        rk.prefill(MODEL, PARAMS, TOKENS, chunk_size=0)


def test_prompts_beyond_the_context_warn():
    with pytest.warns(UserWarning, match="exceed the model's maximum of 100"), pytest.raises(TypeError):
        rk.prefill(MODEL, PARAMS, np.ones((1, 95), int), max_new_tokens=10)


def test_padding_may_hold_any_token_id():
    tokens = np.where(ALL_PADDING[:1] | (np.arange(10) > 2), TOKENS[:1], 10_000)
    params = rk.init_params(MODEL, jax.random.key(0))
    rk.prefill(MODEL, params, tokens, np.arange(10)[None] > 2)


def test_decode_step_refuses_a_wrong_batch_and_a_full_cache():
    params = rk.init_params(MODEL, jax.random.key(0))
    scores, cache = rk.prefill(MODEL, params, TOKENS, policy=rk.full(), max_new_tokens=1)
    with pytest.raises(ValueError, match=r"token has shape \(3,\), but the cache holds 2 rows"):
        rk.decode_step(MODEL, params, np.ones(3, int), cache, rk.full())
    with pytest.raises(ValueError, match=r"token\[1\]=61 is out of the vocabulary"):
        rk.decode_step(MODEL, params, np.array([1, 61]), cache, rk.full())
    with pytest.raises(TypeError, match="token has dtype float64"):
        rk.decode_step(MODEL, params, np.array([1.0, 2.0]), cache, rk.full())
    full = cache.replace(lengths=cache.lengths * 0 + cache.num_slots)
    with pytest.raises(ValueError, match="the cache is full"):
        rk.decode_step(MODEL, params, scores.argmax(-1), full, rk.full())


@pytest.mark.parametrize("call", [rk.generate, rk.prefill])
@pytest.mark.parametrize(("changes", "error", "words"), [
    (dict(max_new_tokens=10**10), ValueError, "max_new_tokens=10000000000 must be at most"),
    (dict(params={"params": PARAMS}), ValueError, r"pass what it holds, params\['params'\]"),
    (dict(params=None), TypeError, "params=None must be the model's parameters"),
    (dict(params=PARAMS | {"final_norm": PARAMS["embedding"]}), ValueError, "'final_norm' has the wrong shape"),
    (dict(params={"embedding": PARAMS["embedding"]}), ValueError, "params are not the model's: missing"),
    (dict(params=jax.tree.map(lambda x: x.update(dtype=np.int8), PARAMS)), TypeError, "has dtype int8"),
    (dict(model="llama"), TypeError, "model='llama' must be a Decoder"),
    (dict(mask=np.full((2, 10), 0.5)), ValueError, "mask holds 0.5; it must be"),
    (dict(mask=np.full((2, 10), np.nan)), ValueError, "mask holds nan; it must be"),
    (dict(tokens=["a prompt"]), TypeError, r"tokens=.* must be numbers; a text becomes tokens by tokenizer"),
    (dict(tokens={"input_ids": TOKENS}), TypeError, r"pass its arrays, tokens=batch\['input_ids'\]"),
    (dict(sharing="groups"), TypeError, "sharing='groups' must be a restkv_jax.pod.Sharing"),
])  # fmt: skip
def test_arguments_that_do_not_belong_together(call, changes, error, words):
    arguments = dict(model=MODEL, params=PARAMS, tokens=TOKENS) | changes
    with pytest.raises(error, match=words):
        call(arguments.pop("model"), arguments.pop("params"), arguments.pop("tokens"), **arguments)


@pytest.mark.parametrize(("options", "error", "words"), [
    (dict(key=jax.random.key(0), temperature=np.ones(2)), ValueError, r"temperature has shape \(2,\)"),
    (dict(key=jax.random.key(0), top_k=2.5), TypeError, "top_k=2.5 must be an integer"),
    (dict(key=jax.random.key(0), temperature="1"), TypeError, "temperature='1' must be a number"),
    (dict(key=jax.random.key(0), top_p=float("nan")), ValueError, "top_p=nan must be finite"),
    (dict(key=jax.random.key(0), min_p="0.1"), TypeError, "min_p='0.1' must be a number"),
    (dict(eos_token_ids=1.5), TypeError, "eos_token_ids=1.5 must be integers"),
    (dict(eos_token_ids=("2",)), TypeError, r"eos_token_ids=\('2',\) must be numbers"),
    (dict(eos_token_ids=(61,)), ValueError, r"eos_token_ids.* is out of the vocabulary"),
])  # fmt: skip
def test_sampling_that_makes_no_sense(options, error, words):
    with pytest.raises(error, match=words):
        rk.generate(MODEL, PARAMS, TOKENS, **options)


@pytest.mark.parametrize(("policies", "error", "words"), [
    ((), ValueError, "policies is empty"),
    (rk.full(), TypeError, r"policies=.* must be a tuple of policies"),
    ("snapkv", TypeError, "policies='snapkv' must be a tuple of policies"),
    (("snapkv",), TypeError, "policy='snapkv' must be an EvictionPolicy"),
])  # fmt: skip
def test_policies_that_are_none(policies, error, words):
    with pytest.raises(error, match=words):
        rk.generate_each(MODEL, PARAMS, TOKENS, policies=policies)


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: rk.restkv(alpha="0.3"), TypeError, "alpha='0.3' must be a number"),
    (lambda: rk.restkv(alpha=float("nan")), ValueError, "alpha=nan must be finite"),
    (lambda: rk.snapkv(kernel_size=5.0), TypeError, "kernel_size=5.0 must be an integer"),
    (lambda: rk.restkv(scale=1.5), TypeError, "scale=1.5 must be an integer"),
    (lambda: rk.restkv().replace(refit=0.01), TypeError, r"refit=0.01 must be a restkv_jax.LeastSquares"),
    (lambda: rk.restkv().replace(refit=True), TypeError, r"refit=True must be a restkv_jax.LeastSquares"),
    (lambda: rk.snapkv().replace(foresight=rk.FutureQueries()), TypeError, "must be a restkv_jax.Foresight"),
    (lambda: rk.best(weight="0.4"), TypeError, "weight='0.4' must be a number"),
    (lambda: rk.LeastSquares("0.1"), TypeError, "ridge='0.1' must be a number"),
    (lambda: rk.restkv(use_output_projection="no"), ValueError, "use_output_projection='no' is unknown"),
    (lambda: rk.restkv(while_generating="no"), ValueError, "while_generating='no' is unknown"),
    (lambda: rk.restkv(budget=True), TypeError, "budget=True must be an integer"),
    (lambda: rk.adakv(floor="0.2"), TypeError, "floor='0.2' must be a number"),
    (lambda: rk.streaming_llm(sinks=2.0), TypeError, "sinks=2.0 must be an integer"),
    (lambda: rk.snapkv().replace(page_size=16.0), TypeError, "page_size=16.0 must be an integer"),
])  # fmt: skip
def test_options_of_policies_of_the_wrong_kind(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_cache_that_an_earlier_step_rewrote_is_refused():
    params = rk.init_params(MODEL, jax.random.key(0))
    logits, cache = rk.prefill(MODEL, params, TOKENS)
    rk.decode_step(MODEL, params, logits.argmax(-1), cache)
    with pytest.raises(ValueError, match="the cache was used by an earlier step, which rewrote its buffers"):
        rk.decode_step(MODEL, params, logits.argmax(-1), cache)
    with pytest.raises(TypeError, match="cache is of type tuple; it must be a cache, as prefill returns it"):
        rk.decode_step(MODEL, params, logits.argmax(-1), (cache,))


def test_decoding_needs_no_policy_and_refuses_one_that_clashes():
    params = rk.init_params(MODEL, jax.random.key(0))
    endless = rk.restkv(budget=8, window=4, while_generating=True)
    logits, cache = rk.prefill(MODEL, params, TOKENS, policy=endless, max_new_tokens=4)
    for _ in range(12):
        logits, cache = rk.decode_step(MODEL, params, logits.argmax(-1), cache)
    assert cache.num_slots == 8
    with pytest.raises(ValueError, match="policy is not the one that the cache was made with"):
        rk.decode_step(MODEL, params, logits.argmax(-1), cache, endless.replace(budget=9))
    logits, dense = rk.prefill(MODEL, params, TOKENS)
    with pytest.raises(ValueError, match=r"policy\.while_generating=True, but the cache was made without it"):
        rk.decode_step(MODEL, params, logits.argmax(-1), dense, endless)
