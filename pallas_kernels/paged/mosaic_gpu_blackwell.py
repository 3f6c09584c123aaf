"""Paged attention on Blackwell: one warpgroup a block, pages by TMA, products by `mma.sync`.

    TMA        Q K0 V0 | K1 V1        | K2 V2        | ..     a page, or a part of one, a copy
    4 warps              QK0 sm0 PV0  | QK1 sm1 PV1  | ..     16 rows a warp

Who attends to what, the copies and the stores are those of the kernels for Hopper; products, the
softmax between them and the order of a tile's work are those of the kernels for Ampere. The
warpgroup that multiplies sends for tiles itself: blocks that share a core have no registers for
another, and a copy takes one thread and no registers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_chip, gpu_mma
from pallas_kernels.gpu_tma_ring import Ring
from pallas_kernels.paged import mosaic_gpu_decode, mosaic_gpu_prefill
from pallas_kernels.paged.mosaic_gpu_ampere import Shared, attend_tiles, swizzle_of
from pallas_kernels.paged.mosaic_gpu_attend import Rows, State, seen_of
from pallas_kernels.paged.mosaic_gpu_geometry import ROWS, Geometry, swizzled
from pallas_kernels.paged.mosaic_gpu_pages import Span, page_of
from pallas_kernels.paged.mosaic_gpu_prefill import PerHead
from pallas_kernels.paged.mosaic_gpu_schedule import Schedule
from pallas_kernels.paged.mosaic_gpu_tiles import Phase

F32 = jnp.float32


def decode(
    q: jax.Array, kv_pages: jax.Array, page_table: jax.Array, schedule: Schedule, factor: jax.Array,
    slopes: jax.Array | None, geometry: Geometry,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Attends to all sequences that are decoded: `mosaic_gpu_decode.decode`, on Blackwell."""
    sizes = geometry.tiles.decode
    arrays = [q, kv_pages, page_table, schedule.table, factor]
    arrays += [] if slopes is None else [slopes]

    def kernel(*refs, **scratch):
        q, pages, table, work, factor, *more = refs[: len(arrays)]
        out, lse = refs[len(arrays) :]
        shared = _shared(**scratch)
        scratch["out_smem"] = shared.results
        block = lax.axis_index("block")

        def attend(i, _):
            item = mosaic_gpu_decode.item_at(first_item + i, block, work, geometry)
            queries = q.at[item.unit, pl.ds(item.first_row, ROWS)]
            plgpu.copy_gmem_to_smem(queries, shared.q, scratch["q_full"])
            described = mosaic_gpu_decode.rows_of(item, factor, more, geometry)
            state = _attend_span(
                item.span, described, pages, table, shared, scratch, sizes, geometry
            )
            mosaic_gpu_decode.leave(state, item, out, lse, scratch, geometry)

        first_item, num_items = mosaic_gpu_decode.items_of(block, work, geometry)
        lax.fori_loop(0, num_items, attend, None)

    return gpu_chip.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((geometry.partial_rows, geometry.partial_width), F32),
            jax.ShapeDtypeStruct((geometry.partial_rows,), F32),
        ],
        kernel_name="paged_decode_blackwell",
        **_launch(sizes, plgpu.SMEM((ROWS, geometry.head_dim), F32), {}, geometry),
    )(*arrays)


def prefill(
    q: jax.Array, kv_pages: jax.Array, page_table: jax.Array, schedule: Schedule, heads: PerHead,
    geometry: Geometry,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Attends to all prompts: `mosaic_gpu_prefill.prefill`, on Blackwell."""
    sizes = geometry.tiles.prefill
    arrays = [q, kv_pages, page_table, schedule.table, schedule.sums, *heads[:4]]
    arrays += [] if heads.slopes is None else [heads.slopes]

    def kernel(*refs, **scratch):
        q, pages, table, work, sums, *per_head = refs[: len(arrays)]
        out, lse = refs[len(arrays) :]
        per_head = PerHead(*per_head, *[None] * (5 - len(per_head)))
        shared = _shared(**scratch)
        scratch["out_smem"] = shared.results
        block, one = lax.axis_index("block"), jnp.int32(0)
        tiles = mosaic_gpu_prefill.num_tiles(sums)
        left = tiles * geometry.num_q_heads - block + (geometry.num_blocks - 1)

        def attend(i, _):
            item = mosaic_gpu_prefill.item_at(block + i * geometry.num_blocks, one, work, geometry)
            queries = q.at[pl.ds(item.token, ROWS), item.head]
            plgpu.copy_gmem_to_smem(queries, shared.q, scratch["q_full"])
            described = mosaic_gpu_prefill.rows_of(item, per_head, geometry)
            state = _attend_span(
                item.span, described, pages, table, shared, scratch, sizes, geometry
            )
            mosaic_gpu_prefill.finish(state, item, per_head, out, lse, scratch, one, geometry)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # keys come where results were

        lax.fori_loop(0, lax.div(left, jnp.int32(geometry.num_blocks)), attend, None)

    tiles = geometry.prefill_tiles
    results = plgpu.SMEM((1, ROWS, geometry.out_width), geometry.out_dtype)
    return gpu_chip.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((*q.shape[:2], geometry.out_width), geometry.out_dtype),
            jax.ShapeDtypeStruct((geometry.num_q_heads, tiles, ROWS), F32),
        ],
        kernel_name="paged_prefill_blackwell",
        **_launch(sizes, results, {"lse_smem": plgpu.SMEM((1, ROWS), F32)}, geometry),
    )(*arrays)


def _launch(sizes: Phase, results: Any, more: dict[str, Any], geometry: Geometry) -> dict[str, Any]:
    """What both kernels are launched with, and more shared memory."""

    def operands(rows):
        return gpu_mma.swizzled(
            rows, geometry.head_dim, dtype=geometry.dtype, swizzle=swizzle_of(geometry)
        )

    shape = (sizes.stages, sizes.keys, geometry.head_dim)
    if geometry.converts:
        transforms = swizzled(geometry.cache_dtype, geometry.head_dim)
        tiles = plgpu.SMEM(shape, geometry.cache_dtype, transforms=transforms)
    else:
        tiles = gpu_mma.swizzled(*shape, dtype=geometry.dtype, swizzle=swizzle_of(geometry))
    copies = 2 * max(1, sizes.keys // geometry.page_size)
    scratch = {
        "q": operands(ROWS),
        "q_full": plgpu.Barrier(),
        "k_and_results": plgpu.RefUnion(tiles, results),
        "v": tiles,
        "full": plgpu.Barrier(num_barriers=sizes.stages, num_arrivals=copies),
    } | more
    if geometry.converts:
        scratch["wide"] = operands(sizes.keys)
    return {
        "scratch_types": scratch,
        "grid": (geometry.num_blocks,),
        "grid_names": ("block",),
        "compiler_params": plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,  # rows are reduced within a warp
        ),
    }


def _shared(q: Any, k_and_results: Any, v: Any, wide: Any = None, **_: Any) -> Shared:
    """A block's shared memory."""
    k, results = k_and_results
    return Shared(q, k, v, results, wide)


def _attend_span(
    span: Span, rows: Rows, pages: Any, table: Any, shared: Shared, scratch: dict[str, Any],
    sizes: Phase, geometry: Geometry,
) -> State:  # fmt: skip
    """Attends to all tiles of a span; its queries have been sent for."""
    keys = sizes.keys
    size = min(keys, geometry.page_size)

    def bring(tile, slot):
        def bring_part(part, _):
            page, offset = page_of(span, span.first_tile + tile, part, keys, table, geometry)
            for side, target in enumerate((shared.k, shared.v)):
                plgpu.copy_gmem_to_smem(
                    pages.at[side, page, span.kv_head, pl.ds(offset, size)],
                    target.at[slot, pl.ds(pl.multiple_of(part * size, size), size)],
                    scratch["full"].at[slot],
                )

        lax.fori_loop(0, keys // size, bring_part, None)  # unrolled it spills

    seen = seen_of(span, rows, keys, geometry.masks)
    ring = Ring(span.num_tiles, scratch["full"], scratch["q_full"], bring)
    return attend_tiles(span, rows, seen, ring, shared, sizes, geometry)
