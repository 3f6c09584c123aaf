"""Importing the library touches no device, imports no kernel, and costs next to nothing."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
EVERYTHING = "import attnsel_jax; [getattr(attnsel_jax, name) for name in attnsel_jax.__all__]"


def fresh(code: str, **environment: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_touches_no_device():
    code = (
        f"{EVERYTHING}; from jax._src import xla_bridge; "
        "print(xla_bridge.backends_are_initialized())"
    )
    assert fresh(code).strip() == "False"


def test_importing_works_where_the_platform_does_not():
    fresh(EVERYTHING, JAX_PLATFORMS="no_such_platform")


def test_listing_and_asking_for_a_chip_that_is_not_here_touches_no_device():
    code = (
        "from attnsel_jax import *; "
        "print(len(list(AttentionBackendEnum)), "
        "select(AttentionSelectorConfig(128, 'bfloat16'), 'h200').device.platform)"
    )
    assert fresh(code, JAX_PLATFORMS="no_such_platform").split()[1] == "cuda"


def test_importing_imports_no_kernel():
    code = f"{EVERYTHING}; import sys; print(*sys.modules)"
    kernels = [
        name
        for name in fresh(code).split()
        if name.startswith(("attnsel_jax.xla.", "attnsel_jax.backends.", "attnsel_jax.impls."))
        or (name.startswith("pallas_kernels.") and name.endswith(("_gpu", "_tpu")))
        or name.startswith(("jax.experimental.pallas", "jax.experimental.mosaic", "rich", "typer"))
    ]  # fmt: skip
    assert kernels == []


def test_importing_adds_at_most_a_tenth_of_a_second_to_jax():
    """CPU time, the best of several, of the package and of everything that it offers."""
    code = (
        f"import jax, time; t = time.process_time(); {EVERYTHING}; print(time.process_time() - t)"
    )
    costs = []
    for _ in range(7):
        costs.append(float(fresh(code)))
        if costs[-1] < 0.1:
            return
    raise AssertionError(f"importing took {min(costs):.3f} s at best of {len(costs)}")
