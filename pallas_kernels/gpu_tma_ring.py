"""A ring of tiles that TMA brings ahead, for one warpgroup that sends for them and reads them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_mma import free_slot


class Ring(NamedTuple):
    """Tiles that are brought ahead, each into the next of a ring of slots.

    Attributes:
        count: int32 []: tiles, which are counted from 0.
        full: a barrier for each slot.
        before: a barrier of what was sent for before; None = nothing was.
        bring: (tile, slot) -> None: sends for a tile.
    """

    count: Any
    full: Any
    before: Any
    bring: Callable[[Any, Any], None]

    def begin(self) -> None:
        """Sends for the first tiles; what was sent for before has arrived when it ends."""
        for i in range(self.full.shape[0] - 1):
            pl.when(i < self.count)(functools.partial(self.bring, jnp.int32(i), i))
        if self.before is not None:
            plgpu.barrier_wait(self.before)

    def slot_of(self, tile: Any) -> Any:
        """Where a tile is; sends for the one that the slot read before is for."""
        stages = self.full.shape[0]
        slot, later = lax.rem(tile, jnp.int32(stages)), tile + (stages - 1)

        @pl.when(later < self.count)
        def _():
            reads_come_first()
            self.bring(later, free_slot(slot, stages))

        arrived(self.full.at[slot])
        return slot


def reads_come_first() -> None:
    """What has been read of shared memory comes before what TMA, sent for next, writes there."""
    plgpu.commit_smem()


def arrived(full: Any) -> None:
    """Waits for a tile."""
    plgpu.barrier_wait(full)
