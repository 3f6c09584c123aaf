"""The process that compiles: a task as JSON on stdin, the answer as JSON in stdout's last line.

Run by `attnsel_jax.aot.compile_for`, with the environment that it sets.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from attnsel_jax.aot.arguments import read_back
from attnsel_jax.aot.collectives import collectives_of, sent_bytes
from attnsel_jax.aot.mesh_call import MeshCall, shared_out
from attnsel_jax.aot.report import cost_of, memory_of
from attnsel_jax.qualnames import resolve_obj_by_qualname

DIFFERENTIABLE = ("q", "k", "v", "bias", "alibi_slopes", "sinks")
CACHES = ("kv_pages", "latent_pages")  # donated, as a server does
_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")


def main() -> None:
    """Answers the task on stdin; a refusal is an answer like any other."""
    start = time.perf_counter()

    def answer(**said: Any) -> None:
        said |= {"seconds": time.perf_counter() - start, "versions": _versions()}
        sys.stdout.write("\n" + json.dumps(said) + "\n")

    def refuse(kind: type[BaseException], error: BaseException, _: Any) -> None:
        answer(refusal=f"{kind.__name__}: {error}")

    # Whatever the lowering or the compiler says, in whatever type it says it, is the answer.
    sys.excepthook = refuse
    task = json.load(sys.stdin)
    program = compiled(task)
    found = collectives_of(program.as_text()) if task["mesh"] else []
    answer(
        memory=memory_of(program),
        cost=cost_of(program),
        sent=sent_bytes(found),
        collectives=[dataclasses.asdict(each) for each in found],
    )


def compiled(task: dict[str, Any]) -> Any:
    """The program of a task, for one device of its target."""
    target = task["target"]
    devices = _devices(target)
    sharding = None if devices is None else jax.sharding.SingleDeviceSharding(devices[0])
    if task["mesh"] is not None:
        arrays, static = read_back(task["arguments"])
        over = MeshCall(**task["mesh"])
        function, arrays = shared_out(over, devices or jax.devices(), arrays, static)
    else:
        arrays, static = read_back(task["arguments"], sharding)
        function = _forward(task["kernel"], static)
    if task["gradients"]:
        function, arrays = _with_gradients(function, arrays)
    caches = {name: arrays.pop(name) for name in CACHES if name in arrays}

    def program(caches: dict[str, jax.Array], arrays: dict[str, jax.Array]) -> Any:
        return function(**caches, **arrays)

    with _abstract_device(target, devices):
        traced = jax.jit(program, donate_argnums=0).trace(caches, arrays)
        return traced.lower().compile()


def _devices(target: dict[str, Any]) -> Any:
    """The devices of the target's topology; None for the processor that is here."""
    if target["platform"] == "cpu":
        return None
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform=target["platform"], **target["topology"])
    return topology.devices


def _forward(kernel: str, static: dict[str, Any]) -> Callable[..., Any]:
    lowering = resolve_obj_by_qualname(kernel)

    def forward(**arrays: jax.Array) -> Any:
        return lowering(**arrays, **static)

    return forward


def _with_gradients(
    forward: Callable[..., Any], arrays: dict[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A function that gives out and the gradients of what is differentiable in it."""
    out = jax.eval_shape(forward, **arrays)[0]
    wanted = [name for name in DIFFERENTIABLE if name in arrays]

    def forward_and_backward(dout: jax.Array, **given: jax.Array) -> Any:
        fixed = {name: value for name, value in given.items() if name not in wanted}

        def of_wanted(values: dict[str, jax.Array]) -> jax.Array:
            return forward(**values, **fixed)[0]

        value, pull_back = jax.vjp(of_wanted, {name: given[name] for name in wanted})
        return value, pull_back(dout)

    # Over a mesh the result lies as q does; its last dimension is whole.
    dout = jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=arrays["q"].sharding)
    return forward_and_backward, {**arrays, "dout": dout}


@contextlib.contextmanager
def _abstract_device(target: dict[str, Any], devices: Any) -> Iterator[None]:
    """Tells kernels that ask what they are traced for: a TPU's generation, a GPU's core count.

    Mosaic GPU asks JAX's default device for the architecture.
    """
    if target["platform"] == "tpu":
        from pallas_kernels import tpu_chip  # it imports Pallas

        with tpu_chip.for_generation(target["chip"]):
            yield
        return
    if target["platform"] != "cuda":
        yield
        return
    device = jax.sharding.AbstractDevice(target["kind"], target["num_cores"], "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), jax.default_device(devices[0]):
        yield


def _versions() -> dict[str, str]:
    found = {}
    for package in _COMPILERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


if __name__ == "__main__":
    main()
