"""What each method keeps of one prompt of a sweep."""

from matplotlib.figure import Figure

from restkv_jax.evaluate.grid import Grid, parse_method, policies
from restkv_jax.evaluate.sweep import encode_prompts, prompt_sets
from restkv_jax.generation.encoding import pad_left
from restkv_jax.generation.reading import prefill_each
from restkv_jax.loading import Loaded
from restkv_jax.plot import plot_kept, token_span

MOST_SHOWN = 5


def plot_example(loaded: Loaded, grid: Grid) -> Figure | None:
    """Draws what the first methods keep, at their second smallest budget, of the first prompt of a sweep.

    Args:
      loaded: what is measured.
      grid: its first task and length.

    Returns:
      a figure, or None where no method evicts or there is no prompt.
    """
    found = prompt_sets(grid, loaded.tokenizer)
    shown = _shown(grid, found[0].length) if found else {}
    if not shown:
        return None
    encoded = encode_prompts(grid, loaded.tokenizer, found[0])
    number = min(encoded.prompts)
    prompt, tokens = encoded.prompts[number], encoded.tokens[number]
    arrays = pad_left([tokens], len(tokens))
    _, caches = prefill_each(loaded.model, loaded.params, *arrays, tuple(shown.values()))
    where = prompt.text.find(prompt.answers[0])
    spans = {}
    if where >= 0:
        spans["answer"] = token_span(loaded.tokenizer, prompt.text, prompt.answers[0])
    title = f"What is kept of a prompt of the task {found[0].task}, {len(tokens):,} tokens"
    return plot_kept(dict(zip(shown, caches, strict=True)), spans=spans, title=title)


def _shown(grid: Grid, length: int) -> dict:
    """One policy of each of the first methods without options, by its label."""
    by_method: dict[str, list] = {}
    for config, policy in policies(grid, length).items():
        if policy.budget is not None and not parse_method(config.method).options:
            by_method.setdefault(config.method, []).append((policy.budget, config.label, policy))
    chosen = [sorted(group, key=lambda each: each[0])[:2][-1] for group in by_method.values()]
    return {label: policy for _, label, policy in chosen[:MOST_SHOWN]}
