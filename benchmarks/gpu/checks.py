"""Whether our kernels are right on this GPU: the whole contract suite, on fresh numbers."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from attnsel_jax.compare import compare
from attnsel_jax.problems import DEFAULT, QUICK, Problem
from attnsel_jax.problems.dense_inputs import dense_inputs
from attnsel_jax.registry import AttentionBackendEnum
from benchmarks.gpu import ours
from benchmarks.gpu.judging import poison

WORKERS = 8


def _walking(name: str, *, gradients: bool = False, **options: Any) -> Problem:
    """More blocks of queries than any GPU has cores, so that a core takes several in turn."""
    options = {"batch": 2, "q_len": 1005, "heads": (16, 4), "head_size": 128} | options
    return Problem(f"walking.{name}", "dense", name, dense_inputs, options, gradients)


def _in_bfloat16(problem: Problem) -> Problem:
    """A problem in float32, or with latents that no kernel takes, as GPU kernels take it."""
    options, other = problem.options, {}
    if options.get("dtype") == "float32":
        other["dtype"] = "bfloat16"
    if options.get("rank") == 32:
        other |= {"rank": 128, "rope_dim": 64}
    if options.get("index_head_dim") == 16:
        other["index_head_dim"] = 64
    name = f"{problem.name}.bfloat16" if other else problem.name
    return dataclasses.replace(problem, name=name, options=options | other)


CAUSAL = {"causal": True}
WALKING = (
    _walking("causal", **CAUSAL, gradients=True),
    _walking("full", gradients=True),
    _walking("window", **CAUSAL, sliding_window=300, sinks=True, gradients=True),
    _walking("capped", **CAUSAL, soft_cap=8.0, attention_chunk_size=700),
    _walking("64", **CAUSAL, head_size=64, gradients=True),
    _walking("192", **CAUSAL, head_size=192, head_size_v=128, gradients=True),
    _walking("segments", **CAUSAL, segments=3),
)
SETS = {
    "quick": QUICK,
    "in bfloat16": tuple(
        other for problem in QUICK if (other := _in_bfloat16(problem)).name != problem.name
    ),
    "models": DEFAULT,
    "walking": WALKING,
}


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
