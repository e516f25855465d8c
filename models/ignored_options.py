"""Options left over in a configuration: ignored where transformers ignores them, but not in silence."""

import reprlib
import warnings
from typing import Any

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "qkv_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (0, -1),
    "use_sliding_window": (True,),
    "attention_chunk_size": (),
    "no_rope_layers": (),
    "no_rope_layer_interval": (0,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "clip_qkv": (),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "dual_chunk_attention_config": (),
    "auto_map": (),
}
"""Options that only some model types have, and the values besides null that change nothing where one has it."""


def warn_of_ignored(model_type: str, unknown: dict[str, Any], fields: dict[str, Any]) -> None:
    """Warns of options that a model type does not have and another would heed.

    Args:
      model_type: of the model.
      unknown: the fields of its configuration that the type does not have.
      fields: all of them.
    """
    ignored = {name: value for name, value in unknown.items() if not _is_neutral(name, value)}
    if fields.get("sliding_window") is None or "sliding_window" in unknown:
        ignored.pop("use_sliding_window", None)
    if fields.get("use_sliding_window") is False:
        ignored.pop("sliding_window", None)
    if ignored:
        named = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in ignored.items())
        warnings.warn(
            f"the configuration has options that models of type {model_type!r} do not have, ignored here as in "
            f"transformers: {named}",
            stacklevel=4,
        )


def _is_neutral(name: str, value: Any) -> bool:
    if name == "layer_types":
        return not isinstance(value, list) or all(kind == "full_attention" for kind in value)
    if name == "no_rope_layers" and isinstance(value, list):
        return all(value)
    return value is None or name not in NEUTRAL or value in NEUTRAL[name]


def warn_of_ignored_rope(model_type: str, rope: dict[str, Any]) -> None:
    """Warns of RoPE settings without effect in transformers: `partial_rotary_factor`, and some for each layer type.

    Raises:
      ValueError: a scaling with which transformers heeds `partial_rotary_factor`.
    """
    part, kind = rope.get("partial_rotary_factor"), rope.get("rope_type", "default")
    ignored = {name: value for name, value in rope.items() if isinstance(value, dict)}
    if part not in (None, 1):
        if kind != "default":
            raise ValueError(f"partial_rotary_factor={reprlib.repr(part)} is not supported with rope_type={kind!r}")
        ignored["partial_rotary_factor"] = part
    if ignored:
        named = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in ignored.items())
        warnings.warn(
            f"RoPE settings without effect for models of type {model_type!r} are ignored as in transformers: {named}",
            stacklevel=3,
        )
