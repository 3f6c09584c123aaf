"""The two slots of keys in shared memory: how they lie there, who fills and who empties them.

A slot has a block of 64 keys. What its owner reads as values is its OWN part; the half that the
other warpgroup reads, and the rotary keys (weights, later), are its OTHER part.

`PlainSlots` take pages as they are: TMA puts them where wgmma reads them, swizzled, each part as
soon as it is free. `ExpandedSlots` take rows of another form, or each from a place of its own: TMA
puts them into the same memory row by row, 16 rows into what 16 rows will fill, and the loading
warpgroup reads 16 rows into registers, converts them, and writes them back as wgmma wants them. (A
warpgroup more for that would leave 128 registers a thread at the kernel's start, too few for an
accumulator of 64 x 256: ptxas refuses it.)
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla.mosaic_gpu_attend import ATTENDING, KEYS, OTHER, OWN, ROWS, Shared, Sizes

GROUP = 16  # rows that are expanded at once
LANE_ROW = 64  # 16-bit numbers of a swizzled row, 128 bytes
TILED_KEYS = 8


def tiled() -> tuple[Any, ...]:
    """How wgmma's operands of 16 bits lie."""
    return plgpu.TilingTransform((TILED_KEYS, LANE_ROW)), plgpu.SwizzleTransform(128)


class PlainSlots(NamedTuple):
    """Slots that TMA fills with what the cache has; each part is filled and emptied by itself."""

    kv: Any  # [2 slots, 2 halves, KEYS, half]
    kv_rope: Any  # [2 slots, KEYS, rope_dim], then weights
    full: tuple[Any, Any]  # by part, of 2 slots
    empty: tuple[Any, Any]

    @classmethod
    def scratch(cls, sizes: Sizes, dtype: Any, copies: int) -> "PlainSlots":
        """What to allocate; copies: that bring one half."""
        return cls(
            plgpu.SMEM((2, 2, KEYS, sizes.half), dtype, transforms=tiled()),
            plgpu.SMEM((2, KEYS, sizes.rope_dim), dtype, transforms=tiled()),
            tuple(plgpu.Barrier(num_barriers=2, num_arrivals=n * copies) for n in (1, 2)),
            tuple(plgpu.Barrier(num_barriers=2) for _ in (OWN, OTHER)),
        )

    def values(self, slot: int, half: int, zero: Any) -> Any:
        """Half of a slot's latents, [KEYS, half]; zero: see `mosaic_gpu_attend.attend`."""
        return self.kv.at[slot + zero, half]

    def rope(self, slot: int, zero: Any) -> Any:
        """A slot's rotary keys, [KEYS, rope_dim]."""
        return self.kv_rope.at[slot + zero]

    def wait(self, slot: int, part: int) -> None:
        """For the owner: until a part is there."""
        plgpu.barrier_wait(self.full[part].at[slot])

    def wait_for_values(self, slot: int) -> None:
        """For the other warpgroup, whose part it is: no other is kept for it."""
        plgpu.barrier_wait(self.full[OTHER].at[slot])

    def release(self, slot: int, part: int) -> None:
        """By who reads the part as values, after that."""
        plgpu.barrier_arrive(self.empty[part].at[slot])

    def blank(self, slot: int, sizes: Sizes, keys: Any) -> None:
        """By the owner: zeros for the values of keys that do not exist, as 0 * NaN is NaN."""

        @pl.when(keys < KEYS)
        def _():
            for half, first in itertools.product((0, 1), range(0, sizes.half, KEYS)):
                values = self.kv.at[slot, half, :, pl.ds(first, KEYS)]
                blank_rows(values, keys, plgpu.Layout.WGMMA)


def blank_rows(rows: Any, keys: Any, layout: Any) -> None:
    """Zeros for rows from number `keys` on."""
    row = plgpu.broadcasted_iota(jnp.int32, rows.shape, 0, layout=layout)
    kept = plgpu.load(rows, layout=layout)
    rows[...] = jnp.where(row < keys, kept, jnp.zeros_like(kept))


class ExpandedSlots(NamedTuple):
    """Slots whose rows come raw, and are then written as wgmma wants them."""

    raw: tuple[Any, Any]  # by slot, some of [KEYS / GROUP, rows, ...]: the same memory as
    kv: tuple[Any, Any]  # by slot, [1, KEYS, rank + rope_dim]
    arrived: Any  # of 2 slots
    full: Any
    empty: Any
    rank: int

    @classmethod
    def scratch(
        cls, raw: tuple[Any, ...], sizes: Sizes, dtype: Any, copies: int
    ) -> tuple[Any, ...]:
        """What to allocate; raw: a slot's rows as they come, by dtype; copies: that bring them."""
        columns = sizes.rank + sizes.rope_dim
        kv = plgpu.SMEM((1, KEYS, columns), dtype, transforms=tiled())
        return (
            *(one_memory(raw, kv) for _ in range(2)),
            plgpu.Barrier(num_barriers=2, num_arrivals=copies),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2, num_arrivals=ATTENDING),
        )

    @classmethod
    def of(cls, scratch: tuple[Any, ...], rank: int) -> "ExpandedSlots":
        """What `scratch` allocated."""
        first, second, *barriers = scratch
        *raw, kv = zip(first, second, strict=True)
        return cls(tuple(zip(*raw, strict=True)), kv, *barriers, rank)

    def values(self, slot: int, half: int, zero: Any) -> Any:
        """Half of a slot's latents, [KEYS, half]; zero: see `mosaic_gpu_attend.attend`."""
        return self.kv[slot].at[zero, :, pl.ds(half * (self.rank // 2), self.rank // 2)]

    def rope(self, slot: int, zero: Any) -> Any:
        """A slot's rotary keys, [KEYS, rope_dim]."""
        kv = self.kv[slot]
        return kv.at[zero, :, pl.ds(self.rank, kv.shape[2] - self.rank)]

    def wait(self, slot: int, part: int) -> None:
        """For the owner: until all is there."""
        if part == OWN:
            plgpu.barrier_wait(self.full.at[slot])

    def wait_for_values(self, slot: int) -> None:
        """For the other warpgroup: what the owner has waited for is there."""

    def release(self, slot: int, part: int) -> None:
        """By who reads the part as values, after that."""
        plgpu.barrier_arrive(self.empty.at[slot])

    def blank(self, slot: int, sizes: Sizes, keys: Any) -> None:
        """Nothing: whoever expands leaves no row that does not exist."""


def one_memory(raw: tuple[Any, ...], kv: Any) -> Any:
    """A slot's raw rows and its keys, at the same address, so that each group covers itself.

    A group of raw rows is allocated as large as GROUP rows of keys, and both begin where the slot
    does: tiles of 8 keys come one after another. While a group is written, the next one's raw rows
    are still there. (The interpreter tells views apart for a whole slot: there, tests give each its
    own memory.)

    Raises:
        ValueError: the sizes differ.
    """
    *sizes, size = (math.prod(x.shape) * x.dtype.itemsize for x in (*raw, kv))
    groups = [x.shape[0] for x in raw]
    if {*sizes} != {size} or {*groups} != {KEYS // GROUP}:
        raise ValueError(
            f"raw rows take {sizes} bytes in {groups} groups, must be {size} in {KEYS // GROUP}: "
            f"as the keys that are written over them"
        )
    return plgpu.RefUnion(*raw, kv)


def row_pieces_layout() -> Any:
    """Of [GROUP, 64]: eight lanes a row, eight numbers a lane; no bank is asked twice."""
    tiles = plgpu.Tiling(((GROUP, LANE_ROW), (GROUP // 4, LANE_ROW), (8,)))
    return plgpu.Layout.TILED(tiles, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def raw_pieces(rows: Any, zero: Any, *, optimized: bool = True) -> list[jax.Array]:
    """The columns of a group of raw rows, [GROUP, columns / 64, 64], 64 at a time.

    optimized: no bank may be asked twice at once; False for 8-bit rows at multiples of 128 bytes,
    where the same columns of two rows are in the same banks.

    zero: that the compiler does not know to be 0. It infers how raw rows lie, and for loads at a
    known place it would have TMA swizzle them; but then it reads all columns of a row as if they
    were its first (jax 0.11.2 and 0.12.0.1, read off the PTX; wrong on an H100).
    """
    return [
        plgpu.load(
            rows.at[:, column, pl.ds(zero, LANE_ROW)],
            layout=row_pieces_layout(),
            optimized=optimized,
        )
        for column in range(rows.shape[1])
    ]


def load_and_expand(
    slots: ExpandedSlots,
    pairs: Any,
    load: Callable[[Any, int], None],
    pieces_of: Callable[[int, int], list[jax.Array]],
    keys_of: Callable[[Any], Any] | None,
) -> None:
    """The work of the loading warpgroup, for every pair of blocks.

    Both blocks of a pair are expanded, then both of the next are loaded, each when its slot is
    free: the second's rows come while the first's are expanded. (Not earlier: who owns the second
    block needs it to go on to what frees the first's slot.)

    Args:
        slots: the slots.
        pairs: how many.
        load: starts the copies of a pair's block into a slot: (pair, slot).
        pieces_of: (slot, group) -> the columns of a group of rows, 64 at a time, as wgmma
            multiplies them: [GROUP, 64] each, laid out as `row_pieces_layout`.
        keys_of: (pair, slot) -> keys of its block that exist; None: all do.
    """

    def expand(i, slot):
        plgpu.barrier_wait(slots.arrived.at[slot])
        for group in range(KEYS // GROUP):
            pieces = pieces_of(slot, group)
            rows = 0, pl.ds(group * GROUP, GROUP)
            slots.kv[slot][rows] = jnp.concatenate(pieces, axis=1)
        if keys_of is not None:
            blank_last(slots, slot, keys_of(i, slot))
        plgpu.commit_smem()
        plgpu.barrier_arrive(slots.full.at[slot])

    def one_pair(i, _):
        for slot in (0, 1):
            expand(i, slot)

        @pl.when(i + 1 < pairs)
        def _():
            for slot in (0, 1):
                plgpu.barrier_wait(slots.empty.at[slot])
                load(i + 1, slot)

        return _

    @pl.when(pairs > 0)
    def _():
        for slot in (0, 1):
            load(0, slot)
        jax.lax.fori_loop(0, pairs, one_pair, None)
        for slot in (0, 1):
            plgpu.barrier_wait(slots.empty.at[slot])


def blank_last(slots: ExpandedSlots, slot: int, keys: Any) -> None:
    """Zeros for the keys of a slot that do not exist."""

    @pl.when(keys < KEYS)
    def _():
        for first in range(0, slots.kv[slot].shape[2], LANE_ROW):
            columns = slots.kv[slot].at[0, :, pl.ds(first, LANE_ROW)]
            blank_rows(columns, keys, plgpu.Layout.WGMMA)


def scratch(sizes: Sizes, slots: Any, q_dtype: Any, out_dtype: Any) -> list[Any]:
    """A kernel's shared memory and barriers, in `Shared`'s order; `out` lies where q does."""
    q, out = (
        plgpu.SMEM((2, ROWS, sizes.half), dtype, transforms=tiled())
        for dtype in (q_dtype, out_dtype)
    )
    return [
        q if q_dtype == out_dtype else plgpu.RefUnion(q, out),
        plgpu.SMEM((ROWS, sizes.rope_dim), q_dtype, transforms=tiled()),
        slots,
        plgpu.SMEM((2, ROWS), jnp.float32),
        plgpu.SMEM((2, ROWS), jnp.float32),
        plgpu.SMEM((ROWS,), jnp.float32),
        plgpu.Barrier(num_arrivals=3),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_arrivals=ATTENDING),
    ]


def allocated(refs: Any, sizes: Sizes, converts: bool) -> Shared:
    """What `scratch` allocated; converts: the output's dtype is not the queries'."""
    q, q_rope, slots, *rest = refs
    q, out = q if converts else (q, q)
    if not isinstance(slots, PlainSlots):
        slots = ExpandedSlots.of(slots, sizes.rank)
    return Shared(q, q_rope, out, slots, *rest)
