"""`restkv evaluate`: a sweep, its table and its report."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import cyclopts
import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)
from rich.table import Table

from restkv_jax.commands.options import FLAT, UsageError, as_usage_error, chosen_mesh, parse
from restkv_jax.commands.progress import show_while
from restkv_jax.evaluate.costs import measure_costs
from restkv_jax.evaluate.example import plot_example
from restkv_jax.evaluate.grid import CacheConfig, Grid, check_grid
from restkv_jax.evaluate.layer_errors import measure_layer_errors
from restkv_jax.evaluate.measuring import RunSettings
from restkv_jax.evaluate.report.page import write_report
from restkv_jax.evaluate.report.summary import Scenario, collect, collect_divergences, standard_error
from restkv_jax.evaluate.report.tables import nats_text
from restkv_jax.evaluate.results import (
    Results,
    check_output,
    open_sweep,
    read_costs,
    read_errors,
    read_results,
    write_costs,
    write_errors,
)
from restkv_jax.evaluate.sweep import as_first, check_sweep, run_sweep
from restkv_jax.loading import Loaded, load_checkpoint
from restkv_jax.models.digest import checksum
from restkv_jax.progress import make_progress

HEARTBEAT_SECONDS = 30
"""Without a sign of life from a process after which the others end."""

LOG_WIDTH = 1000
"""Most characters of a line where no terminal limits it."""

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

    Every result is written as soon as it is known, table and report as soon as all are, and what else is measured after
    that. The same command goes on where one that was killed stopped. All devices take part, those of other processes
    included, which all run the same command; the first of them writes.

    Args:
      output: directory of the results; created if missing.
      grid: YAML file with any of these options by name, such as tasks, methods, budgets and lengths; the command line
        takes precedence.
      batch_size: most prompts generated at once.
      together: methods and budgets that share a prefill; their caches are in memory together, so lower it for large
        models.
      errors: also measure how far every layer's attention moves, on a batch of each task and length.
      costs: also say how many bytes caches take.
      rates: also measure the time of each method's prefill, of a token, and of the ways to run a sweep, which takes
        longer than many a sweep.
      compilation_cache: directory in which JAX keeps compiled programs, or "none"; ~/.cache/restkv-jax, or what
        JAX_COMPILATION_CACHE_DIR says, if left out.
      model_parallel: devices that share the weights, of several hosts if need be.
      data_parallel: parts that the prompts of a batch are divided into; as many as there are devices for if left out.
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
    errors: bool = False
    costs: bool = True
    rates: bool = False
    compilation_cache: str | None = None
    model_parallel: int = 1
    data_parallel: int | None = None
    distributed: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    quiet: bool = False


def run(args: Sequence[str]) -> None:
    """Runs a sweep, prints its table and writes its report.

    Raises:
      UsageError: input that cannot work.
    """
    options, grid = parse_evaluate(args)
    with as_usage_error():
        check_grid(grid)
        check_output(options.output)
    if options.compilation_cache is not None:
        _keep_programs(options.compilation_cache)
    settings = _settings(options)
    _join(options)
    try:
        with as_usage_error():
            _sweep(options, grid, settings)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise UsageError(
            f"another process has ended ({str(error).partition(chr(10))[0][:200]}); start all of them again with the "
            "same command, and the sweep goes on"
        ) from error


def _sweep(options: EvaluateOptions, grid: Grid, settings: RunSettings) -> None:
    is_first = jax.process_index() == 0
    mesh = chosen_mesh(options.model_parallel, options.data_parallel)
    with show_while("loading the model", quiet=options.quiet):
        loaded = load_checkpoint(grid.model, grid.dtype, dense=grid.dense, mesh=mesh)
    if options.errors and loaded.model.sharing is not None:
        raise UsageError("--errors is for models that do not share keys; leave it out, or give --dense")
    if options.errors and grid.cache_dtype is not None:
        raise UsageError("--errors is of caches in the model's dtype; leave it out, or --cache-dtype")
    check_sweep(loaded, grid)
    _open(options.output, grid, checksum(loaded.params))
    # a batch may take minutes, and the time left is estimated from several
    is_silent = options.quiet or not is_first
    with make_progress(*COLUMNS, quiet=is_silent, speed_estimate_period=3600) as bar:
        shown = bar.add_task("", total=None)
        show = lambda done, total: bar.update(shown, completed=done, total=total)  # noqa: E731
        run_sweep(loaded, grid, options.output, settings, show)
    if is_first:
        _report(options)
    if measure_once(options, loaded, grid, settings) and is_first:
        _report(options, quiet=True)
    if jax.process_count() > 1:  # who leaves first ends the others
        multihost_utils.sync_global_devices("the report is written")


def _open(directory: pathlib.Path, grid: Grid, weights: str) -> None:
    """Opens the sweep in the first process; the others end if it cannot."""
    refused = None
    if jax.process_index() == 0:
        try:
            open_sweep(directory, grid, weights)
        except ValueError as error:
            refused = error
    if not as_first(refused is None):
        raise refused or UsageError("the first process cannot open the sweep, and says why")


def _report(options: EvaluateOptions, quiet: bool = False) -> None:
    """Shows the results and writes the report."""
    report = write_report(options.output, plot_example(options.output))
    if not (options.quiet or quiet):
        for table in score_tables(read_results(options.output)):
            _print(table)
        print(f"wrote {report}")


def _print(table: Table) -> None:
    """Prints a table, in a file or a pipe as wide as it is."""
    console = Console()
    if not console.is_terminal:
        wide = console.options.update(max_width=LOG_WIDTH)
        console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)


def measure_once(options: EvaluateOptions, loaded: Loaded, grid: Grid, settings: RunSettings) -> bool:
    """Measures the configurations' costs and reconstruction errors, unless they are there or not asked for.

    Returns:
      whether anything was measured.
    """

    def show(name: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
        is_silent = options.quiet or not is_first
        return iter if is_silent else functools.partial(track, description=name, console=Console(stderr=True))

    is_first = jax.process_index() == 0
    costs = read_costs(options.output) if is_first else None
    lacks_costs = costs is None or (options.rates and not costs.rates)
    if lacks_costs := as_first(lacks_costs and (options.costs or options.rates)):
        found = measure_costs(loaded, grid, settings, options.rates, show("costs"))
        if is_first:
            write_costs(options.output, found)
    if lacks_errors := as_first(options.errors and not (is_first and read_errors(options.output))):
        errors = measure_layer_errors(loaded, grid, settings, show("layer errors"))
        if is_first:
            write_errors(options.output, errors)
    return lacks_costs or lacks_errors


def parse_evaluate(args: Sequence[str]) -> tuple[EvaluateOptions, Grid]:
    """Options of `restkv evaluate`; they come from the file `--grid` where the command line does not give them.

    Raises:
      UsageError: an unknown option or a value of the wrong kind, on the command line or in the file.
    """

    def command(
        *,
        options: Annotated[EvaluateOptions, FLAT],
        grid: Annotated[Grid, FLAT] = Grid(),  # noqa: B008
    ) -> tuple[EvaluateOptions, Grid]:
        return options, grid

    command.__doc__ = EvaluateOptions.__doc__
    return parse(command, args, "restkv evaluate", config=_read_grid_file)


def _read_grid_file(app: cyclopts.App, commands: tuple[str, ...], arguments: cyclopts.ArgumentCollection) -> None:
    """Options from the YAML file that `--grid` names."""
    for token in arguments["--grid"].tokens:
        path = pathlib.Path(token.value)
        source = f"--grid {str(path)!r}"
        file = cyclopts.config.Yaml(path, must_exist=True, use_commands_as_keys=False, source=source)
        try:
            file(app, commands, arguments)
        except cyclopts.UnknownOptionError:
            raise
        except (cyclopts.CycloptsError, OSError) as error:
            raise UsageError(f"{source} cannot be read: {error}") from error


def score_tables(results: Results) -> list[Table]:
    """A table for each task and length: a line per method, a column per budget.

    Mean scores in percent; divergences in nats per token, with their standard errors.
    """
    tables = []
    for scenario, by_config in collect(results).items():
        texts = {config: f"{100 * np.mean(list(scores.values())):.1f}" for config, scores in by_config.items()}
        tables.append(_table(results.grid, scenario, max(map(len, by_config.values())), texts))
    for scenario, by_config in collect_divergences(results).items():
        texts = {e: nats_text(float(np.mean([*v.values()])), standard_error(v.values())) for e, v in by_config.items()}
        tables.append(_table(results.grid, scenario, max(map(len, by_config.values())), texts, ", nats per token"))
    return tables


def _table(grid: Grid, scenario: Scenario, count: int, texts: dict[CacheConfig, str], unit: str = "") -> Table:
    columns = [None, *grid.budgets]
    title = f"{scenario.task}, {scenario.length:,} tokens, {count} prompts{unit}"
    table = Table(title=title)
    table.add_column("method", overflow="fold")
    for budget in columns:
        table.add_column(budget or "", no_wrap=True, overflow="fold")
    for method in grid.methods:
        table.add_row(method, *(texts.get(CacheConfig(method, budget), "") for budget in columns))
    return table


def _keep_programs(directory: str) -> None:
    """Lets JAX keep compiled programs in a directory, or not at all."""
    path = None if directory == "none" else os.path.expanduser(directory)
    jax.config.update("jax_compilation_cache_dir", path)


def _settings(options: EvaluateOptions) -> RunSettings:
    settings = RunSettings(options.batch_size, options.together)
    for name in ("batch_size", "together"):
        if getattr(settings, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(settings, name)} must be at least 1")
    return settings


def _join(options: EvaluateOptions) -> None:
    """Joins the other processes, if there are any; one that ends is missed after a while."""
    processes = options.coordinator, options.num_processes, options.process_id
    if not options.distributed and processes != (None, None, None):
        raise UsageError("--coordinator, --num-processes and --process-id go with --distributed, which is missing")
    if options.distributed:
        with as_usage_error("--distributed: "):
            jax.distributed.initialize(*processes, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
