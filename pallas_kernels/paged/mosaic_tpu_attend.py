"""The TPU kernel of `paged`: one grid step for each tile of tokens."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip
from pallas_kernels.paged import (
    mosaic_tpu_decode,
    mosaic_tpu_heads,
    mosaic_tpu_prefill,
    mosaic_tpu_prompt,
    mosaic_tpu_write,
)
from pallas_kernels.paged.mosaic_tpu_geometry import LANES, ROWS, Geometry, Masks, divided
from pallas_kernels.paged.mosaic_tpu_walk import CELLS, PARTS, Batch, Walk
from pallas_kernels.paged.mosaic_tpu_write import News


class PerHead(NamedTuple):
    """Numbers of each query head, float32 [num_q_heads], in base 2 where they join the logits.

    Attributes:
        factor: on the product of q and the stored key, before the soft cap (which includes its
            division by the cap).
        v_factor: on the stored value.
        slope: ALiBi's.
        sink: -inf = none.
        has_slope: whether slopes count; static.
        is_signed: whether factors may be 0 or below; static.
    """

    factor: jax.Array
    v_factor: jax.Array
    slope: jax.Array
    sink: jax.Array
    has_slope: bool
    is_signed: bool


class Step(NamedTuple):
    """What the computation of a span reads and writes: references of one grid step.

    Attributes:
        q, out: this step's tile, [tokens, num_q_heads, head_dim].
        lse: [registers, tokens, 128]: query heads along lanes.
        scalars: SMEM [4, num_q_heads]; rows: VMEM [4, decode rows, 128], one number along lanes.
        first_token: the tile's.
        soft_cap: in base 2, or None; has_slope, is_signed: as in `PerHead`.
        walk: the walk over the pages.
        words: scratch of `mosaic_tpu_heads`.
        scratch: of the computation.
    """

    q: Any
    out: Any
    lse: Any
    scalars: Any
    rows: Any
    first_token: jax.Array
    soft_cap: float | None
    has_slope: bool
    is_signed: bool
    walk: Walk
    words: Any
    scratch: Any


FACTOR, V_FACTOR, SLOPE, SINK = range(4)
# Where the computation is; whether the tile's queries are rows.
SEQ, TOKEN, IN_ROWS = range(3)


def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    new: News | None,
    per_head: PerHead,
    *,
    geometry: Geometry,
    masks: Masks,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes this step's keys and values, and attends.

    Args:
        q: [num_tokens, num_q_heads, head_dim], or [num_q_heads, head_dim, num_tokens] where the
            geometry is in columns; at least a tile of tokens.
        kv_pages, page_table, kv_lens, cu_q_lens, num_seqs: the contract's.
        new: what is written; None = nothing.
        per_head: of each query head.
        geometry, masks: static.
        soft_cap: in base 2.

    Returns:
        out like q, lse [registers, num_tokens, 128], kv_pages as given, or written.
    """
    numbers = jnp.stack(per_head[:4])
    by_row = jnp.zeros((4, geometry.all_decode_rows), jnp.float32)
    for token in range(geometry.decode_tokens):
        rows = [geometry.decode_row(head, token) for head in range(geometry.num_q_heads)]
        by_row = by_row.at[:, jnp.array(rows)].set(numbers)
    by_row = jnp.broadcast_to(by_row[..., None], (*by_row.shape, LANES))
    tokens = geometry.tile_tokens
    if geometry.in_columns:
        num_tokens = q.shape[2]
        heads = pl.BlockSpec((*q.shape[:2], tokens), lambda j, *_: (0, 0, j))
    else:
        num_tokens = q.shape[0]
        heads = pl.BlockSpec((tokens, *q.shape[1:]), lambda j, *_: (j, 0, 0))
    in_rows = (tokens, geometry.num_q_heads, geometry.head_dim)
    registers = geometry.lse_lanes // LANES
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    # Decodes look up pages past a sequence's last one, and bring none of them.
    pages = jnp.pad(page_table.reshape(-1), (0, geometry.block_pages))
    scalars = [pages, kv_lens, cu_q_lens, num_seqs.reshape(1)]
    arrays = [q, numbers, by_row]
    if new is not None:
        scalars += [new.slots, new.run_lengths]
        arrays += new.parts
    static = _Static(
        geometry, masks, soft_cap, per_head.has_slope, per_head.is_signed,
        None if new is None else new.window, 0 if new is None else len(new.parts),
    )  # fmt: skip
    written = [] if new is None else [jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype)]
    found = tpu_chip.pallas_call(
        lambda *refs: _kernel(static, *refs),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((registers, num_tokens, LANES), jnp.float32),
            *written,
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(pl.cdiv(num_tokens, tokens),),
            in_specs=[
                heads,
                pl.BlockSpec(memory_space=pltpu.SMEM),
                pl.BlockSpec(by_row.shape, lambda j, *_: (0, 0, 0)),
                *(in_hbm for _ in range(static.parts)),
                in_hbm,
            ],
            out_specs=[
                heads,
                pl.BlockSpec((registers, tokens, LANES), lambda j, *_: (0, j, 0)),
                *(in_hbm for _ in written),
            ],
            scratch_shapes=[
                pltpu.VMEM(
                    (
                        geometry.num_buffers,
                        geometry.block_pages,
                        *kv_pages.shape[1:3],
                        geometry.page_size,
                        kv_pages.shape[4],
                    ),
                    kv_pages.dtype,
                ),
                pltpu.SemaphoreType.DMA((geometry.num_buffers,)),
                pltpu.SMEM((CELLS,), jnp.int32),
                pltpu.SMEM((geometry.num_buffers, PARTS + 2 * geometry.chunks), jnp.int32),
                pltpu.SMEM((3,), jnp.int32),
                [pltpu.VMEM(in_rows, q.dtype)] * (2 * geometry.in_columns),
                mosaic_tpu_heads.scratch_shapes(*in_rows, q.dtype),
                mosaic_tpu_decode.scratch_shapes(geometry, kv_pages.dtype, q.dtype),
                mosaic_tpu_prefill.scratch_shapes(geometry, q.dtype),
                mosaic_tpu_prompt.scratch_shapes(geometry, q.dtype),
                [] if new is None else mosaic_tpu_write.scratch_shapes(new, kv_pages),
            ],
        ),
        input_output_aliases={} if new is None else {len(scalars) + len(arrays): 2},
        # Checking a copy's ends takes longer than starting it; page tables are the caller's word,
        # and slots were checked.
        compiler_params=dataclasses.replace(
            tpu_chip.compiler_params(["arbitrary"]), disable_bounds_checks=True
        ),
        name="paged_attention",
    )(*scalars, *arrays, kv_pages)
    return found[0], found[1], kv_pages if new is None else found[2]


class _Static(NamedTuple):
    """What the kernel is made for; window and parts are those of `News`, None and 0 = none."""

    geometry: Geometry
    masks: Masks
    soft_cap: float | None
    has_slope: bool
    is_signed: bool
    window: int | None
    parts: int


def _kernel(static: _Static, page_table, kv_lens, cu_q_lens, num_seqs, *refs) -> None:
    """One tile: every span in it, decodes together; before the first, the cache is written."""
    geometry = static.geometry
    writes = static.window is not None
    slots, refs = refs[: 2 * writes], refs[2 * writes :]
    (q, scalars, rows), refs = refs[:3], refs[3:]
    parts, kv_pages, refs = refs[: static.parts], refs[static.parts], refs[static.parts + 1 :]
    (out, lse), refs = refs[:2], refs[2:]
    kv_pages, refs = (refs[0], refs[1:]) if writes else (kv_pages, refs)
    buffers, arrived, cells, filled, now, in_rows, words, *scratch = refs
    of_decode, of_prefill, of_prompt, of_write = scratch
    batch = Batch(page_table, kv_lens, cu_q_lens, num_seqs)
    walk = Walk(geometry, static.masks, batch, kv_pages, buffers, arrived, cells, filled)
    first_token = pl.program_id(0) * geometry.tile_tokens
    prompt = Step(
        q, out, lse, scalars, rows, first_token, static.soft_cap, static.has_slope,
        static.is_signed, walk, words, of_prompt,
    )  # fmt: skip
    decode = prompt._replace(scratch=of_decode)
    if geometry.in_columns:
        decode = decode._replace(q=in_rows[0], out=in_rows[1])
    prefill = decode._replace(scratch=of_prefill)

    @pl.when(pl.program_id(0) == 0)
    def _():
        if writes:
            mosaic_tpu_write.write_all(*slots, parts, kv_pages, of_write, static.window)
        mosaic_tpu_decode.begin(decode)
        mosaic_tpu_prefill.begin(prefill)
        mosaic_tpu_prompt.begin(prompt)
        now[SEQ] = walk.begin()

    end = cu_q_lens[num_seqs[0]]
    last = jnp.minimum(first_token + geometry.tile_tokens, end)
    now[TOKEN], now[IN_ROWS] = first_token, jnp.int32(0)
    is_partly_none = first_token + geometry.tile_tokens > end
    if geometry.in_columns:
        # What rows have is added to what columns have.
        seq = jnp.minimum(now[SEQ], cu_q_lens.shape[0] - 2)
        is_partly_none |= cu_q_lens[seq + 1] < first_token + geometry.tile_tokens

    @pl.when(is_partly_none)
    def _():
        out[...] = jnp.zeros_like(out)
        lse[...] = jnp.full_like(lse, -jnp.inf)

    def visit(_):
        span = walk.span(now[SEQ], now[TOKEN])
        q_len = cu_q_lens[span.seq + 1] - cu_q_lens[span.seq]
        is_decode = walk.is_decode(span)
        several = jnp.logical_not(is_decode)
        is_short = (q_len <= ROWS) | (geometry.tile_tokens == ROWS)
        if geometry.in_columns:
            are_missing = now[IN_ROWS] == 0
            pl.when((is_decode | is_short) & are_missing)(lambda: _make_rows(prompt, decode, now))

        @pl.when(is_decode)
        def _():
            last_of_all = mosaic_tpu_decode.attend_spans(decode, span)
            now[SEQ], now[TOKEN] = last_of_all.seq, last_of_all.begin

        @pl.when(several & is_short)
        def _():
            row_tile = divided(span.begin - first_token, ROWS)
            mosaic_tpu_prefill.attend_span(prefill, span, row_tile, 1)

        if geometry.tile_tokens > ROWS:

            @pl.when(several & (q_len > ROWS))
            def _():
                if mosaic_tpu_prompt.serves(geometry.tile_tokens):
                    mosaic_tpu_prompt.attend_span(prompt, span)
                else:
                    mosaic_tpu_prefill.attend_span(prefill, span, 0, geometry.tile_tokens // ROWS)

        now[SEQ], now[TOKEN] = walk.after(walk.span(now[SEQ], now[TOKEN]))
        return now[TOKEN] < last

    lax.while_loop(lambda more: more, visit, first_token < last)
    if geometry.in_columns:
        pl.when(now[IN_ROWS] != 0)(lambda: _add_rows(prompt, decode))


def _make_rows(columns: Step, rows: Step, now) -> None:
    """Turns the tile's queries for short spans, whose outputs are 0 until they are known."""
    mosaic_tpu_heads.write(
        rows.q, rows.words, 0, rows.q.shape[0], lambda head: columns.q[head].astype(jnp.float32),
        None, turned=True,
    )  # fmt: skip
    rows.out[...] = jnp.zeros_like(rows.out)
    now[IN_ROWS] = jnp.int32(1)


def _add_rows(columns: Step, rows: Step) -> None:
    """Adds what short spans have put into rows to the tile, which is 0 there."""
    tokens = rows.out.shape[0]
    for head, turned in mosaic_tpu_heads.read(rows.out, rows.words, 0, tokens, turned=True):
        there = columns.out[head].astype(jnp.float32)
        columns.out[head] = (there + turned).astype(columns.out.dtype)
