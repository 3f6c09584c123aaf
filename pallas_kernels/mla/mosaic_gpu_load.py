"""What brings queries and keys into shared memory: one warpgroup of MLA's kernels for Hopper."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla.mosaic_gpu_attend import KEYS, OTHER, ROWS, Shared, Sizes, Walk
from pallas_kernels.mla.mosaic_gpu_batch import Tile
from pallas_kernels.mla.mosaic_gpu_slots import GROUP, ExpandedSlots, PlainSlots


def load_queries(sizes: Sizes, shared: Shared, ql_nope: Any, q_pe: Any, row) -> None:
    """ROWS rows from `row` on, whosever they are: a row sees nothing of another."""
    rows = pl.ds(row, ROWS)
    for half in (0, 1):
        part = ql_nope.at[rows, sizes.columns(half)]
        plgpu.copy_gmem_to_smem(part, shared.q.at[half], shared.q_full)
    plgpu.copy_gmem_to_smem(q_pe.at[rows], shared.q_rope, shared.q_full)


def copies_of_a_block(page_size: int) -> int:
    """Copies that bring one half of a slot."""
    return max(1, KEYS // page_size)


def load_pages(
    sizes: Sizes, slots: PlainSlots, pages: Any, page_table: Any, tile: Tile, walk: Walk
) -> None:
    """Every pair of key blocks, page by page; returns when the last has been used.

    The pages of positions past the sequence's end are not looked up: its last page comes again.
    """
    rows = min(sizes.page_size, KEYS)
    pieces = range(copies_of_a_block(sizes.page_size))

    def page_of(i, slot, piece):
        first = (walk.first_pair + i) * 2 * KEYS + slot * KEYS + piece * rows
        column = jax.lax.div(jnp.minimum(first, walk.kv_len - 1), sizes.page_size)
        at = pl.ds(jax.lax.rem(first, sizes.page_size), rows)
        return pages.at[page_table[tile.seq, column], at]

    def load_slot(i, slot):
        for part, (full, empty) in enumerate(zip(slots.full, slots.empty, strict=True)):
            half = slot ^ part

            @pl.when(i > 0)
            def _(empty=empty):
                plgpu.barrier_wait(empty.at[slot])

            for piece in pieces:
                page = page_of(i, slot, piece)
                at = pl.ds(piece * rows, rows)
                copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=full.at[slot])
                copy(page.at[:, sizes.columns(half)], slots.kv.at[slot, half, at])
                if part == OTHER:
                    copy(page.at[:, sizes.rope], slots.kv_rope.at[slot, at])
        for piece in pieces:
            prefetch(sizes, page_of(i + 1, slot, piece))

    def one_pair(i, _):
        for slot in (0, 1):
            load_slot(i, slot)
        return _

    jax.lax.fori_loop(0, walk.pairs, one_pair, None)

    @pl.when(walk.pairs > 0)
    def _():
        for empty in slots.empty:
            for slot in (0, 1):
                plgpu.barrier_wait(empty.at[slot])


def prefetch(sizes: Sizes, rows: Any) -> None:
    """Has rows of a cache brought into the second-level cache: they are loaded a pair later.

    Slots are filled as soon as they are free and awaited at once, so memory's latency would be
    waited for in each pair (2300 of 7000 clocks on an H100, 2026-11-26).
    """
    for columns in (sizes.columns(0), sizes.columns(1), sizes.rope):
        plgpu.async_prefetch(rows.at[:, columns])


def load_raw_pages(
    sizes: Sizes, slots: ExpandedSlots, pages: Any, page_table: Any, tile: Tile, walk: Walk, i, slot
) -> None:
    """One block of rows that are expanded: groups of 16 into the first rows of theirs.

    pages: [num_pages, page_size, columns / 64, 64]. Positions past the end as in `load_pages`.
    """
    for group in range(KEYS // GROUP):
        rows = _raw_group(sizes, pages, page_table, tile, walk, i, slot, group)
        (raw,) = slots.raw[slot]
        plgpu.copy_gmem_to_smem(rows, raw.at[group, pl.ds(0, GROUP)], slots.arrived.at[slot])
    for group in range(KEYS // GROUP):
        plgpu.async_prefetch(_raw_group(sizes, pages, page_table, tile, walk, i + 1, slot, group))


def _raw_group(sizes: Sizes, pages, page_table, tile: Tile, walk: Walk, i, slot, group: int) -> Any:
    """GROUP rows of a block, where the cache has them."""
    first = (walk.first_pair + i) * 2 * KEYS + slot * KEYS + group * GROUP
    column = jax.lax.div(jnp.minimum(first, walk.kv_len - 1), sizes.page_size)
    at = pl.ds(jax.lax.rem(first, sizes.page_size), GROUP)
    return pages.at[page_table[tile.seq, column], at]
