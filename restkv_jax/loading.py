"""Checkpoints by the names that options give to them and to their dtype."""

import pathlib
import warnings
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from restkv_jax.models.checkpoint import load_model
from restkv_jax.models.config import ModelConfig, read_config
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.gguf import read_gguf

DType = Literal["auto", "bfloat16", "float32", "float16"]
"""Of weights and cache; "auto" is bfloat16, on a CPU float32."""


class Loaded(NamedTuple):
    """A model, its parameters and its tokenizer."""

    model: Decoder
    params: Any
    tokenizer: Any


def load_checkpoint(
    name: str | None,
    dtype: DType = "auto",
    needs_tokenizer: bool = True,
    dense: bool = False,
    mesh: Mesh | None = None,
) -> Loaded:
    """`load_model`, with one kind of error.

    Args:
      name: directory or id; None is the model that comes with the package.
      dtype: of weights and cache.
      needs_tokenizer: refuses a model without a tokenizer.
      dense: leaves out the sharing of keys that a model was adapted to.
      mesh: of devices that share the weights; one device by default.

    Raises:
      ValueError: a model that cannot be loaded, or one without a tokenizer.
    """
    if name is not None and not name.strip():
        raise ValueError("model is empty; give a directory, a file or an id, or leave it out")
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"  # slow on a CPU
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* has no tokenizer")  # an error below
            loaded = Loaded(*load_model(name, jnp.dtype(dtype), mesh))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).removeprefix(f"path_or_id={name!r} ")
        raise ValueError(f"model {name!r} cannot be loaded: {reason}") from error
    if needs_tokenizer and loaded.tokenizer is None:
        raise ValueError(f"model {name!r} has no tokenizer; add its tokenizer.json to the directory")
    return loaded._replace(model=loaded.model.clone(sharing=None)) if dense else loaded


def load_config(path: pathlib.Path) -> ModelConfig:
    """The configuration of a `config.json`, of a directory that has one, or of a GGUF file; no weights are read.

    Raises:
      ValueError, OSError: an unsupported model, or a file that cannot be read.
    """
    return read_gguf(path)[0] if path.suffix == ".gguf" else read_config(path)
