"""A picture of a run: one panel a case, a bar for each contender, a line at the roofline."""

from collections.abc import Sequence
from pathlib import Path

from attnsel_jax.bench.results import CaseResult, Row

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280")
MICROSECONDS, MILLISECONDS, MEBIBYTES = (1e6, "us"), (1e3, "ms"), (2.0**-20, "MiB")


def plot(results: Sequence[CaseResult], path: Path) -> None:
    """Writes the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    heights = [1.0 + 0.4 * len(result.rows) for result in results]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    panels = figure.subplots(len(results), 1, height_ratios=heights, squeeze=False)
    for result, panel in zip(results, panels[:, 0], strict=True):
        _draw(result, panel)
    figure.savefig(path, dpi=120)


def _draw(result: CaseResult, panel) -> None:
    rows = result.rows[::-1]
    factor, unit = _scale(rows)
    values = [row.value * factor for row in rows]
    lows = [(row.low or row.value) * factor for row in rows]
    highs = [(row.high or row.value) * factor for row in rows]
    colours = [COLOURS[(len(rows) - 1 - i) % len(COLOURS)] for i in range(len(rows))]
    panel.barh([row.name for row in rows], values, color=colours, height=0.6)
    spread = [
        [value - low for value, low in zip(values, lows, strict=True)],
        [high - value for value, high in zip(values, highs, strict=True)],
    ]
    panel.errorbar(values, range(len(rows)), xerr=spread, fmt="none", ecolor="black", capsize=2)
    for i, (value, high) in enumerate(zip(values, highs, strict=True)):
        panel.annotate(
            f"{value:.4g}", (high, i), (5, 0), textcoords="offset points", va="center", fontsize=8
        )
    if result.limit:
        panel.axvline(result.limit * factor, color="black", linestyle="--", linewidth=1)
    if rows[0].unit == "B" and min(values) > 0:
        panel.set_xscale("log")
    dashed = "; dashed: what the device allows (roofline)" if result.limit else ""
    panel.set_xlabel(f"{unit}{dashed}")
    panel.set_title(result.name, loc="left", fontsize=10)
    panel.margins(x=0.15)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _scale(rows: Sequence[Row]) -> tuple[float, str]:
    """The factor to the unit that a panel is drawn in, and its name."""
    if rows[0].unit == "B":
        return MEBIBYTES
    return MICROSECONDS if max(row.value for row in rows) < 1e-3 else MILLISECONDS
