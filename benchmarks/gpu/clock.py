"""How long a call takes on the device, by two clocks that do not know of each other.

`device_seconds` asks CUPTI for every kernel of a call and adds them up: gaps between kernels and
the host are not in it. `wall_seconds` takes the difference between many calls and half as many, so
that what each series costs once cancels; on a device that is kept busy it is the time between two
results. Where the two differ by more than `AGREE`, a row says so.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

AGREE = 0.05
Call = Callable[[], Any]


def device_seconds(
    compiled: Any, inputs: list[tuple[Any, ...]], iterations: int
) -> list[float] | None:
    """Seconds of the kernels of each call, as CUPTI has them; None where it has none (a CPU,
    no CUPTI, kernels that differ from call to call).

    Args:
        compiled: of `jax.jit(...).lower(...).compile()`.
        inputs: sets of arguments, taken in turn.
        iterations: calls of each set.
    """
    if jax.default_backend() != "gpu":
        return None
    from jax.experimental.mosaic.gpu import profiler

    measure = profiler.measure(compiled, aggregate=True, iterations=iterations)
    found: list[float] = []
    for arguments in inputs:
        try:
            _, times = measure(*arguments)
        except RuntimeError:  # CUPTI's: the call itself has run before, and will again
            return None
        if times is None:
            return None
        found += [ms * 1e-3 for ms in (times if isinstance(times, list) else [times])]
    return found


def wall_seconds(call: Call, *, calls: int, rounds: int = 3) -> float:
    """Seconds of one call among many: the median over rounds of (T(2 n) - T(n)) / n."""

    def series(count: int) -> float:
        begin = time.perf_counter()
        results = [call() for _ in range(count)]
        jax.block_until_ready(results[-1])
        return time.perf_counter() - begin

    series(1)
    return statistics.median((series(2 * calls) - series(calls)) / calls for _ in range(rounds))


def calls_for(seconds: float, *, window: float = 0.02) -> int:
    """How many calls fill a window of time: two at least, 200 at most."""
    return max(2, min(200, round(window / max(seconds, 1e-6))))
