"""The steps of a run on a GPU, and the process that takes one.

    python -m benchmarks.gpu.steps     # a step as JSON in; lines for what is found out

What a kernel does to a GPU can end the process that called it, or hang it: `watching` gives each
step a process of its own.
"""

import concurrent.futures
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu import calibration, checks, racing, results, turns
from benchmarks.gpu.contenders import OURS
from benchmarks.gpu.runners import FAILED
from benchmarks.work import Work

COMPILERS = 8
Step = dict[str, Any]
Found = tuple[str, Any]  # where it belongs in the results; what was found


def steps_of(works: list[Work], names: list[str], seed: int) -> list[Step]:
    """What a run does, in order: what this card gives, whether we are right, who is how fast."""
    of_checks = [{"kind": "check", "at": at, "seed": seed} for at in range(checks.num_parts())]
    races = [{"kind": "race", "work": dataclasses.asdict(work), "names": names} for work in works]
    return [{"kind": "device"}, {"kind": "calibration"}, *of_checks, *races]


def tuning_steps(work: Work, candidates: Sequence[dict[str, Any]], phase: str) -> list[Step]:
    """To time our kernel at a work with each of these sizes."""
    more = {"phase": phase} if work.op == "paged" else {}
    of_work = dataclasses.asdict(work)
    return [{"kind": "tuned", "work": of_work, "options": {"tiles": sizes} | more}
            for sizes in candidates]  # fmt: skip


def name_of(step: Step) -> str:
    """A step in words."""
    more = {"check": step.get("at"), "race": step.get("work", {}).get("name"),
            "tuned": step.get("options")}  # fmt: skip
    return f"{step['kind']} {more.get(step['kind'], '')}".strip()


def broken(step: Step, reason: str) -> list[Found]:
    """What is said of a step whose process ended, or was ended."""
    if step["kind"] == "race":
        return [
            ("timings", {"work": step["work"]["name"], "contender": name,
                         "verdict": FAILED, "reason": reason})
            for name in step["names"]
        ]  # fmt: skip
    if step["kind"] == "check":
        return [("checks", row | {"verdict": "error", "reason": reason})
                for row in checks.names_of(step["at"])]  # fmt: skip
    return [(step["kind"], {"reason": reason})]


def left(step: Step) -> list[Found]:
    """What is said of a step that no time was left for."""
    verdict = "not run: no time was left"
    if step["kind"] == "race":
        return [("timings", {"work": step["work"]["name"], "verdict": verdict})]
    if step["kind"] == "check":
        rows = checks.names_of(step["at"])
        return [("checks", row | {"verdict": "not run", "reason": verdict}) for row in rows]
    return [(step["kind"], {"reason": verdict})]


def take(step: Step) -> Iterator[Found]:
    """Takes one step, in this process."""
    if step["kind"] == "device":
        yield "device", results.device()
    elif step["kind"] == "calibration":
        with turns.turn(alone=True):
            yield "calibration", calibration.calibrated()
    elif step["kind"] == "check":
        with turns.turn(alone=False):
            for row in checks.check(step["at"], step["seed"]):
                yield "checks", row
    elif step["kind"] == "tuned":
        yield "tuned", {"seconds": racing.seconds_of(_work(step), OURS, step["options"])}
    else:
        for timing in racing.race(_work(step), step["names"], _pool()):
            yield "timings", dataclasses.asdict(timing) | {"clocks_differ": timing.clocks_differ}


def _work(step: Step) -> Work:
    given = {n: tuple(x) if isinstance(x, list) else x for n, x in step["work"].items()}
    return Work(**given)


@functools.cache
def _pool() -> concurrent.futures.Executor:
    return concurrent.futures.ThreadPoolExecutor(COMPILERS)


def main() -> None:
    """Takes the step on stdin; every answer is a line that begins with {."""

    def say(**said: Any) -> None:
        sys.stdout.write("\n" + json.dumps(said) + "\n")
        sys.stdout.flush()

    step = json.loads(sys.stdin.readline())
    try:
        for place, value in take(step):
            say(place=place, value=value)
    except Exception as error:
        for place, value in broken(step, f"{type(error).__name__}: {error}"[:500]):
            say(place=place, value=value)
    say(done=True)


if __name__ == "__main__":
    main()
