"""Times contenders side by side: interleaved rounds, medians, compilation left out."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from attnsel_jax.bench.results import Row

Call = Callable[[int], Any]  # of the number of an input set
# Between two measurements: the worker threads of the contender before (OpenMP's spin for some
# milliseconds after their last task) come to rest.
REST_S = 0.02
LEAST_ROUNDS = 3


def interleaved(
    contenders: Mapping[str, Call], *, rounds: int, budget_s: float, num_sets: int
) -> dict[str, list[float]]:
    """Seconds of each call, round by round; each round begins with another contender.

    Args:
        contenders: by name; each is called with the number of an input set, and has been called
            before (compiled, warm).
        rounds: how many, as long as `budget_s` lasts; three at least.
        budget_s: seconds after which no further round begins.
        num_sets: input sets, taken in turn.
    """
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - begin > budget_s:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(REST_S)
            samples[name].append(seconds_of(contenders[name], number % num_sets))
    return samples


def seconds_of(call: Call, input_set: int) -> float:
    """Seconds of one call, until its results are there."""
    begin = time.perf_counter()
    finished(call(input_set))
    return time.perf_counter() - begin


def finished(outputs: Any) -> Any:
    """Waits for jax arrays; everything else is finished when it is returned."""
    return jax.block_until_ready(outputs)


def row_of(name: str, samples: Sequence[float], limit: float | None = None) -> Row:
    """The median, the quartiles, and the share of a roofline's limit."""
    low, median, high = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
    share = limit / median if limit else None
    return Row(name, median, "s", low, high, len(samples), share)
