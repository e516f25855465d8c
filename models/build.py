"""Models without weights of their own: architecture from a configuration, parameters from a key."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.models.config import read_config
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.rules import with_usual_promotion


def build_model(config: Any) -> Decoder:
    """Builds the decoder that a Hugging Face configuration describes.

    Args:
      config: a transformers config, a dict of its fields, or the path of a `config.json` or its directory.

    Returns:
      a Flax module without parameters, hashable, so static under `jax.jit`.

    Raises:
      ValueError: an unsupported architecture, activation or RoPE scaling.
    """
    return Decoder(read_config(config))


@with_usual_promotion
def init_params(model: Decoder, key: Array, dtype: Any = jnp.float32) -> Any:
    """Draws random parameters; works under `jax.eval_shape`.

    Args:
      model: a `Decoder`.
      key: a JAX random key.
      dtype: of every parameter.

    Returns:
      a dict of arrays; those of the layers carry a leading axis `L`.
    """
    return _init_params(model, key, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnames=("model", "dtype"))
def _init_params(model: Decoder, key: Array, dtype: Any) -> Any:
    token = jnp.zeros((1, 1), jnp.int32)
    params = model.init(key, token, token)["params"]
    return jax.tree.map(lambda x: x.astype(dtype), params)
