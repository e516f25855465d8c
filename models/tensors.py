"""Where each parameter of the decoder stands in a Hugging Face checkpoint."""

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import einops
import jax
import numpy as np
from flax import traverse_util

from restkv_jax.models.build import init_params
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.stored import Index, StoredTensor

TENSORS = {
    "embedding": ("model.embed_tokens.weight", "v m -> v m"),
    "final_norm": ("model.norm.weight", "m -> m"),
    "unembedding": ("lm_head.weight", "v m -> v m"),
    "layers.input_norm": ("model.layers.{}.input_layernorm.weight", "m -> m"),
    "layers.query_projection": ("model.layers.{}.self_attn.q_proj.weight", "(h d) m -> m h d"),
    "layers.key_projection": ("model.layers.{}.self_attn.k_proj.weight", "(k d) m -> m k d"),
    "layers.value_projection": ("model.layers.{}.self_attn.v_proj.weight", "(k d) m -> m k d"),
    "layers.output_projection": ("model.layers.{}.self_attn.o_proj.weight", "m (h d) -> h d m"),
    "layers.query_bias": ("model.layers.{}.self_attn.q_proj.bias", "(h d) -> h d"),
    "layers.key_bias": ("model.layers.{}.self_attn.k_proj.bias", "(k d) -> k d"),
    "layers.value_bias": ("model.layers.{}.self_attn.v_proj.bias", "(k d) -> k d"),
    "layers.output_bias": ("model.layers.{}.self_attn.o_proj.bias", "m -> m"),
    "layers.query_norm": ("model.layers.{}.self_attn.q_norm.weight", "d -> d"),
    "layers.key_norm": ("model.layers.{}.self_attn.k_norm.weight", "d -> d"),
    "layers.attention_output_norm": ("model.layers.{}.post_attention_layernorm.weight", "m -> m"),
    "layers.mlp_output_norm": ("model.layers.{}.post_feedforward_layernorm.weight", "m -> m"),
    "layers.post_attention_norm": ("model.layers.{}.post_attention_layernorm.weight", "m -> m"),
    "layers.gate_projection": ("model.layers.{}.mlp.gate_proj.weight", "f m -> m f"),
    "layers.up_projection": ("model.layers.{}.mlp.up_proj.weight", "f m -> m f"),
    "layers.down_projection": ("model.layers.{}.mlp.down_proj.weight", "m f -> f m"),
    "layers.router": ("model.layers.{}.mlp.gate.weight", "e m -> m e"),
    "layers.expert_gate_projection": ("model.layers.{}.mlp.experts.{}.gate_proj.weight", "f m -> m f"),
    "layers.expert_up_projection": ("model.layers.{}.mlp.experts.{}.up_proj.weight", "f m -> m f"),
    "layers.expert_down_projection": ("model.layers.{}.mlp.experts.{}.down_proj.weight", "m f -> f m"),
    "layers.gate_bias": ("model.layers.{}.mlp.gate_proj.bias", "f -> f"),
    "layers.up_bias": ("model.layers.{}.mlp.up_proj.bias", "f -> f"),
    "layers.down_bias": ("model.layers.{}.mlp.down_proj.bias", "m -> m"),
}
"""Parameter: its Hugging Face name, with places for the numbers of layer and expert, and the change of axes."""

NORMS_AROUND = {"layers.post_attention_norm": "model.layers.{}.pre_feedforward_layernorm.weight"}
"""Where norms stand before and after, Llama's name is that of the one after attention."""

MIXTRAL = {
    "layers.router": "model.layers.{}.block_sparse_moe.gate.weight",
    "layers.expert_gate_projection": "model.layers.{}.block_sparse_moe.experts.{}.w1.weight",
    "layers.expert_up_projection": "model.layers.{}.block_sparse_moe.experts.{}.w3.weight",
    "layers.expert_down_projection": "model.layers.{}.block_sparse_moe.experts.{}.w2.weight",
}

RENAMED = {"gemma2": NORMS_AROUND, "gemma3_text": NORMS_AROUND, "mixtral": MIXTRAL}
"""Model type: parameters that have other names there."""

FUSED = {
    "phi3": {
        "self_attn.qkv_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    }
}
"""Model type: tensors of a layer that hold several others, rows below rows."""

HARMLESS = re.compile(
    r"model\.((layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|(vision_tower|multi_modal_projector)\..*)"
)
"""Tensors that a language model does not need: rotary frequencies, and what reads images beside it."""

LAYER = re.compile(r"(model\.layers\.\d+\.)(.*)")
"""What stands before the names of a layer's tensors, and the rest."""

WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile and FSDP put into names, anywhere."""

PREFIX = re.compile(r"(?:(?:module|language_model|model)\.)*")
"""What stands before the names of a model that is part of another, or is saved without its head."""


class Tensor(NamedTuple):
    """One tensor of a checkpoint: its `shape` there, the parameter it belongs to, its place in that.

    The place is the numbers of layer and expert, as far as the parameter has such axes.
    """

    shape: tuple[int, ...]
    parameter: str
    place: tuple[int, ...]


def parameter_shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters by dotted name; those of the layers carry a leading axis `L`."""
    return _parameter_shapes(model.config)


@functools.cache
def _parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    params = jax.eval_shape(lambda key: init_params(Decoder(config), key), jax.random.key(0))
    return {name: leaf.shape for name, leaf in flatten(params).items()}


def flatten(params: Any) -> dict[str, Any]:
    """Nested parameters to a flat dict with dotted names."""
    return traverse_util.flatten_dict(params, sep=".")


def unflatten(params: dict[str, Any]) -> Any:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(params, sep=".")


def checkpoint_tensors(model: Decoder) -> dict[str, Tensor]:
    """Every tensor that a Hugging Face checkpoint of the model holds, by name."""
    tensors = {}
    for parameter, shape in parameter_shapes(model).items():
        name = RENAMED.get(model.config.model_type, {}).get(parameter, TENSORS[parameter][0])
        stacked = name.count("{}")
        one = jax.ShapeDtypeStruct(shape[stacked:], np.float32)
        found = jax.eval_shape(lambda x, parameter=parameter: to_checkpoint(parameter, x), one).shape
        for place in np.ndindex(shape[:stacked]):
            tensors[name.format(*place)] = Tensor(found, parameter, place)
    return tensors


def fused_names(model_type: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The tensors of a file, and which of those that `checkpoint_tensors` names each holds; mostly itself."""
    whole_of = {part: (fused, parts) for fused, parts in FUSED.get(model_type, {}).items() for part in parts}
    found = {}
    for name in names:
        matched = LAYER.fullmatch(name)
        layer, suffix = ("", name) if matched is None else matched.groups()
        fused, parts = whole_of.get(suffix, (suffix, (suffix,)))
        found[layer + fused] = tuple(layer + part for part in parts)
    return found


def split_fused(
    model_type: str, tensors: Mapping[str, StoredTensor], expected: Mapping[str, Tensor]
) -> dict[str, StoredTensor]:
    """Puts views of their rows in the place of tensors that hold several others.

    Raises:
      ValueError: a tensor with another number of rows than its parts have together.
    """
    split = dict(tensors)
    for name, parts in fused_names(model_type, expected).items():
        if parts == (name,) or name not in tensors:
            continue
        fused = split.pop(name)
        rows = [expected[part].shape[0] for part in parts]
        if fused.shape[0] != sum(rows):
            raise ValueError(
                f"tensor {name!r} has the wrong shape: found {fused.shape}, expected {sum(rows)} rows from "
                "config.json; weights and config.json belong to different models"
            )
        starts = itertools.accumulate(rows, initial=0)
        split |= {part: fused.rows(start, size) for part, start, size in zip(parts, starts, rows, strict=False)}
    return split


def to_checkpoint(parameter: str, array: Any) -> Any:
    """One layer's parameter in the axes of the checkpoint."""
    theirs, ours = TENSORS[parameter][1].split(" -> ")
    return einops.rearrange(array, f"{ours} -> {theirs}")


def checkpoint_index(parameter: str, index: Index, shape: tuple[int, ...]) -> Index:
    """Where a part of one layer's parameter of the given shape stands in the checkpoint's tensor.

    Of axes that are one there, the first alone may be a part.
    """
    theirs, ours = TENSORS[parameter][1].split(" -> ")
    axes = dict(zip(ours.split(), zip(index, shape, strict=True), strict=True))
    found = []
    for group in re.findall(r"\(([^)]*)\)|(\S+)", theirs):
        first, *others = "".join(group).split()
        width = math.prod(axes[letter][1] for letter in others)
        part, size = axes[first]
        start, stop, _ = part.indices(size)
        found.append(slice(start * width, stop * width))
    return tuple(found)


def plain_name(stored: str) -> str:
    """The name of a tensor in the layout of transformers' causal language models, whatever was wrapped around it."""
    name = PREFIX.sub("", WRAPPERS.sub("", stored), count=1)
    return name if name.startswith("lm_head.") else f"model.{name}"


def plain_names(stored: Iterable[str], source: Any) -> dict[str, str]:
    """The stored names by their plain ones.

    Raises:
      ValueError: two tensors that would be the same.
    """
    names: dict[str, str] = {}
    for name in stored:
        plain = plain_name(name)
        if plain in names:
            raise ValueError(f"{source}: tensors {names[plain]!r} and {name!r} are both {plain!r}; keep one of them")
        names[plain] = name
    return names


def check_tensors(
    expected: Mapping[str, Tensor], found: Mapping[str, tuple[int, ...]], source: Any, stored: Mapping[str, str]
) -> None:
    """Refuses a checkpoint whose tensors are not those of the model.

    Args:
      expected: from `checkpoint_tensors`.
      found: shapes by name.
      source: the directory, for the messages.
      stored: the names in the files by those in `found`, for the messages.

    Raises:
      ValueError: a tensor is missing, has another shape, or is one that the model does not know.
    """
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(
            f"{source}: the weights lack {some(missing)}; the files are incomplete or belong to another config.json"
            f"{_stored_instead(expected, stored)}"
        )
    for name, tensor in expected.items():
        if tuple(found[name]) != tensor.shape:
            raise ValueError(
                f"{source}: tensor {stored.get(name, name)!r} has the wrong shape: found {tuple(found[name])}, "
                f"expected {tensor.shape} from config.json; weights and config.json belong to different models"
            )
    unknown = [stored.get(name, name) for name in found if name not in expected and not HARMLESS.fullmatch(name)]
    if unknown:
        raise ValueError(
            f"{source}: unknown tensors {some(unknown)}; ignoring them would change the model, so weights and "
            "config.json must belong together (adapters must be merged first)"
        )


def _stored_instead(expected: Mapping[str, Tensor], stored: Mapping[str, str]) -> str:
    others = [name for place, name in stored.items() if place not in expected and not HARMLESS.fullmatch(place)]
    return f"; stored are {some(others)}" if others else ""


def some(names: Iterable[str], limit: int = 4) -> str:
    """Names for a message, the first few of them."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name[:200]) for name in names[:limit]) + more
