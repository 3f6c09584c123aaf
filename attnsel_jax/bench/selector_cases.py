"""What selection itself costs: a warm call, and importing the package."""

import subprocess
import sys
import time
from collections.abc import Callable

from attnsel_jax.bench.results import CaseResult, Row, Settings, at_most
from attnsel_jax.bench.timing import row_of
from attnsel_jax.envs import backend_variable
from attnsel_jax.forcing import global_force_attn_backend_context_manager
from attnsel_jax.selector import get_attn_backend

CALL_TARGET_S, IMPORT_TARGET_S = 5e-6, 0.1
BATCHES, CALLS = 30, 1000
PROCESSES = 5
# Each measures what comes after `import jax`: the package, then what a user's first line needs. CPU
# seconds of the process, so that other processes do not count; files are cached after the first.
_IMPORTS = """
import jax, time
begin = time.process_time()
import attnsel_jax
package = time.process_time() - begin
attnsel_jax.get_attn_backend, attnsel_jax.select
print(package, time.process_time() - begin)
"""


def selector_call(settings: Settings, *, batches: int = BATCHES) -> CaseResult:
    """A warm `get_attn_backend`: automatic, by the environment variable, forced."""

    def call() -> None:
        get_attn_backend(128, "float32", "auto", 16, num_heads=32, num_kv_heads=8)

    automatic = _per_call(call, batches)
    with backend_variable("XLA"):
        by_variable = _per_call(call, batches)
    with global_force_attn_backend_context_manager("XLA"):
        forced = _per_call(call, batches)
    rows = (
        row_of("automatic", automatic),
        row_of("environment variable set", by_variable),
        row_of("forced", forced),
    )
    verdicts = tuple(
        at_most(f"warm get_attn_backend, {row.name}", row.value, CALL_TARGET_S, "us", 1e6)
        for row in rows
    )
    description = f"get_attn_backend, warm; medians of {batches} batches of {CALLS} calls"
    return CaseResult("selector_call", description, rows, verdicts)


def _per_call(call: Callable[[], None], batches: int) -> list[float]:
    """Seconds of one call, the mean over each batch; of this thread, not of what interrupts it."""
    call()
    means = []
    for _ in range(batches):
        begin = time.thread_time()
        for _ in range(CALLS):
            call()
        means.append((time.thread_time() - begin) / CALLS)
    return means


def import_time(settings: Settings, *, processes: int = PROCESSES) -> CaseResult:
    """What `import attnsel_jax` adds to `import jax`, in processes of their own."""
    samples = [_imported() for _ in range(processes)]
    package, first_use = (sorted(times) for times in zip(*samples, strict=True))
    rows: tuple[Row, ...] = (
        row_of("import attnsel_jax", package),
        row_of("import, then attnsel_jax.get_attn_backend", first_use),
    )
    verdicts = tuple(
        at_most(f"{row.name}, after import jax", row.value, IMPORT_TARGET_S, "s") for row in rows
    )
    description = f"CPU seconds in {processes} processes of their own, after import jax"
    return CaseResult("import", description, rows, verdicts)


def _imported() -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTS], capture_output=True, text=True, check=True
    )
    package, first_use = done.stdout.split()[-2:]
    return float(package), float(first_use)
