"""The registry: published methods by name, each a preset that returns an `EvictionPolicy`."""

from restkv_jax.methods.adakv import adakv
from restkv_jax.methods.full import full
from restkv_jax.methods.h2o import h2o
from restkv_jax.methods.knorm import knorm
from restkv_jax.methods.laprox import laprox
from restkv_jax.methods.pyramidkv import pyramidkv
from restkv_jax.methods.random import random
from restkv_jax.methods.restkv import restkv
from restkv_jax.methods.snapkv import snapkv
from restkv_jax.methods.streaming_llm import streaming_llm
from restkv_jax.methods.tova import tova

METHODS = {
    "full": full,
    "restkv": restkv,
    "laprox": laprox,
    "snapkv": snapkv,
    "pyramidkv": pyramidkv,
    "adakv": adakv,
    "h2o": h2o,
    "tova": tova,
    "streaming_llm": streaming_llm,
    "knorm": knorm,
    "random": random,
}

__all__ = [
    "METHODS",
    "adakv",
    "full",
    "h2o",
    "knorm",
    "laprox",
    "pyramidkv",
    "random",
    "restkv",
    "snapkv",
    "streaming_llm",
    "tova",
]
