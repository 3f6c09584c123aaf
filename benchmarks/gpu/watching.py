"""Takes steps side by side, each in a process of its own: one that crashes or hangs costs itself.

They compile side by side; on the GPU they take `turns`.
"""

import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

from benchmarks.gpu import steps, turns

COMMAND = (sys.executable, "-m", "benchmarks.gpu.steps")
# CUPTI sees no kernel of a command buffer; memory is shared with the other processes.
FLAGS = "--xla_gpu_enable_command_buffer="
MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
WORKERS = 6
STEP_S = 120.0  # that a step may take, compilers and its wait for a turn included
GRACE_S = 25.0  # that it may take past the time of its kind


def taken(
    todo: Sequence[steps.Step],
    ends: Callable[[steps.Step], float],
    say: Callable[[str], None],
    *,
    command: Sequence[str] = COMMAND,
    step_s: float = STEP_S,
    workers: int = WORKERS,
) -> Iterator[steps.Found]:
    """Takes steps, and gives what they find in their order.

    Args:
        todo: the steps.
        ends: a step -> when (`time.perf_counter`) it must have begun, or is left.
        say: told what comes next.
        command: of a process.
        step_s: seconds after which a step counts as hung.
        workers: how many processes at once.
    """
    with (
        tempfile.NamedTemporaryFile() as file,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):
        environment = MEMORY | os.environ | {turns.FILE: file.name}
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

        def take(step: steps.Step) -> list[steps.Found]:
            seconds = ends(step) - time.perf_counter()
            if seconds < 0:
                return steps.left(step)
            say(steps.name_of(step))
            return _taken_by_a_process(step, command, environment, min(step_s, seconds + GRACE_S))

        for found in pool.map(take, todo):
            yield from found


def _taken_by_a_process(
    step: steps.Step, command: Sequence[str], environment: dict[str, str], seconds: float
) -> list[steps.Found]:
    """What a step finds, and why it broke if it did."""
    try:
        done = subprocess.run(
            command, input=json.dumps(step) + "\n", capture_output=True, text=True,
            errors="replace", timeout=seconds, env=environment, check=False,
        )  # fmt: skip
        said, reason = done.stdout, f"its process ended with {done.returncode}"
    except subprocess.TimeoutExpired as stopped:
        said = (stopped.stdout or b"").decode(errors="replace")
        reason = f"hung: stopped after {seconds:.0f} s"
    found, whole = [], False
    for line in said.splitlines():
        if line.startswith(('{"place"', '{"done"')):  # what else a library says is noise
            answer = json.loads(line)
            whole = whole or answer.get("done", False)
            found += [] if "done" in answer else [(answer["place"], answer["value"])]
    return found if whole else found + steps.broken(step, reason)
