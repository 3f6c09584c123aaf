"""The producer: a warpgroup that brings tiles of keys and values through the page table.

A tile is `keys` positions of one kv head of one sequence, put together of pages (or a part of one)
by one TMA each: the descriptor is the whole cache's, a page is only a coordinate. Tiles go round in
a ring of slots; each slot has a barrier that says "full" and one that says "empty", for keys and
for values.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged.mosaic_gpu_geometry import Geometry, swizzled


class Span(NamedTuple):
    """Tiles of keys that a block attends to before it takes the next: int32 scalars.

    Attributes:
        seq: the sequence.
        kv_head: whose keys.
        kv_len: keys that the sequence has.
        first_tile, num_tiles: counted from the sequence's beginning.
    """

    seq: Any
    kv_head: Any
    kv_len: Any
    first_tile: Any
    num_tiles: Any


class Ring(NamedTuple):
    """Slots of tiles in shared memory, and their barriers.

    Attributes:
        k, v: [stages, keys, head_dim] in the cache's dtype.
        k_full, v_full, k_empty, v_empty: a barrier for each slot.
    """

    k: Any
    v: Any
    k_full: Any
    v_full: Any
    k_empty: Any
    v_empty: Any


def ring_scratch(geometry: Geometry, keys: int, stages: int, readers: int) -> Ring:
    """Types of the ring's memory; `readers` warpgroups read each tile."""
    transforms = swizzled(geometry.cache_dtype, geometry.head_dim)
    shape = (stages, keys, geometry.head_dim)
    tiles = plgpu.SMEM(shape, geometry.cache_dtype, transforms=transforms)
    copies = max(1, keys // geometry.page_size)
    full = plgpu.Barrier(num_barriers=stages, num_arrivals=copies)
    empty = plgpu.Barrier(num_barriers=stages, num_arrivals=readers)
    return Ring(tiles, tiles, full, full, empty, empty)


def produce(
    span_of: Callable[[Any], Span], num_items: Any, kv_pages: Any, page_table: Any, ring: Ring,
    geometry: Geometry,
) -> None:  # fmt: skip
    """Brings all tiles of all items, as slots become empty.

    Args:
        span_of: item -> its span.
        num_items: of this block.
        kv_pages: the cache in GMEM.
        page_table: int32 in GMEM.
        ring: where tiles go.
        geometry: the call's sizes.
    """
    stages, keys, _ = ring.k.shape
    sides = ((0, ring.k, ring.k_full, ring.k_empty), (1, ring.v, ring.v_full, ring.v_empty))

    def bring_item(item, count):
        span = span_of(item)

        def bring_tile(i, count):
            slot = lax.rem(count, stages)
            pages = pages_of(span, span.first_tile + i, keys, page_table, geometry)
            for side, smem, full, empty in sides:
                pl.when(count >= stages)(functools.partial(plgpu.barrier_wait, empty.at[slot]))
                size = min(keys, geometry.page_size)
                for j, (page, offset) in enumerate(pages):
                    plgpu.copy_gmem_to_smem(
                        kv_pages.at[side, page, span.kv_head, pl.ds(offset, size)],
                        smem.at[slot, pl.ds(j * size, size)],
                        full.at[slot],
                    )
            return count + 1

        return lax.fori_loop(0, span.num_tiles, bring_tile, count)

    total = lax.fori_loop(0, num_items, bring_item, jnp.int32(0))

    def drain(count, _):
        slot = lax.rem(count, stages)
        plgpu.barrier_wait(ring.k_empty.at[slot])
        plgpu.barrier_wait(ring.v_empty.at[slot])

    lax.fori_loop(lax.max(total - stages, jnp.int32(0)), total, drain, None)


def pages_of(
    span: Span, tile: Any, keys: int, page_table: Any, geometry: Geometry, first: Any = 0
) -> list:
    """(page, offset within it) of each part of a tile, as `page_of` has one."""
    parts = max(1, keys // geometry.page_size)
    return [page_of(span, tile, j, keys, page_table, geometry, first) for j in range(parts)]


def page_of(
    span: Span, tile: Any, part: Any, keys: int, page_table: Any, geometry: Geometry,
    first: Any = 0,
) -> tuple[Any, Any]:  # fmt: skip
    """(page, offset within it) of a part of a tile.

    Past the sequence's last page nothing may be read off the table: the last page comes again. So
    does `first`, a column of the table, for those before it: what is copied without clipping may
    not ask for an expired page.
    """
    page_size = geometry.page_size
    last = lax.div(span.kv_len - 1, jnp.int32(page_size))
    last = lax.min(lax.max(last, jnp.int32(0)), jnp.int32(geometry.pages_per_seq - 1))
    if page_size > keys:
        position = tile * keys
        column = lax.min(lax.max(lax.div(position, jnp.int32(page_size)), first), last)
        offset = pl.multiple_of(lax.rem(position, jnp.int32(page_size)), keys)
        return page_table[span.seq, column], offset
    column = lax.min(lax.max(tile * (keys // page_size) + part, first), last)
    return page_table[span.seq, column], 0
