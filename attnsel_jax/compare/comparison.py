"""What a comparison found: rows of verdicts, as data, as JSON and as a table."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from attnsel_jax.capabilities import Rejection
from attnsel_jax.compare.deviations import Deviation

PASS, FAIL, REFUSED, ERROR = "pass", "fail", "refused", "error"
COLOURS = {PASS: "green", FAIL: "bold red", REFUSED: "dim", ERROR: "bold red"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One backend on one problem.

    Attributes:
        problem: the problem's name.
        op: the kernel's key.
        backend: the backend's name.
        verdict: "pass": every quantity is within its budget; "fail": one is not; "refused": the
            backend does not serve the question, for `reasons`; "error": it accepted and raised.
        deviations: one for each quantity compared.
        reasons: why it was refused.
        left_out: what the backend does not declare, though the problem asks for it ("lse",
            "gradients"), with its reasons.
        error: what was raised.
        seconds: of compiling and running once.
        edges: tokens at which something begins, for the picture: "sequence", "page", "window".
    """

    problem: str
    op: str
    backend: str
    verdict: str
    deviations: tuple[Deviation, ...] = ()
    reasons: tuple[Rejection, ...] = ()
    left_out: dict[str, tuple[Rejection, ...]] = dataclasses.field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0
    edges: dict[str, list[int]] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def ran(self) -> bool:
        """Whether there are numbers."""
        return self.verdict in (PASS, FAIL)

    @property
    def failed(self) -> bool:
        """Whether it was accepted and is wrong."""
        return self.verdict in (FAIL, ERROR)

    @property
    def worst(self) -> Deviation | None:
        """The quantity that is furthest out of its budget."""
        return max(self.deviations, key=lambda d: d.in_budgets, default=None)

    def deviation(self, quantity: str) -> Deviation:
        """The deviation of that quantity.

        Raises:
            ValueError: it was not compared.
        """
        for found in self.deviations:
            if found.quantity == quantity:
                return found
        known = ", ".join(d.quantity for d in self.deviations) or "nothing: the row has no numbers"
        raise ValueError(f"quantity is {quantity!r}, must be one of {known}")

    def __str__(self) -> str:
        said = [*self.deviations] if self.ran else [self.error] if self.error else [*self.reasons]
        lines = [f"{self.problem} on {self.backend}: {self.verdict}", *(f"  {x}" for x in said)]
        for part, reasons in self.left_out.items():
            lines.append(f"  {part} not compared: {'; '.join(map(str, reasons))}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The row as JSON's types."""
        return {
            "problem": self.problem,
            "op": self.op,
            "backend": self.backend,
            "verdict": self.verdict,
            "deviations": [d.to_json() for d in self.deviations],
            "reasons": [reason.to_json() for reason in self.reasons],
            "left_out": {part: [r.to_json() for r in rs] for part, rs in self.left_out.items()},
            "error": self.error,
            "seconds": round(self.seconds, 3),
        }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Every row of a comparison.

    Attributes:
        device: the chip, as text.
        rows: problem after problem, in the order of the backends.
    """

    device: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether something ran, and all that ran is within its budgets."""
        return any(row.ran for row in self.rows) and not any(row.failed for row in self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def row(self, problem: str, backend: str) -> Row:
        """The row of that problem and backend.

        Raises:
            ValueError: there is none.
        """
        for row in self.rows:
            if (row.problem, row.backend) == (problem, backend):
                return row
        raise ValueError(f"({problem!r}, {backend!r}) must be a problem and a backend compared")

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON's types."""
        counts = {v: sum(row.verdict == v for row in self.rows) for v in COLOURS}
        return {
            "device": self.device,
            "passed": self.passed,
            "counts": counts,
            "rows": [row.to_json() for row in self.rows],
        }

    def __rich__(self) -> RenderableType:
        return Group(self._numbers(), *self._refusals(), self._verdict())

    def __str__(self) -> str:
        console = Console(width=160, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def _numbers(self) -> Table:
        table = Table(title=f"Against the float64 oracle, on {self.device}", title_justify="left")
        for name in (
            "problem",
            "backend",
            "verdict",
            "relative error by quantity",
            "worst element",
        ):
            table.add_column(name, overflow="fold")
        table.add_column("in budgets", justify="right")
        for row in self.rows:
            if row.verdict == REFUSED:
                continue
            shown = f"[{COLOURS[row.verdict]}]{row.verdict}[/]"
            errors = ", ".join(_short(d) for d in row.deviations)
            errors += "".join(f", no {part}" for part in row.left_out)
            worst, place = row.worst, escape(row.error or "")
            if worst is not None and worst.worst is not None:
                place = escape(f"{worst.quantity}: {worst.worst}")
            used = f"{worst.in_budgets:.2g}" if worst is not None else ""
            table.add_row(row.problem, row.backend, shown, errors, place, used)
        return table

    def _refusals(self) -> list[str]:
        """A line for each backend and set of reasons, with the problems that they refuse."""
        groups: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.verdict == REFUSED:
                reasons = "; ".join(map(str, row.reasons))
                groups.setdefault((row.backend, reasons), []).append(row.problem)
        return [
            f"[dim]{backend} refused {_list_of(problems)}:[/] {escape(reasons)}"
            for (backend, reasons), problems in groups.items()
        ]

    def _verdict(self) -> str:
        ran, failed = sum(r.ran for r in self.rows), [r for r in self.rows if r.failed]
        if failed:
            names = ", ".join(f"{row.backend} on {row.problem}" for row in failed)
            return f"[bold red]FAILED[/]: {len(failed)} of {ran} runs deviate: {names}"
        if not ran:
            return "[bold red]NOTHING RAN[/]: every backend refused every problem"
        return f"[bold green]PASSED[/]: {ran} runs, every element within its budget"


def _short(found: Deviation) -> str:
    """A quantity and its relative error, in red where it fails."""
    text = f"{found.quantity} {found.relative_error:.1e}"
    return text if found.passed else f"[bold red]{text} ({found.share_outside:.1%} out)[/]"


def _list_of(problems: list[str]) -> str:
    """Few names in full, many by their number."""
    return ", ".join(problems) if len(problems) <= 3 else f"{len(problems)} problems"
