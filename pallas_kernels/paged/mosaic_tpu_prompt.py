"""How the TPU kernel of `paged` computes a span of many tokens: keys first.

Logits are [keys, columns]: a column is one query head with one token, a kv head's group beside the
next. So the softmax runs down registers, its maximum and sum lie along lanes, and nothing is
repeated. Queries, outputs and lse are turned once for each tile.

The kv heads follow one another in pairs: while the weights of one are made, the matrix unit makes
the logits of the next.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged import mosaic_tpu_softmax as softmax
from pallas_kernels.paged.mosaic_tpu_decode import rows_kept
from pallas_kernels.paged.mosaic_tpu_geometry import LANES, ROWS, Geometry, divided
from pallas_kernels.paged.mosaic_tpu_walk import Span


def serves(geometry: Geometry) -> bool:
    """Whether tiles and heads are whole registers in both directions."""
    return geometry.tile_tokens % LANES == 0 and geometry.head_dim % 64 == 0


def scratch_shapes(geometry: Geometry, dtype) -> list:
    """By kv head: q, m, l, acc; the logits of two of them; lse by query head."""
    if not serves(geometry):
        return []
    heads, columns = geometry.num_kv_heads, geometry.group * geometry.tile_tokens
    logits = pltpu.VMEM((geometry.chunk_tokens, columns), jnp.float32)
    return [
        pltpu.VMEM((heads, geometry.k_lanes, columns), dtype),
        pltpu.VMEM((heads, 8, columns), jnp.float32),
        pltpu.VMEM((heads, 8, columns), jnp.float32),
        pltpu.VMEM((heads, geometry.v_lanes, columns), jnp.float32),
        logits,
        logits,
        pltpu.VMEM((geometry.lse_lanes, geometry.tile_tokens), jnp.float32),
    ]


def attend_span(step, span: Span) -> None:
    """Attends with all tokens of the tile, and keeps what is the span's."""
    walk, geometry = step.walk, step.walk.geometry
    _load_q(step)
    first, last = walk.blocks(span)
    size = geometry.chunk_tokens

    def attend_block(block, _):
        buffer = walk.next_block(span, block)
        position = block * geometry.block_tokens
        begin = divided(jnp.maximum(span.start - position, 0), size)
        end = divided(jnp.minimum(span.stop - position, geometry.block_tokens) + size - 1, size)

        def attend_chunk(chunk, _):
            _attend_chunk(step, span, buffer, chunk, position + chunk * size)

        lax.fori_loop(begin, end, attend_chunk, None)

    lax.fori_loop(first, last, attend_block, None)
    _finish(step, span)


def _columns(geometry: Geometry, head: int) -> tuple[int, slice]:
    """The kv head of a query head, and its columns."""
    kv_head, g = divmod(head, geometry.group)
    return kv_head, slice(g * geometry.tile_tokens, (g + 1) * geometry.tile_tokens)


def _load_q(step) -> None:
    """Turns each head's queries into columns; starts the softmax."""
    geometry = step.walk.geometry
    q, m, l, acc, *_ = step.scratch
    for head in range(geometry.num_q_heads):
        kv_head, columns = _columns(geometry, head)
        lanes = slice(head * geometry.k_lanes, (head + 1) * geometry.k_lanes)
        q[kv_head, :, columns] = step.q[:, :, lanes].reshape(geometry.tile_tokens, -1).T
    m[...] = jnp.full_like(m, softmax.START)
    l[...] = jnp.zeros_like(l)
    acc[...] = jnp.zeros_like(acc)


def _attend_chunk(step, span: Span, buffer, chunk, position) -> None:
    """One chunk of keys, for one kv head after another."""
    walk, geometry = step.walk, step.walk.geometry
    start, stop = walk.masks.bounds_of_all(span.first_q, span.last_q, span.start, span.stop)
    inside = (position >= start) & (position + geometry.chunk_tokens <= stop)
    heads = geometry.num_kv_heads
    pages = pl.ds(chunk * geometry.chunk_pages, geometry.chunk_pages)
    kv = step.walk.buffers.at[buffer, pages]
    even_logits, odd_logits = step.scratch[4:6]

    def attend(masked: bool):
        def one(head, logits):
            _attend_head(step, span, kv, head, logits, position, masked)

        def two(i, _):
            _product(step, kv, 2 * i + 1, odd_logits)
            one(2 * i, even_logits)
            _product(step, kv, 2 * i + 2, even_logits)
            one(2 * i + 1, odd_logits)

        _product(step, kv, 0, even_logits)
        lax.fori_loop(0, (heads - 1) // 2, two, None)
        if heads % 2 == 0:
            _product(step, kv, heads - 1, odd_logits)
            one(heads - 2, even_logits)
        one(heads - 1, odd_logits if heads % 2 == 0 else even_logits)

    pl.when(inside)(lambda: attend(False))
    pl.when(jnp.logical_not(inside))(lambda: attend(True))


def _dot(x, y, contracted: tuple[int, int]):
    """The product over one dimension of each, in float32."""
    return lax.dot_general(
        x, y, (((contracted[0],), (contracted[1],)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
    )  # fmt: skip


def _product(step, kv, head, logits) -> None:
    """Keys times queries of one kv head."""
    geometry, q = step.walk.geometry, step.scratch[0]
    k = geometry.read(kv.at[:, head], 0, geometry.k_lanes).astype(q.dtype)
    logits[...] = _dot(k, q[head], (1, 0))


def _attend_head(step, span: Span, kv, head, product, position, masked: bool) -> None:
    """The softmax of one kv head's columns, and the values that it weighs."""
    geometry, keys = step.walk.geometry, step.walk.geometry.chunk_tokens
    q, m, l, acc, *_ = step.scratch
    columns = product.shape[1]
    logits = product[...] * step.scalars[0, head * geometry.group]
    if masked or step.has_slope or step.soft_cap is not None:
        logits = _joined(step, span, head, logits, position, masked)
    logits = logits.reshape(keys // 8, 8, columns)
    largest = jnp.max(jnp.max(logits, axis=0), axis=0, keepdims=True)
    m_next = jnp.maximum(m[head], largest)
    weights = jnp.exp2(logits - m_next[None])
    shrink = jnp.exp2(m[head] - m_next)
    m[head] = m_next
    l[head] = l[head] * shrink + jnp.sum(weights, axis=0)
    kept = (span.start - position, span.stop - position) if masked else None
    v = rows_kept(geometry.read(kv.at[:, head], geometry.v_start, 2 * geometry.head_dim), kept)
    values = _dot(v.astype(q.dtype), weights.reshape(keys, columns).astype(q.dtype), (0, 0))
    old = acc[head].reshape(-1, 8, columns) * shrink[None]
    acc[head] = old.reshape(-1, columns) + values


def _joined(step, span: Span, head, logits, position, masked: bool) -> jax.Array:
    """Soft cap, ALiBi and masks."""
    geometry, tokens = step.walk.geometry, step.walk.geometry.tile_tokens
    keys = logits.shape[0]
    first_q = span.first_q - (span.begin - step.first_token)
    q_pos = first_q + lax.broadcasted_iota(jnp.int32, (1, tokens), 1)
    kv_pos = position + lax.broadcasted_iota(jnp.int32, (keys, 1), 0)
    parts = []
    for g in range(geometry.group):
        slope = step.scalars[2, head * geometry.group + g] if step.has_slope else None
        part = logits[:, g * tokens : (g + 1) * tokens]
        part = softmax.join(part, q_pos, kv_pos, soft_cap=step.soft_cap, slope=slope)
        if masked:
            part = softmax.mask(part, q_pos, kv_pos, span.start, span.stop, step.walk.masks)
        parts.append(part)
    return jnp.concatenate(parts, axis=1)


def _finish(step, span: Span) -> None:
    """Turns outputs and lse into rows, and puts those of the span's tokens into the tile."""
    geometry, tokens = step.walk.geometry, step.walk.geometry.tile_tokens
    _, m, l, acc, _, _, lse_rows = step.scratch
    token = step.first_token + lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)
    mine = (token >= span.begin) & (token < span.end)
    for head in range(geometry.num_q_heads):
        kv_head, columns = _columns(geometry, head)
        total = jnp.sum(l[kv_head, :, columns], axis=0, keepdims=True)
        factor, lse = softmax.finish(
            m[kv_head, :1, columns], total, step.scalars[3, head], step.scalars[1, head]
        )
        lse_rows[head : head + 1, :] = lse
        values = jnp.where(factor != 0, acc[kv_head, :, columns] * factor, 0.0).T
        lanes = slice(head * geometry.out_lanes, (head + 1) * geometry.out_lanes)
        old = step.out[:, :, lanes].astype(jnp.float32).reshape(tokens, -1)
        values = jnp.where(mine, values, old).astype(step.out.dtype)
        step.out[:, :, lanes] = values.reshape(-1, ROWS, geometry.out_lanes)
    old = step.lse[...].reshape(tokens, -1)
    step.lse[...] = jnp.where(mine, lse_rows[...].T, old).reshape(step.lse.shape)
