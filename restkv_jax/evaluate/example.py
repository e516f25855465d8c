"""What each method keeps of one prompt of a sweep: noted while it is read, drawn once the sweep is done."""

import pathlib
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from restkv_jax.caches.base import Cache
from restkv_jax.evaluate.grid import Grid, cache_configs, parse_method
from restkv_jax.evaluate.results import DAMAGED
from restkv_jax.eviction.budgets import budget_slots, parse_budget
from restkv_jax.models.files import written_whole
from restkv_jax.models.mesh import fetched
from restkv_jax.plot import kept_shares, plot_shares, token_span

KEPT = "kept.npz"
MOST_SHOWN = 5


def has_example(directory: pathlib.Path) -> bool:
    """Whether an example was noted."""
    return (directory / KEPT).is_file()


def save_example(
    directory: pathlib.Path, grid: Grid, tokenizer: Any, encoded: Any, number: int, caches: dict[str, Cache]
) -> None:
    """Notes what the first methods keep of a prompt, at their second smallest budget.

    Args:
      directory: of the results.
      grid: that of the sweep.
      tokenizer: that of the prompts.
      encoded: the `EncodedPrompts` that the prompt is of.
      number: of the prompt.
      caches: with the prompt as their first row, by the label of their configuration.
    """
    tokens, prompt = encoded.tokens[number], encoded.prompts[number]
    labels = [label for label in _shown(grid, len(tokens)) if label in caches]
    shown = {label: kept_shares(_on_host(caches[label])) for label in labels}
    if shown and jax.process_index() == 0:
        span = _span_of_answer(tokenizer, prompt, tokens)
        with written_whole(directory / KEPT) as unfinished, unfinished.open("wb") as file:
            np.savez_compressed(
                file, labels=list(shown), shares=np.stack(list(shown.values())), span=np.array(span, int)
            )


def _on_host(cache: Cache) -> Cache:
    return jax.tree.map(lambda x: jnp.asarray(fetched(x)), cache)


def _span_of_answer(tokenizer: Any, prompt: Any, tokens: list[int]) -> tuple[int, ...]:
    """The place of the first answer among the tokens; empty where it is not known."""
    if not prompt.answers or prompt.answers[0] not in prompt.text or tokenizer(prompt.text)["input_ids"] != tokens:
        return ()
    return token_span(tokenizer, prompt.text, prompt.answers[0])


def plot_example(directory: pathlib.Path) -> Figure | None:
    """Draws what was noted; None where nothing was, as where no method evicts.

    Args:
      directory: of the results.
    """
    if not has_example(directory):
        return None
    path = directory / KEPT
    try:
        with np.load(path) as noted:
            labels, shares, span = noted["labels"].tolist(), noted["shares"], noted["span"].tolist()
    except (*DAMAGED, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error!r}); remove it, and the report goes without it") from error
    spans = {"answer": (span[0], span[1])} if span else {}
    title = f"What is kept of a prompt of {shares.shape[-1]:,} tokens"
    return plot_shares(dict(zip(labels, shares, strict=True)), spans, title)


def _shown(grid: Grid, length: int) -> list[str]:
    """The labels of the first methods without options, each at its second smallest budget."""
    by_method: dict[str, list[tuple[int, str]]] = {}
    for config in cache_configs(grid):
        if config.budget is not None and not parse_method(config.method).options:
            slots = budget_slots(parse_budget(config.budget), length)
            by_method.setdefault(config.method, []).append((slots, config.label))
    return [sorted(group)[:2][-1][1] for group in by_method.values()][:MOST_SHOWN]
