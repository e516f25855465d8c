"""What generation costs on a slice: the prefill and a step of decoding, against what they cannot do without."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
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
      unread: bytes, of the weights, that a step does not read: an embedding in which it looks rows up, and experts
        beyond as many as its tokens can choose.
      cache: bytes.
      slots: of a layer, row and KV head, on the average.
      programs: `prefill` and `step`, or how much they lack.
    """

    work: Work
    weights: int
    unread: int
    cache: int
    slots: int
    programs: Mapping[str, Program | OutOfMemory]

    @property
    def floor(self) -> int:
        """Bytes that a step has to read."""
        return self.weights - self.unread + self.cache


class Bounds(NamedTuple):
    """Seconds that a program takes at least: by HBM, matrix products and what is sent; None without a peak."""

    memory: float | None
    products: float | None
    network: float | None

    @property
    def longest(self) -> float | None:
        """All three may go on at the same time."""
        return max((seconds for seconds in self if seconds is not None), default=None)


PROGRAMS: Mapping[str, Callable[[Work], Program]] = {"prefill": compile_reading, "step": compile_step}
"""What reads the prompts, and what decodes one token of each."""


def estimate(work: Work, names: Sequence[str], show: Callable[[str], contextlib.AbstractContextManager]) -> Estimate:
    """Compiles programs.

    Args:
      work: what to do.
      names: of the programs, among `PROGRAMS`.
      show: makes of a program's name a context in which it is compiled.

    Raises:
      ValueError: arguments that make no sense, each named.
    """
    params, cache = abstract_params(work.model, work.mesh, work.dtype), abstract_cache(work)

    def tried(name: str) -> Program | OutOfMemory:
        try:
            with show(name):
                return PROGRAMS[name](work)
        except OutOfMemory as error:
            return error

    programs = {name: tried(name) for name in names}
    weights, unread = bytes_on_device(params), _unread(work, params)
    return Estimate(work, weights, unread, bytes_on_device(cache), cache.num_slots, programs)


def _unread(work: Work, params: Any) -> int:
    config = work.model.config
    unread = 0 if config.tie_word_embeddings else bytes_on_device(params["embedding"])
    if config.num_experts is not None:
        chosen = min(1.0, work.rows // work.data_parallel * config.num_experts_per_tok / config.num_experts)
        experts = {name: x for name, x in params["layers"].items() if name.startswith("expert_")}
        unread += round((1 - chosen) * bytes_on_device(experts))
    return unread


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
