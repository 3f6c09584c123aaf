"""The weights of a tile, computed again from lse: what both backward kernels begin with.

A tile's logits may lie either way: rows of queries (`mosaic_gpu_dq`) or rows of keys
(`mosaic_gpu_dkv`); `queries` says along which axis the queries are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dense.mosaic_gpu_distance import distance
from pallas_kernels.dense.mosaic_gpu_geometry import (
    CONSUMER_ROWS,
    LOG2E,
    Row,
    Static,
    seen_interval,
)

TILE = CONSUMER_ROWS  # queries and keys of a tile: wgmma's M, either way
BLOCK = 2 * TILE  # of a block of the grid: two warpgroups
WGMMA = plgpu.Layout.WGMMA
LAYOUTS = (WGMMA.reduce(1), WGMMA.reduce(0))  # of a number for each row, for each column


class Arrays(NamedTuple):
    """Arrays of both kernels, in GMEM; None = not given.

    q, k, v, dout: the contract's; 0 in rows that nothing sees or that see nothing.
    lse, delta: float32 [batch, num_q_heads, whole blocks]; lse in units of log2, +inf for a row
    that sees nothing.
    out: the forward's, its rows padded to whole blocks, for who computes delta; `delta` then is
    what sum(out * dout) is added to.
    rows: int32 [batch, 3] as `Row`; segment ids int32, padded to whole blocks.
    bias: its full dimensions padded to whole blocks, its last two in the order of the kernel's
        logits: queries first for dq, keys first for dk and dv; slopes float32 [num_q_heads].
    """

    q: Any
    k: Any
    v: Any
    dout: Any
    lse: Any = None
    delta: Any = None
    rows: Any = None
    q_segments: Any = None
    kv_segments: Any = None
    bias: Any = None
    slopes: Any = None
    out: Any = None


class Place(NamedTuple):
    """Where a tile is: row of the batch, its lengths, the first query, the first key, the head."""

    b: Any
    row: Row
    query: Any
    key: Any
    head: Any = None


class Weights(NamedTuple):
    """float32, like the logits: the weights; the soft cap's slope there, None = 1."""

    p: jax.Array
    slope: jax.Array | None


def weights(
    static: Static, x: Arrays, at: Place, logits: jax.Array, lse: jax.Array, *, queries: int,
    sloped: bool = False,
) -> Weights:  # fmt: skip
    """The weights of a tile.

    Args:
        static: the call.
        x: arrays.
        at: where the tile is.
        logits: float32, unscaled products: queries by keys, or keys first.
        lse: float32, along the axis of the queries.
        queries: that axis, 0 or 1.
        sloped: the product of both instead, for who needs no more: 32 registers less, where the
            masks' branch begins.
    """
    slope, y = None, logits * (static.scale * LOG2E)
    if static.soft_cap is not None:
        # tanh by exp2: MUFU.TANH is good to 11 bits only.
        e = jnp.exp2(logits * (2 * LOG2E * static.scale / static.soft_cap))
        t = 1.0 - 2.0 / (e + 1.0)
        slope, y = 1.0 - t * t, t * (static.soft_cap * LOG2E)
    if x.bias is not None:
        y = y + _bias(static, x.bias, at, y, queries) * LOG2E
    if static.alibi:
        y = y - distances(at, y.shape, queries) * (x.slopes[at.head] * LOG2E)
    p = jnp.exp2(y - wide(lse, queries, y))
    if sloped and slope is not None:
        p, slope = p * slope, None
    inside = jnp.logical_not(needs_mask(static, at, y.shape[queries], y.shape[1 - queries]))
    if static.segments:
        return Weights(_masked(static, x, at, p, queries), slope)
    return Weights(
        lax.cond(inside, lambda p: p, lambda p: _masked(static, x, at, p, queries), p), slope
    )


def _bias(static: Static, bias: Any, at: Place, like: jax.Array, queries: int) -> jax.Array:
    """The bias of a tile, float32, as wide as it is."""
    b, head = (i if full else 0 for i, full in zip((at.b, at.head), static.bias[:2], strict=True))
    keys, by_query = 1 - queries, static.bias[2]
    mine = pl.ds(at.query, like.shape[queries]) if by_query else 0
    theirs = pl.ds(at.key, like.shape[keys])
    there = bias.at[b, head, *((mine, theirs) if queries == 0 else (theirs, mine))]
    if by_query:
        return plgpu.load(there, layout=WGMMA, optimized=False).astype(jnp.float32)
    return wide(_load(there, keys).astype(jnp.float32), keys, like)


def distances(at: Place, shape: tuple[int, int], queries: int) -> jax.Array:
    """float32, like the logits: how far apart a query and a key stand."""
    apart = at.query + at.row.offset - at.key
    return distance(apart if queries == 0 else -apart, shape, at.query + at.key)


def wide(numbers: jax.Array, axis: int, like: jax.Array) -> jax.Array:
    """A number for each index of an axis, as a tile."""
    return lax.broadcast_in_dim(numbers, like.shape, [axis])


def needs_mask(static: Static, at: Place, queries: int, keys: int) -> jax.Array:
    """Whether one of a tile's so many queries does not see one of its so many keys."""
    last = at.query + queries - 1
    low = seen_interval(static, at.row, last)[0]
    high = seen_interval(static, at.row, at.query)[1]
    return (low > at.key) | (high < at.key + keys) | (last >= at.row.q_len)


def _masked(static: Static, x: Arrays, at: Place, p: jax.Array, queries: int) -> jax.Array:
    """The weights with 0 where a query does not see a key."""
    keys = 1 - queries
    shape = (p.shape[queries],)
    index = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=LAYOUTS[queries]) + at.query
    low, high = seen_interval(static, at.row, index)
    high = jnp.where(index < at.row.q_len, high, 0)
    key = plgpu.broadcasted_iota(jnp.int32, p.shape, keys, layout=WGMMA) + at.key
    seen = key < wide(high, queries, p)
    if static.sliding_window[0] is not None or static.attention_chunk_size is not None:
        seen = seen & (key >= wide(low, queries, p))
    if static.segments:
        mine, theirs = (
            _load(ids.at[at.b, pl.ds(first, p.shape[axis])], axis)
            for ids, first, axis in (
                (x.q_segments, at.query, queries), (x.kv_segments, at.key, keys),
            )
        )  # fmt: skip
        seen = seen & (wide(mine, queries, p) == wide(theirs, keys, p))
    return jnp.where(seen, p, 0.0)


def _load(numbers: Any, axis: int) -> jax.Array:
    """Numbers along an axis of a tile."""
    return plgpu.load(numbers, layout=LAYOUTS[axis], optimized=False)


def logit_gradients(w: Weights, dp: jax.Array, delta: jax.Array, *, queries: int) -> jax.Array:
    """Gradients of a tile's logits before the scale: 0 where the weight is, if v is finite.

    Without the slope they are the gradients of what is added after the soft cap.

    Args:
        w: the weights.
        dp: float32, like the logits: dout @ v.T, or its transpose.
        delta: float32 [TILE], along the axis of the queries.
        queries: that axis.
    """
    ds = w.p * (dp - wide(delta, queries, dp))
    return ds if w.slope is None else ds * w.slope


def swizzled(*shape: int, dtype: Any) -> Any:
    """Shared memory that TMA writes and wgmma reads: swizzled as far as its rows are long."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))
