"""Long prompts on a small KV cache: ReST-KV and its relatives for Llama-family models in JAX."""

from restkv_jax import pod
from restkv_jax.caches.base import cache_bytes, kept_positions, repeat_rows
from restkv_jax.caches.dense import KVCache
from restkv_jax.caches.paged import PagedCache
from restkv_jax.caches.quantised import QuantisedCache
from restkv_jax.caches.stored import load_cache, save_cache
from restkv_jax.eviction.allocation import AdaptiveHeads, ModelWide, Pyramid, Uniform
from restkv_jax.eviction.future import Foresight, FutureQueries
from restkv_jax.eviction.layer import Eviction, evict_layer
from restkv_jax.eviction.methods.registry import (
    METHODS,
    adakv,
    best,
    compactor,
    expected_attention,
    full,
    h2o,
    keydiff,
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
from restkv_jax.generation.conversation import Answer, Conversation, answer, start_conversation
from restkv_jax.generation.generating import Generation, decode_step, generate, generate_each, stream
from restkv_jax.generation.reading import bucket_length, extend, prefill, prefill_each
from restkv_jax.generation.text import generate_text, stream_text
from restkv_jax.kernels.quantised import Quantisation
from restkv_jax.models import build_model, init_params, load_model, make_mesh, read, save_model

__all__ = [
    "METHODS",
    "AdaptiveHeads",
    "Answer",
    "Conversation",
    "Eviction",
    "EvictionPolicy",
    "Foresight",
    "FutureQueries",
    "Generation",
    "KVCache",
    "LeastSquares",
    "ModelWide",
    "PagedCache",
    "Pyramid",
    "Quantisation",
    "QuantisedCache",
    "Uniform",
    "adakv",
    "answer",
    "best",
    "bucket_length",
    "build_model",
    "cache_bytes",
    "compactor",
    "decode_step",
    "evict_layer",
    "expected_attention",
    "extend",
    "full",
    "generate",
    "generate_each",
    "generate_text",
    "h2o",
    "init_params",
    "kept_positions",
    "keydiff",
    "knorm",
    "laprox",
    "load_cache",
    "load_model",
    "make_mesh",
    "pod",
    "prefill",
    "prefill_each",
    "pyramidkv",
    "random",
    "read",
    "repeat_rows",
    "restkv",
    "save_cache",
    "save_model",
    "snapkv",
    "start_conversation",
    "stream",
    "stream_text",
    "streaming_llm",
    "tova",
]
