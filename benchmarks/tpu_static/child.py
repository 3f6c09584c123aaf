"""The process that compiles one call: a task as JSON on stdin, the answer in stdout's last line.

Run by `measuring`, which sets libtpu's flags before anything is imported.
"""

import json
import re
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from benchmarks.tpu_static.chips import chip_named
from benchmarks.tpu_static.contenders import program_of
from benchmarks.tpu_static.stand_ins import recorded, traced_as
from benchmarks.work import Work
from pallas_kernels import tpu_chip

_INSTRUCTION = re.compile(r"%(\S+) = .*?\b([a-z\-]+)\(")
_BODY = re.compile(r" while\(.*body=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = 1 << 40  # cycles from which XLA means "not known"


def main() -> None:
    """Answers the task on stdin; what the compiler refuses is an answer like any other."""
    begun = time.perf_counter()

    def answer(**said: Any) -> None:
        said |= {"seconds": round(time.perf_counter() - begun, 1)}
        sys.stdout.write("\n" + json.dumps(said) + "\n")

    def refuse(kind: type[BaseException], error: BaseException, _: Any) -> None:
        answer(refusal=f"{kind.__name__}: {error}"[:2000])

    sys.excepthook = refuse  # whoever speaks, tracer or compiler, in whatever type
    answer(**compiled(json.load(sys.stdin)))


def compiled(task: dict[str, Any]) -> dict[str, Any]:
    """Compiles the call of a task for its generation."""
    chip = chip_named(task["generation"])
    topology = topologies.get_topology_desc(platform="tpu", **chip.topology)
    pretend_to_be(topology.devices)
    with tpu_chip.for_generation(chip.generation) as here:
        program = program_of(task["contender"], Work(**task["work"]), task["options"])
        given = recorded(program.function, program.arguments)
        sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            program.arguments,
            is_leaf=lambda leaf: isinstance(leaf, np.ndarray),
        )
        with traced_as(given, here.vmem_bytes - tpu_chip.VMEM_RESERVED) as calls:
            traced = jax.jit(program.function, donate_argnums=program.donated).trace(*shapes)
            executable = traced.lower().compile()
    text = executable.as_text()
    kernels, around = instructions(text)
    return {
        "calls": [call.to_json() for call in calls],
        "kernels": kernels,
        "in_loops": in_loops(text),
        "around_cycles": around,
        "writes_cache": program.writes_cache,
        "temporaries": executable.memory_analysis().temp_size_in_bytes,
    }


def pretend_to_be(devices: Any) -> None:
    """Kernels of other libraries ask jax what it runs on, and choose their tiles by the answer."""
    jax.devices = jax.local_devices = lambda *_, **__: list(devices)
    jax.default_backend = lambda: "tpu"


def instructions(text: str) -> tuple[list[str], dict[str, int]]:
    """(names of the Pallas kernels, XLA's cycles for every other instruction) of a program."""
    kernels, around = [], {}
    for line in text.splitlines():
        found, cycles = _INSTRUCTION.search(line), _CYCLES.search(line)
        if found and 'custom_call_target="tpu_custom_call"' in line:
            kernels.append(found[1])
        elif found and cycles and int(cycles[1]) < _UNKNOWN:
            around[found[1]] = int(cycles[1])
    return kernels, around


def in_loops(text: str) -> list[str]:
    """The Pallas kernels that loops of the program run: more often than once, it is not known how.

    Their scalar operands differ from run to run, and what was recorded is the last one's.
    """
    bodies, found, computation = set(_BODY.findall(text)), [], ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0]
        instruction = _INSTRUCTION.search(line)
        is_kernel = instruction and 'custom_call_target="tpu_custom_call"' in line
        if is_kernel and computation in bodies:
            found.append(instruction[1])
    return found


if __name__ == "__main__":
    main()
