"""The TPU kernel of `paged` that attends: one grid step for each tile of tokens."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip
from pallas_kernels.paged import mosaic_tpu_decode, mosaic_tpu_prefill, mosaic_tpu_prompt
from pallas_kernels.paged.mosaic_tpu_geometry import LANES, ROWS, Geometry, Masks, divided
from pallas_kernels.paged.mosaic_tpu_walk import CELLS, Batch, Walk


class PerHead(NamedTuple):
    """Numbers of each query head, float32 [num_q_heads], in base 2 where they join the logits.

    Attributes:
        factor: on the product of q and the stored key, before the soft cap (which includes its
            division by the cap).
        v_factor: on the stored value.
        slope: ALiBi's.
        sink: -inf = none.
        has_slope: whether slopes count; static.
    """

    factor: jax.Array
    v_factor: jax.Array
    slope: jax.Array
    sink: jax.Array
    has_slope: bool


class Step(NamedTuple):
    """What the computation of a span reads and writes: references of one grid step.

    Attributes:
        q, out, lse: this step's tile, [row tiles, 16, lanes].
        scalars: SMEM [4, num_q_heads]; rows: VMEM [4, decode rows, 128], one number along lanes.
        first_token: the tile's.
        soft_cap: in base 2, or None; has_slope: whether there is ALiBi.
        walk: the walk over the pages.
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
    walk: Walk
    scratch: Any


FACTOR, V_FACTOR, SLOPE, SINK = range(4)
SEQ, TOKEN = range(2)  # where the computation is


def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    per_head: PerHead,
    *,
    geometry: Geometry,
    masks: Masks,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Attention to a cache that holds this step's keys already.

    Args:
        q: [row tiles, 16, num_q_heads * k_lanes].
        kv_pages, page_table, kv_lens, cu_q_lens, num_seqs: the contract's.
        per_head: of each query head.
        geometry, masks: static.
        soft_cap: in base 2.

    Returns:
        out [row tiles, 16, num_q_heads * out_lanes] in q's dtype, lse [row tiles, 16, lse_lanes].
    """
    numbers = jnp.stack(per_head[:4])
    rows = [geometry.decode_row(h) for h in range(geometry.num_q_heads)]
    by_row = (
        jnp.zeros((4, geometry.all_decode_rows), jnp.float32).at[:, jnp.array(rows)].set(numbers)
    )
    by_row = jnp.broadcast_to(by_row[..., None], (*by_row.shape, LANES))
    row_tiles = q.shape[0]

    def tile(lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec((geometry.tile_tokens // ROWS, ROWS, lanes), lambda j, *_: (j, 0, 0))

    def kernel(*refs):
        _kernel(
            *refs, geometry=geometry, masks=masks, soft_cap=soft_cap, has_slope=per_head.has_slope
        )

    out_width = geometry.num_q_heads * geometry.out_lanes
    buffers = (geometry.num_buffers, geometry.block_pages, *kv_pages.shape[1:])
    return pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((row_tiles, ROWS, out_width), q.dtype),
            jax.ShapeDtypeStruct((row_tiles, ROWS, geometry.lse_lanes), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(row_tiles * ROWS, geometry.tile_tokens),),
            in_specs=[
                tile(q.shape[-1]),
                pl.BlockSpec(memory_space=pltpu.SMEM),
                pl.BlockSpec(by_row.shape, lambda j, *_: (0, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[tile(out_width), tile(geometry.lse_lanes)],
            scratch_shapes=[
                pltpu.VMEM(buffers, kv_pages.dtype),
                pltpu.SemaphoreType.DMA((geometry.num_buffers,)),
                pltpu.SMEM((CELLS,), jnp.int32),
                pltpu.SMEM((2,), jnp.int32),
                *mosaic_tpu_decode.scratch_shapes(geometry),
                *mosaic_tpu_prefill.scratch_shapes(geometry, q.dtype),
                *mosaic_tpu_prompt.scratch_shapes(geometry, q.dtype),
            ],
        ),
        # Checking a copy's ends takes longer than starting it; page tables are the caller's word.
        compiler_params=dataclasses.replace(
            tpu_chip.compiler_params(["arbitrary"]), disable_bounds_checks=True
        ),
        name="paged_attention",
    )(
        page_table.reshape(-1), kv_lens, cu_q_lens, num_seqs.reshape(1), q, numbers, by_row,
        kv_pages,
    )  # fmt: skip


def _kernel(
    page_table, kv_lens, cu_q_lens, num_seqs, q, scalars, rows, kv_pages, out, lse, buffers,
    arrived, cells, now, *scratch, geometry: Geometry, masks: Masks, soft_cap, has_slope,
):  # fmt: skip
    """One tile: every span in it, one after another."""
    batch = Batch(page_table, kv_lens, cu_q_lens, num_seqs)
    walk = Walk(geometry, masks, batch, kv_pages, buffers, arrived, cells)
    first_token = pl.program_id(0) * geometry.tile_tokens
    of_decode = len(mosaic_tpu_decode.scratch_shapes(geometry))
    step = Step(q, out, lse, scalars, rows, first_token, soft_cap, has_slope, walk, None)
    decode = step._replace(scratch=scratch[:of_decode])
    of_prefill = of_decode + 4
    prefill = step._replace(scratch=scratch[of_decode:of_prefill])
    prompt = step._replace(scratch=scratch[of_prefill:])
    out[...] = jnp.zeros_like(out)
    lse[...] = jnp.full_like(lse, -jnp.inf)

    mosaic_tpu_decode.begin_tile(decode)

    @pl.when(pl.program_id(0) == 0)
    def _():
        now[SEQ] = walk.begin()

    last = jnp.minimum(first_token + geometry.tile_tokens, cu_q_lens[num_seqs[0]])

    def visit(_):
        span = walk.span(now[SEQ], now[TOKEN])
        q_len = cu_q_lens[span.seq + 1] - cu_q_lens[span.seq]

        @pl.when(span.end - span.begin == 1)
        def _():
            mosaic_tpu_decode.attend_span(decode, span)

        several = span.end - span.begin > 1

        @pl.when(several & (q_len <= ROWS))
        def _():
            row_tile = divided(span.begin - first_token, ROWS)
            mosaic_tpu_prefill.attend_span(prefill, span, row_tile, 1)

        if geometry.tile_tokens > ROWS:

            @pl.when(several & (q_len > ROWS))
            def _():
                if mosaic_tpu_prompt.serves(geometry):
                    mosaic_tpu_prompt.attend_span(prompt, span)
                else:
                    mosaic_tpu_prefill.attend_span(prefill, span, 0, geometry.tile_tokens // ROWS)

        now[SEQ], now[TOKEN] = walk.after(span)
        return now[TOKEN] < last

    now[TOKEN] = first_token
    lax.while_loop(lambda more: more, visit, first_token < last)
    mosaic_tpu_decode.end_row_tile(decode)
