"""Asks the embedded model for what is hidden in long texts, with the full cache and with ReST-KV's small one."""

import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import restkv_jax as rk
from restkv_jax.commands.options import parse
from restkv_jax.evaluate import Prompt, make_prompts
from restkv_jax.timing import CompilationClock


class Run(NamedTuple):
    """Answers to the prompts, cache slots and bytes, seconds without and of compilation."""

    answers: list[str]
    slots: int
    bytes: int
    seconds: float
    compilation: float


def main(
    task: str = "multikey",
    num_tokens: int = 1100,
    percent: float = 10.0,
    num_prompts: int = 8,
    seed: int = 0,
    model: str | None = None,
) -> None:
    """Prints the answers of both caches side by side.

    Args:
      task: what is asked: "single", one hidden number; "multikey", one of eight; "haystack", one of a text of nothing
        else; "multivalue" and "multiquery", four at once; "tracking", the names on a chain of assignments.
      num_tokens: size of each prompt.
      percent: budget of ReST-KV, in percent of the prompt.
      num_prompts: how many fresh prompts to ask.
      seed: of the prompts.
      model: directory of another model; the one that comes with the package by default.
    """
    console = Console(highlight=False)
    decoder, params, tokenizer = rk.load_model(model, dtype=jnp.float32)
    prompts = make_prompts(task, tokenizer, num_tokens, num_prompts, seed)
    show_prompt(console, prompts[0])
    policies = {"full": rk.full(), "restkv": rk.restkv(budget=round(num_tokens * percent / 100))}
    runs = {name: answer(decoder, params, tokenizer, prompts, policy) for name, policy in policies.items()}
    console.print(answer_table(prompts, runs))
    console.print(cost_table(runs, num_tokens, num_prompts))


def show_prompt(console: Console, prompt: Prompt) -> None:
    """Prints the ends of a prompt and the sentence that holds the first answer."""
    lines = prompt.text.splitlines()
    needle = next(i for i, line in enumerate(lines) if prompt.answers[0] in line)
    shown = [*lines[:2], f"[{needle - 2} lines]", f"[bold]{lines[needle]}[/bold]"]
    console.print("The first prompt:", style="bold")
    console.print("\n".join([*shown, f"[{len(lines) - needle - 2} lines]", lines[-1]]), "\n")


def answer(decoder: Any, params: Any, tokenizer: Any, prompts: list[Prompt], policy: rk.EvictionPolicy) -> Run:
    """Runs all prompts as one batch."""
    batch = tokenizer([prompt.text for prompt in prompts], padding=True, return_tensors="np")
    with CompilationClock() as clock:
        start = time.perf_counter()
        out = rk.generate(
            decoder, params, batch["input_ids"], batch["attention_mask"], policy=policy, max_new_tokens=32
        )
        jax.block_until_ready(out)
        seconds = time.perf_counter() - start
    texts = tokenizer.batch_decode(np.asarray(out.tokens), skip_special_tokens=True)
    slots, num_bytes = out.cache.num_slots, rk.cache_bytes(out.cache)
    return Run([text.strip() for text in texts], slots, num_bytes, seconds - clock.seconds, clock.seconds)


def answer_table(prompts: list[Prompt], runs: dict[str, Run]) -> Table:
    """One row per prompt: what is hidden and asked, and what each cache led to."""
    table = Table("hidden", *runs, title="Answers")
    right = dict.fromkeys(runs, 0)
    for i, prompt in enumerate(prompts):
        cells = []
        for name, run in runs.items():
            exact = all(answer in run.answers[i] for answer in prompt.answers)
            right[name] += exact
            cells.append(f"{run.answers[i]} {'✓' if exact else '✗'}")
        table.add_row(", ".join(prompt.answers), *cells)
    table.add_section()
    table.add_row("right", *(f"{count} of {len(prompts)}" for count in right.values()))
    return table


def cost_table(runs: dict[str, Run], num_tokens: int, num_prompts: int) -> Table:
    """What each cache takes."""
    table = Table("", *runs, title=f"Cost of {num_prompts} prompts of up to {num_tokens:,} tokens as one batch")
    full = runs["full"].bytes
    table.add_row("slots per layer and KV head", *(f"{run.slots:,}" for run in runs.values()))
    table.add_row("cache bytes", *(f"{run.bytes:,} ({run.bytes / full:.0%})" for run in runs.values()))
    table.add_row("seconds, prefill and decoding", *(f"{run.seconds:.2f}" for run in runs.values()))
    table.add_row("seconds of compilation", *(f"{run.compilation:.2f}" for run in runs.values()))
    return table


if __name__ == "__main__":
    # transformers advises to install PyTorch, which nothing here needs
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    parse(main)
