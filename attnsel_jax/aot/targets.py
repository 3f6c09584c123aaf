"""The chips that can be compiled for without one, and what each compiler wants to know of them."""

import dataclasses
import importlib.util
import math
from typing import Any

from attnsel_jax.platforms import CHIPS, Device

# The smallest slice of each generation that libtpu describes; one of its devices is used.
TPU_TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "7x": "tpu7x:2x2x1",
}

# How the chips of larger slices are laid out; of each generation those that libtpu describes. A
# chip of 7x is two devices.
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES: dict[str, tuple[str, ...]] = {
    "v4": _CUBES, "v5e": _SQUARES, "v5p": _CUBES, "v6e": _SQUARES, "7x": _CUBES,
}  # fmt: skip
DEVICES_OF_A_CHIP = {"7x": 2}


@dataclasses.dataclass(frozen=True)
class GpuFigures:
    """What XLA's GPU compiler asks of a chip beyond its compute capability; makers' datasheets.

    Attributes:
        cores: streaming multiprocessors.
        fpus: float32 units of each.
        threads: resident threads of each.
        shared_kib: shared memory of each, KiB; a block may have one KiB less.
        l2_mib: second-level cache, MiB.
        ghz: boost clock.
        memory_gb: device memory, 10^9 bytes, as a device reports what is free.
    """

    cores: int
    fpus: int
    threads: int
    shared_kib: int
    l2_mib: int
    ghz: float
    memory_gb: int


GPU_FIGURES = {
    "a100": GpuFigures(108, 64, 2048, 164, 40, 1.41, 80),
    "l40s": GpuFigures(142, 128, 1536, 100, 96, 2.52, 48),
    "h100": GpuFigures(132, 128, 2048, 228, 50, 1.98, 80),
    "h200": GpuFigures(132, 128, 2048, 228, 60, 1.98, 141),
    "b200": GpuFigures(148, 128, 2048, 228, 126, 1.965, 180),
    "rtx5090": GpuFigures(170, 128, 1536, 100, 96, 2.407, 32),
}
GPUS_OF_A_HOST = 8  # of a DGX or HGX board
CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
_INSTALL = {
    "tpu": "pip install libtpu (the version that this jax wants: pip install 'jax[tpu]')",
    "cuda": (
        "pip install --no-deps jax-cuda13-plugin=={jax} jax-cuda13-pjrt=={jax}, and "
        "pip install nvidia-cuda-nvcc nvidia-nvvm; or all of it: pip install 'jax[cuda13]'"
    ),
}


class NoCompilerError(ValueError):
    """A chip's compiler is not installed here; the message says what to install."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip that is compiled for.

    Attributes:
        chip: its name in `CHIPS`.
        platform: "cpu" (compiled for the processor that is here), "tpu" or "cuda".
        topology: keywords of `jax.experimental.topologies.get_topology_desc`; empty for "cpu".
        num_cores: of a GPU, for kernels that ask; None elsewhere.
    """

    chip: str
    platform: str
    topology: dict[str, str] = dataclasses.field(default_factory=dict)
    num_cores: int | None = None

    def missing(self) -> str | None:
        """What to install before it can be compiled for; None = nothing is missing."""
        if self.platform == "cpu" or any(map(_is_installed, _packages(self.platform))):
            return None
        import jax

        return _INSTALL[self.platform].format(jax=jax.__version__)

    def check_installed(self) -> None:
        """Raises `NoCompilerError` where something is missing."""
        missing = self.missing()
        if missing:
            raise NoCompilerError(
                f"device is {self.chip!r}, whose compiler is not installed here: {missing}"
            )

    def to_json(self) -> dict[str, Any]:
        """The target as plain data."""
        return dataclasses.asdict(self) | {"kind": CHIPS[self.chip].kind}


def target_for(chip: str) -> Target:
    """The target of a chip's name.

    Raises:
        ValueError: an unknown name, or a chip for which nothing compiles without it.
    """
    device = Device.named(chip)
    name = next(name for name, known in CHIPS.items() if known == device)
    if name in TPU_TOPOLOGIES:
        return Target(name, "tpu", {"topology_name": TPU_TOPOLOGIES[name]})
    if name in GPU_FIGURES:
        text = _gpu_config(device, GPU_FIGURES[name])
        topology = {"target_config": text, "topology": "1x1x1"}
        return Target(name, "cuda", topology, GPU_FIGURES[name].cores)
    if name == "cpu":
        return Target(name, "cpu")
    allowed = ", ".join(["cpu", *GPU_FIGURES, *TPU_TOPOLOGIES])
    raise ValueError(
        f"device is {chip!r}, must be one of {allowed}: no compiler for {device.platform} runs "
        f"without the chip"
    )


def slice_for(target: Target, devices: int) -> Target:
    """The target with as many devices: a slice of TPUs, hosts of GPUs, a processor for several.

    Raises:
        ValueError: no slice of the generation has so many, or no number of whole hosts.
    """
    if target.platform == "cpu":
        return target
    if target.platform == "cuda":
        return dataclasses.replace(
            target, topology=target.topology | {"topology": _hosts(target.chip, devices)}
        )
    each = DEVICES_OF_A_CHIP.get(target.chip, 1)
    sizes = {each * math.prod(map(int, s.split("x"))): s for s in SLICES[target.chip]}
    if devices not in sizes:
        raise ValueError(
            f"mesh has {devices} devices, must have one of {', '.join(map(str, sizes))} for "
            f"{target.chip}: the slices that its compiler describes"
        )
    family = target.topology["topology_name"].split(":")[0]
    return dataclasses.replace(target, topology={"topology_name": f"{family}:{sizes[devices]}"})


def _hosts(chip: str, devices: int) -> str:
    """Slices x hosts x GPUs of a host, as XLA counts them: all joined by NVLink, so one slice."""
    if devices > GPUS_OF_A_HOST and devices % GPUS_OF_A_HOST:
        raise ValueError(
            f"mesh has {devices} devices, must have at most {GPUS_OF_A_HOST}, or a multiple, for "
            f"{chip}: whole hosts"
        )
    hosts = -(-devices // GPUS_OF_A_HOST)
    return f"1x{hosts}x{devices // hosts}"


def _packages(platform: str) -> tuple[str, ...]:
    return ("libtpu",) if platform == "tpu" else CUDA_PLUGINS


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _gpu_config(device: Device, figures: GpuFigures) -> str:
    """A GpuTargetConfig in text form."""
    capability = device.compute_capability
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_core": figures.shared_kib << 10,
        "threads_per_core_limit": figures.threads,
        "core_count": figures.cores,
        "fpus_per_core": figures.fpus,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(device.memory_bandwidth),
        "l2_cache_size": figures.l2_mib << 20,
        "clock_rate_ghz": figures.ghz,
        "device_memory_size": figures.memory_gb * 10**9,
        "shared_memory_per_block_optin": (figures.shared_kib - 1) << 10,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    fields = " ".join(f"{name}: {value}" for name, value in info.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {capability.major} minor: "
        f'{capability.minor} }} }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 20 }} '
        f'device_description_str: "{device.kind}"'
    )
