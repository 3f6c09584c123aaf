"""A contender at a work on this GPU: as it compiled, and what became of it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.batches import Program
from benchmarks.gpu import clock
from benchmarks.work import Work

TIMED, WRONG, FAILED, LEFT_OUT = "timed", "WRONG", "failed", "left out"


@dataclasses.dataclass(frozen=True)
class Timing:
    """One contender at one work.

    Attributes:
        work, contender, options: what was called.
        verdict: `TIMED`, `WRONG` (never timed), `FAILED` (did not compile or run), `LEFT_OUT`.
        reason: of any other verdict than `TIMED`.
        seconds: the median on the device's clock; on the wall's where there is no other.
        low, high: quartiles.
        wall_seconds: of the other clock.
        samples: calls that were timed.
        tflops, gbytes: a second: necessary operations, necessary bytes.
        error: of the output, relative to the oracle's, by norm; NaN where nobody judges it.
        compile_seconds: of lowering and compiling.
    """

    work: str
    contender: str
    options: dict[str, Any]
    verdict: str
    reason: str = ""
    seconds: float = 0.0
    low: float = 0.0
    high: float = 0.0
    wall_seconds: float = 0.0
    samples: int = 0
    tflops: float = 0.0
    gbytes: float = 0.0
    error: float = 0.0
    compile_seconds: float = 0.0

    @property
    def clocks_differ(self) -> bool:
        """Whether the two clocks disagree by more than they may."""
        return abs(self.wall_seconds / self.seconds - 1) > clock.AGREE if self.seconds else False


@dataclasses.dataclass
class Runner:
    """A contender that compiled, and what is known of it so far."""

    name: str
    options: dict[str, Any]
    program: Program
    compiled: Any
    made: Callable[[int], tuple[jax.Array, ...]]  # a seed -> arguments
    compile_seconds: float
    error: float = math.nan
    first: float = 0.0  # a first guess at its seconds
    samples: list[float] = dataclasses.field(default_factory=list)
    wall: list[float] = dataclasses.field(default_factory=list)


def failed(work: Work, runner: Runner, error: Exception) -> Timing:
    reason = f"{type(error).__name__}: {error}"[:500]
    return Timing(work.name, runner.name, runner.options, FAILED, reason)
