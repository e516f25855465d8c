"""The picture of what is kept and evicted of a prompt."""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from restkv_jax.caches.base import Cache, kept_positions

SPAN_COLORS = ("#D55E00", "#009E73", "#CC79A7")
"""Of Okabe and Ito's colours for all kinds of colour vision, those that stand out from blue."""


def kept_shares(cache: Cache, row: int = 0) -> np.ndarray:
    """The share of a layer's KV heads that hold each position of a prompt.

    Args:
      cache: as `prefill` or `generate` return it.
      row: of the batch.

    Returns:
      float64 [L, T] between 0 and 1, `T` being the prompt's own length.
    """
    kept = np.asarray(kept_positions(cache))[:, row]
    positions = np.arange(int(cache.prompt_lengths[row]))
    return np.stack([np.mean([np.isin(positions, head) for head in layer], axis=0) for layer in kept])


def bin_shares(shares: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over neighbouring positions.

    Args:
      shares: [L, T].
      num_bins: most columns to return.

    Returns:
      means, [L, N] with `N = min(T, num_bins)`, and the positions where bins begin and the last ends, [N + 1].
    """
    length = shares.shape[1]
    edges = np.linspace(0, length, min(length, num_bins) + 1).round().astype(int)
    return np.add.reduceat(shares, edges[:-1], axis=1) / np.diff(edges), edges


def token_span(tokenizer: Any, text: str, part: str) -> tuple[int, int]:
    """The tokens of a text that make up a part of it.

    Args:
      tokenizer: a fast tokenizer of `transformers`.
      text: the prompt.
      part: a string in it; the first occurrence counts.

    Returns:
      position of the first token and of the one after the last.

    Raises:
      ValueError: `part` is empty or not in `text`.
    """
    start = text.find(part)
    if start < 0 or not part:
        raise ValueError(f"part={part!r} is not in the prompt; give a string just as the prompt has it")
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    inside = [i for i, (first, last) in enumerate(offsets) if first < start + len(part) and last > start]
    return inside[0], inside[-1] + 1


def plot_kept(
    caches: Cache | Mapping[str, Cache],
    spans: Mapping[str, tuple[int, int]] | None = None,
    row: int = 0,
    title: str = "What the cache keeps of the prompt",
    num_bins: int = 320,
) -> Figure:
    """Draws which positions each layer keeps: rows are layers, columns positions, shade the share that is kept.

    Long prompts are binned: a column then shows the mean share of its positions.

    Args:
      caches: one cache, or several of the same prompt by the name of their panels.
      spans: positions to mark by name, each `(first, after the last)`.
      row: of the batch.
      title: of the figure.
      num_bins: most columns.

    Returns:
      a figure, not shown and not registered with pyplot.

    Raises:
      ValueError: no cache, caches of prompts of different lengths, or a span that is not in the prompt.
    """
    panels = dict(caches) if isinstance(caches, Mapping) else {"": caches}
    if not panels:
        raise ValueError("caches is empty; give at least one")
    return plot_shares({name: kept_shares(cache, row) for name, cache in panels.items()}, spans, title, num_bins)


def plot_shares(
    shares: Mapping[str, np.ndarray],
    spans: Mapping[str, tuple[int, int]] | None = None,
    title: str = "What the cache keeps of the prompt",
    num_bins: int = 320,
) -> Figure:
    """As `plot_kept`, of the shares that `kept_shares` gives, float [L, T] by the name of their panels."""
    lengths = {share.shape[1] for share in shares.values()}
    if len(lengths) > 1:
        raise ValueError(f"caches are of prompts of different lengths: {sorted(lengths)}; draw each prompt by itself")
    length, spans = lengths.pop(), dict(spans or {})
    for name, (start, stop) in spans.items():
        if not 0 <= start < stop <= length:
            raise ValueError(f"spans[{name!r}]={(start, stop)} is not in the prompt of {length} tokens")
    return _draw(dict(shares), spans, title, num_bins)


def _draw(shares: dict[str, np.ndarray], spans: dict[str, tuple[int, int]], title: str, num_bins: int) -> Figure:
    heights = [0.5 + min(0.18 * share.shape[0], 2.6) for share in shares.values()]
    figure = Figure(figsize=(9, 1.4 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(shares), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (name, share) in zip(axes, shares.items(), strict=True):
        mesh, bin_width = _draw_panel(axis, name, share, spans, num_bins)
    axes[-1].set_xlabel("position in the prompt (tokens)")
    axes[-1].xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    mean = f", mean of about {bin_width:.0f} positions" if round(bin_width) > 1 else ""
    bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", fraction=0.05, pad=0.02, aspect=60, shrink=0.6)
    bar.set_label(f"share of the layer's KV heads that hold the position{mean}")
    bar.set_ticks([0, 0.5, 1], labels=["0 (evicted)", "0.5", "1 (kept by all)"])
    figure.suptitle(title, fontsize=13)
    if spans:
        handles = [
            Patch(fill=False, edgecolor=color, linewidth=1.5, label=name)
            for name, color in zip(spans, cycle(SPAN_COLORS), strict=False)
        ]
        axes[0].legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1.02), ncols=3, frameon=False)
    return figure


def _draw_panel(axis: Axes, name: str, share: np.ndarray, spans: dict[str, tuple[int, int]], num_bins: int):
    """One cache; returns the coloured mesh and the mean width of its columns in tokens."""
    num_layers, length = share.shape
    means, edges = bin_shares(share, num_bins)
    mesh = axis.pcolormesh(edges, np.arange(num_layers + 1) - 0.5, means, cmap="Blues", vmin=0, vmax=1)
    axis.hlines(np.arange(1, num_layers) - 0.5, 0, length, color="white", linewidth=min(1, 8 / num_layers))
    summary = [f"{share.mean():.0%} kept"] + [f"{share[:, a:b].mean():.0%} of the {n}" for n, (a, b) in spans.items()]
    axis.set_title(f"{name}: " * bool(name) + ", ".join(summary), loc="left", fontsize=10)
    for (start, stop), color in zip(spans.values(), cycle(SPAN_COLORS), strict=False):
        rectangle = Rectangle(
            (start, -0.5), stop - start, num_layers, fill=False, edgecolor=color, linewidth=1.5, zorder=3
        )
        axis.add_patch(rectangle).set_clip_on(False)
    axis.set(xlim=(0, length), ylim=(num_layers - 0.5, -0.5), ylabel="layer")
    axis.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    return mesh, length / means.shape[1]
