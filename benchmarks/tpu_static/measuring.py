"""Measures one contender at one work on one generation: compile, read the schedule, replay it."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from attnsel_jax.envs import environment_for_compiling
from benchmarks.tpu_static.chips import Chip, chip_named
from benchmarks.tpu_static.dump import FLAGS, read_kernels
from benchmarks.tpu_static.replay import replay
from benchmarks.tpu_static.schedule import KernelFigures, figures
from benchmarks.tpu_static.stand_ins import number_of
from benchmarks.work import Work

TIMEOUT_S = 900.0
STOPPED = "stopped after"  # how the reason of what took too long begins
MEASURED, REFUSED, NOT_REPLAYED = "measured", "refused by the compiler", "not replayed"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one contender's call costs on one generation.

    Attributes:
        work, contender, options: what was compiled.
        verdict: `MEASURED`, `REFUSED`, `NOT_REPLAYED`, "not installed", "does not serve".
        reason: of any other verdict than `MEASURED`.
        kernels: each Pallas kernel of the program.
        grids: of each `pallas_call`, as it was traced.
        cores_busy: cores that split the kernels' grids.
        replayed_us: all kernels, one after another.
        around_us: XLA's own estimate of the instructions around them; in no other figure.
        bytes_floor_us, flops_floor_us: necessary bytes, necessary operations, by the datasheet.
        bytes_moved: by the kernels' DMAs, all cores.
        floor_bytes: necessary ones.
        seconds: of compiling.
    """

    work: str
    contender: str
    options: dict[str, Any]
    verdict: str
    reason: str = ""
    kernels: tuple[KernelFigures, ...] = ()
    grids: tuple[tuple[int, ...], ...] = ()
    cores_busy: int = 1
    replayed_us: float = 0.0
    around_us: float = 0.0
    bytes_floor_us: float = 0.0
    flops_floor_us: float = 0.0
    bytes_moved: int = 0
    floor_bytes: float = 0.0
    seconds: float = 0.0

    @property
    def estimated_us(self) -> float:
        """The larger of the replayed time and the byte floor."""
        return max(self.replayed_us, self.bytes_floor_us)

    @property
    def main_kernel(self) -> KernelFigures:
        """The one that takes most of the time."""
        return max(self.kernels, key=lambda kernel: kernel.cycles)

    def to_json(self) -> dict[str, Any]:
        """As plain data, shares of peak and bandwidth included."""
        data = dataclasses.asdict(self)
        if self.verdict != MEASURED:
            return {
                name: data[name] for name in ("work", "contender", "options", "verdict", "reason")
            }
        return data | {
            "estimated_us": self.estimated_us,
            "share_of_peak": self.flops_floor_us / self.estimated_us,
            "share_of_bandwidth": self.bytes_floor_us / self.estimated_us,
            "bytes_over_floor": self.bytes_moved / self.floor_bytes,
        }


def measure(
    work: Work,
    contender: str,
    generation: str,
    options: dict[str, Any] | None = None,
    *,
    keep: pathlib.Path | None = None,
    python: str = sys.executable,
) -> Measurement:
    """Measures one call.

    Args:
        work: what is computed.
        contender: a name of `contenders.CONTENDERS`.
        generation: the chip.
        options: of the contender: tile sizes; None = its own choice.
        keep: folder to leave the compiler's files in; None = they are deleted.
        python: interpreter that has jax, libtpu and the contender.
    """
    chip, options = chip_named(generation), options or {}
    task = {
        "work": dataclasses.asdict(work),
        "contender": contender,
        "generation": generation,
        "options": options,
    }
    with tempfile.TemporaryDirectory(prefix="tpu_static_") as temporary:
        folder = keep or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        said = _compiled(task, folder, python)
        if "refusal" in said:
            return Measurement(work.name, contender, options, REFUSED, said["refusal"])
        calls = said["calls"]
        cores_busy = chip.cores if any(call["parallel"] for call in calls) else 1
        kernels = read_kernels(folder, said["kernels"])
        unknown = [name for name in kernels if not calls[number_of(name)]["is_known"]]
        if unknown or said["in_loops"]:
            reason = (
                f"{unknown[0]}: its grid depends on what was not recorded"
                if unknown
                else f"{said['in_loops'][0]}: a loop of the program runs it, more often than once"
            )
            return Measurement(work.name, contender, options, NOT_REPLAYED, reason)
        try:
            found = [
                figures(name, kernel, replay(kernel, chip, cores_busy, call["scalars"]))
                for name, kernel in kernels.items()
                for call in [calls[number_of(name)]]
            ]
        except (ValueError, LookupError, ArithmeticError) as error:
            reason = f"{type(error).__name__} in the schedule's scalar code: {error}"
            return Measurement(work.name, contender, options, NOT_REPLAYED, reason)
    if not found:
        reason = "no schedule of a Pallas kernel was written: the program has none that runs"
        return Measurement(work.name, contender, options, REFUSED, reason)
    return _measurement(work, contender, options, chip, cores_busy, tuple(found), said)


def _measurement(
    work: Work,
    contender: str,
    options: dict[str, Any],
    chip: Chip,
    cores_busy: int,
    found: tuple[KernelFigures, ...],
    said: dict[str, Any],
) -> Measurement:
    floor_bytes = work.floor_bytes(writes_cache=said["writes_cache"])
    us = 1e6 / chip.hertz
    return Measurement(
        work=work.name,
        contender=contender,
        options=options,
        verdict=MEASURED,
        kernels=found,
        grids=tuple(tuple(call["grid"]) for call in said["calls"]),
        cores_busy=cores_busy,
        replayed_us=sum(kernel.cycles for kernel in found) * us,
        around_us=sum(said["around_cycles"].values()) * us,
        bytes_floor_us=floor_bytes / chip.bandwidth * 1e6,
        flops_floor_us=work.flops / chip.peak * 1e6,
        bytes_moved=sum(kernel.bytes_in + kernel.bytes_out for kernel in found) * cores_busy,
        floor_bytes=floor_bytes,
        seconds=said["seconds"],
    )


def _compiled(task: dict[str, Any], folder: pathlib.Path, python: str) -> dict[str, Any]:
    """Runs the child; a compiler that crashes is a refusal too."""
    environment = environment_for_compiling() | {
        "LIBTPU_INIT_ARGS": FLAGS.format(folder=folder),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    try:
        done = subprocess.run(
            [python, "-m", "benchmarks.tpu_static.child"],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            env=environment,
            cwd=pathlib.Path(__file__).parents[2],
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"refusal": f"{STOPPED} {TIMEOUT_S:.0f} s"}
    last = (done.stdout.splitlines() or [""])[-1]
    if last.startswith("{"):
        return json.loads(last)
    fatal = [line for line in done.stderr.splitlines() if line.startswith(("F", "ERROR"))]
    words = "\n".join(fatal[:3] or done.stderr.splitlines()[-5:])
    return {"refusal": f"the compiler's process ended with {done.returncode}: {words}"[:2000]}
