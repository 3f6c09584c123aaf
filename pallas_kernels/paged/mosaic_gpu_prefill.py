"""Prompts on a GPU: tiles of 64 queries of one head for each of two warpgroups, one ring of keys.

The two warpgroups have two heads that share a kv head, or, where a group is odd, the two halves of
128 queries. Blocks stay, and take work items in turn. A tile's rows past its sequence are computed
and not stored. At head size 256 results leave by halves of their columns.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_chip
from pallas_kernels.paged.mosaic_gpu_attend import (
    ROW,
    TILE,
    Rows,
    State,
    Tools,
    attend_span,
    over_columns,
    row_index,
    scaled_queries,
)
from pallas_kernels.paged.mosaic_gpu_geometry import (
    CHUNK,
    ROWS,
    Geometry,
    compute_registers,
    producer_registers,
    swizzled,
)
from pallas_kernels.paged.mosaic_gpu_overlap import attend_overlapped
from pallas_kernels.paged.mosaic_gpu_pages import Span, produce, ring_scratch
from pallas_kernels.paged.mosaic_gpu_schedule import PROMPTS, Schedule, parts_of

F32 = jnp.float32


class PerHead(NamedTuple):
    """Numbers of each query head, float32 [num_q_heads], in units of log2 where they join logits.

    Attributes:
        factor: of the logits.
        row_factor: the same, or [num_q_heads, num_tokens + 128] with `geometry.has_row_factors`.
        v_factor: of the output.
        sinks: -inf = none.
        slopes: None = none.
    """

    factor: jax.Array
    row_factor: jax.Array
    v_factor: jax.Array
    sinks: jax.Array
    slopes: jax.Array | None


class Item(NamedTuple):
    """What a block does: int32 scalars.

    Attributes:
        span: tiles of keys.
        tile: its index among the tiles of queries.
        head: this warpgroup's.
        token: of its first row.
        skipped, num_rows: rows before the first that exists, and those that exist.
        q_pos: position of its first row.
        item_q_pos: of the first row that exists, of both warpgroups.
    """

    span: Span
    tile: Any
    head: Any
    token: Any
    skipped: Any
    num_rows: Any
    q_pos: Any
    item_q_pos: Any


def prefill(
    q: jax.Array, kv_pages: jax.Array, page_table: jax.Array, schedule: Schedule, heads: PerHead,
    geometry: Geometry,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Attends to all prompts, and gives tokens of no sequence their zeros.

    Args:
        q: [num_tokens, num_q_heads, head_dim] in geometry.dtype, or out_dtype with scales_rows.
        kv_pages: the cache.
        page_table: int32.
        schedule: who attends to what.
        heads: numbers of each query head.
        geometry: the call's sizes.

    Returns:
        out [num_tokens, num_q_heads, head_dim or more], nothing of use for tokens that are decoded;
        lse float32 [num_q_heads, tiles, 64 or 128], natural.
    """
    keys, stages, warpgroups, _, overlapped, slots = geometry.tiles.prefill
    tile = (warpgroups, ROWS, geometry.head_dim)
    transforms = swizzled(geometry.dtype, geometry.head_dim)
    scratch = {
        "ring": ring_scratch(geometry, keys, stages, readers=warpgroups),
        "q_smem": plgpu.SMEM((slots, *tile), q.dtype, transforms=transforms),
        "q_full": plgpu.Barrier(num_barriers=warpgroups),
        "out_smem": plgpu.SMEM((*tile[:2], geometry.staged_columns), geometry.out_dtype),
        "lse_smem": plgpu.SMEM(tile[:2], F32),
    }
    if geometry.scales_rows:
        scratch["scaled"] = plgpu.SMEM(tile, geometry.dtype, transforms=transforms)
    if geometry.converts:
        wide = (warpgroups, keys, geometry.head_dim)
        scratch["wide"] = (plgpu.SMEM(wide, geometry.dtype, transforms=transforms),) * 2
    elif warpgroups > 1:
        scratch["patched"] = plgpu.Barrier(num_arrivals=warpgroups)
        if overlapped:
            scratch["turn"] = plgpu.Barrier(num_barriers=warpgroups)
    arrays = [q, kv_pages, page_table, schedule.table, schedule.sums, *heads[:4]]
    arrays += [] if heads.slopes is None else [heads.slopes]

    def kernel(*refs, **scratch):
        q, pages, table, work, sums, *per_head = refs[: len(arrays)]
        per_head = PerHead(*per_head, *[None] * (5 - len(per_head)))
        out, lse = refs[len(arrays) :]
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")

        def column_of(i):
            """There and back: who has the longest item of a row has the shortest of the next."""
            back = geometry.num_blocks - 1 - block
            return jnp.where(lax.rem(i, jnp.int32(2)) == 0, block, back)

        def num_items():  # each role asks for itself: what both hold would be spilled
            total = num_tiles(sums) * (geometry.num_q_heads // geometry.prefill_heads)
            rows, left = (of(total, jnp.int32(geometry.num_blocks)) for of in (lax.div, lax.rem))
            return rows + (column_of(rows) < left).astype(jnp.int32)

        def slot_of(i):
            return lax.rem(i, jnp.int32(slots))

        def item_of(i):
            index = i * geometry.num_blocks + column_of(i)
            return item_at(index, warpgroup, work, geometry)

        @pl.when(warpgroup < warpgroups)
        def _():
            compute = compute_registers(geometry.head_dim, warpgroups)
            plgpu.set_max_registers(compute, action="increase")
            tools = _tools(scratch, warpgroup, geometry)

            def fetch(i):
                item = item_of(i)
                queries = q.at[pl.ds(item.token, ROWS), item.head]
                there = scratch["q_smem"].at[slot_of(i), warpgroup]
                plgpu.copy_gmem_to_smem(queries, there, scratch["q_full"].at[warpgroup])

            def fetch_next(i):
                pl.when(i + 1 < items)(lambda: fetch(i + 1))

            def attend_item(i, count):
                plgpu.barrier_wait(scratch["q_full"].at[warpgroup])
                if slots > 1:
                    fetch_next(i)
                item = item_of(i)
                rows = rows_of(item, per_head, geometry)
                here = tools._replace(q=scratch["q_smem"].at[slot_of(i)])
                if geometry.scales_rows:
                    raw, here = here.q.at[warpgroup], tools._replace(q=scratch["scaled"])
                    rows = scaled_queries(raw, here.q.at[warpgroup], rows, geometry)
                attend = attend_overlapped if overlapped else attend_span
                state, count = attend(item.span, rows, count, here, geometry)
                if slots == 1:  # the queries are done with
                    fetch_next(i)
                # Asked for again: kept over the loop, it would be spilled.
                finish(state, item_of(i), per_head, out, lse, scratch, warpgroup, geometry)
                return count

            items = num_items()
            pl.when(items > 0)(lambda: fetch(jnp.int32(0)))
            if tools.turn is not None:
                pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(tools.turn.at[0]))
            lax.fori_loop(0, items, attend_item, jnp.int32(0))
            if tools.turn is not None:
                pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(tools.turn.at[0]))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == warpgroups)
        def _():
            plgpu.set_max_registers(producer_registers(geometry.head_dim), action="decrease")
            produce(lambda i: item_of(i).span, num_items(), pages, table, scratch["ring"], geometry)

    lse_shape = (geometry.num_q_heads, geometry.prefill_tiles, geometry.prefill_tokens)
    return gpu_chip.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((*q.shape[:2], geometry.out_width), geometry.out_dtype),
            jax.ShapeDtypeStruct(lse_shape, F32),
        ],
        scratch_types=scratch,
        grid=(geometry.num_blocks,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,  # rows are reduced within a warp
        ),
        kernel_name="paged_prefill",
    )(*arrays)


def num_tiles(sums: Any) -> Any:
    """Tiles of queries that exist, by the schedule's sums."""
    return sums[sums.shape[0] - 1, PROMPTS]


def item_at(index: Any, warpgroup: Any, work: Any, geometry: Geometry) -> Item:
    """A work item, as one of the warpgroups sees it; `work` is the schedule's table."""
    parts = parts_of(geometry)
    units = jnp.int32(geometry.num_q_heads // geometry.prefill_heads)
    tile, unit = lax.div(index, units), lax.rem(index, units)
    seq, kv_len, before, token, begin, end, first_tile, num_tiles = (
        work[tile + (parts.tiles - parts.seqs), column] for column in range(8)
    )
    head, first = unit, token + warpgroup * ROWS
    if geometry.pairs_heads:
        head, first = unit * geometry.prefill_heads + warpgroup, token
    first = pl.multiple_of(first, CHUNK)
    kv_head = lax.div(unit * geometry.prefill_heads, jnp.int32(geometry.group))
    skipped, stop = (lax.clamp(jnp.int32(0), x - first, jnp.int32(ROWS)) for x in (begin, end))
    return Item(
        Span(seq, kv_head, kv_len, first_tile, num_tiles), tile, head, first, skipped,
        lax.max(stop - skipped, jnp.int32(0)), before + first, before + lax.max(begin, token),
    )  # fmt: skip


def _tools(scratch: dict[str, Any], warpgroup: Any, geometry: Geometry) -> Tools:
    return Tools(
        ring=scratch["ring"],
        q=None,
        wide=[x.at[warpgroup] for x in scratch["wide"]] if geometry.converts else None,
        patched=scratch.get("patched"),
        turn=scratch.get("turn"),
        warpgroup=warpgroup,
        stride=1,
        tied=geometry.tiles.prefill.tied,
    )


def rows_of(item: Item, heads: PerHead, geometry: Geometry) -> Rows:
    """Positions and factors of the rows of an item."""
    if geometry.has_row_factors:
        source = heads.row_factor.at[item.head, pl.ds(item.token, ROWS)]
        factor = plgpu.load(source, layout=ROW, optimized=False)
    else:
        factor = heads.factor[item.head]
    return Rows(
        q_pos=row_index() + item.q_pos,
        first_q_pos=item.q_pos,
        last_q_pos=item.q_pos + ROWS - 1,
        item_q_pos=item.item_q_pos,
        factor=factor,
        slopes=None if heads.slopes is None else heads.slopes[item.head],
    )


def normalised(
    state: State, item: Item, heads: PerHead, geometry: Geometry
) -> tuple[jax.Array, jax.Array]:
    """Results [64, head_dim], divided by the sum, the sink in it; their natural lse."""
    sink = heads.sinks[item.head]
    m = jnp.maximum(state.m, sink)
    fade = jnp.exp2(state.m - m)
    total = state.l * fade + jnp.exp2(sink - m)
    safe = jnp.where(total != 0, total, 1)
    scaled = state.acc * over_columns(fade * heads.v_factor[item.head] / safe, geometry.head_dim)
    lse = jnp.where(total != 0, (m + jnp.log2(safe)) * jnp.log(2.0), -jnp.inf)
    return scaled.astype(geometry.out_dtype), lse


def finish(
    state: State, item: Item, heads: PerHead, out: Any, lse: Any, scratch: dict[str, Any],
    warpgroup: Any, geometry: Geometry,
) -> None:  # fmt: skip
    """Stores the rows that are the sequence's."""
    out_smem, lse_smem = scratch["out_smem"].at[warpgroup], scratch["lse_smem"].at[warpgroup]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the item before has left
    results, lse_smem[...] = normalised(state, item, heads, geometry)
    if more := geometry.out_width - geometry.head_dim:
        zeros = plgpu.layout_cast(jnp.zeros((ROWS, more), results.dtype), TILE)
        results = jnp.concatenate([results, zeros], axis=1)
    width = geometry.staged_columns
    for column in range(0, geometry.out_width, width):
        if column == 0:
            out_smem[...] = results[:, :width] if width < geometry.out_width else results
            plgpu.commit_smem()
            place = pl.ds(0 if geometry.pairs_heads else warpgroup * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(lse_smem, lse.at[item.head, item.tile, place])
        else:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[...] = results[:, column : column + width]
            plgpu.commit_smem()
        _store_rows(out_smem, out.at[:, item.head, pl.ds(column, width)], item)


def _store_rows(out_smem: Any, out: Any, item: Item) -> None:
    """The rows that exist, a power of two at a time."""
    size = ROWS
    while size:
        begin = item.skipped + (item.num_rows & jnp.int32(-2 * size))

        @pl.when((item.num_rows & size) != 0)
        def _(size=size, begin=begin):
            there = out.at[pl.ds(item.token + begin, size)]
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(begin, size)], there)

        size //= 2
