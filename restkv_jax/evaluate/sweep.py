"""A sweep: every prompt of a grid, in batches, with all methods and budgets from one prefill."""

import collections
import contextlib
import functools
import json
import pathlib
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import filelock
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from restkv_jax.evaluate.batching import pad_batch
from restkv_jax.evaluate.grid import Entry, Grid, grid_places, is_file, policies
from restkv_jax.evaluate.loading import Loaded
from restkv_jax.evaluate.results import Item, Line, append_line, drop_broken_line, read_lines, results_path
from restkv_jax.evaluate.tasks import Prompt, make_prompts
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.generating import generate_each
from restkv_jax.generation.reading import bucket_length

ANSWER_STEP = 16
"""Answers are generated up to a multiple of this many tokens, so that few programs serve all tasks."""


class Work(NamedTuple):
    """How a sweep is carried out, which changes none of its results.

    `batch_size` prompts are generated at once, divided among the devices of the process; `together` policies share a
    prefill, and their caches exist at one time; this is process `process` of `num_processes`.
    """

    batch_size: int = 10
    together: int = 128
    process: int = 0
    num_processes: int = 1


class Place(NamedTuple):
    """Prompts that are measured alike: a task, a length, a depth, and how many there are."""

    task: str
    length: int
    depth: float | None
    num_prompts: int


class Prompts(NamedTuple):
    """The prompts of a place by their number, their tokens, and how many tokens to generate."""

    prompts: dict[int, Prompt]
    encoded: dict[int, list[int]]
    max_new_tokens: int

    def batches(self, size: int) -> list[list[int]]:
        """The numbers of the prompts of every batch, those of like length together."""
        order = sorted(self.encoded, key=lambda i: (len(self.encoded[i]), i))
        return [order[i : i + size] for i in range(0, len(order), size)]


def run_sweep(
    loaded: Loaded,
    grid: Grid,
    directory: pathlib.Path,
    work: Work,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Answers all prompts of a grid that have no result yet, and appends each result to the process's file.

    Batches are numbered through the whole sweep; process `p` of `n` takes those whose number is `p` modulo `n`. A
    result in the file of any process counts as done. A batch is always made of the same prompts, so a sweep that goes
    on gives what an unbroken one gives.

    Args:
      loaded: what to measure.
      grid: which prompts, with what.
      directory: of the results; see `open_sweep`.
      work: how.
      show: called with the prompts done and all prompts of this process, as they grow.

    Raises:
      ValueError: before anything is measured, what `check_places` refuses, or another process that writes the results.
    """
    found = places(grid, loaded.tokenizer)
    check_places(grid, loaded.tokenizer, found, work)
    mesh = Mesh(np.array(jax.local_devices()), ("rows",))
    loaded = loaded._replace(params=jax.device_put(loaded.params, NamedSharding(mesh, P())))
    path = results_path(directory, work.process)
    units = our_units(found, work)
    total, shown = sum(size for _, _, size in units), 0
    with _only_writer(path), path.open("a", encoding="utf-8") as file:
        drop_broken_line(path)
        done = read_lines(directory)
        for place, number, size in units:
            told = prompts_of(grid, loaded.tokenizer, place)
            items = {i: Item(*place[:3], i) for i in told.batches(work.batch_size)[number]}
            if not all(item in done for item in items.values()):
                said = answer_batch(loaded, policies(grid, place.length), told, list(items), work, mesh)
                for i, item in items.items():
                    if item not in done:
                        append_line(file, Line(item, len(told.encoded[i]), told.prompts[i].answers, said[i]))
            shown += size
            show(shown, total)


def check_places(grid: Grid, tokenizer: Any, found: Sequence[Place], work: Work) -> None:
    """Refuses what could not be carried out to the end.

    Raises:
      ValueError: no prompts at all, a length too small for its task or budgets, or other prompts in other processes.
    """
    if not found:
        raise ValueError("tasks: none is left")
    for place in found:
        policies(grid, place.length)
        if not is_file(place.task):
            make_prompts(place.task, tokenizer, place.length, 1, grid.seed, place.depth)
    if work.num_processes > 1:
        digest = np.uint32(zlib.crc32(repr(found).encode()))
        try:
            multihost_utils.assert_equal(digest, "places differ")
        except AssertionError as error:
            raise ValueError("tasks: the processes read other prompts; give all of them the same files") from error


@contextlib.contextmanager
def _only_writer(path: pathlib.Path) -> Iterator[None]:
    """Keeps a second process from writing to the same file; a killed one does not."""
    try:
        with filelock.FileLock(path.with_suffix(".lock"), timeout=0):
            yield
    except filelock.Timeout as error:
        raise ValueError(f"another process writes {str(path)!r}; wait for it, or give another directory") from error


def our_units(found: Sequence[Place], work: Work) -> list[tuple[Place, int, int]]:
    """The batches of this process: place, number of the batch in it, prompts."""
    units = []
    for place in found:
        starts = range(0, place.num_prompts, work.batch_size)
        units += [(place, n, min(work.batch_size, place.num_prompts - start)) for n, start in enumerate(starts)]
    return units[work.process :: work.num_processes]


@functools.lru_cache(maxsize=1)
def places(grid: Grid, tokenizer: Any) -> list[Place]:
    """The places of a sweep, shortest prompts first; files of prompts are divided by the bucket of their lengths.

    A file that cannot be read is left out, with a warning that names it. The length of its prompts is that of their
    bucket: budgets in percent are of that.
    """
    found = [Place(*where, grid.prompts) for where in grid_places(grid)]
    for task in filter(is_file, grid.tasks):
        try:
            counts = collections.Counter(bucket_length(len(ids)) for ids in _encode_file(task, tokenizer))
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"task {task!r} is left out, its prompts cannot be read: {error}", stacklevel=2)
            continue
        found += [Place(task, length, None, count) for length, count in counts.items()]
    return sorted(found, key=lambda place: place.length)


@functools.lru_cache(maxsize=1)
def prompts_of(grid: Grid, tokenizer: Any, place: Place) -> Prompts:
    """The prompts of a place."""
    if is_file(place.task):
        numbered = enumerate(zip(read_prompts(place.task), _encode_file(place.task, tokenizer), strict=True))
        chosen = {i: pair for i, pair in numbered if bucket_length(len(pair[1])) == place.length}
        prompts, encoded = ({i: pair[k] for i, pair in chosen.items()} for k in (0, 1))
    else:
        where = place.task, tokenizer, place.length, place.num_prompts
        made = make_prompts(*where, place_seed(grid.seed, *place[:3]), place.depth)
        prompts = dict(enumerate(made))
        encoded = {i: tokenizer(prompt.text)["input_ids"] for i, prompt in prompts.items()}
    longest = max(len(tokenizer(prompt.continuation)["input_ids"]) for prompt in prompts.values())
    return Prompts(prompts, encoded, -(-(longest + 4) // ANSWER_STEP) * ANSWER_STEP)


def place_seed(seed: int, task: str, length: int, depth: float | None) -> int:
    """A seed of its own for every place, so that no two of them ask for the same needles."""
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
    loaded: Loaded, entries: dict[Entry, EvictionPolicy], told: Prompts, batch: Sequence[int], work: Work, mesh: Mesh
) -> dict[int, dict[str, str]]:
    """What is said after the prompts of a batch, by their number and by the label of every entry.

    A batch with fewer prompts than the others is filled up with its first, so that one program serves all.
    """
    rows = -(-work.batch_size // mesh.size) * mesh.size
    tokens, mask = pad_batch([told.encoded[i] for i in batch], rows)
    said: dict[int, dict[str, str]] = {i: {} for i in batch}
    columns = [(entry.label, policy) for entry, policy in entries.items()]
    for start in range(0, len(columns), work.together):
        labels, group_policies = zip(*columns[start : start + work.together], strict=True)
        out = _generated_tokens(loaded.model, loaded.params, tokens, mask, group_policies, told.max_new_tokens, mesh)
        for label, new in zip(labels, np.asarray(out), strict=True):
            texts = loaded.tokenizer.batch_decode(new[: len(batch)], skip_special_tokens=True)
            for i, text in zip(batch, texts, strict=True):
                said[i][label] = text
    return said


@functools.partial(jax.jit, static_argnames=("model", "policies", "max_new_tokens", "mesh"))
def _generated_tokens(model, params, tokens, mask, policies, max_new_tokens, mesh) -> Array:
    """int32 [P, B, max_new_tokens]; every device generates from its own rows."""

    def alone(params, tokens, mask):
        outs = generate_each(model, params, tokens, mask, policies, max_new_tokens)
        return jnp.stack([out.tokens for out in outs])

    rows = P("rows")
    divided = jax.shard_map(alone, mesh=mesh, in_specs=(P(), rows, rows), out_specs=P(None, "rows"), check_vma=False)
    return divided(params, tokens, mask)
