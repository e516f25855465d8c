"""The registry: published methods, and ours, by name, each a preset that returns an `EvictionPolicy`."""

from collections.abc import Callable

from restkv_jax.eviction.methods.adakv import adakv
from restkv_jax.eviction.methods.best import best
from restkv_jax.eviction.methods.compactor import compactor
from restkv_jax.eviction.methods.expected_attention import expected_attention
from restkv_jax.eviction.methods.full import full
from restkv_jax.eviction.methods.h2o import h2o
from restkv_jax.eviction.methods.keydiff import keydiff
from restkv_jax.eviction.methods.knorm import knorm
from restkv_jax.eviction.methods.laprox import laprox
from restkv_jax.eviction.methods.pyramidkv import pyramidkv
from restkv_jax.eviction.methods.random import random
from restkv_jax.eviction.methods.restkv import restkv
from restkv_jax.eviction.methods.snapkv import snapkv
from restkv_jax.eviction.methods.streaming_llm import streaming_llm
from restkv_jax.eviction.methods.tova import tova
from restkv_jax.eviction.policy import EvictionPolicy

METHODS: dict[str, Callable[..., EvictionPolicy]] = {
    "full": full,
    "best": best,
    "restkv": restkv,
    "laprox": laprox,
    "snapkv": snapkv,
    "pyramidkv": pyramidkv,
    "adakv": adakv,
    "h2o": h2o,
    "tova": tova,
    "compactor": compactor,
    "expected_attention": expected_attention,
    "keydiff": keydiff,
    "streaming_llm": streaming_llm,
    "knorm": knorm,
    "random": random,
}
