"""How the TPU kernel of `paged` computes a span of many tokens: keys first.

Logits are [keys, columns]: a column is one query head with one token, those of a kv head's group
beside each other. So the softmax runs down registers, its maximum and sum lie along lanes, and
nothing is repeated. Queries, outputs and lse are turned once for each tile.

A group is computed at once, or in two shares where kv heads are odd. The shares of a chunk follow
one another, and chunks follow chunks over the borders of blocks, without a pause: while the weights
of one are made, the matrix unit makes the next one's logits into the other of two slots::

    share 0 of a chunk   products │ softmax, values
    share 1                         products        │ softmax, values
     ...                                                    ...
    share 0 of the next                                          products │ ...

The compiler schedules a block close to the order in which it is written, so the two alternate in
steps of keys. A chunk that some query sees only in part is computed as far as it is seen, in
quarters, with masks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged import mosaic_tpu_heads as heads
from pallas_kernels.paged import mosaic_tpu_softmax as softmax
from pallas_kernels.paged.mosaic_tpu_decode import rows_kept
from pallas_kernels.paged.mosaic_tpu_geometry import LANES, Geometry, divided
from pallas_kernels.paged.mosaic_tpu_walk import Span
from pallas_kernels.tpu_operands import as_operand

STEP = 256  # keys of a step


def serves(tile_tokens: int) -> bool:
    """Whether tiles are whole registers along lanes."""
    return tile_tokens % LANES == 0


def scratch_shapes(geometry: Geometry, dtype) -> list:
    """By share: q, m, l, acc; the logits of two of them, their maxima; lse by query head."""
    if not serves(geometry.tile_tokens):
        return []
    shares = geometry.num_kv_heads * geometry.shares
    columns = geometry.share * geometry.tile_tokens
    logits = pltpu.VMEM((geometry.chunk_tokens, columns), jnp.float32)
    largest = pltpu.VMEM((8, columns), jnp.float32)
    return [
        pltpu.VMEM((shares, geometry.row_lanes, columns), dtype),
        pltpu.VMEM((shares, 8, columns), jnp.float32),
        pltpu.VMEM((shares, 8, columns), jnp.float32),
        pltpu.VMEM((shares, geometry.head_dim, columns), jnp.float32),
        logits,
        logits,
        largest,
        largest,
        pltpu.VMEM((geometry.lse_lanes, geometry.tile_tokens), jnp.float32),
    ]


class _Keys(NamedTuple):
    """The keys of one chunk that are computed.

    Attributes:
        buffer, first_page: where they lie.
        pages: how many; static.
        position: of the first key; None = not known.
        masked: whether some query does not see some of them; static.
    """

    buffer: Any
    first_page: Any
    pages: int
    position: Any = None
    masked: bool = False

    def at(self, step, pages: tuple[int, int], share) -> Any:
        """Reference to the kv head of a share in pages [first, last) of these."""
        there = pl.ds(self.first_page + pages[0], pages[1] - pages[0])
        head = divided(share, step.walk.geometry.shares)
        return step.walk.buffers.at[self.buffer, there, head]


def begin(step) -> None:
    """Makes rows that are no key's numbers: they are multiplied, too."""
    geometry, size = step.walk.geometry, step.walk.geometry.head_dim
    if serves(geometry.tile_tokens) and geometry.row_lanes > size:
        rows = step.scratch[0].at[:, size:]
        rows[...] = jnp.zeros(rows.shape, rows.dtype)


def attend_span(step, span: Span) -> None:
    """Attends with all tokens of the tile, and keeps what is the span's."""
    walk, geometry = step.walk, step.walk.geometry
    first, last = walk.blocks(span)
    size, chunks = geometry.chunk_tokens, geometry.block_pages // geometry.chunk_pages

    def keys_of(buffer, chunk) -> _Keys:
        return _Keys(buffer, chunk * geometry.chunk_pages, geometry.chunk_pages)

    def attend_block(block, buffer):
        walk.start_next()
        position = block * geometry.block_tokens
        begin = divided(jnp.maximum(span.start - position, 0), size)
        end = divided(jnp.minimum(span.stop - position, geometry.block_tokens) + size - 1, size)
        goes_on = block + 1 < last
        following = lax.cond(goes_on, lambda: walk.wait(span, block + 1), lambda: buffer)

        def attend_chunk(chunk, _):
            inside = chunk + 1 < end
            after = keys_of(
                jnp.where(inside, buffer, following),
                jnp.where(inside, chunk + 1, jnp.where(goes_on, 0, chunk)),
            )
            keys = keys_of(buffer, chunk)._replace(position=position + chunk * size)
            _attend_chunk(step, span, keys, after, inside | goes_on)

        if chunks == 1:
            attend_chunk(0, None)
        else:
            lax.fori_loop(begin, end, attend_chunk, None)
        return following

    pl.when(last <= first)(lambda: _load_q(step))

    @pl.when(last > first)
    def _():
        buffer = walk.wait(span, first)
        begin = divided(jnp.maximum(span.start - first * geometry.block_tokens, 0), size)
        _load_q(step, lambda: _products(step, keys_of(buffer, begin), 0, 0))
        lax.fori_loop(first, last, attend_block, buffer)

    whole = span.end - span.begin == geometry.tile_tokens
    pl.when(whole)(lambda: _finish(step, span, whole=True))
    pl.when(jnp.logical_not(whole))(lambda: _finish(step, span, whole=False))


def _columns(geometry: Geometry, head: int) -> tuple[int, slice]:
    """The share that a query head is of, and its columns."""
    share, i = divmod(head, geometry.share)
    return share, slice(i * geometry.tile_tokens, (i + 1) * geometry.tile_tokens)


def _load_q(step, first_products=None) -> None:
    """Makes each head's queries columns; starts the softmax, beside the first products."""
    geometry = step.walk.geometry
    q, m, l, acc, *_ = step.scratch
    if geometry.in_columns:
        columns_of = ((head, step.q[head]) for head in range(geometry.num_q_heads))
    else:
        columns_of = heads.read(step.q, step.words, 0, geometry.tile_tokens, turned=True)
    for head, turned in columns_of:
        share, columns = _columns(geometry, head)
        if step.is_signed:
            factor = step.scalars[0, head]
            turned = turned.astype(jnp.float32) * jnp.where(
                factor < 0, -1.0, jnp.where(factor == 0, 0.0, 1.0)
            )
        q[share, : geometry.head_dim, columns] = turned.astype(q.dtype)
        if head == geometry.share - 1 and first_products is not None:
            first_products()
    m[...] = jnp.full_like(m, softmax.START)
    l[...] = jnp.zeros_like(l)
    if first_products is None:
        acc[...] = jnp.zeros_like(acc)


def _is_joined(step) -> bool:
    """Whether soft cap or ALiBi make base-2 logits before the softmax."""
    return step.has_slope or step.soft_cap is not None


def _unit(step, head):
    """What makes a kept logit of this query head a base-2 one; positive."""
    if _is_joined(step):
        return jnp.float32(1)
    factor = step.scalars[0, head]
    if not step.is_signed:
        return factor
    return jnp.where(factor == 0, 1.0, jnp.maximum(factor, -factor))


def _attend_chunk(step, span: Span, keys: _Keys, after: _Keys, goes_on) -> None:
    """One chunk, whose first share's products are made, for all shares; then the next one's.

    Args:
        step, span: what is computed.
        keys: the chunk.
        after: the next one, or any.
        goes_on: whether there is a next one.
    """
    walk, geometry = step.walk, step.walk.geometry
    start, stop = walk.masks.bounds_of_all(span.first_q, span.last_q, span.start, span.stop)
    inside = (keys.position >= start) & (keys.position + geometry.chunk_tokens <= stop)
    pl.when(inside)(lambda: _attend_shares(step, span, keys, after))
    seen = span.stop - keys.position
    below = jnp.int32(-(1 << 30))
    for pages in _parts(geometry):
        fits = (seen > below) & ((seen <= pages * geometry.page_size) | (
            pages == geometry.chunk_pages))  # fmt: skip
        part = keys._replace(pages=pages, masked=True)
        pl.when(fits & jnp.logical_not(inside))(
            lambda part=part: _attend_shares(step, span, part, None)
        )
        below = jnp.int32(pages * geometry.page_size)

    @pl.when(goes_on & jnp.logical_not(inside))
    def _():
        _products(step, after, 0, 0)


def _parts(geometry: Geometry) -> list[int]:
    """Pages of a chunk that are computed where it is seen in part: quarters of it, or pages."""
    quarter = max(1, geometry.chunk_pages // 4, LANES // geometry.page_size)
    return [*range(quarter, geometry.chunk_pages, quarter), geometry.chunk_pages]


def _attend_shares(step, span: Span, keys: _Keys, after: _Keys | None) -> None:
    """Every share of a chunk, each one's products made beside the softmax of the one before."""
    shares = step.walk.geometry.num_kv_heads * step.walk.geometry.shares

    def two(i, _):
        _step_share(step, span, keys, 2 * i, 0, keys, 2 * i + 1)
        then, next_share = keys, 2 * i + 2
        if after is not None and shares % 2 == 0:
            wraps = next_share == shares
            then = _Keys(
                jnp.where(wraps, after.buffer, keys.buffer),
                jnp.where(wraps, after.first_page, keys.first_page),
                keys.pages,
            )
            next_share = jnp.where(wraps, 0, next_share)
        _step_share(step, span, keys, 2 * i + 1, 1, then, next_share)

    if after is not None and shares % 2 == 0:
        lax.fori_loop(0, shares // 2, two, None)
        return
    lax.fori_loop(0, (shares - 1) // 2, two, None)
    if shares % 2 == 0:
        _step_share(step, span, keys, shares - 2, 0, keys, shares - 1)
        _step_share(step, span, keys, shares - 1, 1, None, 0)
        return
    # The slot of the last share is the one that the next chunk's first takes.
    _step_share(step, span, keys, shares - 1, 0, None, 0)
    if after is not None:
        _products(step, after, 0, 0)


def _steps(geometry: Geometry, pages: int):
    """[first, last) page of each step."""
    size = max(1, STEP // geometry.page_size)
    return [(i, min(i + size, pages)) for i in range(0, pages, size)]


def _dot(x, y, contracted: tuple[int, int]):
    """The product over one dimension of each, in float32."""
    return lax.dot_general(
        x, y, (((contracted[0],), (contracted[1],)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST if y.dtype == jnp.float32 else None,
    )  # fmt: skip


def _over_registers(x: jax.Array, combine) -> jax.Array:
    """[8 n, columns] as [8, columns]."""
    return combine(x.reshape(-1, 8, x.shape[-1]), axis=0)


def _products(step, keys: _Keys, share, slot: int) -> None:
    """Keys times queries of one share, all steps."""
    for i, pages in enumerate(_steps(step.walk.geometry, keys.pages)):
        _product(step, keys, pages, share, slot, is_first=i == 0)


def _product(step, keys: _Keys, pages, share, slot: int, *, is_first: bool) -> None:
    """Keys of a step times queries, and the largest logits so far, spread over sublanes."""
    geometry, q = step.walk.geometry, step.scratch[0]
    logits, largest = step.scratch[4 + slot], step.scratch[6 + slot]
    k = geometry.keys(keys.at(step, pages, share))
    found = _dot(as_operand(k, q.dtype), q[share], (1, 0))
    logits[pages[0] * geometry.page_size : pages[1] * geometry.page_size] = found
    high = _over_registers(found, jnp.max)
    largest[...] = high if is_first else jnp.maximum(largest[...], high)


def _step_share(
    step, span: Span, keys: _Keys, share, slot: int, then: _Keys | None, next_share
) -> None:
    """The softmax and the values of one share, from its slot, beside another's products.

    Args:
        step, span: what is computed.
        keys, share, slot: whose softmax.
        then, next_share: whose products, into the other slot; None = nobody's.
    """
    geometry = step.walk.geometry
    q, m, l, acc = step.scratch[:4]
    logits, largest = step.scratch[4 + slot], step.scratch[6 + slot]
    if keys.masked or _is_joined(step):
        _join(step, span, keys, share, slot)
    m_next = jnp.maximum(m[share], jnp.max(largest[...], axis=0, keepdims=True))
    unit = _unit(step, share * geometry.share)
    shrink = jnp.exp2((m[share] - m_next) * unit)
    total, values = l[share] * shrink, None
    kept = (span.start - keys.position, span.stop - keys.position) if keys.masked else None
    mine = _steps(geometry, keys.pages)
    others = [] if then is None else _steps(geometry, then.pages)
    for i in range(max(len(mine), len(others))):
        if i < len(others):
            _product(step, then, others[i], next_share, 1 - slot, is_first=i == 0)
        if i >= len(mine):
            continue
        begin, end = (page * geometry.page_size for page in mine[i])
        x = logits[begin:end].reshape(-1, 8, logits.shape[1]) - m_next[None]
        weights = jnp.exp2(x if _is_joined(step) else x * unit)
        total = total + jnp.sum(weights, axis=0)
        v = geometry.values(keys.at(step, mine[i], share))
        if kept is not None:
            v = rows_kept(v, (kept[0] - begin, kept[1] - begin))
        v = as_operand(v, q.dtype).T[geometry.v_offset : geometry.v_offset + geometry.head_dim]
        part = _dot(v, weights.reshape(end - begin, -1).astype(q.dtype), (1, 0))
        values = part if values is None else values + part
    # What lies in acc before the first keys is no number.
    old = jnp.where(m[share][None] > softmax.START, acc[share].reshape(-1, 8, acc.shape[2]), 0.0)
    old = old * shrink[None]
    acc[share] = old.reshape(acc.shape[1:]) + values
    m[share], l[share] = m_next, total


def _join(step, span: Span, keys: _Keys, share, slot: int) -> None:
    """Soft cap, ALiBi and masks, in the slot; and the largest of what comes out."""
    geometry, tokens = step.walk.geometry, step.walk.geometry.tile_tokens
    logits, largest = step.scratch[4 + slot], step.scratch[6 + slot]
    first_q = span.first_q - (span.begin - step.first_token)
    q_pos = first_q + lax.broadcasted_iota(jnp.int32, (1, tokens), 1)
    first, last = step.walk.masks.limits(q_pos, span.start, span.stop)
    for i, pages in enumerate(_steps(geometry, keys.pages)):
        begin, end = (page * geometry.page_size for page in pages)
        index = begin + lax.broadcasted_iota(jnp.int32, (end - begin, 1), 0)
        mask = None
        if keys.masked:
            mask = index <= last - keys.position
            mask = mask if first is None else mask & (index >= first - keys.position)
        for nth in range(geometry.share):
            columns = slice(nth * tokens, (nth + 1) * tokens)
            part = logits[begin:end, columns]
            if _is_joined(step):
                at = share * geometry.share + nth
                slope = step.scalars[2, at] if step.has_slope else None
                factor = step.scalars[0, at]
                part = part * jnp.maximum(factor, -factor)
                part = softmax.join(
                    part, q_pos, keys.position + index, soft_cap=step.soft_cap, slope=slope
                )
            if mask is not None:
                part = jnp.where(mask, part, softmax.UNSEEN)
            logits[begin:end, columns] = part
            high = _over_registers(part, jnp.max)
            largest[:, columns] = high if i == 0 else jnp.maximum(largest[:, columns], high)


def _finish(step, span: Span, *, whole: bool) -> None:
    """Puts outputs and lse of the span's tokens into the tile, as it has them."""
    geometry, tokens = step.walk.geometry, step.walk.geometry.tile_tokens
    _, m, l, acc, *_, lse_rows = step.scratch
    token = step.first_token + lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)
    mine = None if whole else (token >= span.begin) & (token < span.end)

    def output(head: int) -> jax.Array:
        share, columns = _columns(geometry, head)
        total = jnp.sum(l[share, :, columns], axis=0, keepdims=True)
        high = m[share, :1, columns] * _unit(step, head)
        factor, lse_rows[head : head + 1, :] = softmax.finish(
            high, total, step.scalars[3, head], step.scalars[1, head]
        )
        values = acc[share, :, columns] * factor
        return values if whole else jnp.where(factor != 0, values, 0.0)

    if geometry.in_columns:
        token = step.first_token + lax.broadcasted_iota(jnp.int32, (1, tokens), 1)
        here = (token >= span.begin) & (token < span.end)
        for head in range(geometry.num_q_heads):
            values = output(head).astype(step.out.dtype)
            step.out[head] = values if whole else jnp.where(here, values, step.out[head])
    else:
        heads.write(step.out, step.words, 0, tokens, output, mine, turned=True)
    for i in range(step.lse.shape[0]):
        new = lse_rows[i * LANES : (i + 1) * LANES, :].T
        step.lse[i] = new if whole else jnp.where(mine, new, step.lse[i])
