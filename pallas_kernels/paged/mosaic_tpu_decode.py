"""How the TPU kernel of `paged` computes a span of one token: all heads of a block at once.

The token's query heads are rows, a kv head's group beside the next. A register of 8 rows may hold
the groups of several kv heads: it is multiplied with each one's keys, and from each product the
rows of that kv head are taken. So the softmax works on no row but the query heads.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged import mosaic_tpu_softmax as softmax
from pallas_kernels.paged.mosaic_tpu_geometry import LANES, ROWS, Geometry, divided, remainder
from pallas_kernels.paged.mosaic_tpu_walk import Span


def scratch_shapes(geometry: Geometry) -> list:
    """The token's queries, m, l, acc; a row tile of q and of out, to turn lanes into rows."""
    rows = geometry.all_decode_rows
    return [
        pltpu.VMEM((rows, geometry.k_lanes), jnp.float32),
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, geometry.v_lanes), jnp.float32),
        # One register wide: only then may a load or store begin at any row.
        pltpu.VMEM((geometry.num_q_heads * geometry.k_lanes // LANES, ROWS, LANES), jnp.float32),
        pltpu.VMEM((rows, geometry.out_lanes), jnp.float32),
        pltpu.VMEM((geometry.num_q_heads * geometry.out_lanes // LANES, ROWS, LANES), jnp.float32),
    ]


def clear(step) -> None:
    """Makes the rows between groups numbers: they are multiplied, and dropped."""
    step.scratch[0][...] = jnp.zeros_like(step.scratch[0])


def attend_span(step, span: Span) -> None:
    """Attends with one token, and puts its output and lse into the tile."""
    walk, geometry = step.walk, step.walk.geometry
    _, m, l, acc, *_ = step.scratch
    token = span.begin - step.first_token
    row_tile, row = divided(token, ROWS), remainder(token, ROWS)
    _load_q(step, row_tile, row)
    m[...] = jnp.full_like(m, softmax.START)
    l[...] = jnp.zeros_like(l)
    acc[...] = jnp.zeros_like(acc)
    first, last = walk.blocks(span)

    def attend_block(block, _):
        buffer = walk.next_block(span, block)
        position = block * geometry.block_tokens
        start, stop = walk.masks.bounds_of_all(span.first_q, span.last_q, span.start, span.stop)
        inside = (position >= start) & (position + geometry.block_tokens <= stop)

        @pl.when(inside)
        def _():
            _attend_block(step, span, buffer, position, masked=False)

        @pl.when(jnp.logical_not(inside))
        def _():
            _attend_block(step, span, buffer, position, masked=True)

    lax.fori_loop(first, last, attend_block, None)
    _finish(step, row_tile, row)


def _load_q(step, row_tile, row) -> None:
    """Turns the token's heads, side by side along lanes, into rows."""
    geometry, q, tile = step.walk.geometry, step.scratch[0], step.scratch[4]
    for i, at, from_lanes, lanes in _registers(geometry, geometry.k_lanes):
        tile[i] = step.q[row_tile, :, from_lanes].astype(jnp.float32)
        q[at : at + 1, lanes] = tile[i, pl.ds(row, 1)]


def _registers(geometry: Geometry, width: int):
    """For each register of a token's heads, `width` lanes each, side by side.

    Its number, the row that its head has, its lanes among all heads', and among its head's.
    """
    for i in range(geometry.num_q_heads * width // LANES):
        head, lane = divmod(i * LANES, width)
        yield (
            i,
            geometry.decode_row(head),
            slice(i * LANES, (i + 1) * LANES),
            slice(lane, lane + LANES),
        )


def _attend_block(step, span: Span, buffer, position, *, masked: bool) -> None:
    """One block for all heads."""
    geometry = step.walk.geometry
    q, m, l, acc = step.scratch[:4]
    keys = geometry.block_tokens
    kv_pos = position + lax.broadcasted_iota(jnp.int32, (8, keys), 1)
    live = None
    if masked:
        at = position + lax.broadcasted_iota(jnp.int32, (keys, 1), 0)
        live = (at >= span.start) & (at < span.stop)

    def logits_of(head, rows):
        k = step.walk.buffers[buffer, :, head, :, : geometry.k_lanes]
        return product(rows, k.reshape(keys, -1).astype(step.q.dtype), 1)

    def values_of(head, weights):
        v = step.walk.buffers[buffer, :, head, :, geometry.v_start :].reshape(keys, -1)
        return product(weights, kept(v, live, step.q.dtype), 0)

    logits = _by_kv_head(geometry, q[...].astype(step.q.dtype), logits_of)
    logits = logits * step.rows[0][:, :1]
    slope = step.rows[2][:, :1] if step.has_slope else None
    logits = softmax.join(logits, span.first_q, kv_pos[:1], soft_cap=step.soft_cap, slope=slope)
    if masked:
        logits = softmax.mask(
            logits, span.first_q, kv_pos[:1], span.start, span.stop, step.walk.masks
        )
    weights, shrink, m[...], l[...] = softmax.update(logits, m[...], l[...])
    values = _by_kv_head(geometry, weights.astype(step.q.dtype), values_of)
    acc[...] = acc[...] * softmax.widened(shrink, geometry.v_lanes) + values


def product(x, y, contracted: int):
    """X [rows, n] times y, summed over x's lanes and y's dimension `contracted`; float32."""
    return lax.dot_general(
        x, y, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
    )  # fmt: skip


def kept(v, live, dtype):
    """Values as operands; 0 where `live` is False (what lies there may be NaN)."""
    if live is None:
        return v.astype(dtype)
    return jnp.where(live, v.astype(jnp.float32), 0.0).astype(dtype)


def _by_kv_head(geometry: Geometry, x: jax.Array, f) -> jax.Array:
    """f(kv head, rows of x) for the rows of each kv head, put together."""
    size = geometry.decode_rows
    tile = max(size, 8)
    parts = []
    for first in range(0, geometry.all_decode_rows, tile):
        rows = x[first : first + tile]
        heads = range(first // size, min((first + tile) // size, geometry.num_kv_heads))
        part = f(heads[0], rows)
        row = lax.broadcasted_iota(jnp.int32, part.shape, 0)
        for i, head in list(enumerate(heads))[1:]:
            part = jnp.where(row >= i * size, f(head, rows), part)
        parts.append(part)
    return jnp.concatenate(parts, axis=0) if len(parts) > 1 else parts[0]


def _finish(step, row_tile, row) -> None:
    """Puts output and lse into the token's row of the tile."""
    geometry = step.walk.geometry
    _, m, l, acc, _, rows, tile = step.scratch
    factor, lse = softmax.finish(m[...], l[...], step.rows[3], step.rows[1])
    seen = factor[:, :1] != 0
    values = jnp.where(seen, acc[...] * softmax.widened(factor, geometry.v_lanes), 0.0)
    rows[:, : geometry.v_lanes] = values
    mine = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0) == row
    for i, at, to_lanes, lanes in _registers(geometry, geometry.out_lanes):
        tile[i, pl.ds(row, 1)] = rows[at : at + 1, lanes]
        old = step.out[row_tile, :, to_lanes].astype(jnp.float32)
        step.out[row_tile, :, to_lanes] = jnp.where(mine, tile[i], old).astype(step.out.dtype)
    step.lse[row_tile] = jnp.where(
        lax.broadcasted_iota(jnp.int32, (ROWS, geometry.lse_lanes), 0) == row,
        _as_lanes(geometry, lse), step.lse[row_tile],
    )  # fmt: skip


def _as_lanes(geometry: Geometry, lse: jax.Array) -> jax.Array:
    """[rows, 128], the same along lanes, as [1, lse_lanes] by query head."""
    shape = (geometry.all_decode_rows, geometry.lse_lanes)
    row, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    size, group = geometry.decode_rows, geometry.group
    head = jnp.where(lax.rem(row, size) < group, row // size * group + lax.rem(row, size), -1)
    spread = softmax.widened(jnp.maximum(lse, -1e38), geometry.lse_lanes)  # no -inf * 0
    line = jnp.sum(jnp.where(head == lane, spread, 0.0), axis=0, keepdims=True)
    return jnp.where(line <= -1e38, -jnp.inf, line)
