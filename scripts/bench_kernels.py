"""How close every kernel comes to what its device can do: `python -m scripts.bench_kernels`.

On a GPU or TPU all implementations that take the shapes are timed in turns; the roofline is the time in which the
device could move the bytes and do the products that cannot be avoided. With `--topology` nothing runs: the kernels are
compiled for TPUs that need not be there, and the bytes that their programs move through HBM are counted.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table

from restkv_jax.commands.options import UsageError, as_usage_error, parse, print_notice
from restkv_jax.evaluate.report.units import BYTES, SECONDS, text_of
from restkv_jax.kernels.dispatch import REFERENCE, target_platform
from restkv_jax.models.build import build_model
from restkv_jax.models.checkpoint import EMBEDDED
from restkv_jax.models.mesh import make_mesh
from restkv_jax.planning.chips import Chip, Topology, chip_of, find_topology
from restkv_jax.planning.counting import count
from restkv_jax.planning.programs import compile_lowered
from restkv_jax.planning.uses import Use, kernel_uses

UNITS = {"seconds": SECONDS, "bytes": BYTES, "temporaries": BYTES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Times every implementation of every kernel, or counts the bytes that it moves.

    Args:
      model: a `config.json`, or a directory that has one; the model that comes with the package if left out.
      length: tokens of the prompt.
      dtype: of queries, keys and values.
      topology: a slice such as v5e:2x2, for one chip of which bytes are counted; nothing runs.
      rounds: how often each is timed.
      output: a file for the results as JSON.
    """

    model: pathlib.Path = EMBEDDED
    length: int = 8192
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    topology: str | None = None
    rounds: int = 10
    output: pathlib.Path | None = None


def main() -> None:
    """Prints the table, and writes the results."""
    options = parse(BenchOptions, program="python -m scripts.bench_kernels")
    with as_usage_error():
        config = build_model(options.model).config
    todo = list(kernel_uses(config, options.length, jnp.dtype(options.dtype)))
    if options.topology is None:
        device = jax.devices()[0].device_kind
        results = [line for use in track(todo, "timing", transient=True) for line in timed(use, options.rounds)]
    else:
        with as_usage_error():
            topology = find_topology(options.topology)
        device = f"one chip of {topology.name}, compiled for and not run"
        results = [line for use in track(todo, "compiling", transient=True) for line in counted(use, topology)]
    if options.output is not None:
        kept = dict(device=device, length=options.length, dtype=options.dtype, kernels=results)
        options.output.write_text(json.dumps(kept, indent=2) + "\n")
    show(device, results)


def timed(use: Use, rounds: int) -> Iterator[dict[str, Any]]:
    """The median seconds of every implementation that can be used here, timed in turns."""
    arrays = use.make(jax.random.key(0))
    chip = chip_of(jax.devices()[0].device_kind)
    functions = dict(compiled(use, arrays))
    for function in functions.values():
        jax.block_until_ready(function(*arrays))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arrays))
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    for name in functions:
        least = roofline(use, chip)
        yield dict(
            kernel=use.purpose,
            implementation=name,
            seconds=seconds[name],
            of_reference=seconds[name] / seconds[REFERENCE] if REFERENCE in seconds else None,
            of_roofline=None if least is None else seconds[name] / least,
        )


def compiled(use: Use, arrays: tuple[Any, ...]) -> Iterator[tuple[str, Callable]]:
    """The implementations that can be used here, compiled; what does not compile is said and left out."""
    for name, function in implementations(use, target_platform()):
        try:
            yield name, jax.jit(function).lower(*arrays).compile()
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            print_notice(f"{use.purpose}: {name} does not compile: {str(error).strip().splitlines()[0]}")


def counted(use: Use, topology: Topology) -> Iterator[dict[str, Any]]:
    """The bytes that the program of every implementation for a TPU moves through HBM."""
    mesh = make_mesh(1, 1, topology.devices[:1])
    place = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), use.shapes())
    with jax.set_mesh(mesh):
        for name, function in implementations(use, "tpu"):
            compiled = compile_lowered(jax.jit(function).lower(*shapes))
            found = count(compiled.text)
            moved = None if found.unknown_loops else found.read + found.written  # loops that turn as often as data say
            yield dict(
                kernel=use.purpose,
                implementation=name,
                bytes=moved,
                of_least=None if moved is None else moved / use.least_bytes(),
                temporaries=compiled.memory.temp_size_in_bytes,
            )


def implementations(use: Use, platform: str) -> Iterator[tuple[str, Callable]]:
    """Those that take the arrays on a platform."""
    for name, reason in use.kernel.reasons(platform, *use.shapes(), **use.options).items():
        if reason is None:
            yield name, functools.partial(use.kernel.force(name), **use.options)


def roofline(use: Use, chip: Chip) -> float | None:
    """Seconds that a device needs at least; None where its peaks are not known."""
    if chip.bandwidth is None or chip.operations is None:
        return None
    return max(use.least_bytes() / chip.bandwidth, use.operations / chip.operations)


def show(device: str, results: list[dict[str, Any]]) -> None:
    """Prints the results as a table in Markdown."""
    console = Console(highlight=False, width=160)
    console.print(device)
    columns = [name for name in results[0] if name not in ("kernel", "implementation")]
    table = Table("kernel", "implementation", *columns, box=MARKDOWN)
    for line in results:
        table.add_row(line["kernel"], line["implementation"], *(text(name, line[name]) for name in columns))
    console.print(table)


def text(name: str, value: float | None) -> str:
    """A value in its unit."""
    if value is None:
        return "unknown"
    if name in UNITS:
        return text_of(value, UNITS[name])
    return f"{value:.3g}"


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print_notice(f"error: {error}")
        raise SystemExit(2) from None
