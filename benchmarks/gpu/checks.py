"""Whether our kernels are right on this GPU: the whole contract suite, on fresh numbers."""

import time
from collections.abc import Iterator
from typing import Any

from attnsel_jax.compare import compare
from attnsel_jax.problems import DEFAULT, QUICK
from attnsel_jax.registry import AttentionBackendEnum
from benchmarks.gpu import ours
from benchmarks.gpu.racing import poison

SETS = {"quick": QUICK, "models": DEFAULT}


def check(seed: int, seconds: float, workers: int = 8) -> Iterator[dict[str, Any]]:
    """Every problem on every one of our GPU backends, each as a row; refusals are counted only.

    Args:
        seed: of the numbers; another one each run.
        seconds: after which no further problem begins.
        workers: compilations side by side.
    """
    begun = time.perf_counter()
    names = sorted(set(ours.BACKENDS.values()))
    chosen = [n for n in names if AttentionBackendEnum[n].get_class().capabilities]
    problems = [problem for each in SETS.values() for problem in each]
    for at in range(0, len(problems), workers):
        some = problems[at : at + workers]
        if not chosen or time.perf_counter() - begun > seconds:
            reason = "no time was left" if chosen else "no GPU backend declares an op"
            yield from ({"problem": p.name, "verdict": "not run", "reason": reason} for p in some)
            continue
        poison()
        for row in compare(some, chosen, seed=seed, workers=workers).rows:
            yield {
                "problem": row.problem,
                "backend": row.backend,
                "verdict": row.verdict,
                "in_budgets": row.worst.in_budgets if row.worst else None,
                "reason": row.error or "; ".join(map(str, row.reasons)) or _why(row),
            }


def _why(row: Any) -> str:
    return "" if not row.failed else str(row)
