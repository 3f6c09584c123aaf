"""A picture of where backends deviate: error over tokens and heads, problem by problem."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from attnsel_jax.compare.comparison import Comparison, Row

PANELS = 48  # more are too small to read: those that fail go first
SHOWN_BELOW, SHOWN_ABOVE = -3.0, 3.0  # decades of the budget that the colours span
EDGE_STYLE = {
    "sequence": {"color": "black", "linewidth": 1.2},
    "window": {"color": "tab:purple", "linewidth": 1.0, "linestyle": "--"},
    "chunk": {"color": "tab:orange", "linewidth": 1.0, "linestyle": "--"},
    "page": {"color": "gray", "linewidth": 0.4},
}


def plot(
    comparison: Comparison | Iterable[Row], path: str | pathlib.Path, quantity: str | None = None
) -> pathlib.Path:
    """Draws a panel for each row that ran, and writes the picture.

    A panel has tokens downwards and heads to the right; its colour is log10 of error / budget:
    blue within the budget, red outside, white at its edge, grey where the result is exact or equal.
    Ticks at the left show where sequences, pages, windows and chunks begin; a cross marks the worst
    element.

    Args:
        comparison: what `compare` returned, or some of its rows.
        path: the file; its suffix says the format.
        quantity: "out", "lse", "grad q", ...; None = each row's worst.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed (`pip install attnsel-jax[plot]`).
        ValueError: no row ran, or none has the quantity.
    """
    from matplotlib.figure import Figure

    panels = []
    for row in comparison:
        if row.ran:
            wanted = row.worst.quantity if quantity is None else quantity
            panels += [(row, found) for found in row.deviations if found.quantity == wanted]
    if not panels:
        raise ValueError(f"quantity is {quantity!r}, must be one that some row compared: none did")
    panels = sorted(panels, key=lambda panel: panel[1].passed)[:PANELS]
    columns = min(6, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 3.0 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel in axes[len(panels) :]:
        panel.axis("off")
    for panel, (row, found) in zip(axes, panels, strict=False):
        image = _panel(panel, row, found)
    bar = figure.colorbar(image, ax=axes.tolist(), shrink=0.6, pad=0.01)
    bar.set_label("log10(error / budget): red is outside")
    path = pathlib.Path(path)
    figure.savefig(path, dpi=110)
    return path


def _panel(panel: Any, row: Row, found: Any) -> Any:
    """One heat map; returns its image."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    with np.errstate(divide="ignore"):
        decades = np.log10(found.map.astype(np.float64))
    decades = np.where(found.map > 0, np.clip(decades, SHOWN_BELOW, SHOWN_ABOVE), np.nan)
    panel.set_facecolor("0.85")
    norm = TwoSlopeNorm(0, SHOWN_BELOW, SHOWN_ABOVE)
    drawn = decades if decades.size else np.full((1, 1), np.nan)
    height, width = drawn.shape[0] * found.tokens_per_row, drawn.shape[1]
    box = (-0.5, width - 0.5, height - 0.5, -0.5)
    image = panel.imshow(
        drawn, aspect="auto", cmap="bwr", norm=norm, interpolation="nearest", extent=box
    )
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    colour = "black" if found.passed else "red"
    title = f"{row.problem}\n{row.backend}: {found.quantity}, worst {found.in_budgets:.2g} budgets"
    panel.set_title(title, fontsize=7, color=colour)
    panel.tick_params(labelsize=6)
    panel.set_xlabel("head" if "head" in str(found.worst and found.worst.at) else "", fontsize=6)
    panel.set_ylabel("token" if "head" in str(found.worst and found.worst.at) else "", fontsize=6)
    if found.map.size:
        line, column = np.unravel_index(np.argmax(found.map), found.map.shape)
        panel.plot([column], [line * found.tokens_per_row], marker="x", color="black", markersize=6)
    if found.quantity in ("out", "lse", "grad q"):
        _mark_edges(panel, row.edges, (height, width))
    return image


def _mark_edges(panel: Any, marks: Mapping[str, list[int]], shape: tuple[int, ...]) -> None:
    """Short lines at the left where something begins, in its own style."""
    for name, style in EDGE_STYLE.items():
        rows = [row for row in marks.get(name, []) if row < shape[0]]
        if len(rows) <= 64:  # more would only blacken the edge
            reach = shape[1] if name == "sequence" else 0.15 * shape[1]
            panel.hlines(np.array(rows) - 0.5, -0.5, reach - 0.5, **style)


def edges(arguments: Mapping[str, Any]) -> dict[str, list[int]]:
    """Tokens (rows of the picture) at which a sequence, a page, or the window's cut begins."""
    if "cu_q_lens" in arguments:
        count = int(arguments["num_seqs"])
        starts = np.asarray(arguments["cu_q_lens"])[: count + 1]
        first_pos = np.asarray(arguments["kv_lens"])[:count] - np.diff(starts)
    elif "q" in arguments:
        batch, q_len = np.shape(arguments["q"])[:2]
        starts = np.arange(batch + 1) * q_len
        offset = arguments.get("q_offset")
        first_pos = np.broadcast_to(0 if offset is None else np.asarray(offset), (batch,))
    else:
        return {}
    pages = next((arguments[n] for n in ("kv_pages", "latent_pages") if n in arguments), None)
    page_size = 0 if pages is None else np.shape(pages)[2 if "kv_pages" in arguments else 1]
    window = arguments.get("sliding_window")
    left = window[0] if isinstance(window, tuple) else window
    chunk = arguments.get("attention_chunk_size")
    found: dict[str, list[int]] = {"sequence": [int(s) for s in starts[1:]]}
    for start, stop, pos in zip(starts[:-1], starts[1:], first_pos, strict=True):
        for row in range(int(start), int(stop)):
            p = int(pos) + row - int(start)
            for name, here in (("page", page_size and p % page_size == 0),
                               ("window", left is not None and p == left),
                               ("chunk", chunk is not None and p % chunk == 0)):  # fmt: skip
                if here and p > 0:
                    found.setdefault(name, []).append(row)
    return found
