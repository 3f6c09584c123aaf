"""How the TPU kernel of `paged` computes a span of one token: all heads of a block at once.

The token's query heads are rows, a kv head's group beside the next. A register of 8 rows may hold
the groups of several kv heads: it is multiplied with each one's keys, and from each product the
rows of that kv head are taken. So the softmax works on no row but the query heads.

What bounds it is how fast keys and values are loaded into the matrix unit. A head of 64 leaves half
of it empty: two kv heads are put side by side first, the queries of the second in the upper lanes.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged import mosaic_tpu_softmax as softmax
from pallas_kernels.paged.mosaic_tpu_geometry import LANES, Geometry
from pallas_kernels.paged.mosaic_tpu_walk import Span


def scratch_shapes(geometry: Geometry, cache_dtype) -> list:
    """The token's queries, m, l, acc, by row; a block's values where heads come in twos."""
    rows = geometry.all_decode_rows
    pairs = geometry.num_kv_heads // 2 if geometry.heads_at_once == 2 else 0
    values = [pltpu.VMEM((pairs, geometry.block_tokens, LANES), cache_dtype)] if pairs else []
    return [
        pltpu.VMEM((rows, geometry.k_lanes), jnp.float32),
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, geometry.v_lanes), jnp.float32),
        *values,
    ]


def begin(step) -> None:
    """Makes lanes that are no key's, and rows between groups, numbers: they are multiplied, too."""
    step.scratch[0][...] = jnp.zeros_like(step.scratch[0])


def attend_span(step, span: Span, before) -> jax.Array:
    """Attends with one token, and finishes the one before: the two wait for different things.

    Args:
        step, span: what is computed.
        before: the token, counted from the tile's first, that `finish` is due for; -1 = none.

    Returns:
        the token that it is due for now.
    """
    walk, geometry = step.walk, step.walk.geometry
    _, m, l, acc = step.scratch[:4]
    token = span.begin - step.first_token
    # Where there is none, what comes out is overwritten when this token is finished.
    finish(step, jnp.where(before < 0, token, before))
    _load_q(step, token)
    m[...] = jnp.full_like(m, softmax.START)
    l[...] = jnp.zeros_like(l)
    acc[...] = jnp.zeros_like(acc)
    first, last = walk.blocks(span)
    start, stop = walk.masks.bounds_of_all(span.first_q, span.last_q, span.start, span.stop)

    def attend_block(block, _):
        position = block * geometry.block_tokens
        inside = (position >= start) & (position + geometry.block_tokens <= stop)
        ahead = walk.whole_block_ahead()

        @pl.when(inside & ahead)
        def _():
            buffer, start = walk.next_whole_block()
            _attend_block(step, span, buffer, position, geometry.block_pages, start=start)

        @pl.when(jnp.logical_not(inside & ahead))
        def _():
            buffer = walk.next_block(span, block)
            _attend_part(step, span, buffer, position)

    lax.fori_loop(first, last, attend_block, None)
    return token


def _attend_part(step, span: Span, buffer, position) -> None:
    """A block with keys that are not to be seen: no more of its pages than some quarters."""
    pages = step.walk.geometry.block_pages
    quarter = max(1, pages // 4)
    sizes = range(quarter, pages + 1, quarter)
    used = span.stop - position
    below = jnp.int32(-1)
    for size in sizes:
        tokens = size * step.walk.geometry.page_size
        fits = (used > below) & ((used <= tokens) | (size == pages))

        def attend(size=size):
            _attend_block(step, span, buffer, position, size)

        pl.when(fits)(attend)
        below = jnp.int32(tokens)


def _load_q(step, token) -> None:
    """Puts the token's heads into rows, each kv head's group where it belongs."""
    geometry, q = step.walk.geometry, step.scratch[0]
    rows = step.q[token].astype(jnp.float32)
    for of_heads, of_rows in _groups(geometry):
        q[of_rows, : geometry.head_dim] = rows[of_heads]
    if geometry.heads_at_once == 2:
        lane = lax.broadcasted_iota(jnp.int32, q.shape, 1)
        low = jnp.where(lane < geometry.head_dim, q[...], 0.0)
        q[...] = jnp.where(_of_odd_heads(geometry), pltpu.roll(low, LANES // 2, 1), low)


def _groups(geometry: Geometry):
    """(query heads, rows) that lie one after another in both, as slices."""
    if geometry.decode_rows == geometry.group:
        yield slice(0, geometry.num_q_heads), slice(0, geometry.num_q_heads)
        return
    for first in range(0, geometry.num_q_heads, geometry.group):
        row = geometry.decode_row(first)
        yield slice(first, first + geometry.group), slice(row, row + geometry.group)


def _attend_block(step, span: Span, buffer, position, pages: int, *, start=None) -> None:
    """The first pages of a block, for all heads.

    Args:
        step, span, buffer, position, pages: which.
        start: of `next_whole_block`: the block is whole and seen, copies are started beside it;
            None = it is masked.
    """
    geometry = step.walk.geometry
    q, m, l, acc = step.scratch[:4]
    buffers = step.walk.buffers.at[buffer, pl.ds(0, pages)]
    keys, at_once = pages * geometry.page_size, geometry.heads_at_once
    kv_pos = position + lax.broadcasted_iota(jnp.int32, (1, keys), 1)
    kept = None if start is not None else (span.start - position, span.stop - position)
    parts = 2 * geometry.num_kv_heads // at_once

    def logits_of(unit, rows):
        if start is not None:
            start(unit, parts)
        if at_once == 2:
            k = _keys_of_two(step, buffers, unit)
        else:
            k = geometry.read(buffers.at[:, unit], 0, geometry.k_lanes)
        return product(rows, k.astype(step.q.dtype), 1)

    def values_of(unit, weights):
        if start is not None:
            start(parts // 2 + unit, parts)
        if at_once == 2:
            v = step.scratch[4][unit, :keys]
        else:
            v = geometry.read(buffers.at[:, unit], geometry.v_start, 2 * geometry.head_dim)
        return product(weights, rows_kept(v, kept).astype(step.q.dtype), 0)

    logits = _by_unit(geometry, q[...].astype(step.q.dtype), logits_of)
    logits = logits * step.rows[0][:, :1]
    slope = step.rows[2][:, :1] if step.has_slope else None
    logits = softmax.join(logits, span.first_q, kv_pos, soft_cap=step.soft_cap, slope=slope)
    if kept is not None:
        limits = step.walk.masks.limits(span.first_q, span.start, span.stop)
        logits = softmax.mask(logits, kv_pos, limits)
    weights, shrink, m[...], l[...] = softmax.update(logits, m[...], l[...])
    values = _by_unit(geometry, weights.astype(step.q.dtype), values_of)
    acc[...] = acc[...] * softmax.widened(shrink, geometry.v_lanes) + values


def _keys_of_two(step, buffers, pair: int) -> jax.Array:
    """Keys of two kv heads, even | odd in 128 lanes; their values, odd | even, go to scratch.

    Lanes are turned once for both.
    """
    geometry, values = step.walk.geometry, step.scratch[4]
    even, odd = (
        pltpu.bitcast(geometry.read(buffers.at[:, 2 * pair + i], 0, LANES), jnp.int32)
        for i in range(2)
    )
    odd = pltpu.roll(odd, LANES // 2, 1)
    is_low = lax.broadcasted_iota(jnp.int32, even.shape, 1) < LANES // 2
    found = pltpu.bitcast(jnp.where(is_low, odd, even), buffers.dtype)
    values[pair, : found.shape[0]] = found
    return pltpu.bitcast(jnp.where(is_low, even, odd), buffers.dtype)


def product(x, y, contracted: int):
    """X [rows, n] times y, summed over x's lanes and y's dimension `contracted`; float32."""
    return lax.dot_general(
        x, y, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
    )  # fmt: skip


def rows_kept(v: jax.Array, kept) -> jax.Array:
    """Values with rows outside [begin, end) made 0, as bits (what lies there may be NaN).

    Several rows of a narrow dtype share a 32-bit word.
    """
    if kept is None:
        return v
    packed = 4 // v.dtype.itemsize
    words = pltpu.bitcast(v, jnp.int32)
    first_row = lax.broadcasted_iota(jnp.int32, (words.shape[0], 1), 0) * packed
    bits = jnp.zeros_like(first_row)
    for i in range(packed):
        row = first_row + i
        mine = ((1 << (32 // packed)) - 1) << (i * 32 // packed)
        mine = mine - (1 << 32) if mine >= 1 << 31 else mine
        bits |= jnp.where((row >= kept[0]) & (row < kept[1]), jnp.int32(mine), 0)
    return pltpu.bitcast(words & bits, v.dtype)


def _by_unit(geometry: Geometry, x: jax.Array, f) -> jax.Array:
    """f(unit, rows of x) for the rows of each unit, put together; a unit is `heads_at_once`."""
    size = geometry.decode_rows * geometry.heads_at_once
    tile = max(size, 8)
    parts = []
    for first in range(0, geometry.all_decode_rows, tile):
        rows = x[first : first + tile]
        last = min((first + tile) // size, geometry.num_kv_heads // geometry.heads_at_once)
        units = range(first // size, last)
        part = f(units[0], rows)
        row = lax.broadcasted_iota(jnp.int32, part.shape, 0)
        for i, unit in list(enumerate(units))[1:]:
            part = jnp.where(row >= i * size, f(unit, rows), part)
        parts.append(part)
    return jnp.concatenate(parts, axis=0) if len(parts) > 1 else parts[0]


def _of_odd_heads(geometry: Geometry) -> jax.Array:
    """[rows, 128] of bool: rows of the second kv head of two."""
    row = lax.broadcasted_iota(jnp.int32, (geometry.all_decode_rows, LANES), 0)
    return lax.shift_right_logical(row, geometry.decode_rows.bit_length() - 1) & 1 != 0


def finish(step, token) -> None:
    """Puts a token's output and lse into the tile."""
    geometry = step.walk.geometry
    _, m, l, acc = step.scratch[:4]
    factor, lse = softmax.finish(m[...], l[...], step.rows[3], step.rows[1])
    values = acc[...] * softmax.widened(factor, geometry.v_lanes)
    values = jnp.where(factor[:, :1] != 0, values, 0.0)
    if geometry.heads_at_once == 2:
        values = jnp.where(_of_odd_heads(geometry), values, pltpu.roll(values, LANES // 2, 1))
        values = values[:, : geometry.head_dim]
    else:
        values = values[:, geometry.v_offset : geometry.v_offset + geometry.head_dim]
    rows = [values[of_rows] for _, of_rows in _groups(geometry)]
    rows = jnp.concatenate(rows, axis=0) if len(rows) > 1 else rows[0]
    step.out[token] = rows.astype(step.out.dtype)
    line = _as_lanes(geometry, lse)
    for i in range(step.lse.shape[0]):
        step.lse[i, pl.ds(token, 1)] = line[:, i * LANES : (i + 1) * LANES]


def _as_lanes(geometry: Geometry, lse: jax.Array) -> jax.Array:
    """[rows, 128], the same along lanes, as [1, lse_lanes] by query head."""
    shape = (geometry.all_decode_rows, geometry.lse_lanes)
    row, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    size, group = geometry.decode_rows, geometry.group
    head = jnp.where(lax.rem(row, size) < group, row // size * group + lax.rem(row, size), -1)
    spread = softmax.widened(jnp.maximum(lse, -1e38), geometry.lse_lanes)  # no -inf * 0
    line = jnp.sum(jnp.where(head == lane, spread, 0.0), axis=0, keepdims=True)
    return jnp.where(line <= -1e38, -jnp.inf, line)
