"""Long prompts on a small KV cache: ReST-KV and its relatives for Llama-family models in JAX."""

from restkv_jax.methods import METHODS, full, h2o, knorm, random, restkv, snapkv, streaming_llm, tova
from restkv_jax.models import build_model, init_params, load_model, save_model
from restkv_jax.policy import Eviction, EvictionPolicy, evict_layer

__all__ = [
    "METHODS",
    "Eviction",
    "EvictionPolicy",
    "build_model",
    "evict_layer",
    "full",
    "h2o",
    "init_params",
    "knorm",
    "load_model",
    "random",
    "restkv",
    "save_model",
    "snapkv",
    "streaming_llm",
    "tova",
]
