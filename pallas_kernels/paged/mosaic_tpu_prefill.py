"""How the TPU kernel of `paged` computes a span of several tokens: one kv head after another.

The rows of one kv head are its group's query heads, each with the tokens of the tile (16 for short
spans). Rows of the tile that are not the span's are computed with the others, and dropped.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged import mosaic_tpu_heads as heads
from pallas_kernels.paged import mosaic_tpu_prompt
from pallas_kernels.paged import mosaic_tpu_softmax as softmax
from pallas_kernels.paged.mosaic_tpu_decode import product, rows_kept
from pallas_kernels.paged.mosaic_tpu_geometry import LANES, ROWS, Geometry, divided
from pallas_kernels.paged.mosaic_tpu_walk import Span
from pallas_kernels.tpu_operands import as_operand


def scratch_shapes(geometry: Geometry, dtype) -> list:
    """q, m, l, acc: [num_q_heads, row tiles, 16, lanes]."""
    row_tiles = (
        1
        if mosaic_tpu_prompt.serves(geometry.tile_tokens, geometry.head_dim)
        else geometry.tile_tokens // ROWS
    )
    shape = (geometry.num_q_heads, row_tiles, ROWS)
    return [
        pltpu.VMEM((*shape, geometry.k_lanes), dtype),
        pltpu.VMEM((*shape, LANES), jnp.float32),
        pltpu.VMEM((*shape, LANES), jnp.float32),
        pltpu.VMEM((*shape, geometry.v_lanes), jnp.float32),
    ]


def begin(step) -> None:
    """Makes lanes that are no key's numbers: they are multiplied, too."""
    if step.walk.geometry.k_lanes > step.walk.geometry.head_dim:
        step.scratch[0][...] = jnp.zeros_like(step.scratch[0])


def attend_span(step, span: Span, row_tile, row_tiles: int) -> None:
    """Attends with `row_tiles` row tiles from `row_tile` on, and keeps what is the span's."""
    walk, geometry = step.walk, step.walk.geometry
    _load_q(step, row_tile, row_tiles)
    first, last = walk.blocks(span)
    size = geometry.chunk_tokens

    def attend_block(block, _):
        buffer = walk.next_block(span, block)
        position = block * geometry.block_tokens
        begin = divided(jnp.maximum(span.start - position, 0), size)
        end = divided(jnp.minimum(span.stop - position, geometry.block_tokens) + size - 1, size)

        def attend_chunk(chunk, _):
            _attend_chunk(step, span, row_tile, row_tiles, buffer, chunk, position + chunk * size)

        lax.fori_loop(begin, end, attend_chunk, None)

    lax.fori_loop(first, last, attend_block, None)
    _finish(step, span, row_tile, row_tiles)


def _load_q(step, row_tile, row_tiles: int) -> None:
    """Turns heads, side by side along lanes, into rows of their own; starts the softmax."""
    geometry = step.walk.geometry
    q, m, l, acc = step.scratch

    def load(i, _):
        first = (row_tile + i) * ROWS
        for head, rows in heads.read(step.q, step.words, first, ROWS, turned=False):
            q[head, i, :, : geometry.head_dim] = rows.astype(q.dtype)

    lax.fori_loop(0, row_tiles, load, None)
    shape = (geometry.num_q_heads, row_tiles, ROWS)
    m[:, :row_tiles] = jnp.full((*shape, LANES), softmax.START, jnp.float32)
    l[:, :row_tiles] = jnp.zeros((*shape, LANES), jnp.float32)
    acc[:, :row_tiles] = jnp.zeros((*shape, geometry.v_lanes), jnp.float32)


def _attend_chunk(step, span: Span, row_tile, row_tiles: int, buffer, chunk, position) -> None:
    """One chunk of keys, for one kv head after another."""
    walk, geometry = step.walk, step.walk.geometry
    start, stop = walk.masks.bounds_of_all(span.first_q, span.last_q, span.start, span.stop)
    inside = (position >= start) & (position + geometry.chunk_tokens <= stop)
    # q_pos of the first row, which may be another sequence's.
    first_q = span.first_q - (span.begin - step.first_token) + row_tile * ROWS
    arguments = (step, span, row_tiles, buffer, chunk, position, first_q)

    @pl.when(inside)
    def _():
        lax.fori_loop(
            0, geometry.num_kv_heads, lambda h, _: _attend_head(h, *arguments, masked=False), None
        )

    @pl.when(jnp.logical_not(inside))
    def _():
        lax.fori_loop(
            0, geometry.num_kv_heads, lambda h, _: _attend_head(h, *arguments, masked=True), None
        )


def _attend_head(
    head, step, span: Span, row_tiles: int, buffer, chunk, position, first_q, *, masked: bool
) -> None:
    """One chunk of keys for the query heads of one kv head."""
    geometry, group = step.walk.geometry, step.walk.geometry.group
    keys, tokens = geometry.chunk_tokens, row_tiles * ROWS
    rows = group * tokens
    of_head = pl.ds(head * group, group)
    q, m, l, acc = (ref.at[of_head, pl.ds(0, row_tiles)] for ref in step.scratch)
    pages = pl.ds(chunk * geometry.chunk_pages, geometry.chunk_pages)

    def load_kv():
        kv = step.walk.buffers.at[buffer, pages, head]
        kept = (span.start - position, span.stop - position) if masked else None
        k = geometry.read(kv, 0, geometry.k_lanes)
        v = rows_kept(geometry.read(kv, geometry.v_start, 2 * geometry.head_dim), kept)
        return as_operand(k, q.dtype), as_operand(v, q.dtype)

    def joined(logits):
        if step.soft_cap is None and not step.has_slope and not masked:
            return logits
        logits = logits.reshape(group, tokens, keys)
        q_pos = first_q + lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)
        kv_pos = position + lax.broadcasted_iota(jnp.int32, (1, keys), 1)
        limits = step.walk.masks.limits(q_pos, span.start, span.stop)
        parts = []
        for g in range(group):
            slope = step.scalars[2, head * group + g] if step.has_slope else None
            part = softmax.join(logits[g], q_pos, kv_pos, soft_cap=step.soft_cap, slope=slope)
            if masked:
                part = softmax.mask(part, kv_pos, limits)
            parts.append(part)
        return jnp.concatenate(parts, axis=0)

    k, v = load_kv()
    logits = joined(product(q[...].reshape(rows, -1), k, 1) * step.scalars[0, head * group])
    weights, shrink, m_next, l_next = softmax.update(
        logits, m[...].reshape(rows, LANES), l[...].reshape(rows, LANES)
    )
    m[...], l[...] = m_next.reshape(m.shape), l_next.reshape(l.shape)
    values = product(weights.astype(q.dtype), v, 0)
    new = acc[...].reshape(rows, -1) * softmax.widened(shrink, geometry.v_lanes) + values
    acc[...] = new.reshape(*m.shape[:3], -1)


def _finish(step, span: Span, row_tile, row_tiles: int) -> None:
    """Puts output and lse of the span's tokens into the tile."""
    geometry = step.walk.geometry
    _, m, l, acc = step.scratch

    lane = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)

    def finish(i, _):
        first = (row_tile + i) * ROWS
        token = step.first_token + first + lax.broadcasted_iota(jnp.int32, (ROWS, 1), 0)
        mine = (token >= span.begin) & (token < span.end)
        rows = pl.ds(first, ROWS)
        lse = [step.lse[j, rows] for j in range(step.lse.shape[0])]

        def output(head: int) -> jax.Array:
            factor, of_head = softmax.finish(
                m[head, i], l[head, i], step.scalars[3, head], step.scalars[1, head]
            )
            register, at = divmod(head, LANES)
            lse[register] = jnp.where(mine & (lane == at), of_head, lse[register])
            values = acc[head, i] * softmax.widened(factor, geometry.v_lanes)
            values = jnp.where(factor[:, :1] != 0, values, 0.0)
            return values[:, geometry.v_offset : geometry.v_offset + geometry.head_dim]

        heads.write(step.out, step.words, first, ROWS, output, mine, turned=False)
        for j, line in enumerate(lse):
            step.lse[j, rows] = line

    lax.fori_loop(0, row_tiles, finish, None)
