"""Checkpoints that are refused, by the name of what they are."""

import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from restkv_jax.models.tensors import some

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
QUANTISED = {
    "GPTQ or AWQ": r"\.(qweight|qzeros|g_idx)",
    "fp8 or int8 with scales": r"\.(weight_scale|weight_scale_inv|input_scale|activation_scale|[qkv]_scale)",
    "compressed-tensors": r"\.(weight_packed|weight_shape|weight_zero_point)",
    "bitsandbytes": r"\.(absmax|nested_absmax|quant_map|nested_quant_map|SCB)|\.quant_state\..*",
    "MLX": r"\.(scales|biases)",
}
"""Format: how its additional tensors are named."""

ADAPTER = re.compile(r".*\.?(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save)\b.*")


def refuse_adapter(directory: pathlib.Path) -> None:
    """Refuses an adapter, with or without the model that it changes.

    Raises:
      ValueError: the directory holds one.
    """
    found = [name for name in ("adapter_config.json", "adapter_model.safetensors") if (directory / name).is_file()]
    if found:
        raise ValueError(
            f"{directory} holds an adapter ({', '.join(found)}), which is not supported: merge it into its base model "
            "with peft's merge_and_unload and save that, or remove the adapter's files to load the model without it"
        )


def refuse_quantised(directory: pathlib.Path, fields: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuses quantised weights and adapters by what the configuration or the tensors' names say.

    Args:
      directory: for the messages.
      fields: of `config.json`.
      names: of all tensors.

    Raises:
      ValueError: the format that they are in.
    """
    for key in ("quantization_config", "quantization"):
        if fields.get(key):
            settings = fields[key] if isinstance(fields[key], dict) else {}
            method = settings.get("quant_method") or ("MLX" if key == "quantization" else "an unknown method")
            raise ValueError(
                f"{directory}: quantised weights ({key} in config.json: {str(method)[:50]}) are not supported; use the "
                "original ones"
            )
    names = list(names)
    for method, pattern in QUANTISED.items():
        found = [name for name in names if re.search(rf"(?:{pattern})$", name)]
        if found:
            raise ValueError(
                f"{directory}: quantised weights ({method}: {some(found)}) are not supported; use the original ones"
            )
    adapters = [name for name in names if ADAPTER.fullmatch(name)]
    if adapters:
        raise ValueError(
            f"{directory}: unknown tensors {some(adapters)}, which are those of an adapter; merge it into its base "
            "model with peft's merge_and_unload first"
        )


def refuse_pickled(directory: pathlib.Path, names: Iterable[str]) -> None:
    """Refuses pickled weights among the names of files.

    Raises:
      ValueError: there are some.
    """
    pickled = sorted({name for name in names for pattern in PICKLED if pathlib.PurePath(name).match(pattern)})
    if pickled:
        raise ValueError(
            f"{directory} has only pickled weights ({', '.join(pickled[:4])}): refused, since unpickling runs code "
            "from the file; convert them to safetensors where you trust them: transformers' save_pretrained does"
        )


def missing_weights(directory: pathlib.Path) -> FileNotFoundError:
    """Says what a directory without `model.safetensors` and its index holds instead."""
    names = {path.name for path in directory.iterdir()}
    others = sorted(name for name in names if name.endswith(".safetensors"))
    text = f"{directory} has no weights: neither model.safetensors nor model.safetensors.index.json"
    if any(name.startswith("consolidated") for name in others) or "params.json" in names:
        return FileNotFoundError(
            f"{text}; {', '.join(others[:4]) or 'params.json'} belongs to Mistral's own format, which is not "
            "supported: take the files in the format of transformers from the same repository"
        )
    if others:
        return FileNotFoundError(
            f"{text}, but {', '.join(others[:4])}; name a single file model.safetensors, or download the index "
            "of shards"
        )
    return FileNotFoundError(text)
