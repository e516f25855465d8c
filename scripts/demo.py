"""Asks models about texts, with the full cache and with ReST-KV's small one.

First SmolLM2, a chat model, about a short essay, if `fetch_smollm2.py` has downloaded it; then the embedded model,
which is tiny, for what is hidden in long texts.
"""

import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from fetch_smollm2 import path_of_smollm2
from rich.console import Console
from rich.table import Table

import restkv_jax as rk
from restkv_jax.commands.options import parse
from restkv_jax.commands.programs import keep_programs
from restkv_jax.commands.progress import show_while
from restkv_jax.commands.prompts import encode_turn
from restkv_jax.evaluate import Prompt, make_prompts
from restkv_jax.evaluate.batching import pad_batch
from restkv_jax.timing import CompilationClock

ESSAY = """\
The lighthouse of Skerrymore stands on a rock eleven miles off the coast. It was built in 1844 by the engineer Alan \
Moffat, who spent six summers on the rock with a hundred and fifty masons. In winter the sea was too rough to land, so \
the stone was cut on the island of Tarvie and brought over by steamer in spring. The tower is 48 metres high, and its \
walls are three metres thick at the base.

Three keepers lived there at a time. They trimmed the lamp, polished the lens and wrote down the weather every four \
hours. Letters came once a fortnight, if the boat could land at all; in the winter of 1881 nobody could for nine \
weeks, and the keepers lived on biscuits and fish. The best known of them was Margaret Sinclair, who kept bees on the \
rock and sold the honey in the village of Portbeg.

In 1954 a fire destroyed the living quarters. The light was out for five years and was then rebuilt with electric \
lamps. Since 1994 nobody has lived in the tower: a computer in Portbeg switches the light on at dusk and off at dawn. \
Visitors can still take the boat from Portbeg between May and September, when the weather is calm. The crossing takes \
two hours, and the captain tells everybody the story of the bees."""
QUESTIONS = (
    "Who built the lighthouse?",
    "What destroyed the living quarters in 1954?",
    "How long does the crossing take?",
)


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
      percent: budget of ReST-KV, in percent of a prompt with something hidden.
      num_prompts: how many fresh prompts to ask.
      seed: of the prompts.
      model: directory of a model to ask for what is hidden; the one that comes with the package by default.
    """
    keep_programs()
    console = Console(highlight=False)
    path = path_of_smollm2()
    if path.is_file():
        show_chat(console, path)
    else:
        console.print(
            "With a chat model (98 MB) this begins with questions about an essay: "
            f"[bold]{sys.executable} scripts/fetch_smollm2.py[/bold] downloads it.\n"
        )
    show_hidden(console, task, num_tokens, percent, num_prompts, seed, model)


def show_chat(console: Console, path: pathlib.Path) -> None:
    """Asks a chat model about the essay; half of it stays in the small cache."""
    with show_while("loading SmolLM2"):
        decoder, params, tokenizer = rk.load_model(path, dtype=jnp.float32)
    rows = [encode_turn(tokenizer, f"{ESSAY}\n\n{question}") for question in QUESTIONS]
    batch = pad_batch(rows, len(rows))
    runs = answer_with_both(decoder, params, tokenizer, batch, "50%")
    table = Table("question", *runs, title="SmolLM2, a chat model of 135 million weights, about an essay")
    for i, question in enumerate(QUESTIONS):
        table.add_row(question, *(run.answers[i] for run in runs.values()))
    console.print(table)
    console.print(cost_table(runs, max(map(len, rows)), len(rows)), "\n")


def show_hidden(
    console: Console, task: str, num_tokens: int, percent: float, num_prompts: int, seed: int, model: str | None
) -> None:
    """Asks a model for what is hidden in long texts."""
    decoder, params, tokenizer = rk.load_model(model, dtype=jnp.float32)
    prompts = make_prompts(task, tokenizer, num_tokens, num_prompts, seed)
    show_prompt(console, prompts[0])
    rows = [tokenizer(prompt.text)["input_ids"] for prompt in prompts]
    runs = answer_with_both(decoder, params, tokenizer, pad_batch(rows, len(rows)), f"{percent}%")
    console.print(answer_table(prompts, runs))
    console.print(cost_table(runs, num_tokens, num_prompts))


def show_prompt(console: Console, prompt: Prompt) -> None:
    """Prints the ends of a prompt and the sentence that holds the first answer."""
    lines = prompt.text.splitlines()
    needle = next(i for i, line in enumerate(lines) if prompt.answers[0] in line)
    shown = [*lines[:2], f"[{needle - 2} lines]", f"[bold]{lines[needle]}[/bold]"]
    console.print("The first prompt:", style="bold")
    console.print("\n".join([*shown, f"[{len(lines) - needle - 2} lines]", lines[-1]]), "\n")


def answer_with_both(decoder: Any, params: Any, tokenizer: Any, batch: Any, budget: str) -> dict[str, Run]:
    """Runs the prompts with the full cache and with a budget."""
    policies = {"full": rk.full(), "restkv": rk.restkv(budget=budget)}
    return {name: answer(decoder, params, tokenizer, batch, policy) for name, policy in policies.items()}


def answer(decoder: Any, params: Any, tokenizer: Any, batch: Any, policy: rk.EvictionPolicy) -> Run:
    """Runs all prompts as one batch of tokens and mask."""
    with CompilationClock() as clock, show_while("reading and answering, which compiles what is new"):
        start = time.perf_counter()
        out = rk.generate(decoder, params, *batch, policy=policy, max_new_tokens=48)
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
