"""Weights and dlogits on Blackwell: strips of a tile in TMEM, a row a thread.

Rows of a tile are what the block owns: queries (dq), or keys (dk and dv); `queries` says which axis
the queries are. What a row sees is one interval of columns either way, so that masks take two
comparisons with numbers of the thread's own.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dense.mosaic_gpu_blackwell_softmax import COLUMN, NATIVE, ROW
from pallas_kernels.dense.mosaic_gpu_geometry import LOG2E, Row, Static, seen_interval
from pallas_kernels.dense.mosaic_gpu_weights import Arrays, Place, Weights, needs_mask

ROWS = 128  # of a tile: tcgen05's M


class Tile(NamedTuple):
    """A tile of logits, and the numbers of its queries.

    Attributes:
        static, x: the call.
        at: where it is.
        queries: the axis of the queries, 0 or 1.
        columns: of the tile.
        numbers: axis 0: (lse, delta) of the rows; else SMEM of the columns', float32 [columns].
    """

    static: Static
    x: Arrays
    at: Place
    queries: int
    columns: int
    numbers: tuple[Any, Any]

    @property
    def first(self) -> tuple[Any, Any]:
        """The query or key of row 0, of column 0."""
        return (self.at.query, self.at.key)[:: 1 if self.queries == 0 else -1]

    @property
    def needs_mask(self) -> jax.Array:
        """Whether a row does not see a column, or the other way round."""
        sizes = (ROWS, self.columns)[:: 1 if self.queries == 0 else -1]
        return needs_mask(self.static, self.at, *sizes)


def weights(tile: Tile, strip: Any, s: jax.Array, masked: jax.Array) -> Weights:
    """The weights of a strip of columns, from unscaled logits; the soft cap's slope, None = 1."""
    static, x, shape = tile.static, tile.x, s.shape
    slope, y = None, s * (static.scale * LOG2E)
    if static.soft_cap is not None:
        # tanh by exp2: MUFU.TANH is good to 11 bits only.
        e = jnp.exp2(s * (2 * LOG2E * static.scale / static.soft_cap))
        t = 1.0 - 2.0 / (e + 1.0)
        slope, y = 1.0 - t * t, t * (static.soft_cap * LOG2E)
    if x.bias is not None:
        y = y + _bias(tile, strip, shape) * LOG2E
    if static.alibi:
        y = y - distances(tile, strip, shape) * (x.slopes[tile.at.head] * LOG2E)
    p = jnp.exp2(y - _of_queries(tile, 0, strip, shape))
    if static.segments:
        mine, theirs = _segments(tile, strip)
        p = jnp.where(_along(mine, shape) == _across(theirs, shape), p, 0.0)
    return Weights(lax.cond(masked, lambda p: _masked(tile, strip, p), lambda p: p, p), slope)


def logit_gradients(tile: Tile, strip: Any, p: jax.Array, dp: jax.Array) -> jax.Array:
    """Gradients of what the weights p are the softmax of."""
    return p * (dp - _of_queries(tile, 1, strip, dp.shape))


def distances(tile: Tile, strip: Any, shape: tuple[int, int]) -> jax.Array:
    """float32: how far apart a query and a key stand."""
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, shape, layout=NATIVE)
    offset = tile.at.row.offset * (1 if tile.queries == 0 else -1)
    first_row, first_column = tile.first
    apart = (iota(0) - iota(1)) + (first_row + offset - first_column - strip.start)
    return jnp.abs(apart).astype(jnp.float32)


def seeing_interval(static: Static, row: Row, key: Any) -> tuple[Any, Any]:
    """[first, stop) of the queries that see a key: `seen_interval`, the other way round."""
    left, right = static.sliding_window
    size = static.attention_chunk_size
    first, stop = 0, row.q_len
    if static.causal:
        first = key - row.offset
    elif right is not None:
        first = key - right + 1 - row.offset
    if left is not None:
        stop = jnp.minimum(key + left - row.offset, stop)
    if size is not None:
        chunk = key - lax.rem(key, jnp.int32(size)) - row.offset
        first, stop = jnp.maximum(chunk, first), jnp.minimum(chunk + size, stop)
    return first, jnp.where(key < row.kv_len, stop, 0)


def _masked(tile: Tile, strip: Any, p: jax.Array) -> jax.Array:
    """The weights with 0 where a query does not see a key."""
    static, row, (first_row, first_column) = tile.static, tile.at.row, tile.first
    seen_by = seen_interval if tile.queries == 0 else seeing_interval
    low, high = 0, row.kv_len
    if static.positional or tile.queries == 1:  # a dead vector has no layout
        index = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) + first_row
        low, high = seen_by(static, row, index)
    column = plgpu.broadcasted_iota(jnp.int32, p.shape, 1, layout=NATIVE)
    column = column + (first_column + strip.start)
    seen = column < _along(high, p.shape)
    if jnp.ndim(low):
        seen = seen & (column >= _along(low, p.shape))
    return jnp.where(seen, p, 0.0)


def _segments(tile: Tile, strip: Any) -> tuple[jax.Array, jax.Array]:
    """Segment ids of the rows, of a strip's columns."""
    of_axes = (tile.x.q_segments, tile.x.kv_segments)[:: 1 if tile.queries == 0 else -1]
    first_row, first_column = tile.first
    places = pl.ds(first_row, ROWS), pl.ds(first_column + strip.start, strip.size)
    load = functools.partial(plgpu.load, optimized=False)
    return tuple(
        load(ids.at[tile.at.b, place], layout=layout)
        for ids, place, layout in zip(of_axes, places, (ROW, COLUMN), strict=True)
    )


def _bias(tile: Tile, strip: Any, shape: tuple[int, int]) -> jax.Array:
    """The bias of a strip, float32; its last two dimensions lie as the tile's."""
    static, at, (first_row, first_column) = tile.static, tile.at, tile.first
    b, head = (i if full else 0 for i, full in zip((at.b, at.head), static.bias[:2], strict=True))
    rows, columns = pl.ds(first_row, ROWS), pl.ds(first_column + strip.start, strip.size)
    load = functools.partial(plgpu.load, optimized=False)
    if static.bias[2]:
        return load(tile.x.bias.at[b, head, rows, columns], layout=NATIVE).astype(jnp.float32)
    if tile.queries == 0:
        found = _across(load(tile.x.bias.at[b, head, 0, columns], layout=COLUMN), shape)
    else:
        found = _along(load(tile.x.bias.at[b, head, rows, 0], layout=ROW), shape)
    return found.astype(jnp.float32)


def _of_queries(tile: Tile, which: int, strip: Any, shape: tuple[int, int]) -> jax.Array:
    """The lse (0) or delta (1) of a strip's queries, as wide as it is."""
    numbers = tile.numbers[which]
    if tile.queries == 0:
        return _along(numbers, shape)
    return _across(plgpu.load(numbers.at[strip], layout=COLUMN, optimized=False), shape)


def _along(rows: Any, shape: tuple[int, int]) -> Any:
    """A number for each row, as wide as a strip."""
    return rows if jnp.ndim(rows) == 0 else lax.broadcast_in_dim(rows, shape, [0])


def _across(columns: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(columns, shape, [1])
