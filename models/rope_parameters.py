"""Settings of the rotary position embeddings: which ones count, and which values give a rotation at all."""

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor", "original_max_position_embeddings"),
}
"""Scaling: the settings that it reads besides `rope_type` and `rope_theta`."""

REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}

RANGES = {
    "rope_theta": (1, 1e30),
    "factor": (1, 1e6),
    "low_freq_factor": (1e-6, 1e9),
    "high_freq_factor": (1e-6, 1e9),
    "attention_factor": (1e-6, 1e9),
    "beta_fast": (1e-6, 1e9),
    "beta_slow": (1e-6, 1e9),
    "mscale": (0, 1e9),
    "mscale_all_dim": (0, 1e9),
    "short_factor": (1e-6, 1e9),
    "long_factor": (1e-6, 1e9),
}
"""Setting: least and greatest number that gives a rotation in float32."""


def check_raw_rope(fields: Mapping) -> None:
    """Checks what a `config.json` says of RoPE before transformers' classes read it.

    Raises:
      ValueError: settings that are not an object, an unknown scaling, a number out of range.
    """
    _check_values({name: fields.get(name) for name in ("rope_theta", "original_max_position_embeddings")})
    for name in ("rope_parameters", "rope_scaling"):
        settings = fields.get(name)
        if settings is not None and not isinstance(settings, Mapping):
            raise ValueError(f"{name}={reprlib.repr(settings)} must be an object or null")
        if settings:
            _check_type(settings.get("rope_type", settings.get("type", "default")))
            _check_values(settings)


def one_rope(settings: Mapping, layer_types: Iterable[str]) -> dict[str, Any]:
    """The settings of all layers, which may be given per layer type where they agree.

    Args:
      settings: `rope_parameters` of a transformers config.
      layer_types: the kinds of layers that the model has.

    Raises:
      ValueError: settings that differ from layer to layer, or that a kind of layer lacks.
    """
    kinds = sorted(set(layer_types))
    if not any(kind in settings for kind in kinds):
        return dict(settings)
    each = [settings.get(kind) for kind in kinds]
    first = each[0]
    if not isinstance(first, Mapping) or any(one != first for one in each):
        raise ValueError(
            f"rope_parameters={reprlib.repr(dict(settings))} differ between the layer types {', '.join(kinds)}, which "
            "is not supported for this model_type"
        )
    return dict(first)


def freeze_rope(settings: Mapping, max_position_embeddings: int) -> tuple[tuple[str, Any], ...]:
    """The settings that count for their scaling, as a sorted, hashable tuple of pairs.

    Null is left out; the factor of `yarn` is then the ratio of the longest to the original length.
    """
    kind = settings.get("rope_type", "default")
    _check_type(kind)
    counting = {name: settings.get(name) for name in ("rope_type", "rope_theta", *ROPE_KEYS[kind])}
    if kind == "yarn" and counting["factor"] is None:
        original = counting["original_max_position_embeddings"] or max_position_embeddings
        counting["factor"] = max_position_embeddings / original
    frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in counting.items()}
    return tuple(sorted((name, value) for name, value in frozen.items() if value is not None))


def thaw_rope(pairs: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The inverse of `freeze_rope`, as JSON holds it."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}


def check_rope(settings: Mapping, head_dim: int) -> None:
    """Refuses settings that give no rotation.

    Args:
      settings: of one scaling.
      head_dim: dimensions that are turned.

    Raises:
      ValueError: an unknown scaling; a base, factor or length that is missing, not a number or out of range.
    """
    kind = settings.get("rope_type", "")
    _check_type(kind)
    for name in ("rope_theta", *REQUIRED.get(kind, ())):
        if settings.get(name) is None:
            raise ValueError(f"rope_parameters of rope_type={kind!r} lack {name!r}")
    _check_values(settings)
    if kind == "dynamic" and head_dim <= 2:
        raise ValueError(f"head_dim={head_dim} must be more than 2 for rope_type='dynamic'")
    if kind == "llama3" and not settings["low_freq_factor"] < settings["high_freq_factor"]:
        raise ValueError(
            f"low_freq_factor={settings['low_freq_factor']} must be less than "
            f"high_freq_factor={settings['high_freq_factor']}"
        )
    for name in ("short_factor", "long_factor"):
        if name in settings and len(settings[name]) != head_dim // 2:
            raise ValueError(
                f"{name} has {len(settings[name])} numbers, but the heads have head_dim={head_dim}: expected "
                f"{head_dim // 2}, one per pair of dimensions"
            )


def context_length(settings: Mapping, max_position_embeddings: int) -> int:
    """Tokens that a model is configured for, its RoPE scaling included.

    The factor of `yarn` and `longrope` is the ratio of the extended to the original length. That of `llama3` is not
    (Llama 3.2: factor 32 from 8,192 to 131,072), so it counts only where `max_position_embeddings` is the original
    length itself. `linear` and `dynamic` say nothing of the sort.
    """
    original = settings.get("original_max_position_embeddings", max_position_embeddings)
    kind = settings["rope_type"]
    if kind in ("yarn", "longrope") or (kind == "llama3" and original >= max_position_embeddings):
        return max(max_position_embeddings, round(settings.get("factor", 1) * original))
    return max_position_embeddings


def _check_type(kind: Any) -> None:
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ValueError(f"rope_type={reprlib.repr(kind)} is not supported; supported: {', '.join(ROPE_KEYS)}")


def _check_values(settings: Mapping) -> None:
    """Checks those settings that are there and not null."""
    for name, bounds in RANGES.items():
        value = settings.get(name)
        if name in ("short_factor", "long_factor") and isinstance(value, (list, tuple)):
            for number in value:
                _check_number(name, number, *bounds)
        elif value is not None:
            _check_number(name, value, *bounds)
    length = settings.get("original_max_position_embeddings")
    if length is not None and (type(length) is not int or not 2 <= length < 2**31):
        raise ValueError(f"original_max_position_embeddings={reprlib.repr(length)} must be an integer of at least 2")
    if not isinstance(settings.get("truncate", True), bool):
        raise ValueError(f"truncate={reprlib.repr(settings['truncate'])} must be true or false")
    if settings.get("rope_theta") == 1:
        raise ValueError("rope_theta=1 must be greater than 1: all pairs of dimensions would turn alike")


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        raise ValueError(f"{name}={reprlib.repr(value)} must be a number from {least:g} to {most:g}")
