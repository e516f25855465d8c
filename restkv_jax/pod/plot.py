"""The picture of how alike layers attend and of the blocks they form."""

from typing import Any

import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from restkv_jax.models.key_groups import LayerGroups

BLOCK_COLOR = "#D55E00"
"""Of Okabe and Ito's colours for all kinds of colour vision, one that stands out from blue."""

PANELS_PER_LINE = 4


def plot_groups(
    similarity: Any,
    groups: LayerGroups | None = None,
    title: str = "Similarity of attention between layers",
) -> Figure:
    """Draws a panel per KV head: the similarity of every two layers as shade, blocks as squares around their layers.

    Args:
      similarity: [K, L, L], as `attention_similarity` gives it.
      groups: whose blocks to draw; blocks of one layer are left unmarked.
      title: of the figure.

    Returns:
      a figure, not shown and not registered with pyplot.

    Raises:
      ValueError: another shape, or groups of another one.
    """
    similarity = np.asarray(similarity)
    if similarity.ndim != 3 or similarity.shape[1] != similarity.shape[2] or 0 in similarity.shape:
        raise ValueError(f"similarity has shape {similarity.shape}, but must be [KV heads, layers, layers]")
    num_heads, num_layers, _ = similarity.shape
    if groups is not None and (groups.num_kv_heads, groups.num_layers) != (num_heads, num_layers):
        raise ValueError(
            f"groups are of {groups.num_layers} layers and {groups.num_kv_heads} KV heads, but similarity of "
            f"{num_layers} and {num_heads}"
        )
    columns = min(num_heads, PANELS_PER_LINE)
    lines = -(-num_heads // columns)
    figure = Figure(figsize=(1.2 + 2.6 * columns, 1.2 + 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for head, axis in enumerate(axes):
        axis.set_visible(head < num_heads)
        if head < num_heads:
            image = _draw_head(
                axis, head, similarity[head], None if groups is None else np.array(groups.leader)[:, head]
            )
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, aspect=30)
    bar.set_label("similarity, 1 - Jensen-Shannon divergence")
    figure.supxlabel("layer")
    figure.supylabel("layer")
    figure.suptitle(title if groups is None else f"{title}: {groups.num_blocks} blocks", fontsize=13)
    return figure


def _draw_head(axis: Axes, head: int, similarity: np.ndarray, leader: np.ndarray | None):
    """One KV head, `similarity` [L, L] and the leader of each layer [L]; returns the image."""
    image = axis.imshow(similarity, cmap="Blues", vmin=0, vmax=1, origin="lower")
    axis.set_title(f"KV head {head}", loc="left", fontsize=10)
    for direction in (axis.xaxis, axis.yaxis):
        direction.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    firsts, sizes = np.unique(leader, return_counts=True) if leader is not None else ((), ())
    for first, size in zip(firsts, sizes, strict=True):
        if size > 1:
            square = Rectangle((first - 0.5, first - 0.5), size, size, fill=False, edgecolor=BLOCK_COLOR, linewidth=1.5)
            axis.add_patch(square)
    return image
