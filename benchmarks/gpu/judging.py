"""Who is right at a work on this GPU: ours by the oracle, gradients and rivals beside ours."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.arguments import WRITTEN, contract_arguments
from benchmarks.gpu import contenders, ours
from benchmarks.gpu.runners import WRONG, Runner, Timing, failed
from benchmarks.gpu.sampled import sampled_deviation
from benchmarks.work import Work

# Outputs of two right answers in bfloat16 differ by less than this share of their norm.
AGREEMENT = 2e-2
AGAINST_OURS = "against ours"


def held_to_the_oracle(work: Work, runners: list[Runner]) -> tuple[list[Runner], list[Timing]]:
    """Runs everybody once on the same numbers, us first; who is wrong is not timed.

    Gradients are held to ours: where two rivals differ from ours and not from each other, we are.
    """
    right, wrong, answer = [], [], None
    apart: list[tuple[Runner, list[jax.Array]]] = []
    for runner in sorted(runners, key=lambda r: r.name != contenders.OURS):
        try:
            arguments = runner.made(1)
            poison()
            results = _all(runner.compiled(*arguments))
            again = _all(runner.compiled(*arguments))
            jax.block_until_ready((results, again))
        except Exception as error:
            wrong.append(failed(work, runner, error))
            continue
        if runner.name == contenders.OURS:
            fault = _own_fault(work, runner, arguments, results, again)
            answer = None if fault else results  # a wrong answer judges nobody
        else:
            fault = _rival_fault(work, runner, arguments, results, answer)
            if fault.endswith(AGAINST_OURS):
                apart.append((runner, results))
        if fault:
            wrong.append(Timing(work.name, runner.name, runner.options, WRONG, fault))
        else:
            right.append(runner)
    if len(apart) > 1 and _furthest(apart[0][1], apart[1][1]) <= AGREEMENT:
        return _outvoted(work, right, wrong, [runner for runner, _ in apart])
    return right, wrong


def _outvoted(
    work: Work, right: list[Runner], wrong: list[Timing], rivals: list[Runner]
) -> tuple[list[Runner], list[Timing]]:
    """The same two lists, with the rivals right and ours wrong."""
    names = [runner.name for runner in rivals]
    (mine,) = (runner for runner in right if runner.name == contenders.OURS)
    said = f"{' and '.join(names)} agree with each other, and not with it"
    blamed = Timing(work.name, mine.name, mine.options, WRONG, said)
    return (
        [runner for runner in right if runner is not mine] + rivals,
        [timing for timing in wrong if timing.contender not in names] + [blamed],
    )


def _all(results: Any) -> list[jax.Array]:
    """out, and gradients where they were asked for."""
    return jax.tree.leaves(results)


def _own_fault(work, runner, arguments, results, again) -> str:
    """What is wrong with our results; empty = nothing."""
    if not all(np.array_equal(_bits(a), _bits(b)) for a, b in zip(results, again, strict=True)):
        return "a second call on the same numbers gave other bits"
    found = _sampled(work, arguments, results[0])
    runner.error = found.relative_error
    return "" if found.passed else str(found)


def _rival_fault(work, runner, arguments, results, answer) -> str:
    """Likewise of a rival's: dense in bfloat16 is held to the oracle, then to our results.

    Others have other arrays or another layout, and are timed unjudged: their own tests hold them.
    """
    if work.op != "dense" or runner.program.arguments[0].dtype != jnp.bfloat16:
        return ""
    runner.error = _sampled(work, arguments, results[0]).relative_error
    if not runner.error <= AGREEMENT:
        return f"relative error {runner.error:.2g} against the oracle"
    if answer is None or [a.shape for a in answer] != [r.shape for r in results]:
        return ""
    apart = _furthest(answer, results)
    return "" if apart <= AGREEMENT else f"relative error {apart:.2g} {AGAINST_OURS}"


def _furthest(mine: list[jax.Array], theirs: list[jax.Array]) -> float:
    """How far two answers are apart, in the array where they are furthest."""
    return max(_apart(a, b) for a, b in zip(mine, theirs, strict=True))


def _apart(mine: jax.Array, theirs: jax.Array) -> float:
    mine, theirs = mine.astype(jnp.float32), theirs.astype(jnp.float32)
    return float(jnp.linalg.norm(mine - theirs) / jnp.linalg.norm(mine))


def _sampled(work: Work, arguments: tuple[jax.Array, ...], out: jax.Array) -> Any:
    named = dict(zip(_given(work), arguments, strict=True))
    return sampled_deviation(
        work, named, out, None if work.op == "dense" else ours.backend_of(work)
    )


def _given(work: Work) -> list[str]:
    """Names of a program's arguments, in its order."""
    if work.op == "dense":
        return (["dout"] if work.backward else []) + ["q", "k", "v"]
    given, written = contract_arguments(work, ours.backend_of(work)), WRITTEN[work.op]
    return [
        name for name, value in given.items() if hasattr(value, "shape") and name not in written
    ]


def _bits(array: jax.Array) -> np.ndarray:
    return np.asarray(array).view(np.uint8)


def poison(size: int = 1 << 28) -> None:
    """Fills free device memory that the next outputs will lie in with NaN."""
    blocks = [jnp.full((size // 4,), np.nan, np.float32) for _ in range(4)]
    jax.block_until_ready(blocks)
    for block in blocks:
        block.delete()
