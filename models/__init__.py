"""Llama-family decoders in Flax and their checkpoints."""

from restkv_jax.models.build import build_model, init_params
from restkv_jax.models.checkpoint import load_model
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.decoder import Decoder, Hooks, LayerView, logits, positions_of, read
from restkv_jax.models.mesh import make_mesh
from restkv_jax.models.saving import save_model

__all__ = [
    "Decoder",
    "Hooks",
    "LayerView",
    "ModelConfig",
    "build_model",
    "init_params",
    "load_model",
    "logits",
    "make_mesh",
    "positions_of",
    "read",
    "save_model",
]
