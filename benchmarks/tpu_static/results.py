"""Measurements kept: one JSON file a generation, each contender's best choice at each work."""

import datetime
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.tpu_static.chips import CHIPS
from benchmarks.tpu_static.contenders import OURS
from benchmarks.tpu_static.measuring import MEASURED, STOPPED, Measurement
from benchmarks.tpu_static.works import WORKS

FOLDER = pathlib.Path(__file__).parents[1] / "results" / "tpu_static"
ROOT = pathlib.Path(__file__).parents[2]
# Of the instrument's files those that no figure depends on.
PRESENTATION = ("__main__.py", "cli.py", "page.py", "results.py", "running.py", "tuning.py")
PACKAGES = ("attnsel-jax", "jax", "jaxlib", "libtpu", "numpy", "tokamax", "tpu-inference")


def best_of(measurements: Sequence[Measurement]) -> Measurement:
    """The fastest of a contender's choices; where none compiled, the first."""
    measured = [m for m in measurements if m.verdict == MEASURED]
    return min(measured, key=lambda m: m.estimated_us) if measured else measurements[0]


def row(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """One contender at one work: its best choice in full, the others' times."""
    best = best_of(measurements)
    others = [
        {"options": m.options, "verdict": m.verdict, "reason": m.reason}
        | ({"estimated_us": m.estimated_us} if m.verdict == MEASURED else {})
        for m in measurements
        if m is not best
    ]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    made_of = {"date": now, "versions": versions(), "sources": sources(best.contender)}
    return best.to_json() | {"other_choices": others} | made_of


@functools.cache
def sources(contender: str) -> str:
    """A hash of the files that a contender's figures depend on: the instrument, and our kernels."""
    paths = [*(ROOT / "benchmarks").glob("*.py")]
    instrument = (ROOT / "benchmarks" / "tpu_static").rglob("*.py")
    paths += [path for path in instrument if path.name not in PRESENTATION]
    if contender == OURS:
        kernels = (ROOT / "pallas_kernels").rglob("*.py")
        paths += [path for path in kernels if "gpu" not in path.stem]
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


def current(generation: str, folder: pathlib.Path = FOLDER) -> dict[tuple[str, str], Any]:
    """(work, contender) -> the row of a generation's file, where it would come out the same again.

    That is: made with these versions of the packages by these sources, and not stopped by a clock.
    """
    path = folder / f"{generation}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {
        (row["work"], row["contender"]): row
        for row in rows
        if row.get("sources") == sources(row["contender"])
        and row["versions"] == versions()
        and not _stopped(row)
    }


def written(
    generation: str, rows: Iterable[dict[str, Any]], command: str, folder: pathlib.Path = FOLDER
) -> pathlib.Path:
    """Puts rows into a generation's file; what was there of the same work and contender goes.

    So do rows of works that are no longer known. What a clock stopped replaces no measured row.

    Args:
        generation: the chip.
        rows: as `row` makes them.
        command: what was typed.
        folder: of the files.

    Returns:
        The file.
    """
    path = folder / f"{generation}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    names = list(WORKS)
    by_key = {(r["work"], r["contender"]): r for r in kept if r["work"] in names}
    for r in rows:
        key = r["work"], r["contender"]
        if not (_stopped(r) and by_key.get(key, r).get("verdict") == MEASURED):
            by_key[key] = r
    order = sorted(by_key, key=lambda key: names.index(key[0]))
    chip = CHIPS[generation]
    data = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "generation": generation,
        "chip": {
            "cores": chip.cores,
            "peak_flops": chip.peak,
            "bandwidth": chip.bandwidth,
            "reachable_share_of_bandwidth": round(chip.reachable, 3),
            "clock_ghz": round(chip.hertz / 1e9, 3),
        },
        "rows": [by_key[key] for key in order],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path


def _stopped(row: dict[str, Any]) -> bool:
    """Whether a clock, and not the compiler, refused it."""
    return row.get("reason", "").startswith(STOPPED)


def versions() -> dict[str, str]:
    """Of the packages that are compiled with, and compiled."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
