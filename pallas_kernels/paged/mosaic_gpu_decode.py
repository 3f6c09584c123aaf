"""Decoding on a GPU: few queries of a sequence see its whole cache, cut over all blocks.

A tile's rows are the new tokens of a sequence times the heads of one kv head. Each block walks its
piece of the line of all tiles (`mosaic_gpu_schedule`); two warpgroups take turns at the tiles, and
the first adds the second's softmax to its own. Where a sequence was cut, `mosaic_gpu_merge` puts
the partial results together.
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
    fetch_queries,
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
from pallas_kernels.paged.mosaic_gpu_pages import Span, produce, ring_scratch
from pallas_kernels.paged.mosaic_gpu_schedule import Schedule, parts_of

F32 = jnp.float32


class Item(NamedTuple):
    """What a block does with one tile of queries: int32 scalars.

    Attributes:
        span: its tiles of keys.
        q_pos: position of the first query.
        unit: whose heads.
        first_row, num_rows: of its queries.
        partial_row: where its partial results begin.
    """

    span: Span
    unit: Any
    q_pos: Any
    first_row: Any
    num_rows: Any
    partial_row: Any


def decode(
    q: jax.Array, kv_pages: jax.Array, page_table: jax.Array, schedule: Schedule, factor: jax.Array,
    slopes: jax.Array | None, geometry: Geometry,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Attends to all sequences that are decoded.

    Args:
        q: [units, rows, head_dim] in geometry.dtype (out_dtype with `geometry.scales_rows`): heads
            of a unit of a token, token after token.
        kv_pages: the cache.
        page_table: int32.
        schedule: who attends to what.
        factor: float32 [units], of the logits; [units, rows] with `geometry.has_row_factors`.
        slopes: float32 [units, 64], of each row in units of log2; or None.
        geometry: the call's sizes.

    Returns:
        partial outputs, float32 [partial_rows, partial_width] (each divided by its own sum), and
        their lse in units of log2, float32 [partial_rows].
    """
    keys, stages, warpgroups, *_ = geometry.tiles.decode
    tile = (warpgroups, ROWS, geometry.head_dim)
    wide = (warpgroups, keys, geometry.head_dim)
    transforms = swizzled(geometry.dtype, geometry.head_dim)
    scratch = {
        "ring": ring_scratch(geometry, keys, stages, readers=1),
        "q_full": plgpu.Barrier(num_barriers=warpgroups),
    }
    q_smem = plgpu.SMEM(tile, geometry.dtype, transforms=transforms)
    # Declared where Mosaic's search for a layout without bank conflicts may not end.
    lies = swizzled(F32, geometry.head_dim) if geometry.head_dim == 256 else ()
    out_smem = plgpu.SMEM(tile[1:], F32, transforms=lies)
    if warpgroups == 1:  # nobody reads queries any more when the result is there
        scratch["q_and_out"] = plgpu.RefUnion(q_smem, out_smem)
    else:
        scratch |= {"q_smem": q_smem, "out_smem": out_smem}
        scratch |= {"max_smem": plgpu.SMEM((ROWS,), F32), "sum_smem": plgpu.SMEM((ROWS,), F32)}
        scratch |= {"handed": plgpu.Barrier(), "taken": plgpu.Barrier()}
    if geometry.converts:
        scratch["wide"] = (plgpu.SMEM(wide, geometry.dtype, transforms=transforms),) * 2
    arrays = [q, kv_pages, page_table, schedule.table, factor]
    arrays += [] if slopes is None else [slopes]

    def kernel(*refs, **scratch):
        q, pages, table, work, factor, *more = refs[: len(arrays)]
        out, lse = refs[len(arrays) :]
        if warpgroups == 1:
            scratch["q_smem"], scratch["out_smem"] = scratch["q_and_out"]
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        first_item, num_items = items_of(block, work, geometry)

        def item_of(i):
            return item_at(first_item + i, block, work, geometry)

        @pl.when(warpgroup < warpgroups)
        def _():
            compute = compute_registers(geometry.head_dim, warpgroups)
            plgpu.set_max_registers(compute, action="increase")
            tools = _tools(scratch, warpgroup, geometry)

            def attend(i, count):
                item = item_of(i)
                queries = q.at[item.unit, pl.ds(item.first_row, ROWS)]
                described, smem = rows_of(item, factor, more, geometry), tools.q.at[warpgroup]
                if geometry.scales_rows:
                    described = scaled_queries(queries, smem, described, geometry)
                else:
                    fetch_queries(queries, smem, scratch["q_full"].at[warpgroup])
                state, count = attend_span(item.span, described, count, tools, geometry)
                if warpgroups == 1:
                    leave(state, item, out, lse, scratch, geometry)
                    return count

                @pl.when(warpgroup == 1)
                def _():
                    _hand_over(state, i, scratch)

                @pl.when(warpgroup == 0)
                def _():
                    leave(_with_the_other(state, scratch), item, out, lse, scratch, geometry)
                    plgpu.barrier_arrive(scratch["taken"])

                return count

            lax.fori_loop(0, num_items, attend, jnp.int32(0))
            if warpgroups > 1:
                pl.when((warpgroup == 1) & (num_items > 0))(
                    lambda: plgpu.barrier_wait(scratch["taken"])
                )

        @pl.when(warpgroup == warpgroups)
        def _():
            plgpu.set_max_registers(producer_registers(geometry.head_dim), action="decrease")
            produce(lambda i: item_of(i).span, num_items, pages, table, scratch["ring"], geometry)

    return gpu_chip.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((geometry.partial_rows, geometry.partial_width), F32),
            jax.ShapeDtypeStruct((geometry.partial_rows,), F32),
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
        kernel_name="paged_decode",
    )(*arrays)


def items_of(block: Any, work: Any, geometry: Geometry) -> tuple[Any, Any]:
    """A block's first item, and how many it has; `work` is the schedule's table."""
    row = _row_of_block(block, geometry)
    count = work[row, 1] - work[row, 0] + 1
    return work[row, 0], jnp.where(work[row, 3] > work[row, 2], count, 0)


def _row_of_block(block: Any, geometry: Geometry) -> Any:
    parts = parts_of(geometry)
    return block + (parts.blocks - parts.seqs)


def item_at(index: Any, block: Any, work: Any, geometry: Geometry) -> Item:
    """A block's part of a tile of queries; `work` is the schedule's table."""
    units = jnp.int32(geometry.units)
    place, unit = lax.div(index, units), lax.rem(index, units)
    seq, kv_len, _, tokens, first_tile, count, before, first_row = (
        work[place, column] for column in range(8)
    )
    piece = _row_of_block(block, geometry)
    start = before * units + unit * count
    begin = lax.max(work[piece, 2] - start, jnp.int32(0))
    end = lax.min(work[piece, 3] - start, count)
    span = Span(
        seq, lax.div(unit, jnp.int32(geometry.parts)), kv_len, first_tile + begin, end - begin
    )
    num_rows = tokens * geometry.part_heads
    return Item(
        span, unit, kv_len - tokens, pl.multiple_of(first_row, CHUNK), num_rows,
        first_row * units + unit * in_chunks(num_rows) + block * ROWS,
    )  # fmt: skip


def in_chunks(rows: Any) -> Any:
    """So many rows, in whole chunks."""
    return (rows + (CHUNK - 1)) & jnp.int32(-CHUNK)


def _tools(scratch: dict[str, Any], warpgroup: Any, geometry: Geometry) -> Tools:
    return Tools(
        ring=scratch["ring"],
        q=scratch["q_smem"],
        wide=[x.at[warpgroup] for x in scratch["wide"]] if geometry.converts else None,
        patched=None,
        turn=None,
        warpgroup=warpgroup,
        stride=geometry.tiles.decode.warpgroups,
        tied=geometry.tiles.decode.tied,
    )


def rows_of(item: Item, factor: Any, more: list[Any], geometry: Geometry) -> Rows:
    """Positions and factors of the rows of an item."""
    row = row_index()
    heads = geometry.part_heads
    if geometry.has_row_factors:
        factor = _load_row(factor.at[item.unit, pl.ds(item.first_row, ROWS)])
    else:
        factor = factor[item.unit]
    return Rows(
        q_pos=lax.div(row, jnp.full_like(row, heads)) + item.q_pos,
        first_q_pos=item.q_pos,
        item_q_pos=item.q_pos,
        last_q_pos=item.q_pos + lax.div(item.num_rows, jnp.int32(heads)) - 1,
        factor=factor,
        slopes=_load_row(more[0].at[item.unit]) if more else None,
    )


def _load_row(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=ROW, optimized=False)


def _hand_over(state: State, turn: Any, scratch: dict[str, Any]) -> None:
    """The second warpgroup leaves its softmax in shared memory."""
    pl.when(turn > 0)(lambda: plgpu.barrier_wait(scratch["taken"]))
    scratch["out_smem"][...] = state.acc
    scratch["max_smem"][...] = state.m
    scratch["sum_smem"][...] = state.l
    plgpu.barrier_arrive(scratch["handed"])


def _with_the_other(state: State, scratch: dict[str, Any]) -> State:
    """The first warpgroup's softmax and the second's."""
    plgpu.barrier_wait(scratch["handed"])
    acc = plgpu.load(scratch["out_smem"], layout=TILE, optimized=False)
    m, total = (_load_row(scratch[name]) for name in ("max_smem", "sum_smem"))
    higher = jnp.maximum(state.m, m)
    mine, theirs = jnp.exp2(state.m - higher), jnp.exp2(m - higher)
    width = acc.shape[1]
    acc = state.acc * over_columns(mine, width) + acc * over_columns(theirs, width)
    return State(acc, higher, state.l * mine + total * theirs)


def normalised(state: State) -> tuple[jax.Array, jax.Array]:
    """A partial result [64, head_dim], and its lse in units of log2."""
    # Where nothing was seen the sum is 0, and so is acc; NaN stays NaN.
    total = jnp.where(state.l != 0, state.l, 1)
    out = state.acc / over_columns(total, state.acc.shape[1])
    return out, jnp.where(state.l != 0, state.m + jnp.log2(total), -jnp.inf)


def leave(
    state: State, item: Item, out: Any, lse: Any, scratch: dict[str, Any], geometry: Geometry
) -> None:
    """Stores a partial result, in chunks of rows.

    Its lse is stored whole, from registers: a chunk is 32 bytes, and copies in shared memory begin
    at multiples of 128. Rows of no query are those of the block's next item, or nobody's.
    """
    out_smem = scratch["out_smem"]
    out_smem[...], log_sum = normalised(state)
    lse[pl.ds(item.partial_row, ROWS)] = log_sum
    plgpu.commit_smem()

    def store(chunk, _):
        here = pl.ds(chunk * CHUNK, CHUNK)
        row = item.partial_row + chunk * CHUNK
        if geometry.head_dim == 256:  # whose tiles of 8 rows are declared
            row = pl.multiple_of(row, CHUNK)
        columns = pl.ds(0, geometry.head_dim)
        plgpu.copy_smem_to_gmem(out_smem.at[here], out.at[pl.ds(row, CHUNK), columns])

    lax.fori_loop(0, lax.div(item.num_rows + (CHUNK - 1), jnp.int32(CHUNK)), store, None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
