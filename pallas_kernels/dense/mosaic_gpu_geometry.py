"""Which keys each query row sees, as one interval, and which key tiles a block must bring.

Causal order, windows, chunks and lengths all leave a row one interval of keys, [low, high). Both
ends grow with the row, so a run of rows sees [low of its first, high of its last), and every row of
it sees [low of its last, high of its first): key tiles outside the former are not brought, tiles
inside the latter need no mask.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dense.mosaic_gpu_tiles import Tiles

LOG2E = 1.4426950408889634
CONSUMER_ROWS = 64  # of queries: wgmma's M; 128 rows a warpgroup spill


@dataclasses.dataclass(frozen=True)
class Static:
    """What a call is compiled for.

    Attributes:
        scale: on the logits, above 0.
        causal, sliding_window, attention_chunk_size, soft_cap: the contract's.
        offset: position of query 0 where it is the same for all and known; None = in `rows`.
        lengths: whether `rows` says how many queries and keys exist.
        group: query heads of a kv head.
        batch, num_q_heads, q_len, kv_len, head_dim, head_dim_v: sizes of the arrays.
        bias: which of its dimensions before the keys are full; None = no bias, or one without keys,
            which no kernel sees (`mosaic_gpu_shift`).
        segments, alibi, sinks: whether they are given.
        tiles: sizes of the pipeline.
        capability: of the chip.
        corrected: whether the forward gives, for lse, the maximum in units of log2 and the sum that
            it is of: for a gradient beside a bias.
    """

    scale: float
    causal: bool
    sliding_window: tuple[int | None, int | None]
    attention_chunk_size: int | None
    soft_cap: float | None
    offset: int | None
    lengths: bool
    group: int
    batch: int
    num_q_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    head_dim_v: int
    bias: tuple[bool, bool, bool] | None
    segments: bool
    alibi: bool
    sinks: bool
    tiles: Tiles
    capability: tuple[int, int]
    corrected: bool = False

    @property
    def positional(self) -> bool:
        """Whether what a query sees depends on where it stands."""
        window = self.sliding_window != (None, None)
        return self.causal or window or self.attention_chunk_size is not None

    @property
    def block_q(self) -> int:
        """Queries of a block of the grid: those of all its consumer warpgroups."""
        return self.tiles.rows * self.tiles.consumers

    @property
    def rows_of_lse(self) -> int:
        """Numbers of a query's that go out beside its results."""
        return 2 if self.corrected else 1

    @property
    def lse_shape(self) -> tuple[int, int, int]:
        """[batch, heads, queries in whole blocks]: a further number has heads of its own."""
        queries = tiles_of(self.q_len, self.block_q) * self.block_q
        return (self.batch, self.rows_of_lse * self.num_q_heads, queries)


class Row(NamedTuple):
    """One row of the batch: position of query 0, queries and keys that exist; int or int32 []."""

    offset: Any
    q_len: Any
    kv_len: Any


def row_of(static: Static, rows: Any, b: jax.Array) -> Row:
    """What `rows`, int32 [batch, 3] in GMEM, says of row b; None = all of it is static."""
    offset, q_len, kv_len = static.offset, static.q_len, static.kv_len
    if offset is None:
        offset = rows[b, 0]
    if static.lengths:
        q_len, kv_len = rows[b, 1], rows[b, 2]
    return Row(offset, q_len, kv_len)


def seen_interval(static: Static, row: Row, query: Any) -> tuple[Any, Any]:
    """[low, high) of the keys that a query (an index, or many) sees; empty where low >= high.

    An end that is the same for every query stays a number where the queries are many.
    """
    position = query + row.offset
    left, right = static.sliding_window
    low, high = 0, row.kv_len
    if static.causal:
        high = jnp.minimum(position + 1, high)
    if left is not None:
        low = jnp.maximum(position - left + 1, 0)
    if right is not None and not static.causal:
        high = jnp.minimum(position + right, high)
    if static.attention_chunk_size is not None:
        size = static.attention_chunk_size
        chunk = position - lax.rem(lax.rem(position, size) + size, size)
        low, high = jnp.maximum(chunk, low), jnp.minimum(chunk + size, high)
    return low, high


class KeyTiles(NamedTuple):
    """Tiles of keys, int32 []: [first, stop) are brought, [inner, inner_stop) need no mask.

    `low` and `high` bound the keys that the block sees: what v holds beyond may be NaN.
    """

    first: jax.Array
    stop: jax.Array
    inner: jax.Array
    inner_stop: jax.Array
    low: jax.Array
    high: jax.Array


def key_tiles(static: Static, row: Row, block: jax.Array, rows_of: tuple[Any, int]) -> KeyTiles:
    """The key tiles of the grid's block of queries, and which of them need no mask.

    Args:
        static: the call.
        row: the row of the batch.
        block: index of the block of `static.block_q` queries.
        rows_of: (first query, queries) that the unmasked tiles are for: a warpgroup's.

    Returns:
        The tiles; at least one is brought, so that the pipeline has no empty case.
    """
    block_kv = static.tiles.block_kv
    begin = block * static.block_q
    end = jnp.minimum(begin + static.block_q, row.q_len) - 1
    low = seen_interval(static, row, begin)[0]
    high = jnp.where(end < begin, 0, seen_interval(static, row, end)[1])
    last_tile = tiles_of(static.kv_len, block_kv) - 1
    first = jnp.clip(lax.div(low, jnp.int32(block_kv)), 0, last_tile)
    stop = jnp.clip(lax.div(high + block_kv - 1, jnp.int32(block_kv)), first + 1, last_tile + 1)
    if static.segments:
        return KeyTiles(first, stop, stop, stop, low, high)
    query, count = rows_of
    inner_low = seen_interval(static, row, query + count - 1)[0]
    inner_high = seen_interval(static, row, query)[1]
    inner = jnp.clip(lax.div(inner_low + block_kv - 1, jnp.int32(block_kv)), first, stop)
    inner_stop = jnp.clip(lax.div(jnp.maximum(inner_high, 0), jnp.int32(block_kv)), inner, stop)
    return KeyTiles(first, stop, inner, inner_stop, low, high)


def values_are_whole(static: Static) -> bool:
    """Whether no value that is brought has to be cleared.

    With segment ids what no query sees is 0 before the call; else a block must be known to see
    every key of each tile that it is brought.
    """
    if static.segments:
        return True
    window, chunk = static.sliding_window, static.attention_chunk_size
    if static.lengths or static.offset is None or window != (None, None) or chunk is not None:
        return False
    ends = [static.kv_len]
    if static.causal:  # of the keys that a block's last query sees
        ends += [static.q_len % static.block_q, static.block_q, static.offset]
    return min(ends) >= 0 and not any(end % static.tiles.block_kv for end in ends)


# Bytes of keys and values that blocks which run at once should share: a part of Hopper's
# second-level cache, 50 MB in two halves that each keep what their cores read.
SHARED_BYTES = 16 << 20


def heads_together(heads: int, bytes_of_one: int) -> int:
    """How many heads' blocks run side by side, so that what they read stays in the cache.

    Blocks are taken in the order of the grid. Heads that change fastest balance a causal call's
    long and short blocks; but then every head's keys pass through the cache again and again.

    Args:
        heads: of the call.
        bytes_of_one: that a head's blocks all read.
    """
    fitting = max(1, SHARED_BYTES // max(bytes_of_one, 1))
    return max(n for n in range(1, heads + 1) if heads % n == 0 and (n <= fitting or n == 1))


def head_of_grid() -> jax.Array:
    """The head of this block of a grid whose axes "heads" and "head" share the heads out."""
    return lax.axis_index("heads") * lax.axis_size("head") + lax.axis_index("head")


def tiles_of(a: int, b: int) -> int:
    """How many tiles of b hold a."""
    return -(-a // b)


def seen_keys(
    static: Static,
    rows: Any,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    mask: jax.Array | None = None,
):
    """Keys that some query sees: bool [batch, kv_len, 1, 1], or with heads of k for the third.

    A pass over [batch, q_len, kv_len], or over a mask of heads.
    """
    shape = (static.batch, 1 if mask is None else mask.shape[1], static.q_len, static.kv_len)
    masks = None if mask is None else jnp.broadcast_to(mask, shape)

    def of_row(b, mine, theirs, mask):
        row = row_of(static, rows, b)
        query = jnp.arange(static.q_len, dtype=jnp.int32)
        low, high = (jnp.broadcast_to(x, query.shape) for x in seen_interval(static, row, query))
        high = jnp.where(query < row.q_len, high, 0)
        key = jnp.arange(static.kv_len, dtype=jnp.int32)
        inside = (key >= low[:, None]) & (key < high[:, None])
        if mine is not None:
            inside &= mine[:, None] == theirs
        inside = inside[None] if mask is None else inside & mask
        of_heads = jnp.any(inside, axis=1)  # [1 or num_q_heads, kv_len]
        group = static.group if len(of_heads) > 1 else 1
        return jnp.any(of_heads.reshape(-1, group, static.kv_len), axis=1).T[..., None]

    return jax.vmap(of_row)(jnp.arange(static.batch), q_segments, kv_segments, masks)


def in_whole_tiles_of_rows(x: jax.Array) -> jax.Array:
    """[batch, length, heads, n] padded to a length that TMA can bring into wgmma's tiles of 8 rows.

    A copy where the length is no multiple of 8: Mosaic splits the dimension in the descriptor.
    """
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0)))
