"""How tiles come to products by `mma.sync`: Ampere's way, Blackwell's way.

    copies = COPIES[static.capability](barriers)
    ring = copies.ring(stages, count, groups, bring)    # bring(n, slot) calls copies.bring

Ampere has `cp.async`, from matrices of whole tiles. Mosaic GPU (0.12) has none for Blackwell: there
TMA brings them, from arrays as they are, and a barrier for each slot says what has arrived.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_mma, gpu_tma_ring
from pallas_kernels.dense.mosaic_gpu_ampere_backward import as_matrices, bring_rows
from pallas_kernels.dense.mosaic_gpu_geometry import Static
from pallas_kernels.dense.mosaic_gpu_weights import Arrays


class CpAsync(NamedTuple):
    """Ampere's."""

    barriers: list[Any]  # none

    @staticmethod
    def barrier_types(stages: int, groups: int) -> list[Any]:
        """Barriers for a ring of so many stages, so many copies each."""
        return []

    @staticmethod
    def arrays(static: Static, x: Arrays) -> Arrays:
        """The arrays as tiles are brought from them."""
        return as_matrices(static, x)

    def ring(self, stages: int, count: Any, groups: int, bring: Callable[[Any, Any], None]) -> Any:
        """A ring of `count` tiles."""
        return gpu_mma.Ring(stages, count, groups, bring)

    def bring(
        self, length: int, b: Any, first: Any, head: Any, sources: Any, targets: Any, slot: Any
    ) -> None:
        """A head's rows of two arrays of that length, into a slot."""
        bring_rows(length, b, first, head, sources, targets)


class Tma(NamedTuple):
    """Blackwell's: `CpAsync`, by TMA."""

    barriers: list[Any]  # one for each slot

    @staticmethod
    def barrier_types(stages: int, groups: int) -> list[Any]:
        """Barriers for a ring of so many stages, so many copies each."""
        return [plgpu.Barrier(num_barriers=stages, num_arrivals=groups)]

    @staticmethod
    def arrays(static: Static, x: Arrays) -> Arrays:
        """The arrays as tiles are brought from them."""
        return x

    def ring(self, stages: int, count: Any, groups: int, bring: Callable[[Any, Any], None]) -> Any:
        """A ring of `count` tiles."""
        return gpu_tma_ring.Ring(count, self.barriers[0], None, bring)

    def bring(
        self, length: int, b: Any, first: Any, head: Any, sources: Any, targets: Any, slot: Any
    ) -> None:
        """A head's rows of two arrays of that length, into a slot."""
        for source, target in zip(sources, targets, strict=True):
            rows = pl.ds(first, target.shape[0])
            plgpu.copy_gmem_to_smem(source.at[b, rows, head], target, self.barriers[0].at[slot])


COPIES = {(8, 0): CpAsync, (10, 0): Tma}  # by compute capability
