"""What the configurations of a sweep cost: bytes of the cache, time of the prefill and of a generated token."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax import Array

from restkv_jax.caches.base import cache_bytes
from restkv_jax.evaluate.batching import pad_batch
from restkv_jax.evaluate.grid import CacheConfig, Grid, is_file, parse_method, policies
from restkv_jax.evaluate.measuring import RunSettings, measure_batch
from restkv_jax.evaluate.results import Cost, Costs, Rate
from restkv_jax.evaluate.sweep import PromptSet, encode_prompts, prompt_sets
from restkv_jax.eviction.methods.full import full
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.generating import decode_step
from restkv_jax.generation.reading import cache_shapes, prefill, prefill_each
from restkv_jax.loading import Loaded
from restkv_jax.models.mesh import divisible, fetched

NEW_TOKENS = 16
"""Room for new tokens in the caches that are measured, and tokens that are timed."""
REPEATS = 3
MOST_RATED = 5


def measure_costs(
    loaded: Loaded,
    grid: Grid,
    settings: RunSettings,
    timed: bool = False,
    show: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Costs:
    """Measures bytes, and if asked times, on prompts of the grid's first task, at each of its lengths.

    Bytes are of one prompt's cache with room for 16 tokens, from shapes alone. Times are medians after compilation, of
    a batch: of the prefill for the first budget of each method without options, and of a generated token for every
    budget; caches of one shape take one time. Rates are of one batch at the smallest length, with the first budget of
    the first five methods.

    Args:
      loaded: what to measure.
      grid: its lengths, methods and budgets count.
      settings: its batch size, and how many configurations share a prefill.
      timed: measure times and rates too, which takes longer than many a sweep.
      show: wraps the iteration over lengths, for progress.
    """
    made = [prompt_set for prompt_set in prompt_sets(grid, loaded.tokenizer) if not is_file(prompt_set.task)]
    by_length = {prompt_set.length: prompt_set for prompt_set in reversed(made)}
    found: list[Cost] = []
    for length in show(sorted(by_length)):
        encoded = encode_prompts(grid, loaded.tokenizer, by_length[length])
        first = encoded.batches(settings.batch_size)[0]
        tokens, mask = pad_batch([encoded.tokens[i] for i in first], divisible(len(first), loaded.params))
        found += _costs_at(loaded, grid, length, tokens, mask, settings.together, timed)
    rates = _rates(loaded, grid, by_length[min(by_length)], settings) if by_length and timed else ()
    return Costs(jax.devices()[0].device_kind, tuple(found), rates)


def _costs_at(loaded: Loaded, grid: Grid, length: int, tokens, mask, together, timed) -> list[Cost]:
    """The costs of all configurations for one batch."""
    (model, params, _), configs = loaded, policies(grid, length)
    stored: dict[str, Any] = {"cache_dtype": grid.cache_dtype}
    shapes = {
        e: cache_shapes(model, params, tokens, mask, policy, NEW_TOKENS, **stored) for e, policy in configs.items()
    }
    everything = cache_bytes(cache_shapes(model, params, tokens, mask, full(), NEW_TOKENS))
    plain = {c: policy for c, policy in configs.items() if timed and not parse_method(c.method).options}
    seconds = _token_seconds(
        loaded, {_structure(shapes[e]): policy for e, policy in plain.items()}, tokens, mask, together, stored
    )
    prefills = {}
    for config, policy in plain.items():
        if config.method not in {e.method for e in prefills}:
            run = lambda policy=policy: prefill(model, params, tokens, mask, policy, NEW_TOKENS, **stored)  # noqa: E731
            prefills[config] = _median_seconds(run)
    return [
        Cost(
            length,
            config.label,
            cache_bytes(shapes[config]) // len(tokens),
            cache_bytes(shapes[config]) / everything,
            prefills.get(config),
            seconds.get(_structure(shapes[config])) if config in plain else None,
        )
        for config in configs
    ]


def _structure(shapes: Any) -> tuple:
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _token_seconds(loaded: Loaded, by_structure: dict, tokens, mask, together: int, stored: dict) -> dict[tuple, float]:
    """Seconds of a generated token of a batch, by the structure of the cache, of which the policies each make one."""
    found, structures = {}, list(by_structure)
    for start in range(0, len(structures), together):
        group = structures[start : start + together]
        kept = tuple(by_structure[structure] for structure in group)
        logits, caches = prefill_each(loaded.model, loaded.params, tokens, mask, kept, NEW_TOKENS, **stored)
        token = fetched(logits).argmax(-1).astype(np.int32)
        for structure, policy, cache in zip(group, kept, caches, strict=True):
            found[structure] = _step_seconds(loaded, token, cache, policy)
    return found


def _step_seconds(loaded: Loaded, token: Array, cache: Any, policy: EvictionPolicy) -> float:
    """Median seconds of a step; the first, which compiles, is one of 16."""
    times = []
    for _ in range(NEW_TOKENS):
        start = time.perf_counter()
        _, cache = jax.block_until_ready(decode_step(loaded.model, loaded.params, token, cache, policy))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _rates(loaded: Loaded, grid: Grid, prompt_set: PromptSet, settings: RunSettings) -> tuple[Rate, ...]:
    """Prompts per second in a batch, one at a time, and one at a time for each method."""
    encoded = encode_prompts(grid, loaded.tokenizer, prompt_set)
    batch = encoded.batches(settings.batch_size)[0]
    first: dict[str, tuple[CacheConfig, EvictionPolicy]] = {}
    for config, policy in policies(grid, prompt_set.length).items():
        first.setdefault(config.method, (config, policy))
    configs = dict(list(first.values())[:MOST_RATED])

    def one_by_one():
        for i in batch:
            measure_batch(loaded, configs, encoded, [i], settings._replace(batch_size=1), grid.cache_dtype)

    def one_by_one_for_each():
        for config, policy in configs.items():
            for i in batch:
                measure_batch(loaded, {config: policy}, encoded, [i], settings._replace(batch_size=1), grid.cache_dtype)

    names = f"{len(configs)} methods"
    ways = {
        f"batches of {len(batch)}, {names} from one prefill": lambda: measure_batch(
            loaded, configs, encoded, batch, settings._replace(batch_size=len(batch)), grid.cache_dtype
        ),
        f"one prompt at a time, {names} from one prefill": one_by_one,
        f"one prompt and one method at a time, {names}": one_by_one_for_each,
    }
    return tuple(Rate(how, len(batch) / _median_seconds(run, repeats=1)) for how, run in ways.items())


def _median_seconds(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median wall time after a first call, which compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return float(np.median(times))
