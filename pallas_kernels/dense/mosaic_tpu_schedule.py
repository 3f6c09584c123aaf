"""Which tiles of queries meet which tiles of keys: the work list of the dense TPU kernels.

A few integers for each row of tiles, prefetched into scalar memory: constants where all is known at
trace time; where arrays decide, computed by XLA before the kernel. Tiles that causality, window,
chunk, lengths or segments exclude are in no list: the kernel neither computes them nor, where a
whole major block is excluded, loads them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import masks
from pallas_kernels.dense.mosaic_tpu_tiles import Tiles
from pallas_kernels.tpu_chip import LANES, SMEM_BYTES, SUBLANES

OTHER_SMEM = 16 << 10  # for what the kernels have there beside the lists
# Rows of `Work.rows`.
START, STOP, FREE_START, FREE_STOP, NEXT_FREE, NEXT_MASKED, FIRST_HERE, FIRST_OF_ALL = range(8)
# Rows of `Work.columns`.
FIRST_ROW, KEYS_LEFT_OUT = range(2)
# Rows of `Work.majors`.
FREE, FIRST_FREE, MASKED, FIRST_MASKED, FIRST_MAJOR, LAST_MAJOR, QUERIES_LEFT_OUT = range(7)
# Rows of `Work.facts`.
Q_OFFSET, Q_LEN, KV_LEN = range(3)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """What is known at trace time.

    Attributes:
        scale: factor on the logits, above 0 (a sign is in q).
        causal: as in the contract.
        sliding_window: (left, right).
        attention_chunk_size: as in the contract.
        soft_cap: as in the contract.
        group: query heads for each kv head.
        batch, q_len, kv_len: of the call.
        q_offset: position of query 0, where it is no array.
        has_kv_lens: whether some keys of the call may not exist.
        by_arrays: whether arrays say who sees whom.
        tiles: of the kernel.
        bias_gradient: whether a bias is differentiated.
    """

    scale: float
    causal: bool
    sliding_window: tuple[int | None, int | None]
    attention_chunk_size: int | None
    soft_cap: float | None
    group: int
    batch: int
    q_len: int
    kv_len: int
    q_offset: int
    has_kv_lens: bool
    by_arrays: bool
    tiles: Tiles
    bias_gradient: bool = False

    @property
    def rows(self) -> int:
        """Rows of tiles in a major block of queries."""
        return self.tiles.major_q // self.tiles.block_q

    @property
    def columns(self) -> int:
        """Tiles in a major block of keys."""
        return self.tiles.major_kv // self.tiles.block_kv

    @property
    def q_majors(self) -> int:
        """Major blocks of queries."""
        return -(-self.q_len // self.tiles.major_q)

    @property
    def kv_majors(self) -> int:
        """Major blocks of keys."""
        return -(-self.kv_len // self.tiles.major_kv)

    @property
    def keys_fill_tiles(self) -> bool:
        """Whether every key of every tile exists."""
        return not self.has_kv_lens and self.kv_len % self.tiles.block_kv == 0

    @functools.cached_property
    def free_below(self) -> tuple[int, ...] | None:
        """Free tiles in each pair of major blocks, where all others are on the diagonal.

        None where other tiles need a mask too: some are on the edge of something else, or are not
        square.
        """
        return None if self._behind is None else tuple(np.sum(self._behind > 0, (1, 3)).flat)

    @functools.cached_property
    def together(self) -> int:
        """Free tiles in one run of code."""
        tiles = self.tiles
        free = math.gcd(*(self.free_below or (0,))) if tiles.longest else 0
        if not free:
            return tiles.together
        upwards = range(min(free, tiles.together), tiles.longest + 1)
        return max((n for n in upwards if free % n == 0), default=tiles.together)

    @functools.cached_property
    def diagonal(self) -> int:
        """Tiles on the diagonal in each pair of major blocks that has any.

        0 where other tiles need a mask too, among them free ones that are over.
        """
        if self._behind is None or any(free % self.together for free in self.free_below):
            return 0
        on = np.sum(self._behind == 0, (1, 3))
        return int(on.max()) if np.all((on == 0) | (on == on.max())) else 0

    @functools.cached_property
    def _behind(self) -> np.ndarray | None:
        """[q_majors, rows, kv_majors, columns]: how far tiles are from the diagonal, or None."""
        tiles, block = self.tiles, self.tiles.block_q
        bounded = self.sliding_window != (None, None) or self.attention_chunk_size is not None
        edges = self.q_len, self.kv_len, self.q_offset
        whole = tiles.block_kv == block and not any(edge % block for edge in edges)
        if not self.causal or not whole or self.by_arrays or bounded:
            return None
        row = np.arange(self.q_majors * self.rows)[:, None]
        column = np.arange(self.kv_majors * self.columns)
        exists = (row < self.q_len // block) & (column < self.kv_len // block)
        behind = np.where(exists, row + self.q_offset // block - column, -1)
        return behind.reshape(self.q_majors, self.rows, self.kv_majors, self.columns)

    @property
    def uses_every_key(self) -> bool:
        """Whether it is known by now that each key of each tile is seen by a query of the tile."""
        if self.by_arrays:
            return False
        sizes = (np.full(1, size, np.int32) for size in (self.q_offset, self.q_len, self.kv_len))
        at = edges(np, self, *sizes)
        return not np.any(at.some & ((at.lo < at.start) | (at.hi >= at.stop)))

    @property
    def positions(self) -> dict:
        """What `masks` asks beside the positions."""
        return {
            "causal": self.causal,
            "sliding_window": self.sliding_window,
            "attention_chunk_size": self.attention_chunk_size,
        }


class Masks(NamedTuple):
    """Who sees whom, beside what is static; None = not given.

    The mask is [1 or batch, 1 or num_q_heads, q_len, kv_len].
    """

    q_segment_ids: jax.Array | None
    kv_segment_ids: jax.Array | None
    q_offset: jax.Array | None
    q_lens: jax.Array | None
    kv_lens: jax.Array | None
    mask: jax.Array | None


class Work(NamedTuple):
    """The work list, int32; one batch row's part stands for all where nothing differs by row.

    Tiles are of two kinds: in a free one every query sees every key; all others are computed with
    a mask. Of free ones a major block has a multiple of `Static.together`: what is over is masked.

    Attributes:
        rows: [8, batch * kv_majors * q_majors * rows]: for a row of tiles and a major block of
            keys, the tiles it meets, [START, STOP), within them the free ones, [FREE_START,
            FREE_STOP), and of each kind the next row of this major block of queries that has any,
            or itself; FIRST_HERE, the first tile that is walked, and FIRST_OF_ALL, the same in the
            first major block of keys that the row meets; -1 elsewhere.
        columns: [2, batch * kv_majors * columns]: for a tile's keys FIRST_ROW, the first row that
            is walked, in the call; and, the same for all of a major block, whether some of its
            keys meet no row.
        majors: [7, batch * q_majors * kv_majors]: of each kind how many tiles there are in all,
            and the first row that has one; and, the same for every major block of keys, the first
            and the last one that has any; whether some row of tiles meets none.
        facts: [3, batch]: position of query 0, queries and keys that exist.
    """

    rows: jax.Array
    columns: jax.Array
    majors: jax.Array
    facts: jax.Array

    @property
    def differs(self) -> bool:
        """Whether batch rows have lists of their own."""
        return self.facts.shape[1] > 1


def work_list(static: Static, who: Masks) -> Work:
    """The tiles to compute; NumPy arrays, constants of the program, where all is known by now."""
    xp = np if all(x is None for x in who) else jnp
    lengths = facts(static, who)
    batch, (offset, q_len, kv_len) = lengths.shape[1], lengths
    some, every = meetings(xp, static, who, offset, q_len, kv_len)
    shape = (batch, static.q_majors, static.rows, static.kv_majors, static.columns)
    some, every = (xp.moveaxis(x.reshape(shape), 3, 1) for x in (some, every))
    start, stop = _first(xp, some), _last(xp, some) + 1  # [batch, kv_majors, q_majors, rows]
    every = every & some
    free_start = _first(xp, every)
    index = xp.arange(static.columns, dtype=xp.int32)
    broken = ~every & (index >= free_start[..., None])
    free_stop = xp.where(broken.any(-1), _first(xp, broken), static.columns)
    free_stop = xp.where(every.any(-1), free_stop, free_start)
    free_stop = free_stop - _surplus(xp, free_stop - free_start, static.together)
    free = free_stop - free_start
    kinds = (free, stop - start - free)
    is_free = (index >= free_start[..., None]) & (index < free_stop[..., None])
    met = (index >= start[..., None]) & (index < stop[..., None])
    firsts, columns = _first_met(xp, met, is_free)
    nexts = [_next(xp, x > 0) for x in kinds]
    rows = xp.stack([start, stop, free_start, free_stop, *nexts, *firsts])
    of_kinds = [f for x in kinds for f in (xp.sum(x, -1), _first(xp, x > 0))]
    of_kinds = [xp.moveaxis(x, 1, 2) for x in of_kinds]  # [batch, q_majors, kv_majors]
    any_work = of_kinds[FREE] + of_kinds[MASKED] > 0
    bounds = [_first(xp, any_work), xp.maximum(_last(xp, any_work), 0)]
    bounds = [xp.broadcast_to(x[..., None], any_work.shape) for x in bounds]
    left_out = xp.moveaxis((stop <= start).any(-1), 1, 2)
    majors = xp.stack([*of_kinds, *bounds, left_out])
    lists = rows, columns, majors, lengths
    work = Work(*(x.reshape(len(x), -1).astype(xp.int32) for x in lists))
    _refuse_what_does_not_fit(work, static, batch)
    return work


def facts(static: Static, who: Masks) -> jax.Array:
    """`Work.facts`."""
    xp = np if all(x is None for x in who) else jnp
    batched = any(x is not None and x.shape[0] > 1 for x in who)
    batch = static.batch if batched else 1
    return xp.stack(
        [
            _by_row(xp, who.q_offset, static.q_offset, batch),
            _by_row(xp, who.q_lens, static.q_len, batch),
            _by_row(xp, who.kv_lens, static.kv_len, batch),
        ]
    )


def _refuse_what_does_not_fit(work: Work, static: Static, batch: int) -> None:
    """Raises ValueError where the lists are more than SMEM holds."""
    registers = [-(-x.shape[0] // SUBLANES) * -(-x.shape[1] // LANES) for x in work]
    needed, most = 4 * SUBLANES * LANES * sum(registers), SMEM_BYTES - OTHER_SMEM
    if needed > most:
        raise ValueError(
            f"q_len {static.q_len} and kv_len {static.kv_len}, with {batch} list(s) of tiles, want "
            f"{needed} bytes of a TPU's SMEM, must want at most {most}: call with fewer "
            f"{'rows of the batch' if batch > 1 else 'queries at a time, each with its q_offset'}, "
            f"share positions over a mesh, or use XLA"
        )


def _first_met(xp: Any, met: jax.Array, free: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """FIRST_HERE and FIRST_OF_ALL of rows, and `Work.columns`.

    Args:
        xp: NumPy, or JAX's.
        met, free: [batch, kv_majors, q_majors, rows, columns], tiles of any kind, and free ones.
    """
    batch, kv_majors, q_majors, rows, columns = met.shape
    count = rows * columns
    order = xp.arange(count, dtype=xp.int32).reshape(rows, columns)
    order = xp.where(free, order, xp.where(met, order + count, 2 * count))
    # A grid step begins with its first masked tile.
    masked = xp.where(met & ~free, order, 2 * count)
    lowest = xp.min(masked, axis=(3, 4), keepdims=True)
    order = xp.where((masked == lowest) & (masked < 2 * count), -1, order)
    some = met.any(-1)  # [batch, kv_majors, q_majors, rows]
    here = xp.where(some, xp.argmin(order, axis=-1), -1)
    before = xp.cumsum(some, axis=1) - some
    of_all = xp.where(before == 0, here, -1)
    order += 3 * count * xp.arange(q_majors, dtype=xp.int32)[:, None, None]
    order = xp.where(met, order, 3 * count * q_majors)
    order = order.reshape(batch, kv_majors, q_majors * rows, columns)
    lone = ~met.any((2, 3))  # [batch, kv_majors, columns]
    left_out = xp.broadcast_to(lone.any(-1, keepdims=True), lone.shape)
    return [here, of_all], xp.stack([xp.argmin(order, axis=2), left_out])


def _by_row(xp: Any, given: jax.Array | None, otherwise: int, batch: int) -> jax.Array:
    value = xp.int32(otherwise) if given is None else given.astype(xp.int32)
    return xp.broadcast_to(value, (batch,))


def meetings(
    xp: Any, static: Static, who: Masks, offset, q_len, kv_len
) -> tuple[jax.Array, jax.Array]:
    """Two masks [batch, rows of tiles, tiles]: may one see one there; does each see each."""
    at = edges(xp, static, offset, q_len, kv_len)
    some, every = at.some, at.hi < kv_len[:, None, None]
    # What the first and the last query see of the tile's first and last key bounds all the rest.
    for q_pos in (at.first, at.last):
        for kv_pos in (at.lo, at.hi):
            seen = masks.seen(q_pos, kv_pos, **static.positions)
            every = every if seen is None else every & seen
    if who.mask is not None:
        some_seen, all_seen = _in_tiles(who.mask, static)
        some, every = some & some_seen, every & all_seen
    if who.q_segment_ids is None:
        return some, xp.broadcast_to(every, some.shape)
    q_ids = _id_range(who.q_segment_ids, q_len, static.tiles.block_q, at.first.shape[1])
    kv_ids = _id_range(who.kv_segment_ids, kv_len, static.tiles.block_kv, at.lo.size)
    q_low, q_high = (x[:, :, None] for x in q_ids)
    kv_low, kv_high = (x[:, None, :] for x in kv_ids)
    some = some & (q_low <= kv_high) & (kv_low <= q_high)
    every = every & (q_low == kv_high) & (kv_low == q_high)
    return some, every


class Edges(NamedTuple):
    """Of rows of tiles [batch, rows, 1], and of tiles.

    Attributes:
        first, last: positions of the first query and of the last one that exists.
        start, stop: keys that some query of the row sees.
        lo, hi: [tiles]: the tile's first and last key.
        some: [batch, rows, tiles]: whether some query may see some key.
    """

    first: jax.Array
    last: jax.Array
    start: jax.Array
    stop: jax.Array
    lo: jax.Array
    hi: jax.Array
    some: jax.Array


def edges(xp: Any, static: Static, offset, q_len, kv_len) -> Edges:
    """From [batch] each."""
    block_q, block_kv = static.tiles.block_q, static.tiles.block_kv
    row = xp.arange(static.q_majors * static.rows, dtype=xp.int32) * block_q
    first = offset[:, None] + row
    last = offset[:, None] + xp.minimum(row + block_q, q_len[:, None]) - 1
    start, stop = masks.seen_bounds(first, last, kv_len[:, None], **static.positions)
    first, last, start, stop = (
        xp.broadcast_to(x, first.shape)[..., None] for x in (first, last, start, stop)
    )
    lo = xp.arange(static.kv_majors * static.columns, dtype=xp.int32) * block_kv
    hi = lo + block_kv - 1
    some = (lo < stop) & (hi >= start) & (start < stop) & (last >= first)
    return Edges(first, last, start, stop, lo, hi, some)


def _in_tiles(mask: jax.Array, static: Static) -> tuple[jax.Array, jax.Array]:
    """[1 or batch, rows of tiles, tiles]: whether some query of some head sees some key; all all.

    Queries and keys that do not exist see all, and are seen by none.
    """
    rows, columns = static.q_majors * static.rows, static.kv_majors * static.columns
    missing = (rows * static.tiles.block_q - mask.shape[2], columns * static.tiles.block_kv)
    pads = ((0, 0), (0, 0), (0, missing[0]), (0, missing[1] - mask.shape[3]))

    def reduced(x: jax.Array, reduce: Callable) -> jax.Array:
        x = x.reshape(*x.shape[:2], rows, static.tiles.block_q, columns, static.tiles.block_kv)
        return reduce(x, axis=(1, 3, 5))

    some = reduced(jnp.pad(mask, pads), jnp.any)
    return some, reduced(jnp.pad(mask, pads, constant_values=True), jnp.all)


def _id_range(ids: jax.Array, lens: jax.Array, block: int, blocks: int):
    """Smallest and largest segment id of each block, of the tokens that exist."""
    size = block * blocks
    ids = jnp.pad(ids, ((0, 0), (0, size - ids.shape[1])))
    real = jnp.arange(size) < lens[:, None]
    info = jnp.iinfo(jnp.int32)

    def of(fill, reduce):
        return reduce(jnp.where(real, ids, fill).reshape(-1, blocks, block), axis=2)

    return of(info.max, jnp.min), of(info.min, jnp.max)


def _first(xp: Any, x: jax.Array) -> jax.Array:
    """Index of the first True of the last axis, 0 if there is none."""
    return xp.argmax(x, axis=-1).astype(xp.int32)


def _last(xp: Any, x: jax.Array) -> jax.Array:
    """Index of the last True of the last axis, -1 if there is none."""
    last = x.shape[-1] - 1 - _first(xp, x[..., ::-1])
    return xp.where(x.any(-1), last, xp.int32(-1))


def _surplus(xp: Any, free: jax.Array, together: int) -> jax.Array:
    """How many free tiles to take from each row, last row first, for a multiple in all."""
    later = xp.cumsum(free[..., ::-1], axis=-1)[..., ::-1] - free
    return xp.clip(xp.sum(free, axis=-1, keepdims=True) % together - later, 0, free)


def _next(xp: Any, met: jax.Array) -> jax.Array:
    """For each row the next that is True, or itself."""
    row = xp.arange(met.shape[-1], dtype=xp.int32)
    later = met[..., None, :] & (row > row[:, None])
    return xp.where(later.any(-1), _first(xp, later), row)
