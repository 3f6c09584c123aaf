"""The Mosaic GPU interpreter as every GPU test uses it: races are errors, memory begins as NaN.

    with gpu_interpreter("h200"):
        out, lse = jax.jit(kernel)(q, k, v)

jax has it from 0.11 on; test files that need it begin with `needs_gpu_interpreter()`. It does not
see: races of wgmma's own reads, races between blocks other than overlapping writes, register and
shared-memory limits, tilings that TMA or wgmma cannot take. Those are the compiler's to refuse
(`python -m benchmarks.gpu run --static`). A deadlock hangs: run with a time limit. So does a
machine of two cores where XLA has no thread for each warpgroup that waits: conftest's eight devices
bring enough of them, a script needs the same XLA_FLAGS.
"""

import contextlib
import importlib

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_chip

FIRST_JAX = (0, 11)
# What a race is raised as: by a callback of newer jax's, by `gpu_interpreter` with older.
RACE = (jax.errors.JaxRuntimeError, AssertionError)


def needs_gpu_interpreter():
    """Skips a whole test file where jax has no Mosaic GPU interpreter."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip(
            f"jax_version is {jax.__version__}, must be at least 0.11: no Mosaic GPU interpreter",
            allow_module_level=True,
        )


@contextlib.contextmanager
def gpu_interpreter(chip=gpu_chip.DEFAULT, *, detect_races=True):
    """Runs Pallas Mosaic GPU kernels that are traced inside on the CPU, as that chip would.

    Newer jax raises at a race, older jax sets a flag: both fail here.
    """
    importlib.import_module("gpu_interpreter_gaps").fill_gaps()
    params = plgpu.InterpretGPUParams(detect_races=detect_races)
    with gpu_chip.for_chip(chip) as here, plgpu.force_gpu_interpret_mode(params):
        yield here
        jax.effects_barrier()
    calls = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")
    if detect_races and (found := calls.get_races()) is not None:
        assert not found.races_found, "RACE DETECTED"
