"""The committed measurements as Markdown, for `docs/tpu_performance.md`."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks.tpu_static.chips import CHIPS
from benchmarks.tpu_static.measuring import MEASURED
from benchmarks.tpu_static.results import FOLDER
from benchmarks.tpu_static.works import WORKS

COLUMNS = (
    "work", "who", "tiles", "time µs", "of peak", "of bandwidth", "bytes/floor", "tile bundles",
    "tile MXU", "tile VALU", "tile EUP", "all MXU", "DMA wait", "spills", "VMEM MiB", "around µs",
)  # fmt: skip


def section(path: pathlib.Path) -> str:
    """One generation's table, with the reasons of what was not measured under it."""
    data = json.loads(path.read_text())
    chip = data["chip"]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    oldest = min(row["date"] for row in data["rows"])
    reachable = 100 * chip["reachable_share_of_bandwidth"]
    lines = [
        f"### {data['generation']}",
        f"Last added to by `{data['command']}`, {data['date'][:10]}, {versions}. What it did not "
        f"make is of earlier runs, from {oldest[:10]} on; the JSON has each row's date.",
        f"Datasheet: {chip['peak_flops'] / 1e12:.0f} TFLOP/s, {chip['bandwidth'] / 1e9:.0f} GB/s; "
        f"the DMA model lets {reachable:.0f} % of the bandwidth through.",
        _table(COLUMNS, [cells(row) for row in data["rows"]]),
    ]
    reasons = [
        f"- {row['work']}, {row['contender']}: {row['verdict']}: {_one_line(row['reason'])}"
        for row in data["rows"]
        if row["verdict"] != MEASURED
    ]
    return "\n\n".join(lines + (["\n".join(reasons)] if reasons else []))


def sections(folder: pathlib.Path = FOLDER) -> str:
    """Every generation's, in order."""
    order = list(CHIPS)
    paths = sorted(folder.glob("*.json"), key=lambda path: order.index(path.stem))
    return "\n\n".join(section(path) for path in paths) or "No results are committed yet."


def works() -> str:
    """What is computed."""
    return _table(
        ("work", "what", "heads", "GFLOP", "necessary MB"),
        [
            (
                f"`{work.name}`",
                work.description,
                f"{work.num_heads}, {work.num_kv_heads} kv",
                f"{work.flops / 1e9:.1f}",
                f"{work.floor_bytes() / 1e6:.0f}",
            )
            for work in WORKS.values()
        ],
    )


def chips() -> str:
    """What is known of each generation."""
    header = ("chip", "clock GHz", "cores", "peak TFLOP/s", "HBM GB/s", "of which DMAs reach")
    body = [
        (
            f"`{chip.generation}`",
            f"{chip.hertz / 1e9:.2f}",
            str(chip.cores),
            f"{chip.peak / 1e12:.0f}",
            f"{chip.bandwidth / 1e9:.0f}",
            percent(chip.reachable),
        )
        for chip in CHIPS.values()
    ]
    return _table(header, body)


def cells(row: dict[str, Any]) -> list[str]:
    """A row's cells, in the order of `COLUMNS`."""
    tiles = ", ".join(f"{name} {value}" for name, value in row["options"].items()) or "its own"
    named = [row["work"], row["contender"], tiles]
    if row["verdict"] != MEASURED:
        return [*named[:2], row["verdict"], *[""] * (len(COLUMNS) - 3)]
    kernel = max(row["kernels"], key=lambda kernel: kernel["cycles"])
    cycles = sum(k["cycles"] for k in row["kernels"])
    tile, whole = kernel["tile"]["use"], kernel["use"]
    doubt = " ?" if any(k["doubts"] for k in row["kernels"]) else ""
    return [
        *named,
        f"{row['estimated_us']:.1f}{doubt}",
        percent(row["share_of_peak"]),
        percent(row["share_of_bandwidth"]),
        f"{row['bytes_over_floor']:.2f}",
        str(kernel["tile"]["bundles"]),
        percent(tile.get("MATMUL", tile.get("MXU", 0))),
        percent(tile["VALU"]),
        percent(tile["EUP"]),
        percent(whole.get("MATMUL", whole.get("MXU", 0))),
        percent(sum(k["dma_wait"] for k in row["kernels"]) / cycles),
        str(sum(k["vreg_spills"] for k in row["kernels"])),
        f"{max(k['memory']['vmem'] for k in row['kernels']) / 2**20:.1f}",
        f"{row['around_us']:.1f}",
    ]


def percent(share: float) -> str:
    """A share as a whole number of percents."""
    return f"{100 * share:.0f} %"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
