"""Compiles a backend's kernel for a chip that is not here, and says what the compiler said.

    report = compile_for("v5e", kernel_of(backend, "dense"), arguments)

The real compiler runs (libtpu's, or XLA's for CUDA with ptxas), each time in a process of its own:
libtpu takes a lock, and its variables must be set before jax is imported. What comes back is memory
(arguments, outputs, temporaries), cost (floating-point operations, bytes), or the compiler's own
words if it refuses.
"""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from attnsel_jax.aot.arguments import described
from attnsel_jax.aot.collectives import Collective, Work
from attnsel_jax.aot.mesh_call import MeshCall
from attnsel_jax.aot.report import CompileReport
from attnsel_jax.aot.targets import NoCompilerError, Target, slice_for, target_for
from attnsel_jax.envs import environment_for_compiling

__all__ = ["CompileReport", "MeshCall", "NoCompilerError", "Target", "compile_for", "target_for"]

TIMEOUT_S = 900.0


def compile_for(
    chip: str,
    kernel: str,
    arguments: Mapping[str, Any],
    *,
    gradients: bool = False,
    over: MeshCall | None = None,
    timeout_s: float = TIMEOUT_S,
) -> CompileReport:
    """Compiles one call of a kernel for a chip.

    Args:
        chip: a name of `attnsel_jax.platforms.CHIPS`.
        kernel: dotted path of the function, "module:name", as backends declare it.
        arguments: the op contract's, by name. Of arrays (NumPy, jax, `jax.ShapeDtypeStruct`) only
            shapes and dtypes matter; everything else is static.
        gradients: compile the backward pass of `out` too (dense only).
        over: the mesh that the call is shared out over; None = one device.
        timeout_s: seconds after which the compiler is stopped.

    Raises:
        ValueError: an unknown chip, or one that nothing compiles for without it.
        NoCompilerError: the chip's compiler is not installed here; says what to install.
    """
    target = target_for(chip)
    if over is not None:
        target = slice_for(target, over.devices)
    target.check_installed()
    task = {
        "target": target.to_json(),
        "kernel": kernel,
        "arguments": described(arguments),
        "gradients": gradients,
        "mesh": None if over is None else dataclasses.asdict(over),
    }
    return CompileReport(
        chip=chip, kernel=kernel, gradients=gradients, **_in_child(task, timeout_s)
    )


def _in_child(task: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Runs the task in a process of its own; a compiler that crashes is a refusal too."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "attnsel_jax.aot.child"],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=environment_for_compiling(
                task["mesh"] and math.prod(task["mesh"]["axes"].values())
            ),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"refusal": f"stopped after {timeout_s:.0f} s", "seconds": timeout_s}
    # The child's answer is its last line; libraries may have printed before it.
    last = (done.stdout.splitlines() or [""])[-1]
    if last.startswith("{"):
        answer = json.loads(last)
        found = [
            Collective(**each | {"beside": Work(*each["beside"])})
            for each in answer.pop("collectives", [])
        ]
        return answer | {"collectives": found}
    words = "\n".join(done.stderr.splitlines()[-20:])
    return {"refusal": f"the compiler's process ended with {done.returncode}:\n{words}"}
