"""The process that compiles one call: a task as JSON on stdin, the answer in stdout's last line.

Run by `measuring`, with the environment of `toolkit`.
"""

import json
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from attnsel_jax.aot.targets import target_for
from benchmarks.gpu.contenders import program_of
from benchmarks.work import Work
from pallas_kernels import gpu_chip


def main() -> None:
    """Answers the task on stdin; what the compiler refuses is an answer like any other."""
    begun = time.perf_counter()

    def answer(**said: Any) -> None:
        said |= {"seconds": round(time.perf_counter() - begun, 1)}
        sys.stdout.write("\n" + json.dumps(said) + "\n")

    def refuse(kind: type[BaseException], error: BaseException, _: Any) -> None:
        answer(refusal=f"{kind.__name__}: {error}"[:2000])

    sys.excepthook = refuse  # whoever speaks, tracer or compiler, in whatever type
    answer(temporaries=compiled(json.load(sys.stdin)))


def compiled(task: dict[str, Any]) -> int:
    """Compiles the call of a task for its chip; returns the bytes of its temporaries."""
    target = target_for(task["chip"])
    (device,) = topologies.get_topology_desc(platform="cuda", **target.topology).devices
    pretend_to_be(device)
    sharding = jax.sharding.SingleDeviceSharding(device)
    with gpu_chip.for_chip(task["chip"]), jax.default_device(device):
        program = program_of(task["contender"], Work(**task["work"]), task["options"])
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            program.arguments,
            is_leaf=lambda leaf: isinstance(leaf, np.ndarray),
        )
        traced = jax.jit(program.function, donate_argnums=program.donated).trace(*shapes)
        return traced.lower().compile().memory_analysis().temp_size_in_bytes


def pretend_to_be(device: Any) -> None:
    """Kernels of other libraries ask jax what it runs on, and choose their tiles by the answer."""
    jax.devices = jax.local_devices = lambda *_, **__: [device]
    jax.default_backend = lambda: "gpu"


if __name__ == "__main__":
    main()
