"""The metadata of a GGUF file as the configuration and the tokenizer of transformers.

transformers reads both itself, but only where PyTorch is installed; its tables and its tokenizers are used here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Those that are read; Mistral's models of the architecture of Llama say in GGUF that they are Llama."""

REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
OTHER_MODELS = (
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_count",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "rope.scaling.alpha",
)
"""Fields that change the numbers and that none of the architectures computes."""

LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
ADD_BOS = ("llama3", "llama-v3", "llama-bpe")
"""Splitting rules of tokenizers that begin each text with a token, though older files do not say so."""


def config_fields(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_divisors: np.ndarray | None
) -> dict[str, Any]:
    """The fields of a Hugging Face configuration.

    Args:
      fields: the metadata by name.
      shapes: of all tensors, by their names in GGUF.
      rope_divisors: float32 [D/2], by which RoPE's frequencies are divided, or None.

    Raises:
      ValueError: an architecture or an option that is not supported, a field that is missing.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    own = _own_fields(fields, shapes)
    architecture = fields["general.architecture"]
    names = GGUF_CONFIG_MAPPING[architecture] | {"attention.key_length": "head_dim"}
    names |= {"rope.dimension_count": None, "rope.freq_base": None}
    config = {name: own[key] for key, name in names.items() if name is not None and key in own}
    head_dim = config.setdefault("head_dim", own["embedding_length"] // own["attention.head_count"])
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, head_dim) != head_dim:
            raise ValueError(f"{key}={own[key]} is not supported where heads have {head_dim} dimensions")
    if architecture != "qwen2":  # which has its biases always
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    ids = {key: fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "padding")}
    return config | {
        "model_type": architecture,
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_parameters": {"rope_theta": own.get("rope.freq_base", 1e4)} | _rope(own, rope_divisors, head_dim),
        "bos_token_id": ids["bos"],
        "eos_token_id": sorted({i for i in (ids["eos"], ids["eot"]) if i is not None}) or None,
        "pad_token_id": ids["padding"],
    }


def _own_fields(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of the architecture, which are checked, without its name."""
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise ValueError(f"architecture {architecture!r} is not supported in GGUF; supported: {supported}")
    if fields.get("split.count", 0) > 1:
        raise ValueError(f"it is one of {fields['split.count']} parts; join them with `llama-gguf-split --merge`")
    prefix = f"{architecture}."
    own = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
    missing = [prefix + name for name in REQUIRED if name not in own]
    missing += ["token_embd.weight"] if "token_embd.weight" not in shapes else []
    if missing:
        raise ValueError(f"{missing[0]!r} is missing; convert the model again")
    for name, value in own.items():
        if name in REQUIRED and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            raise ValueError(f"{prefix}{name}={str(value)[:40]} must be one positive number")
        if name in OTHER_MODELS and value:
            raise ValueError(f"{prefix}{name}={value} is not supported for this architecture")
    if own["block_count"] > len(shapes):
        raise ValueError(f"{prefix}block_count={own['block_count']} exceeds the number of tensors, {len(shapes)}")
    return own


def _rope(own: Mapping[str, Any], divisors: np.ndarray | None, head_dim: int) -> dict[str, Any]:
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear")) or 1.0  # 0 is none, as in llama.cpp
    kind = own.get("rope.scaling.type", "none" if factor == 1 else "linear")
    for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if own.get(f"rope.scaling.{name}", 1.0) != 1.0:
            raise ValueError(f"rope.scaling.{name}={own[f'rope.scaling.{name}']} is not supported")
    if divisors is not None and kind == "none":
        return _llama3(divisors, own.get("rope.freq_base", 1e4), head_dim)
    if kind == "yarn":
        settings = {name: own.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
        settings["original_max_position_embeddings"] = own.get("rope.scaling.original_context_length")
        given = {name: value for name, value in settings.items() if value is not None}
        return {"rope_type": "yarn", "factor": factor} | given
    if kind not in ("none", "linear") or divisors is not None:
        raise ValueError(f"rope.scaling.type={kind!r} is not supported; supported: none, linear, yarn")
    return {"rope_type": "default"} if kind == "none" else {"rope_type": "linear", "factor": factor}


def _llama3(divisors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """The settings of Llama 3's scaling, of which GGUF stores only by what each frequency is divided."""
    factor, low, high = float(divisors.max()), LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    rotations = LLAMA3["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((rotations - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError("rope_freqs.weight does not hold the frequencies of Llama 3; others are not supported")
    return LLAMA3 | {"factor": factor}


def make_tokenizer(fields: Mapping[str, Any]) -> Any:
    """The tokenizer, with its chat template, as transformers makes it of the same file.

    Raises:
      ValueError: there is none, or it is one that transformers cannot make.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    if "tokenizer.ggml.tokens" not in fields or "tokenizer.ggml.model" not in fields:
        raise ValueError("it has no tokenizer; convert the model again, with its tokenizer beside it")

    def group(name: str) -> dict[str, Any]:
        known = {theirs: fields.get(f"tokenizer.{key}") for key, theirs in GGUF_TOKENIZER_MAPPING[name].items()}
        return {name: value for name, value in known.items() if value is not None}

    parts, options = group("tokenizer"), group("tokenizer_config")
    if parts["tokenizer_type"] == "llama" or parts.get("pre_tokenizer_type") in ADD_BOS:
        options.setdefault("add_bos_token", True)
    try:
        ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for key, name in SPECIAL_TOKENS.items()}
        options |= {name: None if index is None else parts["tokens"][index] for name, index in ids.items()}
        backend, _ = convert_gguf_tokenizer(fields["general.architecture"], parts)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    except Exception as error:  # The package `tokenizers` raises nothing narrower.
        raise ValueError(f"its tokenizer cannot be read: {error}") from error
