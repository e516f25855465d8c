"""Options of a configuration: the ones that count for a model type count as in transformers, the others do not."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hugging_face import (
    LLAMA,
    LLAMA3,
    LONGROPE,
    MISTRAL,
    QWEN2,
    QWEN3,
    ROPES,
    YARN,
    left_padded,
    our_logits,
    random_model,
    reference_logits,
    torch,
    write_model,
)

import restkv_jax as rk
from restkv_jax.models.config import UNLIMITED, read_config, to_hugging_face
from restkv_jax.models.rope import apply_rope, rope_frequencies
from restkv_jax.models.rope_parameters import RANGES

LENGTHS = (40, 33, 12)
THETA = {"rope_theta": 2000.0}
FEW = {"original_max_position_embeddings": 16}


def without(settings):
    return {name: value for name, value in settings.items() if name != "original_max_position_embeddings"}


COUNT = {
    "yarn, original length outside": LLAMA | THETA | FEW | {"rope_scaling": {"type": "yarn"} | without(YARN)},
    "yarn, original length twice": LLAMA | THETA | FEW | {"rope_scaling": {"type": "yarn", "factor": 4.0} | LLAMA3},
    "yarn, factor null": LLAMA | THETA | FEW | {"rope_scaling": {"type": "yarn", "factor": None}},
    "llama3, original length outside": QWEN3 | THETA | FEW | {"rope_scaling": {"type": "llama3"} | without(LLAMA3)},
    "longrope, original length outside": LLAMA
    | THETA
    | FEW
    | {"rope_scaling": {"type": "longrope"} | without(LONGROPE)},
    "newer RoPE wins over theta": LLAMA | {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 2000.0}},
    "older RoPE wins over newer": LLAMA
    | {"rope_scaling": {"type": "linear", "factor": 3.0, "rope_theta": 50.0}, "rope_parameters": {"rope_theta": 9.0}},
    "qwen2, layer types": QWEN2
    | {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
}
"""Configurations whose options change the numbers."""

NEUTRAL = {
    "swish": (LLAMA, {"hidden_act": "swish"}),
    "heads of keys null": (LLAMA | {"num_key_value_heads": 4}, {"num_key_value_heads": None}),
    "mistral, bias false": (MISTRAL, {"attention_bias": False, "mlp_bias": False}),
    "qwen2, window off and 0": (QWEN2, {"use_sliding_window": False, "sliding_window": 0}),
    "llama, window -1": (LLAMA, {"sliding_window": -1}),
    "llama, window off": (LLAMA, {"sliding_window": 4, "use_sliding_window": False}),
    "llama, all layers of one type": (LLAMA, {"layer_types": ["full_attention"] * 2}),
    "llama, all layers with RoPE": (LLAMA, {"no_rope_layers": [1, 1], "partial_rotary_factor": 1.0}),
}
"""A configuration, and options that change nothing."""

IGNORED = {
    "llama, window": (LLAMA, {"sliding_window": 4}, "sliding_window=4"),
    "llama, layer types": (LLAMA, {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4}, "layer_types"),
    "llama, window in use": (LLAMA, {"sliding_window": 4, "use_sliding_window": True}, "sliding_window=4"),
    "mistral, biases": (MISTRAL, {"attention_bias": True, "mlp_bias": True}, "attention_bias=True, mlp_bias=True"),
    "mistral, window off": (MISTRAL | {"sliding_window": 7}, {"use_sliding_window": False}, "use_sliding_window=False"),
    "mistral, layer types": (
        MISTRAL | {"sliding_window": 7},
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types",
    ),
    "qwen2, biases": (QWEN2, {"attention_bias": True, "mlp_bias": True}, "attention_bias=True, mlp_bias=True"),
    "qwen3, mlp bias": (QWEN3, {"mlp_bias": True}, "mlp_bias=True"),
    "partial rotation": (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "partial rotation, newer": (
        QWEN3,
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5",
    ),
    "layers without RoPE": (LLAMA, {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    "logits scaling": (LLAMA, {"logits_scaling": 8.0}, "logits_scaling=8.0"),
    "other multipliers": (QWEN2, {"embedding_multiplier": 12.0, "residual_multiplier": 0.2}, "_multiplier=.*_multip"),
    "soft caps": (MISTRAL, {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}, "softcapping=3"),
    "dual chunk attention": (QWEN2, {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config="),
    "code": (LLAMA, {"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}, "auto_map="),
}
"""A configuration, options of other model types, and how the warning names them."""


def logits_of(config):
    """Those of transformers for random weights, each row alone."""
    tokens, _ = left_padded(1, LENGTHS)
    reference = random_model(config)
    rows = [tokens[row : row + 1, -length:] for row, length in enumerate(LENGTHS)]
    return [reference_logits(reference, row, np.ones(row.shape, bool))[0] for row in rows]


@pytest.mark.parametrize("name", COUNT)
def test_options_that_count(name, tmp_path):
    config = COUNT[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ignored")
        model, params, _ = rk.load_model(write_model(tmp_path, random_model(config), config), jnp.float32)
    assert read_config(to_hugging_face(model.config)) == model.config
    tokens, mask = left_padded(1, LENGTHS)
    ours = our_logits(model, params, tokens, mask)
    for row, theirs in enumerate(logits_of(config)):
        assert theirs.std() > 0.3
        np.testing.assert_allclose(ours[row, -len(theirs) :], theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NEUTRAL)
def test_options_that_change_nothing(name):
    config, options = NEUTRAL[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ignored")
        assert read_config(config | options) == read_config(config)
    jax.tree.map(np.testing.assert_array_equal, logits_of(config | options), logits_of(config))


@pytest.mark.parametrize("name", IGNORED)
def test_options_that_are_ignored_with_a_warning(name):
    config, options, named = IGNORED[name]
    with pytest.warns(UserWarning, match=named):
        assert read_config(config | options) == read_config(config)
    jax.tree.map(np.testing.assert_array_equal, logits_of(config | options), logits_of(config))


def test_fields_that_no_model_type_here_has_cost_nothing():
    others = {"num_labels": 10**12, "id2label": [0], "n_positions": 10**12, "dtype": "int8", "per_layer_config": 3}
    assert read_config(LLAMA | others) == read_config(LLAMA)


def test_rope_of_layer_types_is_ignored_where_transformers_ignores_it():
    nested = LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 99.0}}}
    with pytest.warns(UserWarning, match=r"ignored as in transformers: full_attention=\{.*99"):
        assert read_config(nested) == read_config(LLAMA)
    jax.tree.map(np.testing.assert_array_equal, logits_of(nested), logits_of(LLAMA))


def test_rope_of_layer_types_that_agree():
    rope = {"rope_type": "yarn", "rope_theta": 2000.0} | YARN
    nested = QWEN3 | {"rope_parameters": {"full_attention": rope, "sliding_attention": {"rope_theta": 7.0}}}
    assert read_config(nested) == read_config(QWEN3 | {"rope_parameters": rope})
    mixed = nested | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    with pytest.raises(ValueError, match=r"rope_parameters=.*differ between the layer types full_attention, sliding"):
        read_config(mixed)


@pytest.mark.parametrize(
    ("scaling", "longest", "expected"),
    [
        (None, 128, 128),
        ({"type": "yarn", "factor": 4.0}, 32, 128),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 40, 128),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128, 128),
        ({"type": "yarn", "factor": None, "original_max_position_embeddings": 32}, 128, 128),
        (LLAMA3, 64, 512),
        (LLAMA3, 256, 256),
        (LONGROPE, 64, 64),
        (LONGROPE | {"factor": 8.0}, 64, 128),
        ({"type": "linear", "factor": 4.0}, 128, 128),
        ({"type": "dynamic", "factor": 4.0}, 128, 128),
    ],
)
def test_context_length(scaling, longest, expected):
    if scaling is LLAMA3:
        scaling = {"type": "llama3"} | scaling
    elif scaling and "short_factor" in scaling:
        scaling = {"type": "longrope"} | scaling
    config = read_config(LLAMA | {"rope_scaling": scaling, "max_position_embeddings": longest})
    assert config.context_length == expected


def test_prompts_within_the_extended_context_are_not_warned_of():
    model = rk.build_model(LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 32})
    tokens = np.ones((1, 120), np.int32)

    def read(new):
        params = rk.init_params(model, jax.random.key(0))
        return rk.prefill(model, params, tokens, policy=rk.full(), max_new_tokens=new)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(lambda: read(8))
    with pytest.warns(UserWarning, match="exceed the model's maximum of 128 positions"):
        jax.eval_shape(lambda: read(9))


@pytest.mark.parametrize("name", ROPES)
def test_every_number_that_is_accepted_gives_a_rotation(name):
    for setting, bounds in RANGES.items():
        for bound in bounds if setting in ROPES[name] else ():
            value = [bound] * 4 if isinstance(ROPES[name][setting], list) else bound
            try:
                config = read_config(LLAMA | {"rope_parameters": ROPES[name] | {setting: value}})
            except ValueError as error:
                assert setting in str(error)
                continue
            rope = rope_frequencies(config, dict(config.rope_parameters), jnp.asarray([5, 2**20]))
            turned = apply_rope(jnp.ones((2, 1, 2, 8)), jnp.asarray([[0, 5], [0, 2**20]]), rope)
            assert np.isfinite(turned).all(), (setting, bound)


def test_longrope_changes_its_factors_while_generating(tmp_path):
    config = LLAMA | {"rope_parameters": ROPES["longrope"]}
    reference = random_model(config)
    model, params, _ = rk.load_model(write_model(tmp_path, reference, config), jnp.float32)
    tokens, _ = left_padded(2, (12,))
    new = 8  # the original length is 16
    ours = rk.generate(model, params, tokens, max_new_tokens=new, eos_token_ids=())
    theirs = reference.generate(torch.tensor(tokens).long(), max_new_tokens=new, do_sample=False, eos_token_id=-1)
    np.testing.assert_array_equal(ours.tokens[0], theirs[0, 12:])


NUMBERS = [float("nan"), float("inf"), -float("inf"), 0, -1, "8", [8], True, 10**400]
SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
SIZES += ["num_key_value_heads", "max_position_embeddings"]
ROPE_NUMBERS = {
    "linear": ({"factor": 2.0}, ["factor"]),
    "dynamic": ({"factor": 2.0}, ["factor"]),
    "llama3": (LLAMA3, list(LLAMA3)),
    "yarn": (YARN, [*YARN, "attention_factor", "beta_fast", "beta_slow", "mscale"]),
    "longrope": (LONGROPE, [*LONGROPE, "factor", "attention_factor"]),
}
HOSTILE = {
    **{f"{name}={value!r:.9}": ({name: value}, name) for name in SIZES for value in (0, -1, 10**12, 2.5, "8", [8])},
    **{f"eps={value!r:.9}": ({"rms_norm_eps": value}, "rms_norm_eps") for value in (*NUMBERS[:3], -1.0, "1", [1.0])},
    **{f"base={value!r:.9}": ({"rope_theta": value}, "rope_theta") for value in (*NUMBERS, None, 1e300)},
    **{
        f"{kind}, {name}={value!r:.9}": ({"rope_scaling": {"type": kind} | settings | {name: value}}, name)
        for kind, (settings, names) in ROPE_NUMBERS.items()
        for name in names
        for value in NUMBERS
        if (name, value) != ("mscale", 0)
    },
    **{
        f"{name}={value!r:.9}": ({name: value}, name)
        for name in ("eos_token_id", "pad_token_id", "bos_token_id")
        for value in (-1, 61, 10**12, "2", 2.0, True)
    },
    "eos in a list": ({"eos_token_id": [2, 10**12]}, "eos_token_id"),
    "eos in lists": ({"eos_token_id": [[2]]}, "eos_token_id"),
    "eos null in a list": ({"eos_token_id": [2, None]}, "eos_token_id"),
    "range of initial values": ({"initializer_range": float("nan")}, "initializer_range"),
    "model type in a list": ({"model_type": ["llama"]}, "model_type"),
    "model type in an object": ({"model_type": {"llama": 1}}, "model_type"),
    "rope in a list": ({"rope_scaling": [1]}, "rope_scaling"),
    "rope of text": ({"rope_parameters": "yarn"}, "rope_parameters"),
    "rope type in a list": ({"rope_scaling": {"type": ["yarn"]}}, "rope_type"),
    "rope type of rope types": ({"rope_scaling": {"type": "yarn", "factor": {"factor": 2}}}, "factor"),
    "rope truncated by number": ({"rope_scaling": {"type": "yarn", "truncate": 3} | YARN}, "truncate"),
    "factors that cross": ({"rope_scaling": {"type": "llama3"} | LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor"),
    "too few factors": ({"rope_scaling": {"type": "longrope"} | LONGROPE | {"long_factor": [1.0]}}, "long_factor"),
    "factor that is no number": (
        {"rope_scaling": {"type": "longrope"} | LONGROPE | {"long_factor": [1.0, 2.0, 0, 1.0]}},
        "long_factor",
    ),
    "tied by text": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    "activation in a list": ({"hidden_act": ["silu"]}, "hidden_act"),
    "unknown activation": ({"hidden_act": "relu2"}, "hidden_act='relu2'"),
    "partial rotation, scaled": (
        {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "partial_rotary_factor",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_values_that_no_model_has_are_refused_by_name(name):
    fields, word = HOSTILE[name]
    with pytest.raises(ValueError, match=word) as error, contextlib.redirect_stdout(None):
        rk.build_model(LLAMA | fields)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


WINDOWS = {
    "mistral, 0": (MISTRAL | {"sliding_window": 0}, "sliding_window=0"),
    "mistral, -1": (MISTRAL | {"sliding_window": -1}, "sliding_window=-1"),
    "mistral, huge": (MISTRAL | {"sliding_window": 10**12}, "sliding_window=1000000000000"),
    "mistral, text": (MISTRAL | {"sliding_window": "4"}, "sliding_window"),
    "qwen2, 0": (QWEN2 | {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, "sliding_window=0"),
    "qwen3, no width": (QWEN3 | {"layer_types": ["sliding_attention"] * 2}, "use_sliding_window is false"),
    "qwen3, other type": (QWEN3 | {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
    "qwen3, too few types": (QWEN3 | {"layer_types": ["full_attention"]}, "layer_types"),
    "qwen3, types of text": (QWEN3 | {"layer_types": "full_attention"}, "layer_types"),
    "qwen3, layers beyond": (QWEN3 | {"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000"),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_that_transformers_cannot_compute_are_refused(name):
    config, words = WINDOWS[name]
    with pytest.raises(ValueError, match=words):
        rk.build_model(config)


def test_largest_window():
    assert read_config(MISTRAL | {"sliding_window": 131072}).sliding_windows == (131072,) * 2
    assert read_config(MISTRAL).sliding_windows == (UNLIMITED,) * 2
