"""Ampere's means: shared memory that `cp.async` fills, products by `mma.sync` from registers.

One warpgroup: each of its four warps has 16 of 64 rows. Results of a product become the left
operand of the next without leaving the registers, as in FlashAttention-2 (Dao, 2023). Blackwell's
paged kernels multiply so too; Mosaic GPU (0.12) has `cp.async` only before Hopper.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

SWIZZLE = 64  # bytes: 32 columns of 16 bits are what a product takes at a time
MMA_K = 16  # of a 16-bit mma


def swizzled(*shape: int, dtype: Any, swizzle: int = SWIZZLE) -> Any:
    """Shared memory that `cp.async` writes and `ldmatrix` reads without bank conflicts."""
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def bring(source: Any, target: Any) -> None:
    """One group of `cp.async`; the source lies inside its array."""
    plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def arrived(groups: int) -> None:
    """Waits until no more than so many groups are in flight, those sent for last."""
    plgpu.wait_gmem_to_smem(groups)


class Ring(NamedTuple):
    """Tiles that are brought ahead, each into the next of a ring of slots.

    Attributes:
        stages: slots; one less are on their way while a tile is read.
        count: int32 []: tiles, which are counted from 0.
        groups: of `cp.async` that bring a tile.
        bring: (tile, slot) -> None: sends for a tile.
    """

    stages: int
    count: Any
    groups: int
    bring: Callable[[Any, Any], None]

    def begin(self) -> None:
        """Sends for the first tiles; what was sent for before has arrived when it ends."""
        ahead = self.stages - 1
        for i in range(ahead):
            pl.when(i < self.count)(functools.partial(self.bring, jnp.int32(i), i))
        self._wait(self.count >= ahead)

    def slot_of(self, tile: Any) -> Any:
        """Where a tile is; sends for the one that the slot read before is for."""
        slot, ahead = lax.rem(tile, jnp.int32(self.stages)), self.stages - 1
        more = tile + ahead < self.count
        pl.when(more)(lambda: self.bring(tile + ahead, free_slot(slot, self.stages)))
        self._wait(more)
        return slot

    def _wait(self, more: Any) -> None:
        """Until all but the newest tiles are there; where no newer were sent for, all."""
        pl.when(more)(lambda: arrived(self.groups * (self.stages - 1)))
        pl.when(jnp.logical_not(more))(lambda: arrived(0))


def free_slot(slot: Any, stages: int) -> Any:
    """The slot that no tile is in or on its way to, while this one is read.

    Mosaic GPU puts a barrier before each copy: whoever read it has done so.
    """
    return lax.rem(slot + (stages - 1), jnp.int32(stages))


def sums(rows: int, columns: int, dtype: Any) -> jax.Array:
    """Zeros for products of dtype to be added to."""
    zeros = jnp.zeros((rows, columns), jnp.float32)
    return plgpu.layout_cast(zeros, plgpu.Layout.MMA_ACC(dtype))


def left_strips(ref: Any, n: int, swizzle: int = SWIZZLE) -> list[jax.Array]:
    """The first n columns of shared memory as left operands, a swizzle's columns each."""
    width = swizzle // jnp.dtype(ref.dtype).itemsize
    layout = plgpu.Layout.MMA_LHS(ref.dtype)
    return [plgpu.load(ref.at[:, pl.ds(i, width)], layout=layout) for i in range(0, n, width)]


def products(q: list[jax.Array], k: Any) -> jax.Array:
    """float32 [queries, keys] of queries in registers and keys in shared memory."""
    dtype, width = q[0].dtype, q[0].shape[1]
    s = sums(q[0].shape[0], k.shape[0], dtype)
    for i, strip in enumerate(q):
        keys = k.at[:, pl.ds(i * width, width)].transpose((1, 0))
        s = plgpu.mma(s, strip, plgpu.load(keys, layout=plgpu.Layout.MMA_RHS(dtype)))
    return s


def weighted_sum(acc: jax.Array, p: jax.Array, v: Any, seen: tuple[Any, Any] | None):
    """The sums, and p @ v; of values outside [low, high) of the tile, where given, nothing is read.

    An unseen value's weight is 0, and 0 * NaN is NaN.
    """
    layout = plgpu.Layout.MMA_RHS(v.dtype)
    p = as_left_operand(p, v.dtype)
    for i in range(0, v.shape[0], MMA_K):
        values = plgpu.load(v.at[pl.ds(i, MMA_K)], layout=layout)
        if seen is not None:
            key = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=layout) + i
            kept = (key >= seen[0]) & (key < seen[1])
            values = jnp.where(kept, values, jnp.zeros_like(values))
        acc = plgpu.mma(acc, p[:, i : i + MMA_K], values)
    return acc


def as_left_operand(p: jax.Array, dtype) -> jax.Array:
    """float32 results of a product, rounded to dtype, as the left operand of the next.

    A thread holds the same elements in either layout, and in the same order: of each 16 columns,
    those of two results side by side. Mosaic GPU has no cast between them.
    """
    left, results = plgpu.Layout.MMA_LHS(dtype), plgpu.Layout.MMA_ACC(dtype)

    @plgpu.inline_mgpu(
        arg_types=(results,),
        return_type=plgpu.ShapeDtypeStruct(p.shape, dtype, layout=left),
    )
    def rounded_as_left_operand(_, array):
        rounded = array.astype(mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
        layout = left.to_mgpu()
        registers = rounded.registers.reshape(layout.registers_shape(rounded.shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return rounded_as_left_operand(p)
