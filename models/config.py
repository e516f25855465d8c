"""The static description of a decoder, read from a Hugging Face configuration."""

import copy
import dataclasses
import inspect
import math
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any, Literal

from restkv_jax.models.families import FAMILIES, prepare, text_part
from restkv_jax.models.files import one_line, read_json
from restkv_jax.models.ignored_options import warn_of_ignored, warn_of_ignored_rope
from restkv_jax.models.rope_parameters import (
    check_raw_rope,
    check_rope,
    context_length,
    freeze_rope,
    one_rope,
    thaw_rope,
)
from restkv_jax.models.sampling_defaults import SamplingDefaults

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_pytorch_tanh"}

COMMON = ("head_dim", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
ROPE_SPELLINGS = ("rope_theta", "rope_scaling", "original_max_position_embeddings", "partial_rotary_factor")
"""Fields of every model type: those that its config class may not declare, and RoPE beside `rope_parameters`."""

LARGEST = {
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "hidden_size": 2**24,
    "intermediate_size": 2**24,
    "vocab_size": 2**24,
    "num_experts": 2**16,
    "num_local_experts": 2**16,
    "num_experts_per_tok": 2**16,
    "moe_intermediate_size": 2**24,
    "max_position_embeddings": 2**31 - 1,
}
"""Sizes that a configuration may ask for, each at least 1; far beyond those of any model."""

UNLIMITED = 2**30
"""A sliding window no prompt reaches: full attention."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a decoder needs to know, in the field names of `transformers`.

    `sliding_windows` holds one width per layer in tokens, `UNLIMITED` where a layer attends to everything.
    `rope_parameters` is a sorted tuple of pairs so that the configuration is hashable, hence static under `jax.jit`;
    where layers differ, `layer_ropes` holds one of them per layer, None where a layer has no RoPE.

    A layer's attention, and its MLP, add to the residual stream `residual_multiplier` times their output: of a normed
    input if `norms_before`, itself normed if `norms_after`. A norm's weight is `1 + w` if `norm_adds_one`. Queries and
    keys are normed over a `head`, or over the whole `projection`. Logits of attention are multiplied by
    `attention_multiplier`, None for `1 / sqrt(head_dim)`, and capped at `attn_logit_softcapping`; those of the next
    token are divided by `logits_scaling` and capped at `final_logit_softcapping`. RoPE turns the first
    `partial_rotary_factor` of a head's dimensions. With `num_experts`, the MLP is a mixture of experts of
    `intermediate_size` each. `sampling` is how the model's makers draw tokens, offered and never used unasked.

    Raises:
      ValueError: sizes, ids or settings that no model can have.
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
    query_key_norm: Literal["head", "projection"] | None = None
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    sampling: SamplingDefaults = dataclasses.field(default_factory=SamplingDefaults)
    activation: str = "silu"
    norm_adds_one: bool = False
    norms_before: bool = True
    norms_after: bool = False
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    partial_rotary_factor: float = 1.0
    layer_ropes: tuple[tuple[tuple[str, Any], ...] | None, ...] | None = None
    llama_4_scaling_beta: float = 0.0
    num_experts: int | None = None
    num_experts_per_tok: int = 1
    norm_topk_prob: bool = True

    def __post_init__(self):
        _check_sizes(vars(self))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs of dimensions")
        for name in ("rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}={value} must be a finite number of at least 0")
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be a finite number greater than 0, or null for no cap")
        if self.num_experts is not None and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must be from 1 to num_experts={self.num_experts}"
            )
        if self.rotary_dim < 2 or self.rotary_dim > self.head_dim or self.rotary_dim % 2:
            raise ValueError(
                f"partial_rotary_factor={self.partial_rotary_factor} of head_dim={self.head_dim} must give an even "
                "number of dimensions"
            )
        for rope in {self.rope_parameters, *self.ropes} - {None}:
            check_rope(dict(rope), self.rotary_dim)
        _check_windows(self.sliding_windows)
        for token in self.eos_token_ids:
            _check_id("eos_token_id", token, self.vocab_size)
        for name in ("bos_token_id", "pad_token_id"):
            if getattr(self, name) is not None:
                _check_id(name, getattr(self, name), self.vocab_size)

    @property
    def context_length(self) -> int:
        """Tokens that the model is configured for: `max_position_embeddings`, or what RoPE scaling extends it to."""
        return context_length(dict(self.rope_parameters), self.max_position_embeddings)

    @property
    def ropes(self) -> tuple[tuple[tuple[str, Any], ...] | None, ...]:
        """The settings of RoPE of every layer, None where it has none."""
        return self.layer_ropes or (self.rope_parameters,) * self.num_hidden_layers

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def logit_scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    @property
    def widest_window(self) -> int:
        """The widest sliding window of any layer, in tokens; 0 where all layers attend to everything."""
        return max((width for width in self.sliding_windows if width != UNLIMITED), default=0)

    @property
    def layer_types(self) -> list[str]:
        """What transformers calls the layers with and without a sliding window."""
        return ["full_attention" if width == UNLIMITED else "sliding_attention" for width in self.sliding_windows]


def read_config(source: Any) -> ModelConfig:
    """Reads a `ModelConfig` from a transformers config, a dict, or the path of a `config.json` or its directory.

    Missing fields take transformers' defaults of the model type; both spellings of the RoPE settings, the older
    `rope_theta` and `rope_scaling` and the newer `rope_parameters`, are understood. Which fields count is a property
    of the model type, as in transformers: others are ignored, with a warning if another type would heed them. Of a
    model that also sees images, the language model is read.

    Raises:
      ValueError: an unsupported architecture, activation or RoPE scaling; a field that is not of its type or range.
      FileNotFoundError: no configuration at the path.
    """
    fields = text_part(_as_dict(source))
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type={reprlib.repr(model_type)} is not a supported architecture; supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    # transformers' own classes would divide by these sizes and make lists of that many entries
    _check_sizes(fields)
    fields = prepare(fields)
    check_raw_rope(fields)
    hf = _hugging_face_config(model_type, fields)
    activation = getattr(hf, "hidden_activation", None) or getattr(hf, "hidden_act", None)
    if activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act={reprlib.repr(activation)} is not supported; supported: {', '.join(ACTIVATIONS)}")
    rope = one_rope(hf.rope_parameters, family.rope_kinds or getattr(hf, "layer_types", None) or ())
    own = family.read(hf, rope)
    if "partial_rotary_factor" not in own:
        warn_of_ignored_rope(model_type, rope)
    attention_bias = bool(getattr(hf, "attention_bias", False))
    return ModelConfig(
        model_type=model_type,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=getattr(hf, "moe_intermediate_size", None) or hf.intermediate_size,
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=hf.num_attention_heads,
        num_key_value_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        max_position_embeddings=hf.max_position_embeddings,
        rms_norm_eps=hf.rms_norm_eps,
        tie_word_embeddings=hf.tie_word_embeddings,
        rope_parameters=freeze_rope(rope, hf.max_position_embeddings),
        sliding_windows=_sliding_windows(hf),
        qkv_bias=model_type == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        initializer_range=hf.initializer_range,
        bos_token_id=hf.bos_token_id,
        eos_token_ids=as_ids(hf.eos_token_id),
        pad_token_id=hf.pad_token_id,
        activation=ACTIVATIONS[activation],
        **own,
    )


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """Returns the `config.json` contents from which `transformers` builds the same architecture."""
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
        "architectures": [FAMILIES[config.model_type].architecture],
        "hidden_act": config.activation,
        "rope_parameters": thaw_rope(config.rope_parameters),
        "eos_token_id": list(config.eos_token_ids) or None,
    }
    return fields | _window_fields(config) | FAMILIES[config.model_type].write(config)


def _window_fields(config: ModelConfig) -> dict[str, Any]:
    """Which layers have a sliding window, in the spelling of the model type; nothing for Llama, which has none."""
    widths = set(config.sliding_windows) - {UNLIMITED}
    family = FAMILIES[config.model_type]
    fields: dict[str, Any] = {}
    if "use_sliding_window" in family.windows:
        fields["use_sliding_window"] = bool(widths)
    if "layer_types" in family.windows:
        fields["layer_types"] = config.layer_types
    if widths or family.windows == ("sliding_window",):
        fields["sliding_window"] = widths.pop() if widths else None
    return fields


def as_ids(value: Any) -> tuple[Any, ...]:
    """Token ids, of which a configuration holds none, one or a list."""
    return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _as_dict(source: Any) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    if hasattr(source, "to_dict"):
        return source.to_dict()
    path = pathlib.Path(source)
    return read_json(path / "config.json" if path.is_dir() else path)


def _hugging_face_config(model_type: str, fields: dict[str, Any]) -> Any:
    """The config class of transformers, given only the fields that its model type has."""
    from transformers import AutoConfig, PreTrainedConfig

    config_class = type(AutoConfig.for_model(model_type))
    own = (_arguments(config_class) - _arguments(PreTrainedConfig)) | {*COMMON, *ROPE_SPELLINGS}
    own |= set(FAMILIES[model_type].undeclared)
    warn_of_ignored(model_type, {name: value for name, value in fields.items() if name not in own}, fields)
    try:
        # transformers fills in nested dicts where they are
        hf = config_class(**copy.deepcopy({name: value for name, value in fields.items() if name in own}))
        # `original_max_position_embeddings` beside the RoPE settings is only heeded once all fields are set
        hf.standardize_rope_params()
    except Exception as error:
        raise ValueError(f"the configuration is not valid: {one_line(error)}") from error
    return hf


def _arguments(config_class: type) -> set[str]:
    return set(inspect.signature(config_class).parameters)


def _sliding_windows(hf: Any) -> tuple[int, ...]:
    """One width per layer, for the model types that have windows."""
    width = getattr(hf, "sliding_window", None)
    kinds = getattr(hf, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if width is None else "sliding_attention"] * hf.num_hidden_layers
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(
            f"layer_types: {reprlib.repr(unknown[0])} is not supported; supported: full_attention, sliding_attention"
        )
    if "sliding_attention" in kinds and width is None:
        raise ValueError(
            "layer_types name 'sliding_attention', but the configuration has no width for it: sliding_window is null "
            "or use_sliding_window is false"
        )
    return tuple(UNLIMITED if kind == "full_attention" or width is None else width for kind in kinds)


def _check_sizes(fields: Mapping) -> None:
    for name, largest in LARGEST.items():
        value = fields.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= largest):
            raise ValueError(f"{name}={reprlib.repr(value)} must be an integer from 1 to {largest}")


def _check_windows(widths: tuple[int, ...]) -> None:
    for width in widths:
        if type(width) is not int or not 1 <= width < 2**31:
            raise ValueError(
                f"sliding_window={reprlib.repr(width)} must be an integer of at least 1, or null for full attention"
            )


def _check_id(name: str, token: Any, vocab_size: int) -> None:
    if type(token) is not int or not 0 <= token < vocab_size:
        raise ValueError(
            f"{name}={reprlib.repr(token)} must be an integer from 0 to {vocab_size - 1}, the last token of the "
            "vocabulary; null means none"
        )
