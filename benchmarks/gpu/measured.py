"""A run on a GPU: calibration, checks, then works in the order of their list, until time is up.

What is wrong or missing is a row like any other; the file is written whenever something is found,
so that a run that is cut off leaves what it had. This process holds no GPU: see `watching`.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.gpu import contenders, results, steps, watching
from benchmarks.gpu.runners import FAILED, WRONG
from benchmarks.work import Work

NAME = "gpu"
# Shares of the time that is given: what is left belongs to the races.
CHECKS, TORCH = 0.3, 0.15


def run(
    works: Sequence[Work],
    names: Sequence[str],
    folder: pathlib.Path,
    seconds: float,
    seed: int,
    say: Callable[[str], None],
    taken: Callable[..., Iterator[steps.Found]] = watching.taken,
) -> dict[str, Any]:
    """Measures and keeps.

    Args:
        works: in the order of their worth.
        names: contenders.
        folder: of the JSON file.
        seconds: that the run may take.
        seed: of the checks' numbers.
        say: told what comes next.
        taken: takes the steps.
    """
    begun = time.perf_counter()
    data = results.head(device={}, seed=seed, calibration={}, checks=[], torch={}, timings=[])

    def keep() -> None:
        data["seconds"] = round(time.perf_counter() - begun, 1)
        results.written(folder, NAME, data)

    def ends(step: steps.Step) -> float:
        return begun + (CHECKS if step["kind"] == "check" else 1 - TORCH) * seconds

    for place, value in taken(steps.steps_of(list(works), list(names), seed), ends, say):
        if isinstance(data[place], list):
            data[place].append(value)
        else:
            data[place] |= value
        keep()
    say("PyTorch")
    dense = [work for work in works if work.op == "dense"]
    left = seconds - (time.perf_counter() - begun)
    data["torch"] = in_torch(dense, left)
    keep()
    return data


def in_torch(works: Sequence[Work], seconds: float) -> dict[str, Any]:
    """PyTorch's answer, or why there is none."""
    command = [sys.executable, "-m", "benchmarks.gpu.torch_child"]
    given = json.dumps([dataclasses.asdict(work) for work in works])
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=max(1.0, seconds),
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as stopped:
        said = stopped.stdout or ""
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
        return _said(said) | {"verdict": f"stopped after {seconds:.0f} s"}
    if done.returncode:
        reason = "\n".join(done.stderr.splitlines()[-3:])
        return _said(done.stdout) | {"verdict": "failed", "reason": reason}
    return _said(done.stdout)


def _said(text: str) -> dict[str, Any]:
    """What PyTorch's process has said: whole lines count."""
    found = [json.loads(line) for line in text.splitlines() if line[:1] + line[-1:] == "{}"]
    answer = {"rows": [row for row in found if "work" in row]}
    return next((row for row in found if "calibration" in row), {}) | answer


def failed(data: dict[str, Any]) -> bool:
    """Whether something of ours was checked and is wrong: then no time counts."""
    wrong = [row for row in data["checks"] if row["verdict"] in ("fail", "error")]
    wrong += [
        row for row in data["timings"]
        if row.get("contender") == contenders.OURS
        and row["verdict"] in (WRONG, FAILED)
    ]  # fmt: skip
    return bool(wrong)
