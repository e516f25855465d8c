"""What generation costs on a slice: the prefill and a step of decoding, against what they cannot do without."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from restkv_jax.planning.chips import Chip
from restkv_jax.planning.collectives import Collective
from restkv_jax.planning.programs import (
    OutOfMemory,
    Program,
    Reading,
    Work,
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
      reading: the prefill, or how much it lacks.
      step: of decoding, or how much it lacks; None without a prefill.
    """

    work: Work
    weights: int
    reading: Reading | OutOfMemory
    step: Program | OutOfMemory | None

    @property
    def cache(self) -> int | None:
        """Bytes of the cache."""
        return bytes_on_device(self.reading.cache) if isinstance(self.reading, Reading) else None

    @property
    def floor(self) -> int | None:
        """Bytes that a step has to read: the cache, and all weights but the embedding's other rows."""
        if self.cache is None:
            return None
        config = self.work.model.config
        untied = 0 if config.tie_word_embeddings else bytes_on_device(self._params["embedding"])
        return self.weights - untied + self.cache

    @property
    def _params(self) -> Any:
        return abstract_params(self.work.model, self.work.mesh, self.work.dtype)


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
    weights = bytes_on_device(abstract_params(work.model, work.mesh, work.dtype))
    try:
        with show("the prefill"):
            reading = compile_reading(work)
    except OutOfMemory as error:
        return Estimate(work, weights, error, None)
    try:
        with show("a step of decoding"):
            return Estimate(work, weights, reading, compile_step(work, reading.cache))
    except OutOfMemory as error:
        return Estimate(work, weights, reading, error)


def bounds(program: Program, chip: Chip) -> Bounds:
    """Seconds that a program takes at least on a chip, by its peaks."""
    c = program.count
    costs = (c.read + c.written, chip.bandwidth), (c.operations, chip.operations), (c.sent(), chip.network)
    return Bounds(*(None if peak is None else cost / peak for cost, peak in costs))


def megatron(work: Work, tokens: int) -> Collective:
    """What Megatron-LM sums over `model` for `tokens` of each row: twice per layer, and once for the embedding.

    The logits stay divided by vocabulary.
    """
    config, rows = work.model.config, work.rows // work.mesh.shape["data"]
    activation = rows * tokens * config.hidden_size * jnp.dtype(work.dtype).itemsize
    return Collective("all-reduce", activation, work.mesh.shape["model"], 2 * config.num_hidden_layers + 1)
