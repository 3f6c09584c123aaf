"""Results as tables: on the terminal, and for the docs."""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.gpu.contenders import OURS
from benchmarks.gpu.results import FOLDER, STATIC

STATIC_COLUMNS = ("work", "who", "tiles", "kernel", "registers", "spills", "stack", "smem KiB",
                  "tensor", "TMA", "ex2", "loop", "tensor cores, at most", "faults")  # fmt: skip
TIMED_COLUMNS = ("work", "ours, µs", "TFLOP/s", "GB/s", "error", "best rival, µs", "times as fast",
                 "the others, µs")  # fmt: skip
CHECK_COLUMNS = ("backend", "problems right", "refused", "wrong", "not run")
SMALLEST = 200  # instructions: what has fewer is no attention kernel


def static_rows(compiled: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each Pallas kernel (and Triton's); one with the reason where there is none."""
    rows = []
    for call in compiled:
        start = [call["work"], call["contender"], _options(call["options"])]
        kernels = [k for k in call["kernels"] if _counts(k)]
        if call["verdict"] != "compiled" or not kernels:
            reason = " ".join(call["reason"].split())[:160] or "XLA's own kernels only"
            rows.append([*start, call["verdict"], *[""] * 9, reason])
        rows += [[*start, *_kernel(kernel)] for kernel in kernels]
    return rows


def _counts(kernel: Mapping[str, Any]) -> bool:
    code = kernel["code"]
    return kernel["maker"] == "mosaic" or bool(code and code["code"]["instructions"] > SMALLEST)


def _kernel(kernel: Mapping[str, Any]) -> list[str]:
    resources, code = kernel["resources"], kernel["code"]
    spills = f"{resources['spill_stores']}+{resources['spill_loads']}"
    start = [kernel["name"][:34], str(resources["registers"]), spills, str(resources["stack"]),
             f"{kernel['smem'] / 1024:.0f}"]  # fmt: skip
    faults = ", ".join(kernel["faults"])
    if code is None:
        return [*start, "", "", "", "", "", faults]
    whole = code["code"]
    tensor = " ".join(f"{count}x{kind}" for kind, count in whole["tensor"].items())
    loop, bound = "", ""
    if code["loops"]:
        first = max(code["loops"], key=lambda loop: loop["code"]["flops"])
        inner = first["code"]
        matrix = sum(inner["tensor"].values())
        loop = f"{matrix}/{inner['mix']['ex2']}/{inner['instructions']}"
        if first["alone"] is not None:
            bound = f"{100 * first['overlapped']:.0f} % to {100 * first['alone']:.0f} %"
    return [*start, tensor, str(whole["mix"]["tma_loads"]), str(whole["mix"]["ex2"]), loop, bound,
            faults]  # fmt: skip


def timed_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """A row for each work: ours, the fastest rival, the others; who was left out is not named."""
    by_work: dict[str, list[Mapping[str, Any]]] = {row["work"]: [] for row in data["timings"]}
    for row in [*data["timings"], *data["torch"].get("rows", [])]:
        if row["verdict"] != "left out":
            by_work[row["work"]].append(row)
    return [[work, *_raced(rows)] for work, rows in by_work.items()]


def _raced(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cells of one work."""
    ours = next((row for row in rows if row.get("contender", OURS) == OURS), {})
    rivals = sorted(
        (row for row in rows if row["verdict"] == "timed" and row["contender"] != OURS),
        key=lambda row: row["seconds"],
    )
    failed = [
        f"{row['contender']} {row['verdict']}" for row in rows
        if row is not ours and row["verdict"] != "timed"
    ]  # fmt: skip
    best = f"{rivals[0]['contender']} {_us(rivals[0])}" if rivals else "none"
    others = ", ".join([*(f"{row['contender']} {_us(row)}" for row in rivals[1:]), *failed])
    if ours.get("verdict") != "timed":
        said = f"{ours.get('verdict', 'not run')}: {ours.get('reason', '')}"[:120]
        return [said, "", "", "", best, "", others]
    faster = f"{rivals[0]['seconds'] / ours['seconds']:.2f}" if rivals else ""
    figures = [f"{ours['tflops']:.0f}", f"{ours['gbytes']:.0f}", f"{ours['error']:.1e}"]
    return [_us(ours), *figures, best, faster, others]


def _us(row: Mapping[str, Any]) -> str:
    """Microseconds; * where the two clocks differ."""
    us = row["seconds"] * 1e6
    return f"{us:,.{0 if us >= 1000 else 1}f}{'*' * bool(row.get('clocks_differ'))}"


def check_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """Of each backend: how many problems were right, refused, wrong, not run."""
    names = dict.fromkeys(row.get("backend", "-") for row in data["checks"])
    verdicts = (("pass",), ("refused",), ("fail", "error"), ("not run",))
    return [
        [name, *(str(_count(data["checks"], name, some)) for some in verdicts)] for name in names
    ]


def _count(rows: Sequence[Mapping[str, Any]], name: str, verdicts: Sequence[str]) -> int:
    return sum(row.get("backend", "-") == name and row["verdict"] in verdicts for row in rows)


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items()) or "its own"


def static_sections(folder: pathlib.Path = FOLDER / STATIC) -> str:
    """What the compiler made, a table for each chip that is committed."""
    sections = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        sections += [
            f"### {data['chip']}",
            _made(data),
            markdown(STATIC_COLUMNS, static_rows(data["rows"])),
        ]
    return "\n\n".join(sections) or "No results are committed yet."


def measured_sections(folder: pathlib.Path = FOLDER) -> str:
    """What was measured, a section for each run that is committed."""
    sections = []
    for path in sorted(folder.glob("*/gpu.json")):
        data = json.loads(path.read_text())
        found = data["calibration"].items()
        best = ", ".join(f"{x:.0f} {name}" for name, x in found if not isinstance(x, str))
        sections += [
            f"### {data['device'].get('kind', 'no device')}",
            f"{_made(data)} Calibration: {best} a second.",
            *(f"- {remark}" for remark in data.get("remarks", [])),
            markdown(CHECK_COLUMNS, check_rows(data)),
            markdown(TIMED_COLUMNS, timed_rows(data)),
        ]
    return "\n\n".join(sections) or "No results are committed yet."


def _made(data: Mapping[str, Any]) -> str:
    """How a file was made; `renewed` says so of those rows of ours that a later run renewed."""
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    said = f"`{data['command']}`, {data['date'][:10]}, {versions}."
    if later := data.get("renewed"):
        said += f" Ours renewed since at {', '.join(later['works'])}: {_made(later)}"
    return said


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table for a page."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
