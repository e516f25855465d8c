"""The commands `restkv evaluate` and `restkv report`."""

import argparse
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
import yaml
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)
from rich.table import Table

from restkv_jax.commands.loading import load_checkpoint
from restkv_jax.commands.options import UsageError, as_usage_error, parse
from restkv_jax.evaluate.costs import measure_costs
from restkv_jax.evaluate.example import plot_example
from restkv_jax.evaluate.grid import Entry, Grid, check_grid, from_mapping
from restkv_jax.evaluate.layer_errors import measure_layer_errors
from restkv_jax.evaluate.report import TITLE, write_report
from restkv_jax.evaluate.report.summary import collect
from restkv_jax.evaluate.results import (
    Results,
    open_sweep,
    read_costs,
    read_errors,
    read_results,
    write_costs,
    write_errors,
)
from restkv_jax.evaluate.sweep import Loaded, Work, run_sweep
from restkv_jax.models.digest import checksum

COLUMNS = (
    TextColumn("evaluating"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("prompts"),
    TimeElapsedColumn(),
    TextColumn("left:"),
    TimeRemainingColumn(),
)


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Measures how well a model answers on small caches: tasks x methods x budgets x lengths in one sweep.

    The same command goes on where one that was killed stopped. Several processes share the work.

    Args:
      output: directory of the results, made if there is none.
      grid: YAML file with any of the options tasks, methods, budgets, lengths, depths, prompts, seed, model, dtype;
        what is given on the command line goes before.
      batch_size: prompts generated at once.
      together: methods and budgets that share a prefill; their caches are in memory together, so lower it for large
        models.
      errors: also measure how far every layer's attention moves, on a batch of each task and length.
      costs: also measure bytes and times.
      compilation_cache: directory in which JAX keeps compiled programs; "none" keeps none.
      distributed: join the other processes of a TPU slice, or those at --coordinator.
      coordinator: address and port of process 0, for --distributed where JAX does not find it by itself.
      num_processes: how many processes there are, with --coordinator.
      process_id: which of them this is, from 0, with --coordinator.
      quiet: print nothing.
    """

    output: pathlib.Path
    grid: pathlib.Path | None = None
    batch_size: int = 10
    together: int = 128
    errors: bool = True
    costs: bool = True
    compilation_cache: str = "~/.cache/restkv-jax"
    distributed: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    quiet: bool = False


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Writes report.html, report.md and pictures of a sweep into its directory, also of an unfinished one.

    A picture kept.png that is in the directory, as `restkv plot` draws it, goes into the report.

    Args:
      directory: of the results, as `restkv evaluate` leaves it.
      title: of the report.
    """

    directory: tyro.conf.Positional[pathlib.Path]
    title: str = TITLE


class Command(NamedTuple):
    """A parsed `restkv evaluate`."""

    options: EvaluateOptions
    grid: Grid


def run_evaluate(args: Sequence[str]) -> None:
    """`restkv evaluate`: runs a sweep, prints its table and writes its report.

    Raises:
      UsageError: input that cannot work.
    """
    options, grid = parse_evaluate(args)
    check_grid(grid)
    _keep_programs(options.compilation_cache)
    work = _join(options)
    loaded = Loaded(*load_checkpoint(grid.model, grid.dtype))
    weights = checksum(loaded.params)
    try:
        if work.process == 0:
            open_sweep(options.output, grid, weights)
    finally:  # the others see for themselves what is wrong
        _wait_for_all(work, "the sweep is opened")
    open_sweep(options.output, grid, weights)
    quiet = options.quiet or work.process > 0
    # a batch may take minutes, and the time left is estimated from several
    bar = Progress(*COLUMNS, console=Console(stderr=True), disable=quiet, speed_estimate_period=3600)
    with bar, as_usage_error():
        shown = bar.add_task("", total=None)
        run_sweep(
            loaded, grid, options.output, work, lambda done, total: bar.update(shown, completed=done, total=total)
        )
    _wait_for_all(work, "the sweep is done")
    if work.process == 0:
        _conclude(options, loaded, grid)
    # who leaves first ends the others
    _wait_for_all(work, "the report is written")


def _conclude(options: EvaluateOptions, loaded: Loaded, grid: Grid) -> None:
    """Measures what is measured once, and shows the results."""
    with as_usage_error():
        measure_once(options, loaded, grid)
    report = write_report(options.output, plot_example(loaded, grid))
    if not options.quiet:
        for table in score_tables(read_results(options.output)):
            Console().print(table)
        print(f"wrote {report}")


def run_report(args: Sequence[str]) -> None:
    """`restkv report`: writes the report of a sweep.

    Raises:
      UsageError: a directory without a sweep or without results.
    """
    options = parse(ReportOptions, args, "restkv report", (ReportOptions,))
    with as_usage_error(f"DIRECTORY {str(options.directory)!r}: "):
        path = write_report(options.directory, title=options.title)
    print(f"wrote {path}")


def measure_once(options: EvaluateOptions, loaded: Loaded, grid: Grid) -> None:
    """Measures the entries' reconstruction errors and costs, unless they are there or not wanted."""

    def show(name: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
        return iter if options.quiet else functools.partial(track, description=name, console=Console(stderr=True))

    # on one device, and so on its share of a batch
    work = Work(-(-options.batch_size // jax.local_device_count()), options.together)
    if options.errors and not read_errors(options.output):
        write_errors(options.output, measure_layer_errors(loaded, grid, work, show("layer errors")))
    if options.costs and read_costs(options.output) is None:
        write_costs(options.output, measure_costs(loaded, grid, work, show("costs")))


def parse_evaluate(args: Sequence[str]) -> Command:
    """Options of `restkv evaluate`; those of a grid come from its file where the command line does not give them.

    Raises:
      UsageError: an unknown option or a value of the wrong kind, on the command line or in the file.
    """
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    first.add_argument("--grid", nargs="?")
    path = first.parse_known_args(args)[0].grid
    default = Grid() if path is None else Grid(**read_grid(pathlib.Path(path)))

    def command(
        options: tyro.conf.OmitArgPrefixes[EvaluateOptions], measured: tyro.conf.OmitArgPrefixes[Grid] = default
    ) -> Command:
        return Command(options, measured)

    command.__doc__ = EvaluateOptions.__doc__
    return parse(command, args, "restkv evaluate", (EvaluateOptions, Grid))


def read_grid(path: pathlib.Path) -> dict[str, Any]:
    """The fields of a `Grid` in a YAML file.

    Raises:
      UsageError: a file that cannot be read, or is no grid.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UsageError(f"--grid {str(path)!r} cannot be read: {error}") from error
    return from_mapping(values, f"--grid {str(path)!r}")


def score_tables(results: Results) -> list[Table]:
    """A table for each task and length: a line per method, a column per budget, mean scores in per cent."""
    columns, tables = [None, *results.grid.budgets], []
    for place, by_entry in collect(results).items():
        count = max(map(len, by_entry.values()))
        title = f"{place.task}, {place.length:,} tokens, {count} prompts"
        table = Table("method", *(budget or "" for budget in columns), title=title)
        means = {entry: f"{100 * np.mean(list(scores.values())):.1f}" for entry, scores in by_entry.items()}
        for method in results.grid.methods:
            table.add_row(method, *(means.get(Entry(method, budget), "") for budget in columns))
        tables.append(table)
    return tables


def _keep_programs(directory: str) -> None:
    """Lets JAX keep compiled programs on disk, unless the environment already says where."""
    if directory != "none" and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))


def _join(options: EvaluateOptions) -> Work:
    """Joins the other processes, if there are any."""
    work = Work(options.batch_size, options.together)
    for name in ("batch_size", "together"):
        if getattr(work, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(work, name)} must be at least 1")
    if not options.distributed:
        return work
    with as_usage_error("--distributed: "):
        jax.distributed.initialize(options.coordinator, options.num_processes, options.process_id)
    return work._replace(process=jax.process_index(), num_processes=jax.process_count())


def _wait_for_all(work: Work, name: str) -> None:
    if work.num_processes > 1:
        multihost_utils.sync_global_devices(name)
