"""One work on this GPU: everybody compiles, is held to the oracle, and is timed in turn."""

import concurrent.futures
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnsel_jax.compare.comparing import RAISED
from benchmarks.arguments import WRITTEN, contract_arguments
from benchmarks.batches import Program
from benchmarks.gpu import clock, contenders, inputs, ours, turns
from benchmarks.gpu.sampled import sampled_deviation
from benchmarks.work import Work

ROUNDS = 3
# Outputs of two right answers in bfloat16 differ by less than this share of their norm.
AGREEMENT = 2e-2
AGAINST_OURS = "against ours"
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
        error: of the output, relative to the oracle's (ours and dense), or to ours, by norm.
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
class _Runner:
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


def race(
    work: Work, names: Sequence[str], pool: concurrent.futures.Executor, *, rounds: int = ROUNDS
) -> list[Timing]:
    """Times every contender at a work, interleaved; each one's best options count.

    Args:
        work: what is computed.
        names: of `contenders.CONTENDERS`.
        pool: where contenders are compiled side by side.
        rounds: in which everybody is timed in turn.
    """
    found: list[Timing] = []
    asked: list[tuple[str, dict[str, Any]]] = []
    for name in names:
        reason = contenders.reason_against(name, work)
        if reason is not None:
            found.append(Timing(work.name, name, {}, LEFT_OUT, reason))
            continue
        asked += [(name, options) for options in contenders.contender(name).choices(work)]
    quiet = [each for each in asked if not contenders.contender(each[0]).MEASURES]
    loud = [each for each in asked if each not in quiet]
    runners = _all_compiled(work, quiet, pool)
    with turns.turn(alone=True):
        runners += _all_compiled(work, loud, pool)
        found += [r for r in runners if isinstance(r, Timing)]
        right, wrong = _held_to_the_oracle(work, [r for r in runners if isinstance(r, _Runner)])
        found += wrong
        stopped = _time(right, rounds)
    found += [_failed(work, right[at], error) for at, error in stopped.items()]
    found += [_timing(work, runner) for at, runner in enumerate(right) if at not in stopped]
    return _best(found)


def seconds_of(work: Work, name: str, options: dict[str, Any]) -> float:
    """Seconds of one contender with these options, held to the oracle before.

    Raises:
        RuntimeError: it is wrong, or did not run.
    """
    runner = _compiled(work, name, options)
    with turns.turn(alone=True):
        _, wrong = _held_to_the_oracle(work, [runner])
        if wrong:
            raise RuntimeError(f"{wrong[0].verdict}: {wrong[0].reason}")
        sets = _sets(runner)
        for _ in range(ROUNDS):
            _time_once(runner, sets)
    return statistics.median(runner.samples or runner.wall)


def _failed(work: Work, runner: _Runner, error: Exception) -> Timing:
    reason = f"{type(error).__name__}: {error}"[:500]
    return Timing(work.name, runner.name, runner.options, FAILED, reason)


def _compiled(work: Work, name: str, options: dict[str, Any]) -> _Runner:
    begun = time.perf_counter()
    more = {"writes": False} if name == contenders.OURS else {}
    program = contenders.program_of(name, work, options | more)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), program.arguments)
    compiled = jax.jit(program.function).lower(*shapes).compile()
    seconds = time.perf_counter() - begun
    return _Runner(name, options, program, compiled, inputs.maker(program), seconds)


def _all_compiled(
    work: Work, asked: Sequence[tuple[str, dict[str, Any]]], pool: concurrent.futures.Executor
) -> list[_Runner | Timing]:
    """Compiled side by side."""
    futures = [pool.submit(_compiled, work, *each) for each in asked]
    return [_result(work, *each, future) for each, future in zip(asked, futures, strict=True)]


def _result(work, name, options, future) -> _Runner | Timing:
    """What became of compiling; a refusal is a finding, not the end of the run."""
    try:
        return future.result()
    except (*RAISED, ImportError, OSError) as error:
        return Timing(work.name, name, options, FAILED, f"{type(error).__name__}: {error}"[:500])


def _held_to_the_oracle(work: Work, runners: list[_Runner]) -> tuple[list[_Runner], list[Timing]]:
    """Runs everybody once on the same numbers, us first; who is wrong is not timed.

    Gradients are held to ours: where two rivals differ from ours and not from each other, we are.
    """
    right, wrong, answer = [], [], None
    apart: list[tuple[_Runner, list[jax.Array]]] = []
    for runner in sorted(runners, key=lambda r: r.name != contenders.OURS):
        try:
            arguments = runner.made(1)
            poison()
            results = _all(runner.compiled(*arguments))
            again = _all(runner.compiled(*arguments))
            jax.block_until_ready((results, again))
        except RAISED as error:
            wrong.append(_failed(work, runner, error))
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
        (mine,) = (runner for runner in right if runner.name == contenders.OURS)
        rivals = [runner for runner, _ in apart]
        names = [runner.name for runner in rivals]
        wrong = [timing for timing in wrong if timing.contender not in names]
        said = f"{' and '.join(names)} agree with each other, and not with it"
        wrong.append(Timing(work.name, mine.name, mine.options, WRONG, said))
        right = [runner for runner in right if runner is not mine] + rivals
    return right, wrong


def _all(results: Any) -> list[jax.Array]:
    """out, and gradients where they were asked for."""
    return jax.tree.leaves(results)


def _own_fault(work, runner, arguments, results, again) -> str:
    """What is wrong with our results; empty = nothing."""
    if not all(np.array_equal(_bits(a), _bits(b)) for a, b in zip(results, again, strict=True)):
        return "a second call on the same numbers gave other bits"
    found = _sampled(work, runner, arguments, results[0])
    runner.error = found.relative_error
    return "" if found.passed else str(found)


def _rival_fault(work, runner, arguments, results, answer) -> str:
    """Likewise of a rival's: held to the oracle where it has our arrays, else to our results."""
    if work.op == "dense" and runner.program.arguments[0].dtype == jnp.bfloat16:
        runner.error = _sampled(work, runner, arguments, results[0]).relative_error
        if not runner.error <= AGREEMENT:
            return f"relative error {runner.error:.2g} against the oracle"
    if answer is None or [a.shape for a in answer] != [r.shape for r in results]:
        return ""  # in another layout: its own tests hold it, not ours
    if runner.program.arguments[0].dtype != jnp.bfloat16 or work.op != "dense":
        return ""  # other numbers: another dtype, or a cache of another shape
    apart = _furthest(answer, results)
    return "" if apart <= AGREEMENT else f"relative error {apart:.2g} {AGAINST_OURS}"


def _furthest(mine: list[jax.Array], theirs: list[jax.Array]) -> float:
    """How far two answers are apart, in the array where they are furthest."""
    return max(_apart(a, b) for a, b in zip(mine, theirs, strict=True))


def _apart(mine: jax.Array, theirs: jax.Array) -> float:
    mine, theirs = mine.astype(jnp.float32), theirs.astype(jnp.float32)
    return float(jnp.linalg.norm(mine - theirs) / jnp.linalg.norm(mine))


def _sampled(work: Work, runner: _Runner, arguments: tuple[jax.Array, ...], out: jax.Array) -> Any:
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


def _time(runners: list[_Runner], rounds: int) -> dict[int, Exception]:
    """Interleaved rounds, each begins with another contender; who failed, by index, and how."""
    stopped: dict[int, Exception] = {}
    sets: dict[int, list[tuple[jax.Array, ...]]] = {}
    order = list(range(len(runners)))
    for number in range(rounds):
        first = number % len(order) if order else 0
        for at in order[first:] + order[:first]:
            if at in stopped:
                continue
            try:
                if at not in sets:
                    sets[at] = _sets(runners[at])
                _time_once(runners[at], sets[at])
            except RAISED as error:
                stopped[at] = error
    return stopped


def _time_once(runner: _Runner, sets: list[tuple[jax.Array, ...]]) -> None:
    """One contender's turn, by both clocks."""
    arguments = itertools.cycle(sets)

    def call() -> Any:
        return runner.compiled(*next(arguments))

    if not runner.wall:
        runner.first = clock.wall_seconds(call, calls=2, rounds=1)
    calls = clock.calls_for(runner.first)
    runner.wall.append(clock.wall_seconds(call, calls=calls, rounds=1))
    per_set = max(1, calls // len(sets))
    runner.samples += clock.device_seconds(runner.compiled, sets, per_set) or []


def _sets(runner: _Runner) -> list[tuple[jax.Array, ...]]:
    count = inputs.num_sets(runner.program)
    return [runner.made(2 + number) for number in range(count)]


def _timing(work: Work, runner: _Runner) -> Timing:
    wall = statistics.median(runner.wall)
    samples = runner.samples or runner.wall
    low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
    return Timing(
        work.name, runner.name, runner.options, TIMED,
        seconds=middle, low=low, high=high, wall_seconds=wall, samples=len(samples),
        tflops=work.flops / middle / 1e12,
        gbytes=work.floor_bytes(writes_cache=False) / middle / 1e9,
        error=runner.error, compile_seconds=runner.compile_seconds,
    )  # fmt: skip


def _best(timings: list[Timing]) -> list[Timing]:
    """One for each contender: its fastest; where none was timed, its first."""
    best: dict[str, Timing] = {}
    for timing in timings:
        known = best.get(timing.contender)
        better = known is not None and timing.verdict == TIMED and (
            known.verdict != TIMED or timing.seconds < known.seconds
        )  # fmt: skip
        if known is None or better:
            best[timing.contender] = timing
    return list(best.values())
