"""What families of models add to the decoder of Llama: fields of `ModelConfig` from those of transformers, and back."""

import math
import reprlib
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from restkv_jax.models.rope_parameters import ROPE_KEYS, freeze_rope, thaw_rope

if TYPE_CHECKING:
    from restkv_jax.models.config import ModelConfig

Fields = dict[str, Any]


class Family(NamedTuple):
    """One `model_type`: its class in transformers, and what differs from Llama.

    `read(hf, rope)` gives fields of `ModelConfig` from a config of transformers and the settings of RoPE that most
    layers have; `write(config)` the fields of `config.json` besides those that all types have; `undeclared`, fields of
    `config.json` that the config class takes without declaring them; `windows`, those that say which layers have a
    sliding window; `rope_kinds`, the kind of layer whose RoPE most layers have, where kinds differ.
    """

    architecture: str
    read: Callable[[Any, Fields], Fields] = lambda hf, rope: {}
    write: Callable[["ModelConfig"], Fields] = lambda config: {}
    undeclared: tuple[str, ...] = ()
    windows: tuple[str, ...] = ()
    rope_kinds: tuple[str, ...] = ()


TEXT_PARTS = {"gemma3": "gemma3_text", "mistral3": "mistral"}
"""Models that also see images, and the type of their language model where it does not name its own."""

SHARED = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
"""Fields that such a model may have instead of its language model."""


def prepare(fields: Mapping) -> Fields:
    """The fields as the config classes take them: early Phi-3 says `su` where transformers says `longrope`.

    Raises:
      ValueError: `no_rope_layers` of fewer layers than the model has.
    """
    kind, scaling, uses_rope = (fields.get(name) for name in ("model_type", "rope_scaling", "no_rope_layers"))
    if kind == "phi3" and isinstance(scaling, Mapping) and scaling.get("type") == "su":
        return dict(fields) | {"rope_scaling": dict(scaling) | {"type": "longrope"}}
    layers = fields.get("num_hidden_layers", 0)
    if kind == "smollm3" and isinstance(uses_rope, list) and len(uses_rope) < layers:
        raise ValueError(f"no_rope_layers has {len(uses_rope)} entries for num_hidden_layers={layers}")
    return dict(fields)


def text_part(fields: Mapping) -> Fields:
    """The fields of the language model, where a configuration is that of a model that also sees images.

    Raises:
      ValueError: no `text_config`, or one that is not an object.
    """
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        return dict(fields)
    text = fields.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config={reprlib.repr(text)} of model_type={kind!r} must be an object")
    shared = {name: fields[name] for name in SHARED if fields.get(name) is not None}
    return {"model_type": TEXT_PARTS[kind], **text, "tie_word_embeddings": True, **shared}


def _positive(name: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}={reprlib.repr(value)} must be a finite number greater than 0")
    return value


def _read_gemma2(hf: Any, rope: Fields) -> Fields:
    if hf.use_bidirectional_attention:
        raise ValueError("use_bidirectional_attention=True is not supported: generation is causal")
    return {
        "norm_adds_one": True,
        "norms_after": True,
        "embedding_multiplier": hf.hidden_size**0.5,
        "attention_multiplier": _positive("query_pre_attn_scalar", hf.query_pre_attn_scalar) ** -0.5,
        "attn_logit_softcapping": hf.attn_logit_softcapping,
        "final_logit_softcapping": hf.final_logit_softcapping,
    }


def _write_gemma2(config: "ModelConfig") -> Fields:
    return _attention_bias(config) | {
        "hidden_activation": config.activation,
        "query_pre_attn_scalar": round(config.logit_scale**-2),
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def _read_gemma3(hf: Any, rope: Fields) -> Fields:
    if hf.attn_logit_softcapping is not None:
        warnings.warn(
            f"attn_logit_softcapping={hf.attn_logit_softcapping} is ignored as in transformers: Gemma 3 has none",
            stacklevel=4,
        )
    ropes = {
        kind: freeze_rope(hf.rope_parameters[kind], hf.max_position_embeddings) for kind in sorted(set(hf.layer_types))
    }
    own = {"query_key_norm": "head", "attn_logit_softcapping": None}
    return _read_gemma2(hf, rope) | own | {"layer_ropes": tuple(ropes[kind] for kind in hf.layer_types)}


def _write_gemma3(config: "ModelConfig") -> Fields:
    kinds = config.layer_types
    ropes = dict(zip(kinds, config.ropes, strict=True))
    own = {kind: thaw_rope(settings) for kind, settings in ropes.items() if settings is not None}
    return _write_gemma2(config) | {"rope_parameters": {"full_attention": thaw_rope(config.rope_parameters)} | own}


def _attention_bias(config: "ModelConfig") -> Fields:
    return {"attention_bias": config.qkv_bias}


def _biases(config: "ModelConfig") -> Fields:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _read_phi3(hf: Any, rope: Fields) -> Fields:
    return {"partial_rotary_factor": rope.get("partial_rotary_factor") or 1.0}


def _write_phi3(config: "ModelConfig") -> Fields:
    rope = thaw_rope(config.rope_parameters)
    # the config class takes this length from beside the RoPE settings
    original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    rope |= {"partial_rotary_factor": config.partial_rotary_factor}
    return {"rope_parameters": rope, "original_max_position_embeddings": original}


def _read_olmo2(hf: Any, rope: Fields) -> Fields:
    return {"norms_before": False, "norms_after": True, "query_key_norm": "projection"}


MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


def _read_granite(hf: Any, rope: Fields) -> Fields:
    return {name: _positive(name, getattr(hf, name)) for name in MULTIPLIERS}


def _write_granite(config: "ModelConfig") -> Fields:
    return _biases(config) | {name: getattr(config, name) for name in MULTIPLIERS}


def _read_smollm3(hf: Any, rope: Fields) -> Fields:
    settings = freeze_rope(rope, hf.max_position_embeddings)
    return {"layer_ropes": tuple(settings if uses else None for uses in hf.no_rope_layers[: hf.num_hidden_layers])}


def _write_smollm3(config: "ModelConfig") -> Fields:
    return _biases(config) | {"no_rope_layers": [int(settings is not None) for settings in config.ropes]}


def _read_ministral3(hf: Any, rope: Fields) -> Fields:
    beta, original = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta < math.inf or original is None:
        raise ValueError(
            f"rope_parameters of model_type='ministral3' have llama_4_scaling_beta={reprlib.repr(beta)} and "
            f"original_max_position_embeddings={reprlib.repr(original)}; numbers of at least 0 are needed"
        )
    if "original_max_position_embeddings" not in ROPE_KEYS[rope["rope_type"]]:
        raise ValueError(
            f"rope_type={rope['rope_type']!r} of model_type='ministral3' is not supported: queries grow by the "
            "original length, which is kept of other scalings, such as yarn"
        )
    return {"llama_4_scaling_beta": beta}


def _write_ministral3(config: "ModelConfig") -> Fields:
    rope = thaw_rope(config.rope_parameters)
    return {"rope_parameters": rope | {"llama_4_scaling_beta": config.llama_4_scaling_beta}}


def _read_qwen3_moe(hf: Any, rope: Fields) -> Fields:
    if hf.decoder_sparse_step != 1 or hf.mlp_only_layers:
        raise ValueError(
            f"decoder_sparse_step={reprlib.repr(hf.decoder_sparse_step)} and "
            f"mlp_only_layers={reprlib.repr(hf.mlp_only_layers)} are not supported: all layers must have experts"
        )
    experts = {name: getattr(hf, name) for name in ("num_experts", "num_experts_per_tok", "norm_topk_prob")}
    return {"query_key_norm": "head"} | experts


def _write_qwen3_moe(config: "ModelConfig") -> Fields:
    return _attention_bias(config) | {
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": config.norm_topk_prob,
    }


def _read_mixtral(hf: Any, rope: Fields) -> Fields:
    return {"num_experts": hf.num_local_experts, "num_experts_per_tok": hf.num_experts_per_tok}


def _write_mixtral(config: "ModelConfig") -> Fields:
    return {"num_local_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok}


ONE_WINDOW = ("sliding_window",)
BY_LAYER = ("sliding_window", "layer_types")
SWITCHED = ("sliding_window", "layer_types", "use_sliding_window")

FAMILIES = {
    "llama": Family("LlamaForCausalLM", write=_biases),
    "mistral": Family("MistralForCausalLM", windows=ONE_WINDOW),
    "qwen2": Family("Qwen2ForCausalLM", windows=SWITCHED),
    "qwen3": Family("Qwen3ForCausalLM", lambda hf, rope: {"query_key_norm": "head"}, _attention_bias, windows=SWITCHED),
    "ministral": Family("MinistralForCausalLM", windows=BY_LAYER),
    "gemma2": Family("Gemma2ForCausalLM", _read_gemma2, _write_gemma2, windows=BY_LAYER),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _read_gemma3,
        _write_gemma3,
        undeclared=("rope_local_base_freq", "sliding_window_pattern"),
        windows=BY_LAYER,
        rope_kinds=("full_attention",),
    ),
    "phi3": Family("Phi3ForCausalLM", _read_phi3, _write_phi3, windows=ONE_WINDOW),
    "olmo2": Family("Olmo2ForCausalLM", _read_olmo2, _attention_bias),
    "granite": Family("GraniteForCausalLM", _read_granite, _write_granite),
    "smollm3": Family("SmolLM3ForCausalLM", _read_smollm3, _write_smollm3, windows=SWITCHED),
    "ministral3": Family("Ministral3ForCausalLM", _read_ministral3, _write_ministral3, windows=ONE_WINDOW),
    "mixtral": Family("MixtralForCausalLM", _read_mixtral, _write_mixtral, windows=ONE_WINDOW),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe, windows=("sliding_window", "use_sliding_window")
    ),
}
"""Supported model types."""
