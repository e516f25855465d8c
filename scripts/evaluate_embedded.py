"""Prints how often a model answers needle prompts exactly: `python scripts/evaluate_embedded.py`."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

import restkv_jax as rk
from restkv_jax.evaluate import TASKS, Accuracy, make_prompts, measure_accuracy


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure. Budgets are shares of the prompt, for every method but the full cache."""

    model: str | None = None
    """a directory or hub id; the embedded model by default"""
    tasks: tuple[str, ...] = tuple(TASKS)
    lengths: tuple[int, ...] = (1024,)
    methods: tuple[str, ...] = ("full", "restkv", "snapkv", "streaming_llm")
    budgets: tuple[float, ...] = (0.05, 0.1, 0.2)
    prompts: int = 300
    seed: int = 2024
    batch_size: int = 10
    json_lines: pathlib.Path | None = None
    """also append every cell to this file"""


def policies(options: Options, length: int):
    """Yields a label and a policy for every method and budget."""
    for name in options.methods:
        if name == "full":
            yield "full", rk.full()
            continue
        for share in options.budgets:
            yield f"{name} {share:.0%}", rk.METHODS[name](budget=round(share * length))


def show(accuracy: Accuracy) -> str:
    """`97.3 (94.8-98.6)`, in per cent."""
    return f"{100 * accuracy.share:.1f} ({100 * accuracy.low:.1f}-{100 * accuracy.high:.1f})"


def main(options: Options) -> None:
    """Measures cell by cell and prints one table per length."""
    model, params, tokenizer = rk.load_model(options.model, dtype=jnp.float32)
    console = Console()
    for length in options.lengths:
        rows: dict[str, dict[str, str]] = {}
        for task in options.tasks:
            prompts = make_prompts(task, tokenizer, length, options.prompts, options.seed)
            for label, policy in policies(options, length):
                accuracy = measure_accuracy(model, params, tokenizer, prompts, policy, options.batch_size)
                rows.setdefault(label, {})[task] = show(accuracy)
                console.print(f"{length} {task} {label}: {show(accuracy)}", highlight=False)
                if options.json_lines:
                    record = {"length": length, "task": task, "policy": label, **accuracy._asdict()}
                    with options.json_lines.open("a") as file:
                        file.write(json.dumps(record) + "\n")
        table = Table("cache", *options.tasks, title=f"exact answers in % (95 % interval), {length} tokens")
        for label, cells in rows.items():
            table.add_row(label, *(cells[task] for task in options.tasks))
        console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
