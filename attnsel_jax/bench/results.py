"""What a benchmark case is given, and what it answers: rows, verdicts and notes."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: measurements of each contender; fewer (at least 3) once `budget_s` is spent.
        budget_s: seconds for the rounds of one case.
        backends: names to time; None = the backends that may be chosen automatically.
        seed: of the random data.
    """

    rounds: int = 9
    budget_s: float = 25.0
    backends: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}, must be at least 1")
        if not self.budget_s >= 0:
            raise ValueError(f"budget is {self.budget_s}, must be at least 0 seconds")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, must be at least 0")


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured quantity: the median over the samples, and their quartiles.

    Attributes:
        name: of the contender, or of what was measured.
        value: the median, in `unit`.
        unit: "s" or "B".
        low, high: quartiles of the samples.
        samples: how many.
        share: of the device's roofline; None where there is none.
    """

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    samples: int = 1
    share: float | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A target, and whether it was reached.

    Attributes:
        target: in words.
        measured: the figure, in words.
        reached: None = not measured (`measured` says why).
    """

    target: str
    measured: str
    reached: bool | None

    def __str__(self) -> str:
        said = {True: "reached", False: "NOT REACHED", None: "not measured"}[self.reached]
        return f"{said}: {self.target} ({self.measured})"


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """What one case measured.

    Attributes:
        name, description: of the case.
        rows: what was measured.
        verdicts: its targets.
        notes: what else a reader must know (contenders left out and why, ...).
        limit: seconds below which the device's roofline does not let it; None = not said.
    """

    name: str
    description: str
    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()
    limit: float | None = None

    @property
    def missed(self) -> list[Verdict]:
        """The targets that were measured and not reached."""
        return [verdict for verdict in self.verdicts if verdict.reached is False]

    def to_json(self) -> dict[str, Any]:
        """The result as plain data."""
        return dataclasses.asdict(self)


def at_least(what: str, value: float, bound: float, unit: str = "x") -> Verdict:
    """The verdict on a target that wants a figure not to be below a bound."""
    return Verdict(f"{what}: at least {bound:g}{unit}", f"{value:.3g}{unit}", value >= bound)


def at_most(what: str, value: float, bound: float, unit: str, scale: float = 1.0) -> Verdict:
    """The verdict on a target that wants a figure not to be above a bound.

    Args:
        what: is measured.
        value, bound: in the base unit.
        unit: shown.
        scale: shown = base * scale.
    """
    target = f"{what}: at most {bound * scale:g} {unit}"
    return Verdict(target, f"{value * scale:.3g} {unit}", value <= bound)


def missed(results: Sequence[CaseResult]) -> list[Verdict]:
    """Every target of a run that was measured and not reached."""
    return [verdict for result in results for verdict in result.missed]
