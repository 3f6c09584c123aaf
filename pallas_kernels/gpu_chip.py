"""The NVIDIA GPU that a kernel is being traced for: capability, cores, shared memory.

    chip = gpu_chip.current()                  # inside a kernel's door, at trace time
    with gpu_chip.for_chip("b200"):            # for a chip that is not here
        jax.jit(kernel).trace(...)

Three places trace a kernel: a GPU (the chip is the default device), ahead of time for a chip that
is not here, and the interpreter on a CPU. The last two say which chip they mean by `for_chip`, an
abstract device of JAX's, which `jax.jit` knows of: what was traced for one chip is never taken for
another. Where nothing is said, it is `DEFAULT`. Mosaic itself asks JAX's default device: compiling
for a chip that is not here needs `jax.default_device` as well (`attnsel_jax.aot` sets both).
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.jax_settings import unchecked

DEFAULT = "h200"
# Blocks of a launch along x, y and z, as CUDA takes them.
MOST_BLOCKS = (2**31 - 1, 65535, 65535)


@dataclasses.dataclass(frozen=True)
class GpuChip:
    """What a kernel may want to know of the chip.

    Attributes:
        name: as `attnsel_jax.platforms.CHIPS` has it; of a relative, the one it is like.
        kind: as JAX prints the device.
        capability: CUDA compute capability, (9, 0).
        num_cores: streaming multiprocessors: blocks of a persistent grid.
        smem_bytes: shared memory that one block may have.
    """

    name: str
    kind: str
    capability: tuple[int, int]
    num_cores: int
    smem_bytes: int


CHIPS = {
    "a100": GpuChip("a100", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 << 10),
    "h100": GpuChip("h100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 227 << 10),
    "h200": GpuChip("h200", "NVIDIA H200", (9, 0), 132, 227 << 10),
    "b200": GpuChip("b200", "NVIDIA B200", (10, 0), 148, 227 << 10),
}


def current() -> GpuChip:
    """The chip that is traced for.

    Raises:
        ValueError: it is a GPU that these kernels do not know.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    for chip in CHIPS.values():
        if abstract is not None and abstract.device_kind == chip.kind:
            return chip
    device = _default_device()
    capability = str(getattr(device, "compute_capability", ""))
    if not capability[:1].isdigit():  # no NVIDIA GPU: an interpreter, or an export
        return CHIPS[DEFAULT]
    return _as_present(device, capability)


def _as_present(device: jax.Device, capability: str) -> GpuChip:
    """The chip that is here, its own figures in the place of its relative's."""
    major, minor = (int(part) for part in capability.split("."))
    alike = [c for c in CHIPS.values() if c.capability == (major, minor)]
    if not alike:
        known = ", ".join(sorted({"{}.{}".format(*c.capability) for c in CHIPS.values()}))
        raise ValueError(
            f"compute_capability is {capability}, must be one of {known}: use a backend without "
            f"Pallas kernels (XLA)"
        )
    same = [chip for chip in alike if chip.kind == device.device_kind] or alike
    return dataclasses.replace(
        same[0],
        kind=device.device_kind,
        num_cores=getattr(device, "core_count", same[0].num_cores),
        smem_bytes=getattr(device, "shared_memory_per_block_optin", same[0].smem_bytes),
    )


def _default_device() -> jax.Device:
    default = jax.config.jax_default_device
    if default is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=default)[0] if isinstance(default, str) else default


def kernel(body: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """`plgpu.kernel`, whose calls a `jax.vmap` makes one after another.

    Pallas' own rule traces the body again, under whatever settings the caller has by then.
    """
    options["grid"], options["grid_names"] = launchable(options["grid"], options["grid_names"])
    return jax.custom_batching.sequential_vmap(unchecked(plgpu.kernel(body, **options)))


def launchable(grid: Sequence[int], names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """A grid and its names in the first order that a GPU launches, the given one if it does.

    Mosaic makes the last axis x, the one before it y, and z of all others together.

    Raises:
        ValueError: there is no such order.
    """
    for axes in itertools.permutations(zip(grid, names, strict=True)):
        sizes = [size for size, _ in axes]
        launched = sizes[-1], *sizes[-2:-1], math.prod(sizes[:-2])
        if all(size <= most for size, most in zip(launched, MOST_BLOCKS, strict=False)):
            return tuple(zip(*axes, strict=True))
    raise ValueError(
        f"grid is {dict(zip(names, grid, strict=True))}, must be of at most {MOST_BLOCKS} blocks: "
        f"give fewer rows or tokens at once, or use XLA"
    )


@contextlib.contextmanager
def for_chip(name: str) -> Iterator[GpuChip]:
    """Everything traced inside is traced for one device of this kind.

    Raises:
        ValueError: no such chip is known.
    """
    if name not in CHIPS:
        raise ValueError(f"chip is {name!r}, must be one of {', '.join(CHIPS)}")
    chip = CHIPS[name]
    device = jax.sharding.AbstractDevice(chip.kind, chip.num_cores, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield chip
