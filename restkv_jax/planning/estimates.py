"""What generation costs on a slice: the prefill and a step of decoding, against what they cannot do without."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from restkv_jax.planning.chips import Chip
from restkv_jax.planning.collectives import Collective
from restkv_jax.planning.programs import (
    OutOfMemory,
    Program,
    Work,
    abstract_cache,
    abstract_params,
    bytes_on_device,
    compile_reading,
    compile_step,
)


class Estimate(NamedTuple):
    """What a method costs every device.

    Attributes:
      work: what is done.
      weights: bytes.
      embedding: bytes, of the weights, that a step only looks rows up in.
      cache: bytes.
      slots: of a layer, row and KV head, on the average.
      reading: the prefill, or how much it lacks.
      step: of decoding, or how much it lacks.
    """

    work: Work
    weights: int
    embedding: int
    cache: int
    slots: int
    reading: Program | OutOfMemory
    step: Program | OutOfMemory

    @property
    def floor(self) -> int:
        """Bytes that a step has to read."""
        return self.weights - self.embedding + self.cache


class Bounds(NamedTuple):
    """Seconds that a program takes at least: by HBM, matrix products and what is sent; None without a peak."""

    memory: float | None
    products: float | None
    network: float | None

    @property
    def longest(self) -> float | None:
        """All three may go on at the same time."""
        return max((seconds for seconds in self if seconds is not None), default=None)


def estimate(work: Work, show: Callable[[str], Any]) -> Estimate:
    """Compiles the prefill and a step.

    Args:
      work: what to do.
      show: is told what is being compiled, and returns a context in which it is.

    Raises:
      ValueError: arguments that make no sense, each named.
    """
    params, cache = abstract_params(work.model, work.mesh, work.dtype), abstract_cache(work)
    embedding = 0 if work.model.config.tie_word_embeddings else bytes_on_device(params["embedding"])
    held = bytes_on_device(params), embedding, bytes_on_device(cache), cache.num_slots

    def tried(compile_: Callable[[Work], Program], what: str) -> Program | OutOfMemory:
        try:
            with show(what):
                return compile_(work)
        except OutOfMemory as error:
            return error

    return Estimate(work, *held, tried(compile_reading, "the prefill"), tried(compile_step, "a step of decoding"))


def bounds(program: Program, chip: Chip) -> Bounds:
    """Seconds that a program takes at least on a chip, by its peaks."""
    c = program.count
    costs = (c.read + c.written, chip.bandwidth), (c.operations, chip.operations), (c.sent(), chip.network)
    return Bounds(*(None if peak is None else cost / peak for cost, peak in costs))


def megatron(work: Work, tokens: int) -> Collective:
    """What Megatron-LM sums over `model` for `tokens` of each row: twice per layer, and once for the embedding.

    The logits stay divided by vocabulary.
    """
    config = work.model.config
    activation = work.rows // work.data_parallel * tokens * config.hidden_size * jnp.dtype(work.dtype).itemsize
    return Collective("all-reduce", activation, work.model_parallel, 2 * config.num_hidden_layers + 1)
