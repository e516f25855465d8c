"""The static description of a decoder, read from a Hugging Face configuration."""

import copy
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")

UNLIMITED = 2**30
"""A sliding window no prompt reaches: full attention."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a decoder needs to know, in the field names of `transformers`.

    `sliding_windows` holds one width per layer in tokens, `UNLIMITED` where a layer attends to everything.
    `rope_parameters` is a sorted tuple of pairs so that the configuration is hashable, hence static under `jax.jit`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: tuple[tuple[str, Any], ...]
    sliding_windows: tuple[int, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs of dimensions")
        _check_rope_type(dict(self.rope_parameters))


def read_config(source: Any) -> ModelConfig:
    """Reads a `ModelConfig` from a transformers config, a dict, or the path of a `config.json` or its directory.

    Missing fields take transformers' defaults of the architecture; both spellings of the RoPE settings, the older
    `rope_theta` and `rope_scaling` and the newer `rope_parameters`, are understood.

    Raises:
      ValueError: an unsupported architecture, activation or RoPE scaling.
      FileNotFoundError: no configuration at the path.
    """
    fields = _as_dict(source)
    model_type = fields.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"model_type={model_type!r} is not a supported architecture; supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    _check_rope_type(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        hf = AutoConfig.for_model(**fields)
    except (KeyError, StrictDataclassError) as error:
        raise ValueError(f"the configuration is not valid: {error.args[0]}") from error
    if hf.hidden_act != "silu":
        raise ValueError(f"hidden_act={hf.hidden_act!r} is not supported; supported: silu")
    eos = hf.eos_token_id
    return ModelConfig(
        model_type=model_type,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=hf.num_attention_heads,
        num_key_value_heads=hf.num_key_value_heads or hf.num_attention_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        max_position_embeddings=hf.max_position_embeddings,
        rms_norm_eps=hf.rms_norm_eps,
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        rope_parameters=tuple(sorted((k, v) for k, v in hf.rope_parameters.items() if v is not None and k != "type")),
        sliding_windows=_sliding_windows(hf),
        qkv_bias=model_type == "qwen2" or bool(getattr(hf, "attention_bias", False)),
        output_bias=model_type != "qwen2" and bool(getattr(hf, "attention_bias", False)),
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        query_key_norm=model_type == "qwen3",
        initializer_range=hf.initializer_range,
        bos_token_id=hf.bos_token_id,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,),
        pad_token_id=hf.pad_token_id,
    )


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """Returns the `config.json` contents from which `transformers` builds the same architecture."""
    architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[config.model_type]
    same = [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "initializer_range",
        "bos_token_id",
        "pad_token_id",
    ]
    fields = {name: getattr(config, name) for name in same} | {
        "architectures": [f"{architecture}ForCausalLM"],
        "hidden_act": "silu",
        "rope_parameters": dict(config.rope_parameters),
        "eos_token_id": list(config.eos_token_ids) or None,
    }
    if config.model_type in ("llama", "qwen3"):
        fields["attention_bias"] = config.qkv_bias
    if config.model_type == "llama":
        fields["mlp_bias"] = config.mlp_bias
    widths = set(config.sliding_windows) - {UNLIMITED}
    if config.model_type == "mistral":
        fields["sliding_window"] = widths.pop() if widths else None
    elif config.model_type in ("qwen2", "qwen3"):
        kinds = ["full_attention" if w == UNLIMITED else "sliding_attention" for w in config.sliding_windows]
        fields |= {"use_sliding_window": bool(widths), "layer_types": kinds}
        fields |= {"sliding_window": widths.pop()} if widths else {}
    return fields


def _check_rope_type(settings: Mapping) -> None:
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ValueError(f"rope_type={rope_type!r} is not supported; supported: {', '.join(SUPPORTED_ROPE_TYPES)}")


def _as_dict(source: Any) -> dict[str, Any]:
    if isinstance(source, Mapping):
        # transformers fills in nested dicts where they are
        return copy.deepcopy(dict(source))
    if hasattr(source, "to_dict"):
        return source.to_dict()
    path = pathlib.Path(source)
    path = path / "config.json" if path.is_dir() else path
    return json.loads(path.read_text())


def _sliding_windows(hf: Any) -> tuple[int, ...]:
    width = getattr(hf, "sliding_window", None)
    kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    return tuple(width if width and kind == "sliding_attention" else UNLIMITED for kind in kinds)
