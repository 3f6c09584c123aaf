"""A race at one work on this GPU: everybody compiles, is judged, and is timed in turn."""

import concurrent.futures
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.gpu import clock, contenders, inputs, turns
from benchmarks.gpu.judging import held_to_the_oracle
from benchmarks.gpu.runners import FAILED, LEFT_OUT, TIMED, Runner, Timing, failed
from benchmarks.work import Work

ROUNDS = 3


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
        right, wrong = held_to_the_oracle(work, [r for r in runners if isinstance(r, Runner)])
        found += wrong
        stopped = _time(right, rounds)
    found += [failed(work, right[at], error) for at, error in stopped.items()]
    found += [_timing(work, runner) for at, runner in enumerate(right) if at not in stopped]
    return _best(found)


def seconds_of(work: Work, name: str, options: dict[str, Any]) -> float:
    """Seconds of one contender with these options, held to the oracle before.

    Raises:
        RuntimeError: it is wrong, or did not run.
    """
    runner = _compiled(work, name, options)
    with turns.turn(alone=True):
        _, wrong = held_to_the_oracle(work, [runner])
        if wrong:
            raise RuntimeError(f"{wrong[0].verdict}: {wrong[0].reason}")
        sets = _sets(runner)
        for _ in range(ROUNDS):
            _time_once(runner, sets)
    return statistics.median(runner.samples or runner.wall)


def _compiled(work: Work, name: str, options: dict[str, Any]) -> Runner:
    begun = time.perf_counter()
    more = {"writes": False} if name == contenders.OURS else {}
    program = contenders.program_of(name, work, options | more)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), program.arguments)
    compiled = jax.jit(program.function).lower(*shapes).compile()
    seconds = time.perf_counter() - begun
    return Runner(name, options, program, compiled, inputs.maker(program), seconds)


def _all_compiled(
    work: Work, asked: Sequence[tuple[str, dict[str, Any]]], pool: concurrent.futures.Executor
) -> list[Runner | Timing]:
    """Compiled side by side."""
    futures = [pool.submit(_compiled, work, *each) for each in asked]
    return [_result(work, *each, future) for each, future in zip(asked, futures, strict=True)]


def _result(work, name, options, future) -> Runner | Timing:
    """What became of compiling; a refusal is a finding, not the end of the run."""
    try:
        return future.result()
    except Exception as error:
        return Timing(work.name, name, options, FAILED, f"{type(error).__name__}: {error}"[:500])


def _time(runners: list[Runner], rounds: int) -> dict[int, Exception]:
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
            except Exception as error:
                stopped[at] = error
    return stopped


def _time_once(runner: Runner, sets: list[tuple[jax.Array, ...]]) -> None:
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


def _sets(runner: Runner) -> list[tuple[jax.Array, ...]]:
    count = inputs.num_sets(runner.program)
    return [runner.made(2 + number) for number in range(count)]


def _timing(work: Work, runner: Runner) -> Timing:
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
