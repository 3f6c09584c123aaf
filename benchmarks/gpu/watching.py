"""Takes steps in a process that may crash or hang: then the next one goes on after that step."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from benchmarks.gpu import steps

COMMAND = (sys.executable, "-m", "benchmarks.gpu.steps")
# CUPTI sees no kernel of a command buffer; memory is shared with PyTorch's process.
FLAGS = "--xla_gpu_enable_command_buffer="
MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
STEP_S = 150.0  # that a step may take, compilers included
GRACE_S = 25.0  # that it may take past the time of its kind


def taken(
    todo: Sequence[steps.Step],
    ends: Callable[[steps.Step], float],
    say: Callable[[str], None],
    *,
    command: Sequence[str] = COMMAND,
    step_s: float = STEP_S,
) -> Iterator[steps.Found]:
    """Takes steps in order, and gives what they find as it comes.

    Args:
        todo: the steps.
        ends: a step -> when (`time.perf_counter`) it must have begun, or is left.
        say: told what comes next.
        command: of the process.
        step_s: seconds after which a step counts as hung.
    """
    process = None
    try:
        for step in todo:
            seconds = ends(step) - time.perf_counter()
            if seconds < 0:
                yield from steps.left(step)
                continue
            say(steps.name_of(step))
            process = process or _Process(command)
            reason = yield from process.take(step, min(step_s, seconds + GRACE_S))
            if reason is not None:
                process = process.end()
                yield from steps.broken(step, reason)
    finally:
        if process is not None:
            process.end()


class _Process:
    """The process that takes steps, and the lines that it says."""

    def __init__(self, command: Sequence[str]):
        environment = MEMORY | os.environ
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, errors="replace",
            env=environment,
        )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def end(self) -> None:
        """Ends it, whatever it does."""
        self.process.kill()
        self.process.communicate()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith("{"):
                self.lines.put(line)
        self.lines.put(None)

    def take(self, step: steps.Step, seconds: float) -> Iterator[steps.Found]:
        """What a step finds; returns why it broke, None = it did not."""
        end = time.perf_counter() + seconds
        try:
            self.process.stdin.write(json.dumps(step) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return f"its process ended with {self.process.wait()} before the step"
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, end - time.perf_counter()))
            except queue.Empty:
                return f"hung: stopped after {seconds:.0f} s"
            if line is None:
                return f"its process ended with {self.process.wait()}"
            said = json.loads(line)
            if said.get("done"):
                return None
            yield said["place"], said["value"]
