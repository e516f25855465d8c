"""Small random models of `transformers`, the reference that the decoder is compared with."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from restkv_jax.models.decoder import Decoder, logits, read

torch = pytest.importorskip("torch", reason="needs PyTorch: compares with transformers' own models")
torch.set_num_threads(1)

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA = BASE | {"model_type": "llama"}
MISTRAL = BASE | {"model_type": "mistral", "sliding_window": None, "head_dim": 8}
QWEN2 = BASE | {"model_type": "qwen2"}
QWEN3 = BASE | {"model_type": "qwen3", "head_dim": 12}

ARCHITECTURES = {
    "llama": LLAMA,
    "llama, one key per query": LLAMA | {"num_key_value_heads": 4},
    "llama, one key for all queries": LLAMA | {"num_key_value_heads": 1},
    "llama, wide heads": LLAMA | {"head_dim": 14},
    "llama, attention bias": LLAMA | {"attention_bias": True},
    "llama, mlp bias": LLAMA | {"mlp_bias": True},
    "llama, tied": LLAMA | {"tie_word_embeddings": True},
    "llama, large eps": LLAMA | {"rms_norm_eps": 0.3},
    "mistral": MISTRAL,
    "mistral, sliding window": MISTRAL | {"sliding_window": 7, "head_dim": 10},
    "qwen2": QWEN2 | {"tie_word_embeddings": True},
    "qwen2, window unused": QWEN2 | {"use_sliding_window": False, "sliding_window": 5},
    "qwen2, window in upper layers": QWEN2
    | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3},
    "qwen3": QWEN3,
    "qwen3, attention bias, tied": QWEN3 | {"attention_bias": True, "tie_word_embeddings": True},
    "qwen3, window in upper layers": QWEN3
    | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_hidden_layers": 3},
}
"""One configuration per architecture and option."""

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.2, 2.0, 4.0, 9.0],
    "original_max_position_embeddings": 16,
}

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 2000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 2000.0, "factor": 2.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 10000.0} | LLAMA3,
    "yarn": {"rope_type": "yarn", "rope_theta": 2000.0} | YARN,
    "yarn, mscale": {"rope_type": "yarn", "rope_theta": 2000.0, "mscale": 0.7, "mscale_all_dim": 0.2} | YARN,
    "yarn, attention factor": {"rope_type": "yarn", "rope_theta": 2000.0, "attention_factor": 1.3} | YARN,
    "yarn, betas": {"rope_type": "yarn", "rope_theta": 99.0, "beta_fast": 2, "beta_slow": 0.5, "truncate": False}
    | YARN,
    "longrope": {"rope_type": "longrope", "rope_theta": 2000.0} | LONGROPE,
    "longrope, factor": {"rope_type": "longrope", "rope_theta": 2000.0, "factor": 3.0} | LONGROPE,
    "longrope, attention factor": {"rope_type": "longrope", "rope_theta": 2000.0, "attention_factor": 0.8} | LONGROPE,
}
"""`rope_parameters` of every scaling."""

GEMMA2 = BASE | {
    "model_type": "gemma2",
    "num_hidden_layers": 4,
    "head_dim": 12,
    "query_pre_attn_scalar": 20,
    "sliding_window": 7,
    "attn_logit_softcapping": 2.5,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
GEMMA3 = BASE | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "head_dim": 12,
    "query_pre_attn_scalar": 20,
    "sliding_window": 7,
    "sliding_window_pattern": 3,
    "rope_theta": 5000.0,
    "rope_local_base_freq": 100.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "tie_word_embeddings": True,
}
PHI3 = BASE | {"model_type": "phi3", "sliding_window": None}
OLMO2 = BASE | {"model_type": "olmo2"}
GRANITE = BASE | {
    "model_type": "granite",
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 0.5,
}
SMOLLM3 = BASE | {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "rope_theta": 50.0}
MINISTRAL = BASE | {
    "model_type": "ministral",
    "head_dim": 12,
    "num_hidden_layers": 3,
    "sliding_window": 6,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
MINISTRAL3 = BASE | {
    "model_type": "ministral3",
    "head_dim": 12,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 2000.0, "llama_4_scaling_beta": 0.3} | YARN,
}
MIXTRAL = BASE | {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2}
QWEN3_MOE = BASE | {
    "model_type": "qwen3_moe",
    "head_dim": 12,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
}

FAMILIES = {
    "gemma 2": GEMMA2,
    "gemma 2, no caps": GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma 3": GEMMA3,
    "gemma 3, layer types": GEMMA3
    | {"layer_types": ["full_attention", *["sliding_attention"] * 3], "attention_bias": True},
    "phi 3": PHI3,
    "phi 3, window": PHI3 | {"sliding_window": 6},
    "phi 4, part of the head": PHI3 | {"head_dim": 16, "partial_rotary_factor": 0.75},
    "olmo 2": OLMO2,
    "olmo 2, one key per query": OLMO2 | {"num_key_value_heads": 4, "attention_bias": True},
    "granite": GRANITE,
    "granite, biases, tied": GRANITE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "smollm3": SMOLLM3,
    "smollm3, interval and window": SMOLLM3
    | {"no_rope_layers": None, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6},
    "ministral": MINISTRAL,
    "ministral 3": MINISTRAL3,
    "mixtral": MIXTRAL,
    "mixtral, window": MIXTRAL | {"sliding_window": 7},
    "qwen3 moe": QWEN3_MOE,
    "qwen3 moe, normed": QWEN3_MOE | {"norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 9},
    "falcon 3": LLAMA | {"head_dim": 16, "rope_theta": 1000042},
}
"""One configuration per family that is a Llama but for some fields, and per option that is its own."""

VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA3_WITH_IMAGES = {
    "model_type": "gemma3",
    "text_config": GEMMA3,
    "vision_config": VISION | {"model_type": "siglip_vision_model"},
    "mm_tokens_per_image": 4,
}
MISTRAL3 = {
    "model_type": "mistral3",
    "text_config": MISTRAL,
    "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
    "tie_word_embeddings": False,
}

WITH_IMAGES = {
    "gemma 3": GEMMA3_WITH_IMAGES,
    "mistral 3": MISTRAL3,
    "mistral 3, tied by default": {name: MISTRAL3[name] for name in ("model_type", "text_config", "vision_config")},
    "mistral 3 of ministral 3": MISTRAL3 | {"text_config": MINISTRAL3},
}
"""Models that also see images, whose language model is read."""


def newer_spelling(config: dict, rope: dict) -> dict:
    """The configuration with its RoPE settings in `rope_parameters`."""
    return config | {"rope_parameters": rope}


def older_spelling(config: dict, rope: dict, type_key: str = "rope_type") -> dict:
    """The configuration with its RoPE settings in `rope_theta` and `rope_scaling`."""
    scaling = {type_key: rope["rope_type"]} | {k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta")}
    return config | {"rope_theta": rope["rope_theta"], "rope_scaling": None if len(scaling) == 1 else scaling}


def random_model(config: dict, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with random weights, biases and norms, large enough for every part to matter."""
    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(**config), attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                # that of Gemma is added to one
                parameter.copy_((0 if config["model_type"].startswith("gemma") else 1) + 0.4 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5 * (2 if "q_proj" in name else 1))
            # `model.to(dtype)` would round the rotary frequencies too
            parameter.data = parameter.data.to(dtype)
    return model


def write_model(directory: pathlib.Path, model: PreTrainedModel, config: dict, **options) -> pathlib.Path:
    """Saves the weights with the configuration just as it is spelled."""
    model.save_pretrained(directory, **options)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def left_padded(seed: int, lengths: tuple[int, ...], vocab_size: int = BASE["vocab_size"]):
    """Random tokens int32 [B, T] and their mask bool [B, T]; the padding holds random tokens too."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (len(lengths), max(lengths)), dtype=np.int32)
    return tokens, np.arange(max(lengths)) >= max(lengths) - np.array(lengths)[:, None]


def reference_logits(model: PreTrainedModel, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """float32 [B, T, V]."""
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    arrays = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        tensors = {name: torch.tensor(x, dtype=torch.long) for name, x in arrays.items()}
        # a cache takes windows from the configuration, which the model itself may not have
        return model(**tensors, use_cache=False).logits.float().numpy()


def our_logits(model: Decoder, params, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """float32 [B, T, V]."""

    @jax.jit
    def run(params, tokens, mask):
        return logits(model, params, read(model, params, tokens, mask)[0])

    return np.asarray(run(params, jnp.asarray(tokens), jnp.asarray(mask)))
