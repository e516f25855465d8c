"""Measures what is kept of four needles, the number that is asked for against the others, and what is answered.

Prints a table of docs/policies.md, which has the command.
"""

import re
from collections import defaultdict

import numpy as np
import rich.progress
from jax import Array

from restkv_jax.commands.options import parse
from restkv_jax.evaluate import match_share
from restkv_jax.evaluate.batching import pad_batch
from restkv_jax.evaluate.grid import Grid, check_grid, policies
from restkv_jax.evaluate.measuring import EncodedPrompts
from restkv_jax.evaluate.steps import answer_reading, read_batch
from restkv_jax.evaluate.sweep import encode_prompts, prompt_sets
from restkv_jax.loading import Loaded, load_checkpoint
from restkv_jax.plot import kept_shares

NUMBER = re.compile(r"\d{7}")


def number_spans(tokenizer, tokens: list[int]) -> dict[str, slice]:
    """The tokens of each number of a prompt."""
    pieces = [tokenizer.decode([token]) for token in tokens]
    ends = np.cumsum([len(piece) for piece in pieces])
    found = NUMBER.finditer("".join(pieces))
    # a token belongs to a number if any of its characters does
    return {
        m.group(): slice(ends.searchsorted(m.start(), "right"), ends.searchsorted(m.end() - 1, "right") + 1)
        for m in found
    }


def kept_of_numbers(shares: np.ndarray, spans: dict[str, slice], answer: str) -> tuple[float, float]:
    """The share of the KV heads of all layers, in percent, that hold a token of the answer; and of another number."""
    kept = {number: 100 * shares[:, span].mean() for number, span in spans.items()}
    return kept.pop(answer), float(np.mean(list(kept.values())))


def measure(loaded: Loaded, grid: Grid, batch_size: int) -> dict[str, list[tuple[float, float, float]]]:
    """Of every prompt whether the answer is right, and what is kept of the numbers, by method and budget."""
    (prompt_set,) = prompt_sets(grid, loaded.tokenizer)
    encoded, configs = encode_prompts(grid, loaded.tokenizer, prompt_set), policies(grid, prompt_set.length)
    found = defaultdict(list)
    for batch in rich.progress.track(encoded.batches(batch_size), "prompts"):
        tokens, mask = pad_batch([encoded.tokens[i] for i in batch], batch_size)
        new = encoded.max_new_tokens
        reading = read_batch(loaded.model, loaded.params, tokens, mask, tuple(configs.values()), new, None)
        said = answer_reading(loaded.model, loaded.params, reading, new)
        for config, cache, of_policy in zip(configs, reading.caches, said, strict=True):
            for row, i in enumerate(batch):
                found[config.label].append(
                    _of_prompt(loaded.tokenizer, encoded, i, kept_shares(cache, row), of_policy[row])
                )
    return found


def _of_prompt(
    tokenizer, encoded: EncodedPrompts, i: int, shares: np.ndarray, said: Array
) -> tuple[float, float, float]:
    (answer,) = encoded.prompts[i].answers
    right = match_share(tokenizer.decode(said, skip_special_tokens=True), encoded.prompts[i].answers)
    return 100.0 * right, *kept_of_numbers(shares, number_spans(tokenizer, encoded.tokens[i]), answer)


def main(
    model: str | None = None,
    methods: tuple[str, ...] = ("full", "restkv", "snapkv", "laprox", "pyramidkv", "best"),
    budgets: tuple[str, ...] = ("5%", "10%", "20%"),
    length: int = 1024,
    prompts: int = 40,
    chat: bool = False,
    task: str = "essays_multikey",
    seed: int = 2026,
    batch_size: int = 5,
) -> None:
    """Prints what is kept and what is answered, means over the prompts.

    Args:
      model: a checkpoint; the model that comes with the package by default.
      methods: as `restkv evaluate` takes them, with options in parentheses.
      budgets: of each method, in slots or percent.
      length: of the prompts, in tokens.
      prompts: how many.
      chat: put them in the tokenizer's chat template.
      task: one whose prompts have several numbers of seven digits, one of which is asked for.
      seed: of the prompts.
      batch_size: most prompts at once.
    """
    grid = Grid((task,), methods, budgets, (length,), prompts=prompts, chat=chat, seed=seed, model=model)
    check_grid(grid)
    print("| | answers | kept of the number asked for | of the others | ratio |", "|---|---|---|---|---|", sep="\n")
    for label, of_prompts in measure(load_checkpoint(model, "auto"), grid, batch_size).items():
        right, asked, others = np.mean(of_prompts, axis=0)
        print(f"| `{label}` | {right:.0f} | {asked:.1f} | {others:.1f} | {asked / others:.1f} |")


if __name__ == "__main__":
    parse(main)
