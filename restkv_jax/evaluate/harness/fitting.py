"""What the harness asks of the machine and of the hub's cache: batches that fit into memory, a model's commit."""

import os
import pathlib
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp

from restkv_jax.caches.base import cache_bytes
from restkv_jax.eviction.methods.full import full
from restkv_jax.generation.reading import CHUNK_SIZE, cache_shapes
from restkv_jax.models.decoder import Decoder

MOST, MOST_ON_CPU = 64, 8
"""Prompts of a batch beyond which nothing is gained."""
USED_SHARE = 0.5
"""Of the free memory; the other half is for what is not counted, and for the allocator's gaps."""


def fitting_batch(model: Decoder, params: Any, length: int) -> int:
    """How many prompts of `length` tokens fit into memory at once, a power of two.

    A row is taken to need a full cache, the residual stream, and for each token of a chunk its activations in the MLP
    and, once, the logits; all but the cache in float32.
    """
    config = model.config
    prompt = jnp.zeros((1, length), jnp.int32)
    cache = cache_bytes(cache_shapes(model, params, prompt, None, full()))
    activations = 2 * length * config.hidden_size + 3 * min(length, CHUNK_SIZE) * config.intermediate_size
    rows = int(USED_SHARE * free_bytes()) // (cache + 4 * (activations + config.vocab_size))
    on_cpu = jax.default_backend() == "cpu"
    return 1 << (max(1, min(rows, MOST_ON_CPU if on_cpu else MOST)).bit_length() - 1)


def free_bytes() -> int:
    """Bytes of the first device's memory that are not in use; the host's where the device does not say."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def commit_in_cache(name: str | None) -> str:
    """The commit of a model of the hub, as the hub's cache has it; empty for what is not of the hub."""
    if name is None or pathlib.Path(name).exists():
        return ""
    found = huggingface_hub.try_to_load_from_cache(name, "config.json")
    return pathlib.Path(found).parent.name if isinstance(found, str) else ""
