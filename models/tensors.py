"""Where each parameter of the decoder stands in a Hugging Face checkpoint."""

import functools
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
    "layers.post_attention_norm": ("model.layers.{}.post_attention_layernorm.weight", "m -> m"),
    "layers.gate_projection": ("model.layers.{}.mlp.gate_proj.weight", "f m -> m f"),
    "layers.up_projection": ("model.layers.{}.mlp.up_proj.weight", "f m -> m f"),
    "layers.down_projection": ("model.layers.{}.mlp.down_proj.weight", "m f -> f m"),
    "layers.gate_bias": ("model.layers.{}.mlp.gate_proj.bias", "f -> f"),
    "layers.up_bias": ("model.layers.{}.mlp.up_proj.bias", "f -> f"),
    "layers.down_bias": ("model.layers.{}.mlp.down_proj.bias", "m -> m"),
}
"""Parameter: its Hugging Face name, with a place for the layer's number, and the change of axes when loading."""

HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Tensors without information of their own: rotary frequencies."""

WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile and FSDP put into names, anywhere."""

PREFIX = re.compile(r"(?:(?:module|language_model|model)\.)*")
"""What stands before the names of a model that is part of another, or is saved without its head."""


class Tensor(NamedTuple):
    """One tensor of a checkpoint: its `shape` there, the parameter it belongs to, its layer or None."""

    shape: tuple[int, ...]
    parameter: str
    layer: int | None


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
        name = TENSORS[parameter][0]
        stacked = "{}" in name
        one = jax.ShapeDtypeStruct(shape[1:] if stacked else shape, np.float32)
        found = jax.eval_shape(lambda x, parameter=parameter: to_checkpoint(parameter, x), one).shape
        for layer in range(shape[0]) if stacked else [None]:
            tensors[name.format(layer)] = Tensor(found, parameter, layer)
    return tensors


def to_checkpoint(parameter: str, array: Any) -> Any:
    """One layer's parameter in the axes of the checkpoint."""
    theirs, ours = TENSORS[parameter][1].split(" -> ")
    return einops.rearrange(array, f"{ours} -> {theirs}")


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
