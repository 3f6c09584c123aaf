"""How the TPU kernel of `paged` computes decodes, spans of a token or few: all heads at once.

A decode's query heads are rows, a kv head's group beside the next, of each token. A register of 8
rows may hold the groups of several kv heads: it is multiplied with each one's keys, and from each
product the rows of that kv head are taken. So the softmax works on no row but the query heads. A
decode that has fewer tokens than another may have computes its last one again.

What bounds it is how fast keys and values are loaded into the matrix unit. A head of 64 leaves half
of it empty: two kv heads are put side by side first, the queries of the second in the upper lanes.

So that this loading never waits for a softmax, a step takes the parts of a whole buffer, of
whichever tokens come, as one run of instructions without a branch, and weighs a step ahead::

    step        k                             k + 1
    q @ K.T   | 0 1 of k + 1                | 0 1 of k + 2       (drawn: 2 parts a step, 4 buffers)
    softmax   |    0 1 of k + 1             |    0 1 of k + 2
    p @ V     |        0 1 of k             |        0 1 of k + 1
    DMA       |        parts of k + 3       |        parts of k + 4
    divide    | all of k - 1                | all of k

For the compiler a copy may go where keys are read, and neither passes the other. So copies are
started when the keys of k + 1 were read; those of heads in twos a few after each piece of the keys,
for there the matrix unit has most to do, and the scalar unit nothing.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged import mosaic_tpu_softmax as softmax
from pallas_kernels.paged.mosaic_tpu_geometry import LANES, Geometry
from pallas_kernels.paged.mosaic_tpu_walk import Part, Span
from pallas_kernels.tpu_operands import as_operand

PIECE_TOKENS = 256  # keys of two heads that are read before copies are started


def scratch_shapes(geometry: Geometry, cache_dtype, q_dtype) -> list:
    """`Scratch`'s."""
    chunks, rows = geometry.chunks, geometry.all_decode_rows
    pairs = geometry.num_kv_heads // 2 if geometry.heads_at_once == 2 else 0
    values = (2, chunks, pairs, geometry.chunk_tokens, LANES) if pairs else (1, 1, 1, 8, LANES)
    return [
        pltpu.VMEM((chunks, rows, geometry.row_lanes), jnp.float32),
        pltpu.VMEM((chunks, rows, geometry.chunk_tokens), q_dtype),
        pltpu.VMEM((chunks, rows, LANES), jnp.float32),
        pltpu.VMEM((2, chunks, rows, LANES), jnp.float32),
        pltpu.VMEM((2, chunks, rows, LANES), jnp.float32),
        pltpu.VMEM((chunks, rows, geometry.row_lanes), jnp.float32),
        pltpu.VMEM(values, cache_dtype),
        pltpu.SMEM((chunks,), jnp.int32),
        pltpu.SMEM((chunks,), jnp.int32),
    ]


class Scratch(NamedTuple):
    """What decodes keep, references.

    Attributes:
        q: queries by row, of each chunk.
        weights, shrink: of each chunk of the next step.
        m, l: after each chunk, by row, of the last step and of the next one.
        acc: after each chunk of the last step, by row.
        values: of each chunk, where heads come in twos; of even and of odd steps.
        tokens, counts: of each chunk of the last step, the first token and how many.
    """

    q: Any
    weights: Any
    shrink: Any
    m: Any
    l: Any
    acc: Any
    values: Any
    tokens: Any
    counts: Any


def begin(step) -> None:
    """Makes lanes that are no key's, and rows between groups, numbers: they are multiplied, too."""
    for scratch in Scratch(*step.scratch)[:6]:
        scratch[...] = jnp.zeros_like(scratch)


def attend_spans(step, span: Span) -> Span:
    """Attends with the tokens of decodes, from this one on; returns the last one's span."""
    walk, scratch = step.walk, Scratch(*step.scratch)
    first = walk.first_of(span)
    buffer = walk.wait_step()
    for i in range(walk.geometry.chunks):  # what is written there now is overwritten
        scratch.tokens[i], scratch.counts[i] = span.begin - step.first_token, jnp.int32(1)
    _weigh(step, buffer, first, jnp.int32(0))()

    def attend_step(buffer, side):
        goes_on = walk.goes_on(buffer)
        beside = goes_on & walk.step_ahead()
        pl.when(jnp.logical_not(beside))(walk.start_next)
        following = lax.cond(goes_on, walk.wait_step, lambda: buffer)

        @pl.when(beside)
        def _():
            _attend(step, buffer, following, first, side, walk.start_beside())
            walk.move_on()

        alone = goes_on & jnp.logical_not(beside)
        pl.when(alone)(lambda: _attend(step, buffer, following, first, side))
        pl.when(jnp.logical_not(goes_on))(lambda: _attend(step, buffer, None, first, side))
        return following, goes_on, 1 - side

    last, _, _ = lax.while_loop(
        lambda state: state[1],
        lambda state: attend_step(state[0], state[2]),
        (buffer, jnp.bool_(True), jnp.int32(0)),
    )
    _finish_all(step)
    part = walk.part_in(last, walk.geometry.chunks - 1, first)
    return walk.span(part.seq, part.token)


def _load_q(step, i: int, part: Part) -> jax.Array:
    """The tokens' heads in rows, each kv head's group where it belongs, by way of scratch i."""
    geometry, q = step.walk.geometry, Scratch(*step.scratch).q.at[i]
    for at, token in _tokens(geometry, part.token - step.first_token, part.count):
        rows = step.q[token].astype(jnp.float32)
        for of_heads, of_rows in _groups(geometry, at):
            q[of_rows, : geometry.head_dim] = rows[of_heads]
    if geometry.heads_at_once == 1:
        return q[...].astype(step.q.dtype)
    low = q[...]
    rolled = pltpu.roll(low, LANES // 2, 1)
    return jnp.where(_of_odd_heads(geometry), rolled, low).astype(step.q.dtype)


def _tokens(geometry: Geometry, token, count):
    """(place, token) of all that a decode may have; past its last one, that one again.

    The last place comes first, so that of what is written to a token its own place is the last.
    """
    for at in reversed(range(geometry.decode_tokens)):
        yield at, token + (at if at == 0 else jnp.minimum(at, count - 1))


def _groups(geometry: Geometry, at: int):
    """(query heads, rows) of a token that lie one after another in both, as slices."""
    if geometry.decode_rows == geometry.group:
        yield slice(0, geometry.num_q_heads), slice(0, geometry.num_q_heads)
        return
    for first in range(0, geometry.num_q_heads, geometry.group):
        row = geometry.decode_row(first, at)
        yield slice(first, first + geometry.group), slice(row, row + geometry.group)


def _attend(step, buffer, following, first, side, copies: Iterable[None] = ()) -> None:
    """A step, without a branch: the next one's parts are weighed, then this one's values added.

    So no product waits for a softmax. Tokens are written in the next step, for divisions take long:
    each part's, of which a token's last one stays.

    Args:
        step, buffer, following: this step's buffer, and the next one's; None = none follows.
        first: of `Walk.first_of`.
        side: of the values that the step before has put in scratch.
        copies: of `start_beside`: what is started beside it.
    """
    walk, scratch = step.walk, Scratch(*step.scratch)
    chunks = walk.geometry.chunks
    _finish_all(step)
    scratch.m[0], scratch.l[0] = scratch.m[1], scratch.l[1]
    weights, shrink, acc = scratch.weights[...], scratch.shrink[...], scratch.acc[chunks - 1]
    keep = None if following is None else _weigh(step, following, first, 1 - side, copies)
    for i in range(chunks):
        part = walk.part_in(buffer, i, first)
        acc = _add_values(step, part, buffer, i, side, weights[i], shrink[i], acc)
        scratch.acc[i], scratch.tokens[i] = acc, part.token - step.first_token
        scratch.counts[i] = jnp.int32(part.count)
    if keep is not None:
        keep()


def _weigh(step, buffer, first, side, copies: Iterable[None] = ()) -> Callable[[], None]:
    """Weighs the keys of a step; returns what puts the weights where the next step finds them.

    Values of heads in twos go to this side of the scratch. Starts all copies.
    """
    walk, scratch = step.walk, Scratch(*step.scratch)
    chunks = walk.geometry.chunks
    parts = [walk.part_in(buffer, i, first) for i in range(chunks)]
    q = [_load_q(step, i, part) for i, part in enumerate(parts)]
    logits = [_logits(step, part, buffer, i, side, q[i], copies) for i, part in enumerate(parts)]
    _start(copies, None)
    m, l = scratch.m[1, chunks - 1], scratch.l[1, chunks - 1]
    found = []
    for part, products in zip(parts, logits, strict=True):
        found.append(_softmax(step, part, products, m, l))
        m, l = found[-1][2:]

    def keep() -> None:
        for i, (weights, shrink, m, l) in enumerate(found):
            scratch.weights[i], scratch.shrink[i] = weights, shrink
            scratch.m[1, i], scratch.l[1, i] = m, l

    return keep


def _finish_all(step) -> None:
    """Writes what each part of the last step has come to."""
    scratch = Scratch(*step.scratch)
    for i in range(step.walk.geometry.chunks):
        tokens = scratch.tokens[i], scratch.counts[i]
        _finish(step, *tokens, scratch.m[0, i], scratch.l[0, i], scratch.acc[i])


def _start(copies: Iterable[None], count: int | None) -> None:
    """Starts so many copies; None = all that are left."""
    for _ in itertools.islice(copies, count):
        pass


def _logits(step, part: Part, buffer, i: int, side, q, copies: Iterable[None]) -> jax.Array:
    """Products of the keys of a part, chunk i of a buffer, with its token's queries."""
    geometry, pages = step.walk.geometry, step.walk.geometry.chunk_pages
    buffers = step.walk.buffers.at[buffer, pl.ds(i * pages, pages)]

    def logits_of(unit, rows):
        if geometry.heads_at_once == 2:
            k, v = _keys_and_values_of_two(geometry, buffers, unit, copies)
            Scratch(*step.scratch).values[side, i, unit] = rows_kept(v, _kept(step, part))
        else:
            k = geometry.keys(buffers.at[:, unit])
        return product(rows, as_operand(k, step.q.dtype), 1)

    return _by_unit(geometry, q, logits_of)


def _place(geometry: Geometry) -> jax.Array | int:
    """[rows, 1]: the place of each row's token in a decode."""
    if geometry.decode_tokens == 1:
        return 0
    row = lax.broadcasted_iota(jnp.int32, (geometry.all_decode_rows, 1), 0)
    return lax.rem(row, geometry.decode_rows) // geometry.group


def _kept(step, part: Part) -> tuple[jax.Array | None, jax.Array]:
    """[begin, end) of the part's keys that are seen; None = from the first on."""
    begin = part.start - part.position if step.walk.masks.has_start else None
    return begin, part.stop - part.position


def _softmax(step, part: Part, logits, m, l) -> tuple[jax.Array, ...]:
    """Weights of a part, what older sums keep, m and l; at a token's first part they begin."""
    geometry = step.walk.geometry
    is_first = part.number == part.first
    m, l = jnp.where(is_first, softmax.START, m), jnp.where(is_first, 0.0, l)
    logits = logits * step.rows[0][:, :1]
    kv_pos = part.position + lax.broadcasted_iota(jnp.int32, (1, geometry.chunk_tokens), 1)
    slope = step.rows[2][:, :1] if step.has_slope else None
    q_pos = part.q_pos + _place(geometry)
    logits = softmax.join(logits, q_pos, kv_pos, soft_cap=step.soft_cap, slope=slope)
    limits = step.walk.masks.limits(q_pos, part.start, part.stop)
    logits = softmax.mask(logits, kv_pos, limits)
    weights, shrink, m, l = softmax.update(logits, m, l, by_lane=True)
    return weights.astype(step.q.dtype), jnp.where(is_first, 0.0, shrink), m, l


def _add_values(step, part: Part, buffer, i: int, side, weights, shrink, acc) -> jax.Array:
    """Adds the weighted values of a part, chunk i of a buffer, to what `shrink` keeps of acc."""
    geometry, pages = step.walk.geometry, step.walk.geometry.chunk_pages

    def values_of(unit, rows):
        if geometry.heads_at_once == 2:
            v = Scratch(*step.scratch).values[side, i, unit]
        else:
            there = step.walk.buffers.at[buffer, pl.ds(i * pages, pages), unit]
            v = rows_kept(geometry.values(there), _kept(step, part))
        return product(rows, as_operand(v, step.q.dtype), 0)

    shrink = softmax.widened(shrink, geometry.row_lanes)
    kept = jnp.where(shrink == 0, 0.0, acc * shrink)  # even if another token's are no numbers
    return kept + _by_unit(geometry, weights, values_of)


def _keys_and_values_of_two(
    geometry: Geometry, buffers, pair: int, copies: Iterable[None]
) -> tuple[jax.Array, jax.Array]:
    """Keys of two kv heads, even | odd in 128 lanes, and their values, odd | even.

    Lanes are turned once for both. Copies are started after each piece of them: a page is read once
    for every two heads, so a quarter more than that share has them all started in time.
    """
    pages = math.gcd(geometry.chunk_pages, max(1, PIECE_TOKENS // geometry.page_size))
    copies_a_piece = -(-5 * pages // (2 * geometry.num_kv_heads))
    keys, values = [], []
    for first in range(0, geometry.chunk_pages, pages):
        even, odd = (
            pltpu.bitcast(geometry.keys(buffers.at[pl.ds(first, pages), head]), jnp.int32)
            for head in (2 * pair, 2 * pair + 1)
        )
        odd = pltpu.roll(odd, LANES // 2, 1)
        is_low = lax.broadcasted_iota(jnp.int32, even.shape, 1) < LANES // 2
        keys.append(jnp.where(is_low, even, odd))
        values.append(jnp.where(is_low, odd, even))
        _start(copies, copies_a_piece)
    keys, values = (jnp.concatenate(pieces, axis=0) for pieces in (keys, values))
    return pltpu.bitcast(keys, buffers.dtype), pltpu.bitcast(values, buffers.dtype)


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
        inside = row < kept[1] if kept[0] is None else (row >= kept[0]) & (row < kept[1])
        bits |= jnp.where(inside, jnp.int32(mine), 0)
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
    return row // geometry.decode_rows & 1 != 0


def _finish(step, first_token, count, m, l, acc) -> None:
    """Puts the tokens' outputs and lse into the tile: what their last part says stays."""
    geometry = step.walk.geometry
    l = jnp.broadcast_to(jnp.sum(l, axis=1, keepdims=True), l.shape)
    factor, lse = softmax.finish(m, l, step.rows[3], step.rows[1])
    values = acc * softmax.widened(factor, geometry.row_lanes)
    values = jnp.where(factor[:, :1] != 0, values, 0.0)
    if geometry.heads_at_once == 2:
        values = jnp.where(_of_odd_heads(geometry), values, pltpu.roll(values, LANES // 2, 1))
        values = values[:, : geometry.head_dim]
    else:
        values = values[:, geometry.v_offset : geometry.v_offset + geometry.head_dim]
    for at, token in _tokens(geometry, first_token, count):
        rows = [values[of_rows] for _, of_rows in _groups(geometry, at)]
        rows = jnp.concatenate(rows, axis=0) if len(rows) > 1 else rows[0]
        step.out[token] = rows.astype(step.out.dtype)
        line = _as_lanes(geometry, lse, at)
        for i in range(step.lse.shape[0]):
            step.lse[i, pl.ds(token, 1)] = line[:, i * LANES : (i + 1) * LANES]


def _as_lanes(geometry: Geometry, lse: jax.Array, at: int) -> jax.Array:
    """[rows, 128], the same along lanes, as [1, lse_lanes] by query head, of one token."""
    shape = (geometry.all_decode_rows, geometry.lse_lanes)
    row, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    size, group = geometry.decode_rows, geometry.group
    of_group = lax.rem(row, size) - at * group
    mine = (of_group >= 0) & (of_group < group)
    head = jnp.where(mine, row // size * group + of_group, -1)
    finite = jnp.where(lse == -jnp.inf, -1e38, lse)  # no -inf * 0; NaN stays NaN
    spread = softmax.widened(finite, geometry.lse_lanes)
    line = jnp.sum(jnp.where(head == lane, spread, 0.0), axis=0, keepdims=True)
    return jnp.where(line <= -1e38, -jnp.inf, line)
