"""Long prompts on a small KV cache: ReST-KV and its relatives for Llama-family models in JAX."""

from restkv_jax import pod
from restkv_jax.caches.base import cache_bytes, kept_positions
from restkv_jax.caches.dense import KVCache
from restkv_jax.caches.paged import PagedCache
from restkv_jax.eviction.allocation import AdaptiveHeads, ModelWide, Pyramid, Uniform
from restkv_jax.eviction.layer import Eviction, evict_layer
from restkv_jax.eviction.methods.registry import (
    METHODS,
    adakv,
    full,
    h2o,
    knorm,
    laprox,
    pyramidkv,
    random,
    restkv,
    snapkv,
    streaming_llm,
    tova,
)
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.refit import LeastSquares
from restkv_jax.generation.generating import Generation, decode_step, generate, generate_each, stream
from restkv_jax.generation.reading import bucket_length, prefill, prefill_each
from restkv_jax.generation.text import generate_text, stream_text
from restkv_jax.models import build_model, init_params, load_model, read, save_model

__all__ = [
    "METHODS",
    "AdaptiveHeads",
    "Eviction",
    "EvictionPolicy",
    "Generation",
    "KVCache",
    "LeastSquares",
    "ModelWide",
    "PagedCache",
    "Pyramid",
    "Uniform",
    "adakv",
    "bucket_length",
    "build_model",
    "cache_bytes",
    "decode_step",
    "evict_layer",
    "full",
    "generate",
    "generate_each",
    "generate_text",
    "h2o",
    "init_params",
    "kept_positions",
    "knorm",
    "laprox",
    "load_model",
    "pod",
    "prefill",
    "prefill_each",
    "pyramidkv",
    "random",
    "read",
    "restkv",
    "save_model",
    "snapkv",
    "stream",
    "stream_text",
    "streaming_llm",
    "tova",
]
