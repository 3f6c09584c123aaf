"""Whether our kernels are right on this GPU: the whole contract suite, on fresh numbers."""

from collections.abc import Iterator
from typing import Any

from attnsel_jax.compare import compare
from attnsel_jax.problems import DEFAULT, QUICK
from attnsel_jax.registry import AttentionBackendEnum
from benchmarks.gpu import ours
from benchmarks.gpu.racing import poison

SETS = {"quick": QUICK, "models": DEFAULT}
WORKERS = 8


def _parts() -> list[list[Any]]:
    """The problems, as many together as compile side by side."""
    problems = [problem for each in SETS.values() for problem in each]
    return [problems[at : at + WORKERS] for at in range(0, len(problems), WORKERS)]


def num_parts() -> int:
    """How many parts the suite has."""
    return len(_parts())


def names_of(part: int) -> list[dict[str, Any]]:
    """Rows that name the problems of a part."""
    return [{"problem": problem.name} for problem in _parts()[part]]


def check(part: int, seed: int) -> Iterator[dict[str, Any]]:
    """A part's problems on every one of our GPU backends; refusals are counted only.

    Args:
        part: which one.
        seed: of the numbers; another one each run.
    """
    names = sorted(set(ours.BACKENDS.values()))
    chosen = [n for n in names if AttentionBackendEnum[n].get_class().capabilities]
    poison()
    for row in compare(_parts()[part], chosen, seed=seed, workers=WORKERS).rows:
        yield {
            "problem": row.problem,
            "backend": row.backend,
            "verdict": row.verdict,
            "in_budgets": row.worst.in_budgets if row.worst else None,
            "reason": row.error or "; ".join(map(str, row.reasons)) or _why(row),
        }


def _why(row: Any) -> str:
    return "" if not row.failed else str(row)
