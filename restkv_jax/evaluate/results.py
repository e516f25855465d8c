"""The results of a sweep on disk: one JSON line per prompt, a file per process, and the grid that they are of."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from restkv_jax.evaluate.accuracy import is_exact, match_share
from restkv_jax.evaluate.grid import CacheConfig, Grid, cache_configs, check_grid, conditions, is_file
from restkv_jax.evaluate.tasks.files import read_prompts
from restkv_jax.models.files import written_whole

SWEEP = "sweep.json"
COSTS = "costs.json"
ERRORS = "errors.json"
DAMAGED = OSError, ValueError, KeyError, TypeError, AttributeError
"""What reading a file that something else has changed may raise."""

T = TypeVar("T")


class PromptId(NamedTuple):
    """One prompt of a sweep: the task, the length and the depth asked for, and its number."""

    task: str
    length: int
    depth: float | None
    index: int


class PromptResult(NamedTuple):
    """What was said after one prompt, by the label of each configuration, and what should have been.

    `read_seconds` is the prompt's share of the time that its batch took to be read for all configurations;
    `divergences`, of a prompt without answers, are from the full cache in nats per token, by label.
    """

    item: PromptId
    prompt_tokens: int
    answers: tuple[str, ...]
    said: dict[str, str]
    read_seconds: float | None = None
    divergences: Mapping[str, float] = types.MappingProxyType({})


class Cell(NamedTuple):
    """The prompts of one task, length and depth with one method and budget."""

    task: str
    length: int
    depth: float | None
    config: CacheConfig


class Scores(NamedTuple):
    """Of the prompts of a cell, in the order of their numbers `index` int [N]: `match`, float [N], the share of the
    answers that were said; `exact`, bool [N], whether they were said and nothing else.
    """

    index: np.ndarray
    match: np.ndarray
    exact: np.ndarray


class Divergences(NamedTuple):
    """Of the prompts of a cell, in the order of their numbers `index` int [N]: `nats`, float [N], the divergence from
    the full cache's next-token distribution in nats per token.
    """

    index: np.ndarray
    nats: np.ndarray


class Cost(NamedTuple):
    """What a configuration costs at a length: bytes of a row's cache after the prompt, their share of the full cache's,
    seconds of the prefill, seconds of a generated token of a batch; None where it was not timed.
    """

    length: int
    label: str
    cache_bytes: int
    cache_share: float
    prefill_seconds: float | None
    token_seconds: float | None


class Rate(NamedTuple):
    """Prompts per second of a sweep done in one way, on the same prompts as the others."""

    how: str
    prompts_per_second: float


class Costs(NamedTuple):
    """What the configurations of a sweep cost on the machine it says."""

    device: str
    costs: tuple[Cost, ...]
    rates: tuple[Rate, ...]


class LayerErrors(NamedTuple):
    """The mean relative error of every layer's attention output for the tokens of the answers; see
    `reconstruction_errors`.
    """

    task: str
    length: int
    label: str
    layers: tuple[float, ...]


class File(NamedTuple):
    """A file that a sweep reads: a hash of its bytes, and how many prompts it has; None where that is not known."""

    digest: str | None
    num_prompts: int | None = None


class Results(NamedTuple):
    """A sweep as read from its directory; `costs` is None and `errors` empty where they were not measured.

    `read_seconds` are the medians of the prompts' times of reading for all configurations, by length; `weights` the
    checksum of the model's parameters; `files` what is known of the files that were read, by path.
    """

    grid: Grid
    cells: dict[Cell, Scores]
    costs: Costs | None
    errors: tuple[LayerErrors, ...] = ()
    read_seconds: Mapping[int, float] = types.MappingProxyType({})
    divergences: Mapping[Cell, Divergences] = types.MappingProxyType({})
    weights: str = ""
    files: Mapping[str, File] = types.MappingProxyType({})


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Names what cannot be written, and says how to go on.

    Raises:
      ValueError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{str(path)!r} cannot be written ({error.strerror or error}); make room or give another --output, and the "
            "same command goes on"
        ) from error


def check_output(directory: pathlib.Path) -> None:
    """Refuses a place that cannot be the directory of a sweep, before anything is loaded.

    Raises:
      ValueError: a file, a directory in a file, or one that cannot be written to.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"output {str(directory)!r} cannot be made: {str(existing)!r} is a file; give a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output {str(directory)!r}: {str(existing)!r} cannot be written to; give another directory")


def open_sweep(directory: pathlib.Path, grid: Grid, weights: str) -> None:
    """Makes the directory of a sweep, or checks that it is of the same one.

    Args:
      directory: of the results.
      grid: what is measured.
      weights: the checksum of the model's parameters.

    Raises:
      ValueError: the directory holds a sweep of another grid or model; says what differs.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    texts = [] if grid.text is None else [grid.text]
    files = {path: _digest(pathlib.Path(path)) for path in [*filter(is_file, grid.tasks), *texts]}
    prompts = {path: _count(path) for path in grid.tasks if is_file(path)}
    described = {"grid": dataclasses.asdict(grid), "weights": weights, "files": files, "prompts": prompts}
    ours = json.loads(json.dumps(described))
    path = directory / SWEEP
    if not path.is_file():
        replace_text(path, json.dumps(ours, indent=1) + "\n")
        return
    theirs = _read_sweep(path)
    theirs["grid"] = dataclasses.asdict(Grid()) | theirs["grid"]  # an option may be younger than the sweep
    ours, theirs = (
        values["grid"] | {"the model's weights": values["weights"], "the files": values["files"]}
        for values in (ours, theirs)
    )
    different = [
        f"{name} {theirs.get(name)} there, {ours.get(name)} here"
        for name in ours | theirs
        if ours.get(name) != theirs.get(name)
    ]
    if different:
        raise ValueError(
            f"{str(directory)!r} holds results of another sweep ({'; '.join(different)}); give another --output, or "
            "the same grid to go on"
        )


def _read_sweep(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
        found = {"grid": dict(values["grid"]), "weights": str(values["weights"])}
        return found | {name: dict(values.get(name, {})) for name in ("files", "prompts")}
    except DAMAGED as error:
        raise ValueError(f"{str(path)!r} does not describe a sweep ({error!r}); give the directory of one") from error


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with writing(path), written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _digest(path: pathlib.Path) -> str | None:
    """A hash of a file's bytes; None for one that cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return None


def _count(path: str) -> int | None:
    """How many prompts a file has; None for one that is left out."""
    try:
        return len(read_prompts(path))
    except (OSError, ValueError):
        return None


def append_line(path: pathlib.Path, line: PromptResult) -> None:
    """Writes the result of one prompt so that it outlives the process."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(line_text(line))
        file.flush()
        os.fsync(file.fileno())


def line_text(line: PromptResult) -> str:
    """The result of one prompt as it stands in a file."""
    values = {name: value for name, value in line._asdict().items() if name != "divergences" or value}
    return json.dumps(values.pop("item")._asdict() | values) + "\n"


def results_path(directory: pathlib.Path, process: int) -> pathlib.Path:
    """The file to which one process writes."""
    return directory / f"results-{process}.jsonl"


def drop_broken_line(path: pathlib.Path) -> None:
    """Takes away a last line that a killed process left unfinished."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))


def read_lines(directory: pathlib.Path) -> dict[PromptId, PromptResult]:
    """The results of all processes; an unfinished last line of a file counts as none.

    Raises:
      ValueError: another line that cannot be read, with its number.
    """
    found = {}
    for path in sorted(directory.glob("results-*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, text in enumerate(lines[:-1], 1):
            try:
                line = _parse_line(json.loads(text))
                found[line.item] = line
            except DAMAGED as error:
                raise ValueError(f"line {number} of {str(path)!r} is broken ({error!r}); remove it") from error
    return found


def _parse_line(values: dict[str, Any]) -> PromptResult:
    seconds, depth = values.get("read_seconds"), values["depth"]
    item = PromptId(
        _text(values["task"]), int(values["length"]), None if depth is None else float(depth), int(values["index"])
    )
    return PromptResult(
        item,
        int(values["prompt_tokens"]),
        tuple(map(_text, values["answers"])),
        {label: _text(said) for label, said in values["said"].items()},
        None if seconds is None else float(seconds),
        {label: float(nats) for label, nats in values.get("divergences", {}).items()},
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is not a string")
    return value


def read_results(directory: pathlib.Path) -> Results:
    """Everything that a sweep has found so far.

    Raises:
      ValueError: no sweep, or broken lines.
    """
    sweep = _read_sweep(directory / SWEEP)
    values = sweep["grid"]
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    try:
        grid = Grid(**values)
        check_grid(grid)
    except DAMAGED as error:
        raise ValueError(
            f"{str(directory / SWEEP)!r} is damaged or of another version ({error}); measure into another directory"
        ) from error
    lines = read_lines(directory).values()
    extras = read_costs(directory), read_errors(directory)
    cells, divergences = score_lines(grid, lines)
    files = {path: File(digest, sweep["prompts"].get(path)) for path, digest in sweep["files"].items()}
    return Results(grid, cells, *extras, median_read_seconds(lines), divergences, sweep["weights"], files)


def write_errors(directory: pathlib.Path, errors: Iterable[LayerErrors]) -> None:
    """Writes the reconstruction errors of the configurations of a sweep."""
    lines = ",\n".join(json.dumps(each._asdict()) for each in errors)
    replace_text(directory / ERRORS, f"[{lines}]\n")


def read_errors(directory: pathlib.Path) -> tuple[LayerErrors, ...]:
    """The reconstruction errors; none where they were not measured."""

    def parse(values: Any) -> tuple[LayerErrors, ...]:
        of_each = (LayerErrors(**each) for each in values)
        return tuple(each._replace(layers=tuple(map(float, each.layers))) for each in of_each)

    return _read_extra(directory / ERRORS, parse) or ()


def write_costs(directory: pathlib.Path, costs: Costs) -> None:
    """Writes what configurations cost."""
    values = {"device": costs.device, "costs": [c._asdict() for c in costs.costs]}
    values["rates"] = [rate._asdict() for rate in costs.rates]
    replace_text(directory / COSTS, json.dumps(values, indent=1) + "\n")


def read_costs(directory: pathlib.Path) -> Costs | None:
    """What configurations cost; None where it was not measured."""

    def parse(values: Any) -> Costs:
        costs, rates = tuple(Cost(**each) for each in values["costs"]), tuple(Rate(**each) for each in values["rates"])
        if not all(isinstance(x, int | float | None) for cost in costs for x in cost._replace(label=None)):
            raise TypeError("not all costs are numbers")
        return Costs(_text(values["device"]), costs, tuple(Rate(_text(how), float(rate)) for how, rate in rates))

    return _read_extra(directory / COSTS, parse)


def _read_extra(path: pathlib.Path, parse: Callable[[Any], T]) -> T | None:
    """What a file that is measured once says; None without it."""
    if not path.is_file():
        return None
    try:
        return parse(json.loads(path.read_bytes()))
    except DAMAGED as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({error!r}); remove it, and `restkv evaluate` measures it anew"
        ) from error


def score_lines(grid: Grid, lines: Iterable[PromptResult]) -> tuple[dict[Cell, Scores], dict[Cell, Divergences]]:
    """The scores, and the divergences, of all cells that have prompts, in the grid's order."""
    by_condition: dict[tuple, list[PromptResult]] = {}
    for line in lines:
        by_condition.setdefault(line.item[:3], []).append(line)
    order = conditions(grid)
    measured = [condition for condition in order if condition in by_condition] + [
        condition for condition in by_condition if condition not in order
    ]
    cells, divergences = {}, {}
    for condition in measured:
        ordered = sorted(by_condition[condition], key=lambda line: line.item.index)
        for config in cache_configs(grid):
            cell, label = Cell(*condition, config), config.label
            answered = [line for line in ordered if label in line.said]
            followed = [line for line in ordered if label in line.divergences]
            if answered:
                cells[cell] = _scores(answered, label)
            if followed:
                index = np.array([line.item.index for line in followed])
                divergences[cell] = Divergences(index, np.array([line.divergences[label] for line in followed]))
    return cells, divergences


def median_read_seconds(lines: Iterable[PromptResult]) -> dict[int, float]:
    """The median time of reading a prompt for all configurations, by length."""
    by_length: dict[int, list[float]] = {}
    for line in lines:
        if line.read_seconds is not None:
            by_length.setdefault(line.item.length, []).append(line.read_seconds)
    return {length: float(np.median(by_length[length])) for length in sorted(by_length)}


def _scores(lines: list[PromptResult], label: str) -> Scores:
    pairs = [(line.said[label], line.answers) for line in lines]
    return Scores(
        np.array([line.item.index for line in lines]),
        np.array([match_share(said, answers) for said, answers in pairs]),
        np.array([is_exact(said, answers) for said, answers in pairs]),
    )
