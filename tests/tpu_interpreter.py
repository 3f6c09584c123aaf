"""The TPU interpreter as every TPU test uses it: races are errors, memory begins as NaN.

    with tpu_interpreter("v6e"):
        out, lse = jax.jit(kernel)(q, k, v)

A read out of bounds is an error, a DMA moves its bytes only when it is waited for, and grid
dimensions declared parallel are run in a random order.
"""

import contextlib
import io
import sys

import jax
from jax.experimental.pallas import tpu as pltpu
from tpu_interpreter_gaps import fill_gaps

from pallas_kernels import tpu_chip

fill_gaps()


# What a race is raised as, by newer jax and by `tpu_interpreter`.
RACE = (jax.errors.JaxRuntimeError, AssertionError)


class _Tee(io.TextIOBase):
    """Writes on, and remembers whether the interpreter reported a race."""

    def __init__(self, onward):
        self.onward, self.races = onward, []

    def write(self, text):
        if "RACE DETECTED" in text:
            self.races.append(text)
        return self.onward.write(text)

    def flush(self):
        self.onward.flush()


@contextlib.contextmanager
def tpu_interpreter(generation=tpu_chip.DEFAULT, *, detect_races=True, seed=0):
    """Runs Pallas TPU kernels that are traced inside, on the CPU, as that generation would.

    Newer jax raises at a race, older jax prints it and goes on: both fail here.
    """
    params = pltpu.InterpretParams(
        detect_races=detect_races,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        dma_execution_mode="on_wait",
        random_seed=seed,
    )
    tee = _Tee(sys.stdout)
    # Most of a test's time is LLVM's; what it makes runs for milliseconds.
    optimises = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with (
            tpu_chip.for_generation(generation) as chip,
            pltpu.force_tpu_interpret_mode(params),
            contextlib.redirect_stdout(tee),
        ):
            yield chip
            jax.effects_barrier()
    except BaseException:
        pltpu.reset_tpu_interpret_mode_state()
        raise
    finally:
        jax.config.update("jax_disable_most_optimizations", optimises)
    assert not tee.races, tee.races[0]
