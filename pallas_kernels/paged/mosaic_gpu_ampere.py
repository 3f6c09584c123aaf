"""Paged attention on Ampere: one warpgroup a block, pages by `cp.async`, products by `mma.sync`.

    cp.async   Q K0 V0 | K1 V1        | K2 V2        | ..     a page, or a part of one, a group
    4 warps              QK0 sm0 PV0  | QK1 sm1 PV1  | ..     16 rows a warp

Who attends to what, which page a tile is made of, what a row sees and how partial results are
merged are those of the kernels for Hopper; so are the rows of a tile. Nothing here clips a copy or
a store. Pages of a tile that lie outside what its rows see are replaced by the nearest that they
do see, values there become 0 in registers. Stores are whole tiles of 64 rows into buffers where
those behind the last row are nobody's, or are written afterwards by the same block.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_chip
from pallas_kernels.gpu_mma import (
    SWIZZLE,
    Ring,
    bring,
    left_strips,
    products,
    swizzled,
    weighted_sum,
)
from pallas_kernels.paged import mosaic_gpu_decode, mosaic_gpu_prefill
from pallas_kernels.paged.mosaic_gpu_attend import (
    Rows,
    Seen,
    State,
    in_log2,
    initial_state,
    seen_of,
    softmax_step,
    widen,
)
from pallas_kernels.paged.mosaic_gpu_geometry import ROWS, Geometry, round_up
from pallas_kernels.paged.mosaic_gpu_pages import Span, pages_of
from pallas_kernels.paged.mosaic_gpu_prefill import PerHead
from pallas_kernels.paged.mosaic_gpu_schedule import Schedule, row_of_token
from pallas_kernels.paged.mosaic_gpu_tiles import Phase

F32 = jnp.float32
LINE = 128  # bytes of a line of the cache


class Shared(NamedTuple):
    """A block's shared memory.

    Attributes:
        q: [64, head_dim].
        k, v: [stages, keys, head_dim].
        results: [64, whole lines]: where k is, when the keys are done with.
        wide: [keys, head_dim], where a float8 tile is converted to; or None.
    """

    q: Any
    k: Any
    v: Any
    results: Any
    wide: Any = None

    def widened(self, tile: Any, geometry: Geometry) -> Any:
        """A tile of the ring as it is multiplied."""
        if not geometry.converts:
            return tile
        widen(tile, self.wide, None, None, geometry)
        return self.wide


class Cache(NamedTuple):
    """In GMEM: the cache as a matrix [2 * pages * kv_heads * page_size, head_dim], its table."""

    rows: Any
    num_pages: int
    table: Any


def decode(
    q: jax.Array, kv_pages: jax.Array, page_table: jax.Array, schedule: Schedule, factor: jax.Array,
    slopes: jax.Array | None, geometry: Geometry,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Attends to all sequences that are decoded: `mosaic_gpu_decode.decode`, on Ampere."""
    units, rows, head_dim = q.shape
    queries, cache = q.reshape(units * rows, head_dim), kv_pages.reshape(-1, head_dim)
    arrays = [queries, cache, page_table, schedule.table, factor]
    arrays += [] if slopes is None else [slopes]

    def kernel(*refs):
        q, cache, table, work, factor, *more = refs[: len(arrays)]
        out, lse, *shared = refs[len(arrays) :]
        cache, shared = Cache(cache, kv_pages.shape[1], table), _shared(*shared)
        block = lax.axis_index("block")

        def attend(i, _):
            item = mosaic_gpu_decode.item_at(first_item + i, block, work, geometry)
            bring(q.at[pl.ds(item.unit * rows + item.first_row, ROWS)], shared.q)
            described = mosaic_gpu_decode.rows_of(item, factor, more, geometry)
            state = attend_span(
                item.span, described, cache, shared, geometry.tiles.decode, geometry
            )
            # Rows of no query are those of the block's next item, or nobody's.
            partial, log_sum = mosaic_gpu_decode.normalised(state)
            _store(partial, shared.results, out, item.partial_row, 0)
            lse[pl.ds(item.partial_row, ROWS)] = log_sum

        first_item, num_items = mosaic_gpu_decode.items_of(block, work, geometry)
        lax.fori_loop(0, num_items, attend, None)

    return gpu_chip.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((geometry.partial_rows, geometry.partial_width), F32),
            jax.ShapeDtypeStruct((geometry.partial_rows,), F32),
        ],
        kernel_name="paged_decode_ampere",
        **_launch(geometry.tiles.decode, F32, geometry),
    )(*arrays)


def prefill(
    q: jax.Array, kv_pages: jax.Array, page_table: jax.Array, schedule: Schedule, heads: PerHead,
    geometry: Geometry,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Attends to all prompts: `mosaic_gpu_prefill.prefill`, on Ampere.

    Results leave as whole tiles, and XLA puts the tokens' rows in their places: a row of a tile
    behind a sequence's last token may not be stored where the next sequence's results are.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    width = _stored_width(geometry.out_dtype, geometry)
    queries, cache = q.reshape(num_tokens, -1), kv_pages.reshape(-1, head_dim)
    arrays = [queries, cache, page_table, schedule.table, schedule.sums, *heads[:4]]
    arrays += [] if heads.slopes is None else [heads.slopes]

    def kernel(*refs):
        q, cache, table, work, sums, *per_head = refs[: len(arrays)]
        out, lse, *shared = refs[len(arrays) :]
        per_head = PerHead(*per_head, *[None] * (5 - len(per_head)))
        cache, shared = Cache(cache, kv_pages.shape[1], table), _shared(*shared)
        block = lax.axis_index("block")
        tiles = mosaic_gpu_prefill.num_tiles(sums)
        left = tiles * num_q_heads - block + (geometry.num_blocks - 1)

        def attend(i, _):
            item = mosaic_gpu_prefill.item_at(
                block + i * geometry.num_blocks, jnp.int32(0), work, geometry
            )
            columns = pl.ds(item.head * head_dim, head_dim)
            _bring_queries(q, item.token, columns, shared.q, geometry.tiles.alignment)
            described = mosaic_gpu_prefill.rows_of(item, per_head, geometry)
            state = attend_span(
                item.span, described, cache, shared, geometry.tiles.prefill, geometry
            )
            o, log_sum = mosaic_gpu_prefill.normalised(state, item, per_head, geometry)
            _store(o, shared.results, out, item.tile * ROWS, item.head * width)
            lse[item.head, item.tile] = log_sum

        lax.fori_loop(0, lax.div(left, jnp.int32(geometry.num_blocks)), attend, None)

    tiles = geometry.prefill_tiles
    out, lse = gpu_chip.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((tiles * ROWS, num_q_heads * width), geometry.out_dtype),
            jax.ShapeDtypeStruct((num_q_heads, tiles, ROWS), F32),
        ],
        kernel_name="paged_prefill_ampere",
        **_launch(geometry.tiles.prefill, geometry.out_dtype, geometry),
    )(*arrays)
    row, _ = row_of_token(schedule, geometry)
    return out[row].reshape(-1, num_q_heads, width)[..., :head_dim], lse


def _stored_width(dtype: Any, geometry: Geometry) -> int:
    """Columns of stored rows: Mosaic GPU stores whole lines only."""
    return round_up(geometry.head_dim, LINE // jnp.dtype(dtype).itemsize)


def _launch(sizes: Phase, out_dtype: Any, geometry: Geometry) -> dict[str, Any]:
    """What both kernels are launched with; their results have out_dtype."""

    def ring(stages, rows):
        return swizzled(*stages, rows, geometry.head_dim, dtype=geometry.dtype,
                        swizzle=swizzle_of(geometry))  # fmt: skip

    tiles = ring((sizes.stages,), sizes.keys)
    results = swizzled(ROWS, _stored_width(out_dtype, geometry), dtype=out_dtype)
    return {
        "scratch_types": [ring((), ROWS), plgpu.RefUnion(tiles, results), tiles],
        "grid": (geometry.num_blocks,),
        "grid_names": ("block",),
        "compiler_params": plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,  # rows are reduced within a warp
        ),
    }


def _shared(q: Any, k_and_results: Any, v: Any) -> Shared:
    k, results = k_and_results
    return Shared(q, k, v, results)


def swizzle_of(geometry: Geometry) -> int:
    """Bytes: four warps share a copy of 16 rows by columns only where their strips are even."""
    is_even = geometry.head_dim * geometry.dtype.itemsize % (2 * SWIZZLE) == 0
    return SWIZZLE if is_even else SWIZZLE // 2


def attend_span(
    span: Span, rows: Rows, cache: Cache, shared: Shared, sizes: Phase, geometry: Geometry
) -> State:
    """Attends to all tiles of a span; its queries have been sent for."""
    keys = sizes.keys
    seen = seen_of(span, rows, keys, geometry.masks)
    groups = 2 * max(1, keys // geometry.page_size)
    bring_tile = functools.partial(_bring_tile, span, seen, cache, shared, keys, geometry)
    ring = Ring(sizes.stages, span.num_tiles, groups, bring_tile)
    return attend_tiles(span, rows, seen, ring, shared, sizes, geometry)


def attend_tiles(
    span: Span, rows: Rows, seen: Seen, ring: Any, shared: Shared, sizes: Phase,
    geometry: Geometry,
) -> State:  # fmt: skip
    """Attends to all tiles that a ring brings; what else it waits for are the queries."""
    keys = sizes.keys
    ring.begin()
    queries = functools.partial(left_strips, shared.q, geometry.head_dim, swizzle_of(geometry))
    kept = None if sizes.tied else queries()

    def over(begin, end, state, masked):
        def step(i, state):
            slot = ring.slot_of(i)
            first_key = (span.first_tile + i) * keys
            k = shared.widened(shared.k.at[slot], geometry)
            logits = in_log2(products(kept or queries(), k), rows, first_key, geometry)
            interval = seen.interval if masked else None
            p, state = softmax_step(state, logits, first_key, interval)
            valid = tuple(end - first_key for end in seen.valid) if masked else None
            v = shared.widened(shared.v.at[slot], geometry)
            return state._replace(acc=weighted_sum(state.acc, p, v, valid))

        return lax.fori_loop(begin, end, step, state)

    state = initial_state(geometry)
    if seen.interval[0] is not None:
        state = over(jnp.int32(0), seen.plain, state, True)
    state = over(seen.plain, seen.late, state, False)
    return over(seen.late, span.num_tiles, state, True)


def _bring_tile(
    span: Span, seen: Seen, cache: Cache, shared: Shared, keys: int, geometry: Geometry, i: Any,
    slot: Any,
) -> None:  # fmt: skip
    """Sends for keys and values of a tile of the span: a group for each page and side."""
    first = lax.div(lax.max(seen.valid[0], jnp.int32(0)), jnp.int32(geometry.page_size))
    size = min(keys, geometry.page_size)
    pages = pages_of(span, span.first_tile + i, keys, cache.table, geometry, first)
    for side, target in enumerate((shared.k, shared.v)):
        for j, (page, offset) in enumerate(pages):
            page = (side * cache.num_pages + page) * geometry.num_kv_heads + span.kv_head
            row = page * geometry.page_size + offset
            bring(cache.rows.at[pl.ds(row, size)], target.at[slot, pl.ds(j * size, size)])


def _bring_queries(q: Any, token: Any, columns: Any, target: Any, size: int) -> None:
    """Sends for 64 rows of queries, so many at a time, as far as there are any."""
    for i in range(0, ROWS, size):

        @pl.when(token + i < q.shape[0])
        def _(i=i):
            bring(q.at[pl.ds(token + i, size), columns], target.at[pl.ds(i, size)])


def _store(rows: jax.Array, staging: Any, out: Any, first_row: Any, first_column: Any) -> None:
    """Stores 64 rows of results through shared memory, 16 bytes a thread."""
    width = rows.shape[1]
    staging.at[:, pl.ds(0, width)][...] = rows
    layout = plgpu.Layout.SMEM_GMEM_COPY(staging.shape, staging.dtype, SWIZZLE)
    place = pl.ds(first_row, ROWS), pl.ds(first_column, staging.shape[1])
    out[place] = plgpu.load(staging, layout=layout)
