"""What the device allows: its peak and its bandwidth, by datasheet, or measured on a CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attnsel_jax.bench.timing import seconds_of
from attnsel_jax.platforms import Device

MATMUL_SIZE = 2048  # 17 GFLOP a product: some tenths of a second on two cores
COPY_BYTES = 256 << 20  # past the last cache of any CPU, to within some percent
REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Work:
    """What a computation needs at least: floating-point operations, and bytes moved once."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """A device's limits.

    Attributes:
        flops: per second.
        bandwidth: bytes per second.
        source: where the figures come from.
    """

    flops: float
    bandwidth: float
    source: str

    def limit(self, work: Work) -> float:
        """Seconds below which the device cannot do the work."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth)


def roofline_of(device: Device) -> Roofline | None:
    """The device's limits: by its datasheet, measured now on a CPU; None where neither is known."""
    if device.peak_flops and device.memory_bandwidth:
        source = f"datasheet of {device.kind}: dense bfloat16, main memory"
        return Roofline(device.peak_flops, device.memory_bandwidth, source)
    return _measured() if device.platform == "cpu" else None


@functools.cache
def _measured() -> Roofline:
    """The best of some large float32 products, and of some large copies, in this process."""
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (MATMUL_SIZE, MATMUL_SIZE), jnp.float32) for key in keys)
    product = jax.jit(lambda x, y: jnp.matmul(x, y, precision="highest"))
    block = jnp.zeros(COPY_BYTES // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    best = {}
    for name, call in (("product", lambda _: product(a, b)), ("copy", lambda _: copy(block))):
        seconds_of(call, 0)  # compiles
        best[name] = min(seconds_of(call, 0) for _ in range(REPEATS))
    return Roofline(
        flops=2 * MATMUL_SIZE**3 / best["product"],
        bandwidth=2 * COPY_BYTES / best["copy"],
        source=f"measured in this run: float32 product of size {MATMUL_SIZE}, copy of "
        f"{COPY_BYTES >> 20} MiB (read and written)",
    )
