"""How the TPU kernel of `paged` computes a span of several tokens: one kv head after another.

The rows of one kv head are its group's query heads, each with the tokens of the tile (16 for short
spans). Rows of the tile that are not the span's are computed with the others, and dropped. For
short spans the products of one kv head are made beside the softmax of the one before.
"""

from typing import Any, NamedTuple

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
    """q, m, l, acc: [num_q_heads, row tiles, 16, lanes]; the logits of two kv heads."""
    alone = mosaic_tpu_prompt.serves(geometry.tile_tokens)
    row_tiles = 1 if alone else geometry.tile_tokens // ROWS
    shape = (geometry.num_q_heads, row_tiles, ROWS)
    logits = pltpu.VMEM((geometry.group * ROWS, geometry.chunk_tokens), jnp.float32)
    return [
        pltpu.VMEM((*shape, geometry.row_lanes), dtype),
        pltpu.VMEM((*shape, LANES), jnp.float32),
        pltpu.VMEM((*shape, LANES), jnp.float32),
        pltpu.VMEM((*shape, geometry.row_lanes), jnp.float32),
        [logits] * (2 * alone),
    ]


def begin(step) -> None:
    """Makes lanes that are no key's numbers: they are multiplied, too."""
    if step.walk.geometry.row_lanes > step.walk.geometry.head_dim:
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
    q, m, l, acc, _ = step.scratch

    def load(i, _):
        first = (row_tile + i) * ROWS
        for head, rows in heads.read(step.q, step.words, first, ROWS, turned=False):
            q[head, i, :, : geometry.head_dim] = rows.astype(q.dtype)

    lax.fori_loop(0, row_tiles, load, None)
    shape = (geometry.num_q_heads, row_tiles, ROWS)
    m[:, :row_tiles] = jnp.full((*shape, LANES), softmax.START, jnp.float32)
    l[:, :row_tiles] = jnp.zeros((*shape, LANES), jnp.float32)
    acc[:, :row_tiles] = jnp.zeros((*shape, geometry.row_lanes), jnp.float32)


def _attend_chunk(step, span: Span, row_tile, row_tiles: int, buffer, chunk, position) -> None:
    """One chunk of keys, for one kv head after another."""
    walk, geometry = step.walk, step.walk.geometry
    start, stop = walk.masks.bounds_of_all(span.first_q, span.last_q, span.start, span.stop)
    inside = (position >= start) & (position + geometry.chunk_tokens <= stop)
    # q_pos of the first row, which may be another sequence's.
    first_q = span.first_q - (span.begin - step.first_token) + row_tile * ROWS
    keys = _Keys(buffer, chunk, position, first_q, row_tiles)
    pl.when(inside)(lambda: _attend_heads(step, span, keys))
    pl.when(jnp.logical_not(inside))(lambda: _attend_heads(step, span, keys._replace(masked=True)))


class _Keys(NamedTuple):
    """One chunk of keys, and the rows that attend to it.

    Attributes:
        buffer, chunk: where the keys lie.
        position: of the first key.
        first_q: position of the first row's query.
        row_tiles: of the rows; static.
        masked: whether some query does not see some key; static.
    """

    buffer: Any
    chunk: Any
    position: Any
    first_q: Any
    row_tiles: int
    masked: bool = False

    def at(self, step, head) -> Any:
        """Reference to the pages of one kv head."""
        pages = step.walk.geometry.chunk_pages
        return step.walk.buffers.at[self.buffer, pl.ds(self.chunk * pages, pages), head]


def _attend_heads(step, span: Span, keys: _Keys) -> None:
    """Every kv head; where there are slots for logits, products beside another head's softmax."""
    heads, slots = step.walk.geometry.num_kv_heads, step.scratch[4]
    if not slots:

        def one(head, _):
            _weigh(step, span, keys, head, _logits(step, keys, head))

        lax.fori_loop(0, heads, one, None)
        return
    even, odd = slots

    def two(i, _):
        odd[...] = _logits(step, keys, 2 * i + 1)
        _weigh(step, span, keys, 2 * i, even[...])
        even[...] = _logits(step, keys, jnp.minimum(2 * i + 2, heads - 1))
        _weigh(step, span, keys, 2 * i + 1, odd[...])

    even[...] = _logits(step, keys, 0)
    lax.fori_loop(0, heads // 2, two, None)
    if heads % 2:
        _weigh(step, span, keys, heads - 1, even[...])


def _of_head(step, keys: _Keys, head) -> list:
    """References to q, m, l and acc of one kv head's query heads."""
    group = step.walk.geometry.group
    here = pl.ds(head * group, group), pl.ds(0, keys.row_tiles)
    return [ref.at[here] for ref in step.scratch[:4]]


def _logits(step, keys: _Keys, head) -> jax.Array:
    """[rows, keys]: keys times queries of one kv head."""
    geometry, (q, *_) = step.walk.geometry, _of_head(step, keys, head)
    k = geometry.keys(keys.at(step, head))
    rows = q[...].reshape(-1, geometry.row_lanes)
    return product(rows, as_operand(k, q.dtype), 1) * step.scalars[0, head * geometry.group]


def _weigh(step, span: Span, keys: _Keys, head, logits) -> None:
    """Makes the logits of one kv head weights, and adds the values that they weigh."""
    geometry, rows = step.walk.geometry, logits.shape[0]
    q, m, l, acc = _of_head(step, keys, head)
    kept = (span.start - keys.position, span.stop - keys.position) if keys.masked else None
    v = geometry.values(keys.at(step, head))
    v = as_operand(rows_kept(v, kept), q.dtype)
    weights, shrink, m_next, l_next = softmax.update(
        _joined(step, span, keys, head, logits), m[...].reshape(rows, LANES),
        l[...].reshape(rows, LANES),
    )  # fmt: skip
    m[...], l[...] = m_next.reshape(m.shape), l_next.reshape(l.shape)
    values = product(weights.astype(q.dtype), v, 0)
    new = acc[...].reshape(rows, -1) * softmax.widened(shrink, geometry.row_lanes) + values
    acc[...] = new.reshape(acc.shape)


def _joined(step, span: Span, keys: _Keys, head, logits) -> jax.Array:
    """Soft cap, ALiBi and masks, as far as they are asked for."""
    if step.soft_cap is None and not step.has_slope and not keys.masked:
        return logits
    group, tokens = step.walk.geometry.group, keys.row_tiles * ROWS
    q_pos = keys.first_q + lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)
    kv_pos = keys.position + lax.broadcasted_iota(jnp.int32, (1, logits.shape[1]), 1)
    limits = step.walk.masks.limits(q_pos, span.start, span.stop)
    parts = []
    for g in range(group):
        slope = step.scalars[2, head * group + g] if step.has_slope else None
        part = logits[g * tokens : (g + 1) * tokens]
        part = softmax.join(part, q_pos, kv_pos, soft_cap=step.soft_cap, slope=slope)
        parts.append(softmax.mask(part, kv_pos, limits) if keys.masked else part)
    return jnp.concatenate(parts, axis=0)


def _finish(step, span: Span, row_tile, row_tiles: int) -> None:
    """Puts output and lse of the span's tokens into the tile."""
    geometry = step.walk.geometry
    _, m, l, acc, _ = step.scratch

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
            values = acc[head, i] * softmax.widened(factor, geometry.row_lanes)
            values = jnp.where(factor[:, :1] != 0, values, 0.0)
            return values[:, geometry.v_offset : geometry.v_offset + geometry.head_dim]

        heads.write(step.out, step.words, first, ROWS, output, mine, turned=False)
        for j, line in enumerate(lse):
            step.lse[j, rows] = line

    lax.fori_loop(0, row_tiles, finish, None)
