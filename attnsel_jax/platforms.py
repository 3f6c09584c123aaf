"""The machine: which chip runs, or would run, the attention.

A `Device` is a value. It is read off a `jax.Device` (`device_of`, `current_device`), or written
down for a chip that is not here (`Device.named("tpu v6e")`), so that selection can be asked for
any chip on any machine. Importing this file touches no device.
"""

import dataclasses
import difflib
import functools
from typing import NamedTuple

import jax


class DeviceCapability(NamedTuple):
    """A CUDA compute capability; compares as (major, minor)."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of chip.

    Attributes:
        platform: "cpu", "cuda", "rocm" or "tpu".
        kind: the chip as JAX prints it (`jax.Device.device_kind`).
        compute_capability: CUDA only.
        generation: TPU generation ("v6e") or ROCm architecture ("gfx942").
        peak_flops: dense bfloat16 FLOP/s of one device by its datasheet; None = unknown.
        memory_bandwidth: bytes/s by its datasheet; None = unknown.
    """

    platform: str
    kind: str
    compute_capability: DeviceCapability | None = None
    generation: str | None = None
    peak_flops: float | None = None
    memory_bandwidth: float | None = None

    @staticmethod
    def named(name: str) -> "Device":
        """The chip of that name: "h200", "tpu v6e", "NVIDIA H100 80GB HBM3", "cpu", ...

        Raises:
            ValueError: no such chip is known; the message lists those that are.
        """
        key = _normalized(str(name))
        key = _ALIASES.get(key, key)
        if key not in CHIPS:
            families = _FAMILIES.get(str(name).strip().lower(), ())
            of_family = [known for known, chip in CHIPS.items() if chip.platform in families]
            close = of_family or difflib.get_close_matches(key, CHIPS, n=2, cutoff=0.5)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(
                f"device is {name!r}, must be one of {', '.join(CHIPS)}{hint}; any other chip is, "
                f"in Python, a Device such as Device('cuda', 'NVIDIA L4', DeviceCapability(8, 9))"
            )
        return CHIPS[key]

    def __str__(self) -> str:
        more = self.generation or (self.compute_capability and f"sm {self.compute_capability}")
        return f"{self.platform} ({self.kind}{f', {more}' if more else ''})"


def _cuda(kind: str, major: int, minor: int, tflops: float, gigabytes: float) -> Device:
    capability = DeviceCapability(major, minor)
    return Device("cuda", kind, capability, None, tflops * 1e12, gigabytes * 1e9)


def _rocm(kind: str, architecture: str, tflops: float, gigabytes: float) -> Device:
    return Device("rocm", kind, None, architecture, tflops * 1e12, gigabytes * 1e9)


def _tpu(kind: str, generation: str, tflops: float, gigabytes: float) -> Device:
    return Device("tpu", kind, None, generation, tflops * 1e12, gigabytes * 1e9)


# Dense bfloat16 TFLOP/s and GB/s by the makers' datasheets (SXM forms where there are several). A
# TPU row is one JAX device: a chip, and half a chip of 7x (two TensorCores appear as two devices).
CHIPS: dict[str, Device] = {
    "cpu": Device("cpu", "cpu"),
    "a100": _cuda("NVIDIA A100-SXM4-80GB", 8, 0, 312, 2039),
    "l40s": _cuda("NVIDIA L40S", 8, 9, 362, 864),
    "h100": _cuda("NVIDIA H100 80GB HBM3", 9, 0, 989, 3350),
    "h200": _cuda("NVIDIA H200", 9, 0, 989, 4800),
    "b200": _cuda("NVIDIA B200", 10, 0, 2250, 8000),
    "rtx5090": _cuda("NVIDIA GeForce RTX 5090", 12, 0, 210, 1792),
    "mi300x": _rocm("AMD Instinct MI300X", "gfx942", 1307, 5300),
    "mi355x": _rocm("AMD Instinct MI355X", "gfx950", 2517, 8000),
    "v4": _tpu("TPU v4", "v4", 275, 1200),
    "v5e": _tpu("TPU v5 lite", "v5e", 197, 819),
    "v5p": _tpu("TPU v5", "v5p", 459, 2765),
    "v6e": _tpu("TPU v6 lite", "v6e", 918, 1640),
    "7x": _tpu("TPU7x", "7x", 1154, 3690),
}
_ALIASES = {
    "sm80": "a100", "sm89": "l40s", "sm90": "h100", "sm100": "b200", "sm120": "rtx5090",
    "gfx942": "mi300x", "gfx950": "mi355x",
    "v5lite": "v5e", "v5": "v5p", "v6lite": "v6e", "v6": "v6e", "v7x": "7x", "v7": "7x",
}  # fmt: skip
# Names of many chips, JAX's platforms among them, for which no one chip can stand.
_FAMILIES = {
    "gpu": ("cuda", "rocm"), "cuda": ("cuda",), "nvidia": ("cuda",), "rocm": ("rocm",),
    "amd": ("rocm",), "tpu": ("tpu",),
}  # fmt: skip
_GENERATIONS = {chip.kind: chip.generation for chip in CHIPS.values() if chip.platform == "tpu"}


def _normalized(name: str) -> str:
    """Lower case, without makers, "tpu" and form factors, without spaces and dashes."""
    words = name.lower().replace("-", " ").replace("_", " ").split()
    dropped = {"nvidia", "amd", "instinct", "geforce", "tpu", "sxm", "sxm4", "80gb", "hbm3", "gpu"}
    key = "".join(word for word in words if word not in dropped)
    return key.removeprefix("tpu")


def current_device() -> Device:
    """The chip that JAX runs on by default here (`jax_default_device`, else the first device)."""
    default = jax.config.jax_default_device
    if default is None:
        default = jax.local_devices()[0]
    elif isinstance(default, str):
        default = jax.local_devices(backend=default)[0]
    return device_of(default)


@functools.lru_cache(maxsize=1024)
def device_of(device: jax.Device) -> Device:
    """What a `jax.Device` is, with the figures of its datasheet where its kind is known."""
    platform = device.platform
    if platform in ("gpu", "cuda", "rocm"):
        is_rocm = platform == "rocm" or "rocm" in device.client.platform_version.lower()
        return _gpu(device, "rocm" if is_rocm else "cuda")
    if platform == "tpu":
        generation = _GENERATIONS.get(device.device_kind, device.device_kind.removeprefix("TPU "))
        return _with_figures(Device("tpu", device.device_kind, None, generation))
    return Device(platform, device.device_kind)


def _gpu(device: jax.Device, platform: str) -> Device:
    capability = str(getattr(device, "compute_capability", ""))
    if platform == "rocm":
        architecture = capability.partition(":")[0]  # without ":sramecc+:xnack-"
        return _with_figures(Device(platform, device.device_kind, None, architecture or None))
    major, _, minor = capability.partition(".")
    known = DeviceCapability(int(major), int(minor or 0)) if major.isdigit() else None
    return _with_figures(Device(platform, device.device_kind, known))


def _with_figures(device: Device) -> Device:
    """The same chip with its datasheet's figures, where `CHIPS` has its kind.

    A TPU has several names for one generation ("TPU v5e" and "TPU v5 lite"): the generation counts.
    """
    for chip in CHIPS.values():
        same = chip.kind == device.kind
        if device.platform == "tpu":
            same = chip.generation == device.generation
        if chip.platform == device.platform and same:
            return dataclasses.replace(
                device, peak_flops=chip.peak_flops, memory_bandwidth=chip.memory_bandwidth
            )
    return device
