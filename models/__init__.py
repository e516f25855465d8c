"""Llama-family decoders in Flax and their checkpoints."""

from restkv_jax.models.build import build_model, init_params
from restkv_jax.models.checkpoint import load_model
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.decoder import (
    STATELESS,
    Decoder,
    Layer,
    Memory,
    StateFunctions,
    hidden_states,
    logits,
    positions_of,
)
from restkv_jax.models.saving import save_model

__all__ = [
    "STATELESS",
    "Decoder",
    "Layer",
    "Memory",
    "ModelConfig",
    "StateFunctions",
    "build_model",
    "hidden_states",
    "init_params",
    "load_model",
    "logits",
    "positions_of",
    "save_model",
]
