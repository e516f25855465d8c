"""A sweep: every prompt of a grid, in batches, with all methods and budgets from one prefill."""

import collections
import contextlib
import functools
import json
import pathlib
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import filelock
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from restkv_jax.caches.base import Cache
from restkv_jax.evaluate.batching import even_size, pad_batch
from restkv_jax.evaluate.example import has_example, save_example
from restkv_jax.evaluate.grid import CacheConfig, Grid, conditions, is_file, policies
from restkv_jax.evaluate.results import PromptId, PromptResult, append_line, drop_broken_line, read_lines, results_path
from restkv_jax.evaluate.steps import Reading, answer_reading, cache_of_first, read_batch
from restkv_jax.evaluate.tasks.making import make_prompts
from restkv_jax.evaluate.tasks.prompts import Prompt
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.reading import bucket_length
from restkv_jax.loading import Loaded
from restkv_jax.timing import CompilationClock

ANSWER_STEP = 16
"""Answers are generated up to a multiple of this many tokens, so that few programs serve all tasks."""


class RunSettings(NamedTuple):
    """How a sweep is carried out, which changes none of its results.

    At most `batch_size` prompts are generated at once, divided among the devices of the process; `together` policies
    share a prefill, and their caches exist at one time; this is process `process` of `num_processes`.
    """

    batch_size: int = 10
    together: int = 128
    process: int = 0
    num_processes: int = 1


class PromptSet(NamedTuple):
    """Prompts that are measured alike: a task, a length, a depth, and how many there are."""

    task: str
    length: int
    depth: float | None
    num_prompts: int


class EncodedPrompts(NamedTuple):
    """Prompts by their number, their tokens, and how many tokens to generate."""

    prompts: dict[int, Prompt]
    tokens: dict[int, list[int]]
    max_new_tokens: int

    def batches(self, most: int) -> list[list[int]]:
        """The numbers of the prompts of every batch, those of like length together, at most `most` in each."""
        order = sorted(self.tokens, key=lambda i: (len(self.tokens[i]), i))
        size = even_size(len(order), most)
        return [order[i : i + size] for i in range(0, len(order), size)]


class Found(NamedTuple):
    """What was found of one prompt: what was said, by the label of every configuration, and its seconds of reading."""

    said: dict[str, str]
    read_seconds: float


def run_sweep(
    loaded: Loaded,
    grid: Grid,
    directory: pathlib.Path,
    settings: RunSettings,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Answers all prompts of a checked grid that have no result yet, and appends each result to the process's file.

    Batches are numbered through the whole sweep; process `p` of `n` takes those whose number is `p` modulo `n`. A
    result in the file of any process counts as done. A batch is always made of the same prompts, so a sweep that goes
    on gives what an unbroken one gives.

    Args:
      loaded: what to measure.
      grid: which prompts, with what.
      directory: of the results; see `open_sweep`.
      settings: how.
      show: called with the prompts done and all prompts of this process, as they grow.

    Raises:
      ValueError: another process that writes, or a file that cannot be written.
    """
    found = prompt_sets(grid, loaded.tokenizer)
    mesh = Mesh(np.array(jax.local_devices()), ("rows",))
    loaded = loaded._replace(params=jax.device_put(loaded.params, NamedSharding(mesh, P())))
    path = results_path(directory, settings.process)
    units = batches_of_process(found, settings)
    total, shown = sum(size for _, _, size in units), 0
    with _only_writer(path), path.open("a", encoding="utf-8") as file:
        drop_broken_line(path)
        done = read_lines(directory)
        for prompt_set, number, size in units:
            encoded = encode_prompts(grid, loaded.tokenizer, prompt_set)
            items = {i: PromptId(*prompt_set[:3], i) for i in encoded.batches(settings.batch_size)[number]}
            if not all(item in done for item in items.values()):
                look = None
                if prompt_set == found[0] and number == 0 and not has_example(directory):
                    look = functools.partial(save_example, directory, grid, loaded.tokenizer, encoded)
                configs = policies(grid, prompt_set.length)
                results = answer_batch(loaded, configs, encoded, list(items), settings, mesh, look)
                for i, item in items.items():
                    if item not in done:
                        answers, tokens = encoded.prompts[i].answers, len(encoded.tokens[i])
                        append_line(file, PromptResult(item, tokens, answers, *results[i]))
            shown += size
            show(shown, total)


def check_sweep(loaded: Loaded, grid: Grid, settings: RunSettings) -> None:
    """Refuses what could not be carried out to the end, before anything is written.

    Raises:
      ValueError: no prompts at all, a length too small for its task or budgets, or other prompts in other processes.
    """
    found = prompt_sets(grid, loaded.tokenizer)
    if not found:
        raise ValueError("tasks: no prompts are left to measure")
    for prompt_set in found:
        policies(grid, prompt_set.length)
        if not is_file(prompt_set.task):
            make_prompts(prompt_set.task, loaded.tokenizer, prompt_set.length, 1, grid.seed, prompt_set.depth)
    if settings.num_processes > 1:
        digest = np.uint32(zlib.crc32(repr(found).encode()))
        try:
            multihost_utils.assert_equal(digest, "prompt sets differ")
        except AssertionError as error:
            raise ValueError("tasks: the processes have read different prompts; give all the same files") from error


@contextlib.contextmanager
def _only_writer(path: pathlib.Path) -> Iterator[None]:
    """Keeps a second process from writing to the same file; a killed one does not."""
    try:
        with filelock.FileLock(path.with_suffix(".lock"), timeout=0):
            yield
    except filelock.Timeout as error:
        raise ValueError(f"another process writes {str(path)!r}; wait for it, or give another directory") from error


def batches_of_process(found: Sequence[PromptSet], settings: RunSettings) -> list[tuple[PromptSet, int, int]]:
    """The batches of this process: prompt set, number of the batch in it, prompts."""
    units = []
    for prompt_set in found:
        size = even_size(prompt_set.num_prompts, settings.batch_size)
        starts = range(0, prompt_set.num_prompts, size)
        units += [(prompt_set, n, min(size, prompt_set.num_prompts - start)) for n, start in enumerate(starts)]
    return units[settings.process :: settings.num_processes]


@functools.lru_cache(maxsize=1)
def prompt_sets(grid: Grid, tokenizer: Any) -> list[PromptSet]:
    """The prompt sets of a sweep, shortest prompts first; files of prompts are divided by the bucket of their lengths.

    A file that cannot be read is left out, with a warning that names it. The length of its prompts is that of their
    bucket: budgets in percent are of that.
    """
    found = [PromptSet(*where, grid.prompts) for where in conditions(grid)]
    for task in filter(is_file, grid.tasks):
        try:
            counts = collections.Counter(bucket_length(len(ids)) for ids in _encode_file(task, tokenizer))
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"task {task!r} is left out, its prompts cannot be read: {error}", stacklevel=2)
            continue
        found += [PromptSet(task, length, None, count) for length, count in counts.items()]
    return sorted(found, key=lambda prompt_set: prompt_set.length)


@functools.lru_cache(maxsize=1)
def encode_prompts(grid: Grid, tokenizer: Any, prompt_set: PromptSet) -> EncodedPrompts:
    """The prompts of a prompt set."""
    if is_file(prompt_set.task):
        numbered = enumerate(zip(read_prompts(prompt_set.task), _encode_file(prompt_set.task, tokenizer), strict=True))
        chosen = {i: pair for i, pair in numbered if bucket_length(len(pair[1])) == prompt_set.length}
        prompts = {i: prompt for i, (prompt, _) in chosen.items()}
        tokens = {i: ids for i, (_, ids) in chosen.items()}
    else:
        where = prompt_set.task, tokenizer, prompt_set.length, prompt_set.num_prompts
        made = make_prompts(*where, prompt_set_seed(grid.seed, *prompt_set[:3]), prompt_set.depth)
        prompts = dict(enumerate(made))
        tokens = {i: tokenizer(prompt.text)["input_ids"] for i, prompt in prompts.items()}
    longest = max(len(tokenizer(prompt.continuation)["input_ids"]) for prompt in prompts.values())
    return EncodedPrompts(prompts, tokens, -(-(longest + 4) // ANSWER_STEP) * ANSWER_STEP)


def prompt_set_seed(seed: int, task: str, length: int, depth: float | None) -> int:
    """A seed of its own for every prompt set, so that no two of them ask for the same needles."""
    return zlib.crc32(f"{seed} {task} {length} {depth}".encode())


def read_prompts(path: str) -> list[Prompt]:
    """Prompts from JSON lines with "prompt", a string, and "answers", strings."""
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
    values = [json.loads(line) for line in lines if line.strip()]
    if not values:
        raise ValueError("the file is empty")
    for number, value in enumerate(values, 1):
        if not isinstance(value["prompt"], str) or not isinstance(value["answers"], list) or not value["answers"]:
            raise ValueError(f'prompt {number} must have "prompt", a string, and "answers", a list that is not empty')
    return [Prompt(value["prompt"], tuple(map(str, value["answers"]))) for value in values]


@functools.lru_cache(maxsize=1)
def _encode_file(path: str, tokenizer: Any) -> list[list[int]]:
    return [tokenizer(prompt.text)["input_ids"] for prompt in read_prompts(path)]


def answer_batch(
    loaded: Loaded,
    configs: dict[CacheConfig, EvictionPolicy],
    encoded: EncodedPrompts,
    batch: Sequence[int],
    settings: RunSettings,
    mesh: Mesh,
    look: Callable[[int, dict[str, Cache]], None] | None = None,
) -> dict[int, Found]:
    """What is said after the prompts of a batch, by their number.

    Batches of one length that have a prompt less than others are filled up with their first, so that one program serves
    all.

    Args:
      loaded: what to measure.
      configs: policies by configuration.
      encoded: the prompts.
      batch: numbers of those to answer.
      settings: how.
      mesh: of the process's devices.
      look: called once with the number of the batch's first prompt and the first caches that hold it, by label.
    """
    size = even_size(len(encoded.tokens), settings.batch_size)
    rows = -(-size // mesh.size) * mesh.size
    tokens, mask = pad_batch([encoded.tokens[i] for i in batch], rows)
    said: dict[int, dict[str, str]] = {i: {} for i in batch}
    columns, seconds = [(config.label, policy) for config, policy in configs.items()], 0.0
    for start in range(0, len(columns), settings.together):
        labels, group = zip(*columns[start : start + settings.together], strict=True)
        read = functools.partial(read_batch, loaded.model, loaded.params, tokens, mask, group)
        reading, taken = _timed(read, encoded.max_new_tokens, mesh)
        seconds += taken
        if look is not None and start == 0:
            look(batch[0], {label: cache_of_first(reading, i) for i, label in enumerate(labels)})
        out = answer_reading(loaded.model, loaded.params, reading, encoded.max_new_tokens, mesh)
        for label, new in zip(labels, np.asarray(out), strict=True):
            texts = loaded.tokenizer.batch_decode(new[: len(batch)], skip_special_tokens=True)
            for i, text in zip(batch, texts, strict=True):
                said[i][label] = text
    return {i: Found(said[i], round(seconds / rows, 6)) for i in batch}


def _timed(read: Callable[..., Reading], *args: Any) -> tuple[Reading, float]:
    """A reading, and its seconds without compilation."""
    with CompilationClock() as clock:
        start = time.perf_counter()
        reading = jax.block_until_ready(read(*args))
        return reading, max(0.0, time.perf_counter() - start - clock.seconds)
