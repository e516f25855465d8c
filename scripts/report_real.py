"""The report on SmolLM2-135M-Instruct: the grids of docs/report-real in the order of their numbers.

python scripts/report_real.py measure   goes on where it was stopped: by SIGTERM, or a file STOP among the results
python scripts/report_real.py pack      keeps what is measured beside its grid, from where `measure` goes on too
python scripts/report_real.py report    writes a report for each folder of grids
"""

import argparse
import dataclasses
import json
import lzma
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import yaml
from fetch_smollm2 import fetch_smollm2
from PIL import Image

from restkv_jax.evaluate.combining import combine
from restkv_jax.evaluate.report.page import select, write_report
from restkv_jax.evaluate.results import SWEEP, Results, line_text, read_lines, read_results, replace_text

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "report-real"
GRIDS = sorted(FOLDER.glob("*/*.yaml"), key=lambda path: path.name)


PAIRS = (
    # the published orders, at equal smoothing
    "restkv > snapkv(kernel_size=21)",
    "restkv > pyramidkv(kernel_size=21)",
    "restkv > adakv(kernel_size=21)",
    "restkv > laprox(kernel_size=21)",
    "laprox(kernel_size=21) > snapkv(kernel_size=21)",
    "laprox(kernel_size=21) > full",
    "adakv(kernel_size=21) > snapkv(kernel_size=21)",
    "pyramidkv(kernel_size=21) > snapkv(kernel_size=21)",
    # and as published
    "restkv > snapkv",
    "restkv(kernel_size=5) > snapkv",
    "restkv > laprox",
    "laprox > snapkv",
    "adakv > snapkv",
    "pyramidkv > snapkv",
    # free text asks for narrow smoothing
    "h2o > snapkv",
    "h2o > restkv(kernel_size=5)",
    # one budget for the model, or for each layer
    "laprox > laprox(scope=layer)",
    "laprox(kernel_size=21) > laprox(kernel_size=21, scope=layer)",
    "laprox(window=8, pooling=successor, kernel_size=12) > "
    "laprox(window=8, pooling=successor, kernel_size=12, scope=layer)",
    "restkv(allocation=model) > restkv",
    "restkv(allocation=pyramid) > restkv",
    "restkv(allocation=adaptive_heads) > restkv",
    # width, and successor smoothing against the best symmetric one
    "laprox(kernel_size=21) > laprox",
    "snapkv(kernel_size=21) > snapkv",
    "laprox(window=8, pooling=successor, kernel_size=12) > laprox(kernel_size=21)",
    "restkv(pooling=successor, kernel_size=12, allocation=adaptive_heads) > restkv",
    "restkv(pooling=successor, kernel_size=12) > restkv",
    # ours against the best published, and what its parts do
    "best > laprox(kernel_size=21)",
    "best > laprox(kernel_size=21, scope=layer)",
    "best > laprox",
    "best > h2o",
    "best > tova",
    "best > snapkv",
    "best > restkv",
    "best > restkv(kernel_size=5)",
    "best > full",
    "laprox(sinks=4) > laprox",
    "laprox(window=8, pooling=successor, kernel_size=12, sinks=4) > "
    "laprox(window=8, pooling=successor, kernel_size=12)",
)
"""Compared on the same prompts."""

PACKED = "results-packed.jsonl"
"""What was packed, beside the results of `measure`, in a form that `evaluate` reads."""

ENOUGH = 30
"""Prompts of a cell, from which on it is reported."""

DRAWN = (
    "best",
    "restkv",
    "snapkv(kernel_size=21)",
    "laprox",
    "laprox(kernel_size=21)",
    "laprox(kernel_size=21, scope=layer)",
    "adakv(kernel_size=21)",
    "pyramidkv(kernel_size=21)",
    "restkv(pooling=successor, kernel_size=12, allocation=adaptive_heads)",
    "laprox(window=8, pooling=successor, kernel_size=12)",
    "streaming_llm",
)


def measure(results: pathlib.Path) -> None:
    """Runs the grids in the order of their names."""
    unpack(results)
    model = fetch_smollm2()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    for grid in GRIDS:
        options = ["--grid", grid, "--model", model.name, "--output", results / grid.stem]
        options += [f"--batch-size={_batch_size(grid)}", "--no-costs", "--quiet"]
        command = [sys.executable, "-m", "restkv_jax", "evaluate", *options]
        # beside the model, so that the results name it without this machine's folders
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, cwd=model.parent, env=environment) as sweep:
            try:
                while sweep.poll() is None:
                    if (results / "STOP").exists():
                        sys.exit("stopped")
                    time.sleep(1)
            finally:
                sweep.terminate()
        print(f"{grid.stem}: exit {sweep.returncode}", flush=True)
        if sweep.returncode < 0:
            sys.exit(f"{grid.stem} was killed; start again, and it goes on")


def _batch_size(grid: pathlib.Path) -> int:
    """Prompts that are measured at once; two of 4,096 tokens and 51 columns take 9.4 GB."""
    (length,) = yaml.safe_load(grid.read_text())["lengths"]
    return min(5, 8192 // length)


def pack(results: pathlib.Path) -> None:
    """A sweep is a file: its description is the first line, the others are its results, in the order of the prompts."""
    unpack(results)
    for grid in GRIDS:
        directory = results / grid.stem
        if lines := read_lines(directory):
            with lzma.open(grid.with_suffix(".jsonl.xz"), "wt", encoding="utf-8") as file:
                print(json.dumps(json.loads((directory / SWEEP).read_text())), file=file)
                for item in sorted(lines, key=str):
                    file.write(line_text(lines[item]))


def unpack(results: pathlib.Path) -> None:
    """Puts what is packed beside what is measured; of a prompt that both have one counts."""
    for grid in GRIDS:
        packed, directory = grid.with_suffix(".jsonl.xz"), results / grid.stem
        if packed.exists():
            directory.mkdir(parents=True, exist_ok=True)
            description, *lines = lzma.decompress(packed.read_bytes()).decode().splitlines(keepends=True)
            replace_text(directory / PACKED, "".join(lines))
            if not (directory / SWEEP).exists():
                replace_text(directory / SWEEP, description)


def report(results: pathlib.Path) -> None:
    """Puts the sweeps of a folder together; Markdown and pictures lie beside their grids."""
    unpack(results)
    for folder in sorted({grid.parent for grid in GRIDS}):
        sweeps = [results / grid.stem for grid in GRIDS if grid.parent == folder]
        found = [read_results(sweep) for sweep in sweeps if read_lines(sweep)]
        combined = _enough(combine(found)) if found else None
        if combined is not None:
            methods = combined.grid.methods
            pairs = [pair for pair in PAIRS if set(pair.split(" > ")) <= set(methods)]
            selection = select(combined.grid, pairs, [method for method in DRAWN if method in methods])
            title = f"SmolLM2-135M-Instruct, {folder.name}"
            with tempfile.TemporaryDirectory() as temporary:
                written = pathlib.Path(temporary)
                write_report(written, None, title, combined, selection, command="make report-real")
                for path in written.iterdir():
                    _keep(path, folder / path.name)


def _enough(results: Results) -> Results | None:
    """What is measured with enough prompts; None where nothing is."""
    cells, divergences = (
        {cell: found for cell, found in of_cells.items() if found.index.size >= ENOUGH}
        for of_cells in (results.cells, results.divergences)
    )
    tasks = {cell.task for cell in (*cells, *divergences)}
    grid = dataclasses.replace(results.grid, tasks=tuple(task for task in results.grid.tasks if task in tasks))
    return results._replace(grid=grid, cells=cells, divergences=divergences) if tasks else None


def _keep(path: pathlib.Path, target: pathlib.Path) -> None:
    """Pictures in few colours, which take a third of the bytes; without the page that holds them once more."""
    if path.suffix == ".png":
        Image.open(path).convert("RGB").quantize(64).save(target, optimize=True)
    elif path.suffix == ".md":
        shutil.copy(path, target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["measure", "pack", "report"])
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "build" / "report-real")
    arguments = parser.parse_args()
    {"measure": measure, "pack": pack, "report": report}[arguments.action](arguments.results.absolute())
