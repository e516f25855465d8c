"""A sweep: every prompt of a grid, in batches, with all methods and budgets from one prefill."""

import collections
import contextlib
import functools
import pathlib
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import filelock
import jax
import numpy as np
from jax.experimental import multihost_utils

from restkv_jax.evaluate.batching import even_size
from restkv_jax.evaluate.example import has_example, save_example
from restkv_jax.evaluate.grid import CacheConfig, Grid, conditions, has_depths, is_file, policies
from restkv_jax.evaluate.measuring import EncodedPrompts, RunSettings, measure_batch
from restkv_jax.evaluate.results import (
    PromptId,
    PromptResult,
    append_line,
    drop_broken_line,
    read_lines,
    results_path,
    writing,
)
from restkv_jax.evaluate.tasks.encoding import EncodedPrompt, Form, encode_prompt
from restkv_jax.evaluate.tasks.essays import read_essays
from restkv_jax.evaluate.tasks.files import read_prompts
from restkv_jax.evaluate.tasks.making import TASKS, make_prompts
from restkv_jax.evaluate.tasks.prompts import Prompt
from restkv_jax.evaluate.tasks.texts import DIVERGENCE, NUM_FOLLOWING, cut_pieces, read_text
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.checks import check_residual
from restkv_jax.generation.encoding import has_template
from restkv_jax.generation.reading import bucket_length, extend, prefill
from restkv_jax.kernels.quantised import parse_quantisation
from restkv_jax.loading import Loaded

ANSWER_STEP = 16
"""Answers are generated up to a multiple of this many tokens, so that few programs serve all tasks."""


class PromptSet(NamedTuple):
    """Prompts that are measured alike: a task, a length, a depth, and how many there are."""

    task: str
    length: int
    depth: float | None
    num_prompts: int


def run_sweep(
    loaded: Loaded,
    grid: Grid,
    directory: pathlib.Path,
    settings: RunSettings,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Answers all prompts of a checked grid that have no result yet, and appends each result to the file.

    Processes that share the model's devices all run this; the first alone reads and writes files. A batch is always
    made of the same prompts, so a sweep that goes on gives what an unbroken one gives.

    Args:
      loaded: what to measure.
      grid: which prompts, with what.
      directory: of the results; see `open_sweep`.
      settings: how.
      show: called with the prompts done and all prompts, as they grow.

    Raises:
      ValueError: another process that writes, or a file that cannot be written.
    """
    units = batches(prompt_sets(grid, loaded.tokenizer), settings)
    total, shown = sum(size for _, _, size in units), 0
    path, is_first = results_path(directory, 0), jax.process_index() == 0
    with _only_writer(path) if is_first else contextlib.nullcontext():
        done = read_lines(directory) if is_first else {}
        for number, (prompt_set, place, size) in enumerate(units):
            encoded = encode_prompts(grid, loaded.tokenizer, prompt_set)
            items = {i: PromptId(*prompt_set[:3], i) for i in encoded.batches(settings.batch_size)[place]}
            if not as_first(all(item in done for item in items.values())):
                look = None
                if number == 0 and not as_first(has_example(directory)):
                    look = functools.partial(save_example, directory, grid, loaded.tokenizer, encoded)
                configs = policies(grid, prompt_set.length)
                results = measure_batch(loaded, configs, encoded, list(items), settings, grid.cache_dtype, look)
                for i, item in items.items():
                    if is_first and item not in done:
                        tokens = len(encoded.tokens[i]) + len(encoded.asked.get(i, ()))
                        answers = encoded.prompts[i].answers
                        append_line(path, PromptResult(item, tokens, answers, *results[i]))
            shown += size
            show(shown, total)


def as_first(value: bool) -> bool:
    """What the first process says, for all of them."""
    return value if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def check_sweep(loaded: Loaded, grid: Grid) -> None:
    """Refuses what could not be carried out to the end, before anything is written.

    Raises:
      ValueError: no prompts at all, depths for none of the tasks, a length too small for its task or budgets, or other
        prompts in other processes.
    """
    if grid.chat and not has_template(loaded.tokenizer):
        raise ValueError("chat needs a chat template, which the model's tokenizer does not have; leave --chat out")
    if grid.depths and not any(map(has_depths, grid.tasks)):
        asked = ", ".join(filter(has_depths, TASKS))
        raise ValueError(f"depths are only for tasks that ask for one needle ({asked}); add one, or leave depths out")
    found = prompt_sets(grid, loaded.tokenizer)
    if not found:
        raise ValueError("tasks: no prompts are left to measure")
    for prompt_set in found:
        configs = policies(grid, prompt_set.length)
        if grid.cache_dtype is not None:
            quantisation = parse_quantisation(grid.cache_dtype)
            check_residual(quantisation, list(configs.values()), loaded.model.sharing)
        if prompt_set.task == DIVERGENCE:
            encode_prompts(grid, loaded.tokenizer, prompt_set)
        elif not is_file(prompt_set.task):
            _make(grid, loaded.tokenizer, prompt_set, 1)
    if grid.ask == "after":
        _check_extending(loaded, policies(grid, found[0].length), found[0].length)
    if jax.process_count() > 1:
        digest = np.uint32(zlib.crc32(repr(found).encode()))
        try:
            multihost_utils.assert_equal(digest, "prompt sets differ")
        except AssertionError as error:
            raise ValueError("tasks: the processes have read different prompts; give all the same files") from error


def _check_extending(loaded: Loaded, configs: dict[CacheConfig, EvictionPolicy], length: int) -> None:
    """Refuses methods whose caches cannot be read further onto; nothing is computed."""
    prompt = jax.ShapeDtypeStruct((1, length), np.int32)

    def read_twice(params: Any, prompt: jax.Array, policy: EvictionPolicy) -> Any:
        _, cache = prefill(loaded.model, params, prompt, None, policy)
        return extend(loaded.model, params, prompt[:, :1], None, cache)

    for method, policy in {config.method: policy for config, policy in configs.items()}.items():
        try:
            jax.eval_shape(functools.partial(read_twice, policy=policy), loaded.params, prompt)
        except (NotImplementedError, ValueError, TypeError) as error:
            raise ValueError(
                f"method {method!r} cannot be asked afterwards ({error}); leave it out, or give --ask within"
            ) from error


@contextlib.contextmanager
def _only_writer(path: pathlib.Path) -> Iterator[None]:
    """Makes the file of results ready, and keeps other processes from it; a killed one does not keep others out."""
    with contextlib.ExitStack() as held:
        with writing(path):
            try:
                held.enter_context(filelock.FileLock(path.with_suffix(".lock"), timeout=0))
            except filelock.Timeout as error:  # an OSError, of which `writing` would say something else
                raise ValueError(
                    f"another process writes {str(path)!r}; wait for it, or give another --output"
                ) from error
            drop_broken_line(path)
        yield


def batches(found: Sequence[PromptSet], settings: RunSettings) -> list[tuple[PromptSet, int, int]]:
    """All batches: prompt set, number of the batch in it, prompts.

    Shortest prompts first, and of one length a batch of each task in turn: a sweep that is stopped has as much of each.
    """
    units = []
    for prompt_set in found:
        size = even_size(prompt_set.num_prompts, settings.batch_size)
        starts = range(0, prompt_set.num_prompts, size)
        units += [(prompt_set, n, min(size, prompt_set.num_prompts - start)) for n, start in enumerate(starts)]
    return sorted(units, key=lambda unit: (unit[0].length, unit[1]))


@functools.lru_cache(maxsize=1)
def prompt_sets(grid: Grid, tokenizer: Any) -> list[PromptSet]:
    """The prompt sets of a sweep, shortest prompts first; files of prompts are divided by the bucket of their lengths.

    A task whose file or essays cannot be read is left out, with a warning that names it. The length of a file's prompts
    is that of their bucket: budgets in percent are of that.
    """
    found, no_essays = [], _why_no_essays(grid)
    for task in grid.tasks:
        try:
            if is_file(task):
                lengths = (each.length for _, each in _encode_file(task, tokenizer, grid.form))
                counts = collections.Counter(map(bucket_length, lengths))
                found += [PromptSet(task, length, None, count) for length, count in counts.items()]
            else:
                if no_essays is not None and needs_essays(grid, task):
                    raise no_essays
                found += [PromptSet(*where, grid.prompts) for where in conditions(grid) if where[0] == task]
        except (OSError, ValueError) as error:
            warnings.warn(f"task {task!r} is left out, its prompts cannot be read: {error}", stacklevel=2)
    return sorted(found, key=lambda prompt_set: prompt_set.length)


@functools.lru_cache(maxsize=64)
def encode_prompts(grid: Grid, tokenizer: Any, prompt_set: PromptSet) -> EncodedPrompts:
    """The prompts of a prompt set."""
    task, length, _, count = prompt_set
    if task == DIVERGENCE:
        seed = prompt_set_seed(grid.seed, *prompt_set[:3])
        pieces = dict(enumerate(cut_pieces(tokenizer, read_text(grid.text), length, count, seed)))
        tokens, following = ({i: piece[part] for i, piece in pieces.items()} for part in range(2))
        return EncodedPrompts(dict.fromkeys(pieces, Prompt("", ())), tokens, NUM_FOLLOWING, {}, following)
    if is_file(task):
        numbered = dict(enumerate(_encode_file(task, tokenizer, grid.form)))
        found = {i: pair for i, pair in numbered.items() if bucket_length(pair[1].length) == length}
    else:
        made = _make(grid, tokenizer, prompt_set, count)
        found = {i: (prompt, encode_prompt(tokenizer, prompt, grid.form)) for i, prompt in enumerate(made)}
    longest = max(len(tokenizer(prompt.continuation)["input_ids"]) for prompt, _ in found.values())
    return EncodedPrompts(
        {i: prompt for i, (prompt, _) in found.items()},
        {i: encoded.read for i, (_, encoded) in found.items()},
        -(-(longest + 4) // ANSWER_STEP) * ANSWER_STEP,
        {i: encoded.asked for i, (_, encoded) in found.items() if encoded.asked},
        {},
    )


def _make(grid: Grid, tokenizer: Any, prompt_set: PromptSet, count: int) -> list[Prompt]:
    """Fresh prompts, sized as they are put."""
    task, length, depth, _ = prompt_set
    length_of = None
    if grid.form != Form():
        length_of = lambda prompt: encode_prompt(tokenizer, prompt, grid.form).length  # noqa: E731
    seed = prompt_set_seed(grid.seed, task, length, depth)
    return make_prompts(task, tokenizer, length, count, seed, depth, length_of)


def _why_no_essays(grid: Grid) -> OSError | None:
    """What goes wrong where essays are needed and cannot be fetched; tried once, for it may take a while."""
    try:
        if any(needs_essays(grid, task) for task in grid.tasks):
            read_essays()
    except OSError as error:
        return error
    return None


def needs_essays(grid: Grid, task: str) -> bool:
    """Whether a task's prompts are made of the essays that pip downloads."""
    if task == DIVERGENCE:
        return grid.text is None
    return getattr(TASKS.get(task), "haystack", None) == "essays"


def prompt_set_seed(seed: int, task: str, length: int, depth: float | None) -> int:
    """A seed of its own for every prompt set, so that no two of them ask for the same needles."""
    return zlib.crc32(f"{seed} {task} {length} {depth}".encode())


@functools.lru_cache(maxsize=1)
def _encode_file(path: str, tokenizer: Any, form: Form) -> list[tuple[Prompt, EncodedPrompt]]:
    return [(prompt, encode_prompt(tokenizer, prompt, form)) for prompt in read_prompts(path)]
