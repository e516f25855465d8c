"""Checkpoints for the command line: what cannot be loaded is a line that names the option."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from restkv_jax.commands.options import UsageError
from restkv_jax.models import Decoder, load_model


def load_checkpoint(
    model: str | None, dtype: str, option: str = "--model", without_tokenizer: bool = False
) -> tuple[Decoder, Any, Any]:
    """`load_model` for an option and `--dtype`; "auto" is bfloat16, but float32 on a CPU, slow with bfloat16.

    Args:
      model: directory or id; None is the model that comes with the package.
      dtype: name of a dtype, or "auto".
      option: what names the model, for messages.
      without_tokenizer: whether a model without a tokenizer will do.

    Raises:
      UsageError: a model that cannot be loaded, or one without a tokenizer.
    """
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    try:
        with warnings.catch_warnings():
            # an error below, or what was asked for
            warnings.filterwarnings("ignore", message=".* has no tokenizer")
            loaded, params, tokenizer = load_model(model, jnp.dtype(dtype))
    except (OSError, ValueError, KeyError) as error:
        name = "" if model is None else f" {model!r}"
        reason = str(error).removeprefix(f"path_or_id={model!r} ")
        raise UsageError(f"{option}{name} cannot be loaded: {reason}") from error
    if tokenizer is None and not without_tokenizer:
        raise UsageError(f"{option} {model!r} has no tokenizer; add its tokenizer.json to the directory")
    return loaded, params, tokenizer
