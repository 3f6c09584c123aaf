"""What the replay and the estimates know of a TPU generation.

Peak and bandwidth are the datasheet's (`attnsel_jax.platforms.CHIPS`), of one JAX device. The clock
follows from the peak and the matrix units' geometry; a 512 x 512 x 512 product's schedule agrees
with that geometry on every generation (2048 cycles of busy matrix slots on v4, v5e and v5p, 512 on
v6e and 7x).
"""

import dataclasses

from attnsel_jax.aot.targets import TPU_TOPOLOGIES
from attnsel_jax.platforms import CHIPS as DATASHEETS


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation.

    Attributes:
        generation: its name in `attnsel_jax.platforms.CHIPS`.
        cores: TensorCores of one JAX device, which split "parallel" grid dimensions.
        flops_per_cycle: of one core's matrix units, bfloat16.
        pipe: bytes/cycle between HBM and the cores: the slope of one DMA in libtpu's model.
        latency_in, latency_out: cycles of the smallest DMA from HBM, and to HBM.
        granule: bytes that DMA sizes are counted in.
    """

    generation: str
    cores: int
    flops_per_cycle: int
    pipe: float
    latency_in: int
    latency_out: int
    granule: int = 32

    @property
    def peak(self) -> float:
        """Datasheet's bfloat16 FLOP/s of the device."""
        return DATASHEETS[self.generation].peak_flops

    @property
    def bandwidth(self) -> float:
        """Datasheet's HBM bytes/s of the device."""
        return DATASHEETS[self.generation].memory_bandwidth

    @property
    def hertz(self) -> float:
        """The clock."""
        return self.peak / (self.cores * self.flops_per_cycle)

    @property
    def reachable(self) -> float:
        """Share of the datasheet's bandwidth that the pipe lets through."""
        return self.pipe * self.hertz / self.bandwidth

    @property
    def topology(self) -> dict[str, str]:
        """The smallest slice that libtpu describes, its chips' cores fused as a user finds them."""
        name = {"topology_name": TPU_TOPOLOGIES[self.generation]}
        return name | ({"chip_config_name": "megacore"} if self.generation == "v4" else {})


_FOUR_128 = 4 * 128 * 128 * 2  # four matrix units, a row of each a cycle
_TWO_256 = 2 * 256 * 256 * 2 * 2  # two matrix units, two rows of each a cycle

# Pipe and latency: slope and intercept of single DMAs of 4 KiB to 8 MiB in the static profile of
# libtpu 0.0.52. v4 has no profile: pipe by XLA's cost of a large addition (451 bytes/cycle a core),
# latencies are guesses. 7x: the slope is 1687, more than the datasheet's 1677, which is kept.
CHIPS: dict[str, Chip] = {
    "v4": Chip("v4", 2, _FOUR_128, 902.0, 700, 600, granule=512),
    "v5e": Chip("v5e", 1, _FOUR_128, 491.0, 1133, 447),
    "v5p": Chip("v5p", 2, _FOUR_128, 1251.0, 667, 627),
    "v6e": Chip("v6e", 1, _TWO_256, 776.0, 546, 459),
    "7x": Chip("7x", 1, _TWO_256, 1676.0, 692, 596),
}


def chip_named(generation: str) -> Chip:
    """The chip of that generation.

    Raises:
        ValueError: there is none.
    """
    if generation not in CHIPS:
        raise ValueError(f"generation is {generation!r}, must be one of {', '.join(CHIPS)}")
    return CHIPS[generation]
