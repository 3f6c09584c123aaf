"""A run on a GPU: calibration, checks, then works in the order of their list, until time is up.

What is wrong or missing is a row like any other; the file is written after every work, so that a
run that is cut off leaves what it had.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu import calibration, checks, contenders, racing, results
from benchmarks.work import Work

NAME = "gpu"
COMPILERS = 8
# Shares of the time that is given: what is left belongs to the races.
CHECKS, TORCH = 0.3, 0.15


def run(
    works: Sequence[Work],
    names: Sequence[str],
    folder: pathlib.Path,
    seconds: float,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measures and keeps.

    Args:
        works: in the order of their worth.
        names: contenders.
        folder: of the JSON file.
        seconds: that the run may take.
        seed: of the checks' numbers.
        say: told what comes next.
    """
    begun = time.perf_counter()
    data = results.head(device=results.device(), seed=seed, checks=[], torch={}, timings=[])

    def keep() -> None:
        data["seconds"] = round(time.perf_counter() - begun, 1)
        results.written(folder, NAME, data)

    say("calibrating")
    data["calibration"] = calibration.calibrated()
    keep()
    for row in checks.check(seed, CHECKS * seconds):
        say(f"checked {row['problem']}: {row['verdict']}")
        data["checks"].append(row)
    keep()
    end = begun + (1 - TORCH) * seconds
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        for work in works:
            if time.perf_counter() > end:
                data["timings"].append({"work": work.name, "verdict": "not run: no time was left"})
                continue
            say(work.name)
            timings = racing.race(work, names, pool)
            data["timings"] += [_row(timing) for timing in timings]
            keep()
    say("PyTorch")
    dense = [work for work in works if work.op == "dense"]
    left = seconds - (time.perf_counter() - begun)
    data["torch"] = in_torch(dense, left)
    keep()
    return data


def _row(timing: racing.Timing) -> dict[str, Any]:
    return dataclasses.asdict(timing) | {"clocks_differ": timing.clocks_differ}


def in_torch(works: Sequence[Work], seconds: float) -> dict[str, Any]:
    """PyTorch's answer, or why there is none."""
    command = [sys.executable, "-m", "benchmarks.gpu.torch_child"]
    given = json.dumps([dataclasses.asdict(work) for work in works])
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=max(1.0, seconds),
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"verdict": f"stopped after {seconds:.0f} s"}
    last = (done.stdout.splitlines() or [""])[-1]
    if done.returncode or not last.startswith("{"):
        return {"verdict": "failed", "reason": "\n".join(done.stderr.splitlines()[-3:])}
    return json.loads(last)


def failed(data: dict[str, Any]) -> bool:
    """Whether something of ours was checked and is wrong: then no time counts."""
    wrong = [row for row in data["checks"] if row["verdict"] in ("fail", "error")]
    wrong += [
        row for row in data["timings"]
        if row.get("contender") == contenders.OURS
        and row["verdict"] in (racing.WRONG, racing.FAILED)
    ]  # fmt: skip
    return bool(wrong)
