"""What is found for a batch of a sweep's prompts: what is said with every configuration, or how far it diverges."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from restkv_jax.caches.base import Cache
from restkv_jax.evaluate.batching import even_size, pad_batch
from restkv_jax.evaluate.grid import CacheConfig
from restkv_jax.evaluate.steps import (
    Reading,
    answer_reading,
    divergences_of_reading,
    extend_reading,
    read_batch,
)
from restkv_jax.evaluate.tasks.prompts import Prompt
from restkv_jax.evaluate.tasks.texts import NUM_FOLLOWING
from restkv_jax.eviction.methods.full import full
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.reading import bucket_length
from restkv_jax.loading import Loaded
from restkv_jax.models.mesh import divisible, fetched
from restkv_jax.timing import CompilationClock

Look = Callable[[int, dict[str, Cache]], None]


class RunSettings(NamedTuple):
    """How a sweep is carried out, which changes none of its results.

    At most `batch_size` prompts are generated at once, divided along the mesh's axis `data`; `together` policies share
    a prefill, and their caches exist at one time.
    """

    batch_size: int = 10
    together: int = 128


class EncodedPrompts(NamedTuple):
    """Prompts by their number, their tokens that are compressed, and how many tokens to generate.

    `asked` are tokens that are read onto what is left of a prompt, where any are; `following` those that follow a
    prompt without answers.
    """

    prompts: dict[int, Prompt]
    tokens: dict[int, list[int]]
    max_new_tokens: int
    asked: dict[int, list[int]]
    following: dict[int, list[int]]

    def batches(self, most: int) -> list[list[int]]:
        """The numbers of the prompts of every batch, those of like length together, at most `most` in each."""
        order = sorted(self.tokens, key=lambda i: (len(self.tokens[i]), i))
        size = even_size(len(order), most)
        return [order[i : i + size] for i in range(0, len(order), size)]


class Found(NamedTuple):
    """Of one prompt: what was said by the label of every configuration, the seconds of its reading, its divergences."""

    said: dict[str, str]
    read_seconds: float
    divergences: dict[str, float]


def measure_batch(
    loaded: Loaded,
    configs: dict[CacheConfig, EvictionPolicy],
    encoded: EncodedPrompts,
    batch: Sequence[int],
    settings: RunSettings,
    cache_dtype: str | None = None,
    look: Look | None = None,
) -> dict[int, Found]:
    """What is found of the prompts of a batch, by their number.

    Batches of one length that have a prompt less than others are filled up with their first, so that one program serves
    all.

    Args:
      loaded: what to measure.
      configs: policies by configuration.
      encoded: the prompts.
      batch: numbers of those to measure.
      settings: how.
      cache_dtype: what caches store keys and values in; see `prefill`.
      look: called once with the number of the batch's first prompt and the first caches that hold it, by label.
    """
    found = {i: Found({}, 0.0, {}) for i in batch}
    size = even_size(len(encoded.tokens), settings.batch_size)
    rows = divisible(size, loaded.params)
    measure = _diverged if encoded.following else _said
    columns, seconds = [(config.label, policy) for config, policy in configs.items()], 0.0
    for start in range(0, len(columns), settings.together):
        labels, group = zip(*columns[start : start + settings.together], strict=True)
        of_group = measure(loaded, encoded, batch, group, rows, cache_dtype)
        seconds += of_group.read_seconds
        if look is not None and start == 0:
            look(batch[0], dict(zip(labels, of_group.reading.caches, strict=True)))
        for label, values in zip(labels, of_group.values, strict=True):
            for i, value in zip(batch, values, strict=True):
                (found[i].divergences if encoded.following else found[i].said)[label] = value
    return {i: one._replace(read_seconds=round(seconds / rows, 6)) for i, one in found.items()}


class OfGroup(NamedTuple):
    """What policies that share a reading give: values for each policy and prompt, seconds of the reading, it itself."""

    values: list[list[Any]]
    read_seconds: float
    reading: Reading


def _said(loaded: Loaded, encoded: EncodedPrompts, batch: Sequence[int], policies, rows: int, cache_dtype) -> OfGroup:
    """The texts that are said."""
    model, params, tokenizer = loaded
    new = encoded.max_new_tokens
    reading, seconds = _read(loaded, encoded, batch, policies, new, rows, cache_dtype)
    last = reading
    if encoded.asked:
        longest = bucket_length(max(map(len, encoded.asked.values())))
        asked = pad_batch([encoded.asked[i] for i in batch], rows, longest)
        last = extend_reading(model, params, *asked, reading, new)
    tokens = fetched(answer_reading(model, params, last, new))
    texts = [tokenizer.batch_decode(of_policy[: len(batch)], skip_special_tokens=True) for of_policy in tokens]
    return OfGroup(texts, seconds, reading)


def _diverged(
    loaded: Loaded, encoded: EncodedPrompts, batch: Sequence[int], policies, rows: int, cache_dtype
) -> OfGroup:
    """The divergences from the full cache as it is, which is read beside the others unless these are quantised."""
    first, others = ((full(), *policies), ()) if cache_dtype is None else ((full(),), policies)
    reading, seconds = _read(loaded, encoded, batch, first, NUM_FOLLOWING, rows)
    if others:
        quantised, seconds = _read(loaded, encoded, batch, others, NUM_FOLLOWING, rows, cache_dtype)
        reading = reading.beside(quantised)
    following, _ = pad_batch([encoded.following[i] for i in batch], rows, NUM_FOLLOWING)
    nats = np.asarray(fetched(divergences_of_reading(loaded.model, loaded.params, following, reading)), np.float64)
    return OfGroup(nats[1:, : len(batch)].round(8).tolist(), seconds, reading.after(1))


def _read(
    loaded: Loaded,
    encoded: EncodedPrompts,
    batch: Sequence[int],
    policies,
    room: int,
    rows: int,
    cache_dtype=None,
) -> tuple[Reading, float]:
    """The reading of a batch, and its seconds without compilation."""
    tokens, mask = pad_batch([encoded.tokens[i] for i in batch], rows)
    with CompilationClock() as clock:
        start = time.perf_counter()
        reading = jax.block_until_ready(
            read_batch(loaded.model, loaded.params, tokens, mask, tuple(policies), room, cache_dtype)
        )
        return reading, max(0.0, time.perf_counter() - start - clock.seconds)
