"""Prints how often a model answers needle prompts exactly: `python scripts/evaluate_embedded.py`."""

import dataclasses
import functools
import itertools
import json
import pathlib

import jax.numpy as jnp
import rich.progress
import tyro
from rich.console import Console
from rich.table import Table

import restkv_jax as rk
from restkv_jax.evaluate import Accuracy, make_prompts, measure_accuracy

METHODS = rk.METHODS | {
    "restkv-model": functools.partial(rk.restkv, allocation="model"),
    "laprox-layer": functools.partial(rk.laprox, scope="layer"),
}
"""The methods, and those with a budget for the whole model or for each layer, by name."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure. Budgets are shares of the prompt, for every method but the full cache."""

    model: str | None = None
    """a directory or hub id; the embedded model by default"""
    tasks: tuple[str, ...] = ("single", "multikey", "haystack", "multivalue", "multiquery", "tracking")
    """of `restkv_jax.evaluate.TASKS`"""
    lengths: tuple[int, ...] = (1024,)
    methods: tuple[str, ...] = (
        "full",
        "restkv",
        "restkv-model",
        "laprox",
        "snapkv",
        "adakv",
        "pyramidkv",
        "streaming_llm",
    )
    budgets: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    refit: tuple[float, ...] = ()
    """also measure every method with its values refitted, with these ridges"""
    prompts: int = 300
    seed: int = 2024
    batch_size: int = 10
    json_lines: pathlib.Path | None = None
    """also append every cell to this file"""


def policies(options: Options, length: int) -> list[dict[str, rk.EvictionPolicy]]:
    """Policies by label, those that are measured together in one dict. The window is half of a small budget."""
    groups = [{"full": rk.full()}]
    for share, ridge in itertools.product(options.budgets, (None, *options.refit)):
        budget, suffix = round(share * length), "" if ridge is None else f" refit {ridge:g}"
        refit = None if ridge is None else rk.LeastSquares(ridge)
        group = {}
        for name in options.methods:
            sized = {} if name == "streaming_llm" else {"window": min(32, budget // 2)}
            group[f"{name} {share:.0%}{suffix}"] = METHODS[name](budget=budget, **sized).replace(refit=refit)
        groups.append(group)
    return groups


def show(accuracy: Accuracy) -> str:
    """`97.3 (94.8-98.6)`, in per cent."""
    return f"{100 * accuracy.share:.1f} ({100 * accuracy.low:.1f}-{100 * accuracy.high:.1f})"


def write_cell(options: Options, record: dict[str, object]) -> None:
    """Appends a cell to the file of cells, where there is one."""
    if options.json_lines:
        with options.json_lines.open("a") as file:
            file.write(json.dumps(record) + "\n")


def main(options: Options) -> None:
    """Measures cell by cell and prints one table per length."""
    model, params, tokenizer = rk.load_model(options.model, dtype=jnp.float32)
    console = Console()
    for length in options.lengths:
        rows: dict[str, dict[str, str]] = {}
        for task in options.tasks:
            prompts = make_prompts(task, tokenizer, length, options.prompts, options.seed)
            for group in policies(options, length):
                track = functools.partial(rich.progress.track, description=f"{length} {task}", console=console)
                measured = measure_accuracy(
                    model, params, tokenizer, prompts, tuple(group.values()), options.batch_size, track
                )
                for label, accuracy in zip(group, measured, strict=True):
                    rows.setdefault(label, {})[task] = show(accuracy)
                    console.print(f"{length} {task} {label}: {show(accuracy)}", highlight=False)
                    write_cell(options, {"length": length, "task": task, "policy": label, **accuracy._asdict()})
        table = Table("cache", *options.tasks, title=f"exact answers in % (95 % interval), {length} tokens")
        for label, cells in rows.items():
            table.add_row(label, *(cells[task] for task in options.tasks))
        console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
