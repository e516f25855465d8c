"""Families besides Llama's own against the PyTorch models of `transformers`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hugging_face import (
    FAMILIES,
    GEMMA2,
    GRANITE,
    LLAMA,
    LONGROPE,
    OLMO2,
    PHI3,
    QWEN3_MOE,
    SMOLLM3,
    WITH_IMAGES,
    left_padded,
    our_logits,
    random_model,
    reference_logits,
    write_model,
)
from transformers import AutoModelForCausalLM

import restkv_jax as rk
from restkv_jax.models.config import read_config, to_hugging_face
from restkv_jax.models.decoder import Hooks, read
from restkv_jax.pod import LayerGroups, Sharing

LENGTHS = (41, 33, 1, 12)
NEW = 12
PECULIAR = ["gemma 2", "gemma 3", "phi 4, part of the head", "olmo 2", "granite", "smollm3", "ministral 3", "qwen3 moe"]
"""One of each family that computes something that Llama does not."""
FIRST_IS_FAST = [PECULIAR[0], *(pytest.param(name, marks=pytest.mark.slow) for name in PECULIAR[1:])]


@functools.cache
def reference_of(name):
    return random_model(FAMILIES[name])


@pytest.fixture
def loaded(tmp_path):
    """A function that gives the reference of a family and our model with the same weights."""

    def load(name):
        reference = reference_of(name)
        return reference, *rk.load_model(write_model(tmp_path / "model", reference, FAMILIES[name]), jnp.float32)[:2]

    return load


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name, loaded):
    reference, model, params = loaded(name)
    tokens, mask = left_padded(1, LENGTHS)
    theirs = reference_logits(reference, tokens, mask)
    assert theirs[mask].std() > 0.3
    np.testing.assert_allclose(our_logits(model, params, tokens, mask)[mask], theirs[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_configuration_round_trip(name):
    config = read_config(FAMILIES[name])
    assert read_config(to_hugging_face(config)) == config


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_is_what_was_loaded(name, loaded, tmp_path):
    reference, model, params = loaded(name)
    rk.save_model(tmp_path / "saved", model, params)
    again, same, _ = rk.load_model(tmp_path / "saved", jnp.float32)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, params)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    tokens, mask = left_padded(2, (20, 9))
    expected = reference_logits(reference, tokens, mask)
    np.testing.assert_allclose(reference_logits(theirs, tokens, mask)[mask], expected[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_language_model_of_one_that_sees_images(name, tmp_path):
    config = WITH_IMAGES[name]
    reference = random_model(config)
    model, params, _ = rk.load_model(write_model(tmp_path / "model", reference, config), jnp.float32)
    assert model.config.model_type == config["text_config"]["model_type"]
    assert model.config.tie_word_embeddings == reference.config.tie_word_embeddings
    tokens, mask = left_padded(1, LENGTHS)
    theirs = reference_logits(reference, tokens, mask)
    np.testing.assert_allclose(our_logits(model, params, tokens, mask)[mask], theirs[mask], atol=1e-4, rtol=0)
    rk.save_model(tmp_path / "saved", model, params)
    assert rk.load_model(tmp_path / "saved", jnp.float32)[0] == model


@pytest.mark.parametrize("spelled", ["longrope", "su"])
def test_longrope_of_phi_4(spelled, tmp_path):
    """Short factors up to the original length, which stands beside the settings; part of a head turns."""
    factors = {name: LONGROPE[name][:3] for name in ("short_factor", "long_factor")}
    config = PHI3 | {"rope_scaling": {"type": "longrope"} | factors, "partial_rotary_factor": 0.75}
    config |= {"original_max_position_embeddings": 16, "rope_theta": 2000.0}
    reference = random_model(config)
    config |= {"rope_scaling": {"type": spelled} | factors}
    model, params, _ = rk.load_model(write_model(tmp_path / "model", reference, config), jnp.float32)
    for length in (12, 40):
        tokens, mask = left_padded(1, (length,))
        theirs = reference_logits(reference, tokens, mask)
        np.testing.assert_allclose(our_logits(model, params, tokens, mask), theirs, atol=1e-4, rtol=0)
    rk.save_model(tmp_path / "saved", model, params)
    assert rk.load_model(tmp_path / "saved", jnp.float32)[0] == model
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    np.testing.assert_allclose(reference_logits(again, tokens, mask), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GEMMA2 | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 must be"),
        (GEMMA2 | {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping=-1.0 must be"),
        (GEMMA2 | {"final_logit_softcapping": 0.0}, "final_logit_softcapping=0.0 must be"),
        (GEMMA2 | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        (GRANITE | {"logits_scaling": 0}, "logits_scaling=0 must be"),
        (GRANITE | {"residual_multiplier": float("nan")}, "residual_multiplier=nan must be"),
        (SMOLLM3 | {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for num_hidden_layers=4"),
        (PHI3 | {"partial_rotary_factor": 0.4}, "partial_rotary_factor=0.4 of head_dim=8 must"),
        (PHI3 | {"partial_rotary_factor": -2}, "partial_rotary_factor=-2 "),
        (OLMO2 | {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        (QWEN3_MOE | {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] are not supported"),
        (QWEN3_MOE | {"num_experts_per_tok": 7}, "num_experts_per_tok=7 must be from 1 to num_experts=6"),
        (QWEN3_MOE | {"num_experts": 10**12}, "num_experts=1000000000000 must be"),
        ({"model_type": "gemma3", "text_config": None}, "text_config=None of model_type='gemma3' must be an object"),
        ({"model_type": "mistral3", "text_config": LLAMA | {"model_type": "gpt2"}}, "model_type='gpt2' is not"),
    ],
)
def test_what_no_model_has_is_refused_by_name(config, words):
    with pytest.raises(ValueError, match=words):
        rk.build_model(config)


def test_fused_tensor_of_another_size_is_refused_by_name(tmp_path):
    write_model(tmp_path, random_model(PHI3), PHI3 | {"intermediate_size": 40})
    with pytest.raises(
        ValueError, match=r"gate_up_proj.weight' has the wrong shape: found \(88, 32\), expected 80 rows"
    ):
        rk.load_model(tmp_path)


def test_granites_multiplier_is_in_the_projection_that_eviction_sees(loaded):
    _, model, params = loaded("granite")
    stored = params["layers"]["output_projection"]
    tokens, mask = left_padded(3, (9,))
    hooks = Hooks(observe=lambda view, memory, seen: seen.at[view.index].set(view.output_projection.reshape(4, 8, 32)))
    _, seen = read(model, params, tokens, mask, hooks, jnp.zeros_like(stored))
    np.testing.assert_allclose(seen, GRANITE["residual_multiplier"] * stored, rtol=1e-6)


def generate(model, params, tokens, mask, **options):
    return rk.generate(model, params, tokens, mask, max_new_tokens=NEW, eos_token_ids=(), **options)


def continued(tokens, mask, new):
    """Prompts with the tokens that were generated, and their mask."""
    return np.concatenate([tokens, new], axis=1), np.concatenate([mask, np.ones_like(new, bool)], axis=1)


@pytest.mark.parametrize("name", FIRST_IS_FAST)
def test_greedy_tokens(name, loaded):
    """Each is the likeliest that transformers sees after those before it, in rows of different lengths."""
    reference, model, params = loaded(name)
    tokens, mask = left_padded(3, LENGTHS)
    ours = generate(model, params, tokens, mask, chunk_size=16)
    theirs = reference_logits(reference, *continued(tokens, mask, ours.tokens))[:, -NEW - 1 : -1]
    np.testing.assert_array_equal(ours.tokens, theirs.argmax(-1))
    assert len(np.unique(ours.tokens)) > 5


def policies(budget):
    """Every method with that budget, and one whose values are refitted, by name."""
    windows = {name: {} if name == "streaming_llm" else {"window": 8} for name in rk.METHODS if name != "full"}
    of_methods = {name: rk.METHODS[name](budget=budget, **window) for name, window in windows.items()}
    return of_methods | {"refit": of_methods["snapkv"].replace(refit=rk.LeastSquares())}


def generating(slots):
    """One that evicts while generating."""
    return rk.restkv(slots, window=8, while_generating=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", PECULIAR)
def test_every_method(name, loaded):
    """All that is kept gives the tokens of the full cache, and a small budget gives tokens."""
    _, model, params = loaded(name)
    tokens, mask = left_padded(3, LENGTHS)
    full = generate(model, params, tokens, mask).tokens
    options = {"max_new_tokens": NEW, "eos_token_ids": ()}
    budget = tokens.shape[1] + 3  # AdaKV rounds its heads' shares down
    assert budget < rk.bucket_length(tokens.shape[1]), "or nothing would be selected"
    # where all is kept, methods differ in their budgets and refits alone
    some = (policies(budget)[name] for name in ("restkv", "best", "adakv", "laprox", "refit"))
    holding, small = (*some, generating(budget + NEW)), (*policies(16).values(), generating(16))
    outs = rk.generate_each(model, params, tokens, mask, policies=holding + small, **options)
    for out in outs[: len(holding)]:
        np.testing.assert_array_equal(out.tokens, full)
    for out in outs[len(holding) :]:
        assert (out.lengths == NEW).all()
        assert np.asarray(rk.kept_positions(out.cache) < 0).any()


def sharing_of(model, block):
    """Blocks of that many layers."""
    leaders = [[layer - layer % block] * 2 for layer in range(model.config.num_hidden_layers)]
    return Sharing(LayerGroups(leaders), sink=2, recent=9)


@pytest.mark.parametrize("name", FIRST_IS_FAST)
@pytest.mark.slow
def test_shared_keys(name, loaded):
    """Decoding on the cache of a model that shares keys gives the tokens of the pass over whole sequences."""
    _, model, params = loaded(name)
    tokens, mask = left_padded(3, LENGTHS)
    sharing = sharing_of(model, 2)
    ours = generate(model, params, tokens, mask, sharing=sharing)
    expected = our_logits(model.clone(sharing=sharing), params, *continued(tokens, mask, ours.tokens))
    np.testing.assert_array_equal(ours.tokens, expected[:, -NEW - 1 : -1].argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize("name", PECULIAR)
def test_shared_keys_of_one_layer_each_and_with_eviction(name, loaded):
    _, model, params = loaded(name)
    tokens, mask = left_padded(3, LENGTHS)
    alone = generate(model, params, tokens, mask, sharing=sharing_of(model, 1))
    np.testing.assert_array_equal(alone.tokens, generate(model, params, tokens, mask).tokens)
    evicted = generate(model, params, tokens, mask, sharing=sharing_of(model, 2), policy=rk.snapkv(20, window=8))
    assert (evicted.lengths == NEW).all()


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic"])
def test_ministral_3_needs_a_scaling_with_an_original_length(kind):
    rope = {"rope_theta": 2000.0, "llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 16}
    config = FAMILIES["ministral 3"] | {"rope_parameters": rope | {"rope_type": kind, "factor": 2.0}}
    with pytest.raises(ValueError, match=f"rope_type='{kind}' of model_type='ministral3' is not supported"):
        read_config(config)
