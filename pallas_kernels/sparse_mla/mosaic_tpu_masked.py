"""The masked half of sparse MLA on TPU: tiles of tokens over all their keys, most of them masked.

A row that is gathered costs a descriptor, some 3.3 bundles for each token that names it. A row that
comes with its page costs products for every token of a tile, whoever names it. Where a context is
no more than a few times the lists, the latter is less: `shared_tokens` has the rule.

What a token names becomes a mask by a product, too: a position p has the one-hot row of p // 128
and the one-hot column of p % 128, and the sum over a list of row times column has a 1 for each
position that is named, 128 of them a row, as the logits' registers want them.

All tiles go through their blocks of keys as one flat sequence, so that borders between tiles are no
borders to the pipeline::

    DMA          | block k+3 |                  | k+4      pages into a ring of buffers
    unpack       | k+1       |                  | k+2
    q @ K.T      | k+1       |                  | k+2      some tokens of the tile at a time
    softmax, p@V | k         |                  | k+1
    between      |           | a tile that ended: divide, send; that begins: its queries, its mask
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_mla.mosaic_tpu_positions import MASKED
from pallas_kernels.sparse_mla.mosaic_tpu_rows import Row, unpack
from pallas_kernels.sparse_mla.mosaic_tpu_softmax import (
    Running,
    add_block,
    dot,
    finished,
    reset,
    running_shapes,
    scaled_logits,
)
from pallas_kernels.tpu_chip import LANES
from pallas_kernels.tpu_operands import operand_dtype

RING = 3  # blocks of pages in VMEM


@dataclasses.dataclass(frozen=True)
class MaskedSizes:
    """What is static of the masked half.

    Attributes:
        block_q: tokens of a tile.
        step_q: of those, that are multiplied at once; divides block_q.
        block_kv: keys of a block, whole pages and whole registers.
        most_keys: that a tile may have, whole blocks.
        num_heads: of the queries, a multiple of a packed register's rows.
        topk: of a list, a multiple of a register's lanes.
        page_size: of the cache.
        row: of the cache.
        q_dtype, cache_dtype: of queries and output; of the rows as they are stored.
        soft_cap: of the logits.
    """

    block_q: int
    step_q: int
    block_kv: int
    most_keys: int
    num_heads: int
    topk: int
    page_size: int
    row: Row
    q_dtype: jnp.dtype
    cache_dtype: jnp.dtype
    soft_cap: float | None

    @property
    def rows(self) -> int:
        """Rows of a tile's products: tokens times heads."""
        return self.block_q * self.num_heads

    @property
    def abreast(self) -> int:
        """Tokens whose masks are made by one product: two fill a matrix unit of 256 columns."""
        return 2 if self.block_q % 2 == 0 else 1

    @property
    def precision(self) -> jax.lax.Precision | None:
        """Of both products."""
        return jax.lax.Precision.HIGHEST if self.q_dtype == jnp.float32 else None


class MaskedTiles(NamedTuple):
    """In SMEM: int32 [tiles], and how many there are."""

    token: Any  # its first
    count: Any  # tokens
    q_pos: Any  # position of its first token
    seq: Any  # row of the page table
    number: Any  # [1]


class MaskedArrays(NamedTuple):
    """The arrays in HBM; in SMEM the tiles, the page table and `factors_of`."""

    ql_nope: Any
    q_pe: Any
    topk: Any  # int32 [num_tokens, 1, topk]: positions
    pages: Any
    out: Any
    lse: Any
    tiles: MaskedTiles
    page_table: Any
    factors: Any


class Cursor(NamedTuple):
    """Block `block` of tile `tile`; past the last tile, tile is how many there are."""

    tile: jax.Array
    block: jax.Array


class Scratch(NamedTuple):
    """What it has in VMEM, and its semaphores; [2, ...]: of this tile and the next one."""

    ql_nope: Any  # [2, block_q, num_heads, rank]
    q_pe: Any  # [2, block_q, num_heads, rope_dim]
    topk: Any  # int32 [2, block_q, 1, topk]
    masks: Any  # float32 [2, block_q, most_keys / LANES, LANES]: 0, or MASKED
    raw: Any  # [RING, block_kv * parts, packed, 128]: as pages have them
    keys: list[Any]  # [block_kv, rank + 128], operands beside the queries
    logits: list[Any]  # float32 [rows, block_kv]: unscaled
    running: Running
    out: Any  # [2, block_q, num_heads, rank]
    lse: Any  # float32 [2, block_q, 1, num_heads]
    q_arrived: Any
    raw_arrived: Any
    out_left: Any


def scratch_shapes(sizes: MaskedSizes) -> Scratch:
    """The shapes of the scratch."""
    s, row = sizes, sizes.row
    return Scratch(
        ql_nope=pltpu.VMEM((2, s.block_q, s.num_heads, row.rank), s.q_dtype),
        q_pe=pltpu.VMEM((2, s.block_q, s.num_heads, row.rope_dim), s.q_dtype),
        topk=pltpu.VMEM((2, s.block_q, 1, s.topk), jnp.int32),
        masks=pltpu.VMEM((2, s.block_q, s.most_keys // LANES, LANES), jnp.float32),
        raw=pltpu.VMEM((RING, s.block_kv * row.parts, row.packed, LANES), s.cache_dtype),
        keys=[
            pltpu.VMEM((s.block_kv, row.rank + LANES), operand_dtype(s.cache_dtype, s.q_dtype))
            for _ in range(2)
        ],
        logits=[pltpu.VMEM((s.rows, s.block_kv), jnp.float32) for _ in range(2)],
        running=running_shapes(s.rows, row.rank),
        out=pltpu.VMEM((2, s.block_q, s.num_heads, row.rank), s.q_dtype),
        lse=pltpu.VMEM((2, s.block_q, 1, s.num_heads), jnp.float32),
        q_arrived=pltpu.SemaphoreType.DMA((2,)),
        raw_arrived=pltpu.SemaphoreType.DMA((RING,)),
        out_left=pltpu.SemaphoreType.DMA((2,)),
    )


def attend_tiles(sizes: MaskedSizes, arrays: MaskedArrays) -> None:
    """Attends with every token of the tiles, and writes its output and lse."""

    @pl.when(arrays.tiles.number[0] > 0)
    def _():
        shapes, structure = jax.tree.flatten(scratch_shapes(sizes))

        def scoped(*scratch):
            _Pass(sizes, arrays, jax.tree.unflatten(structure, scratch)).run()

        pl.run_scoped(scoped, *shapes)


class _Pass:
    """The arguments of `attend_tiles`, and the phases of a block as methods."""

    def __init__(self, sizes, arrays, scratch):
        self.sizes, self.arrays, self.scratch = sizes, arrays, scratch
        self.tiles, self.num_tiles = arrays.tiles, arrays.tiles.number[0]
        self.factors = [arrays.factors[i] for i in range(2)]
        self.parts = range(sizes.block_q // sizes.step_q)

    def run(self) -> None:
        """Fills the pipeline, and turns it until every block is through."""
        zero = jnp.int32(0)
        reset(self.scratch.running)
        self._each_query(zero, _start)
        first = coming = Cursor(zero, zero)
        for k in range(RING):
            self._start_pages(coming, jnp.int32(k))
            coming = self._after(coming)
        self._receive(zero)
        self._wait_pages(zero)
        self._unpack(first, zero, 0)
        for part in self.parts:
            self._multiply_keys(first, 0, part)

        def two_blocks(state):
            k, current, following, coming = state
            for slot in (0, 1):
                step = (k, current, following, coming, slot)
                pl.when(self._exists(current))(lambda step=step: self._one_block(*step))
                k, current, following = k + 1, following, self._after(following)
                coming = self._after(coming)
            return k, current, following, coming

        def is_left(state):
            return self._exists(state[1])

        jax.lax.while_loop(is_left, two_blocks, (zero, first, self._after(first), coming))
        for back in (2, 1):
            tile = self.num_tiles - back
            pl.when(tile >= 0)(lambda tile=tile: self._each_output(tile, _wait))

    def _one_block(self, k, current: Cursor, following: Cursor, coming: Cursor, slot: int) -> None:
        """Block k at its values, the next one at its keys, and the one RING later on its way.

        After the last block comes one that does not exist: of nothing that was waited for.
        """
        self._start_pages(coming, k + RING)
        begins = self._exists(following) & (following.block == 0)
        pl.when(begins)(lambda: self._receive(following.tile))
        pl.when(self._exists(following))(lambda: self._wait_pages(k + 1))
        self._unpack(following, k + 1, 1 - slot)
        for part in self.parts:
            self._multiply_keys(following, 1 - slot, part)
            self._multiply_values(current, slot, part)
        is_last = current.block + 1 == self._blocks(current.tile)
        pl.when(is_last)(lambda: self._finish(current.tile))

    # Where a block is.

    def _exists(self, cursor: Cursor) -> jax.Array:
        return cursor.tile < self.num_tiles

    def _listed(self, tile: jax.Array) -> jax.Array:
        """The tile, or, past the last one, the last one."""
        return jnp.minimum(tile, self.num_tiles - 1)

    def _keys(self, tile: jax.Array) -> jax.Array:
        """Keys that some token of the tile sees; at least one."""
        return self.tiles.q_pos[tile] + self.tiles.count[tile]

    def _blocks(self, tile: jax.Array) -> jax.Array:
        return pl.cdiv(self._keys(tile), self.sizes.block_kv)

    def _after(self, cursor: Cursor) -> Cursor:
        """The next block."""
        is_last = cursor.block + 1 >= self._blocks(self._listed(cursor.tile))
        tile = jnp.minimum(cursor.tile + is_last, self.num_tiles)
        return Cursor(tile, jnp.where(is_last, 0, cursor.block + 1))

    # Copies.

    def _start_pages(self, cursor: Cursor, k: jax.Array) -> None:
        """Starts the copies of block k's pages, if it exists; past the last, that one again."""
        sizes, buffer = self.sizes, jax.lax.rem(k, RING)
        rows = sizes.page_size * sizes.row.parts

        @pl.when(self._exists(cursor))
        def _():
            pages = sizes.block_kv // sizes.page_size
            seq = self.tiles.seq[cursor.tile]
            last = (self._keys(cursor.tile) - 1) // sizes.page_size
            for j in range(pages):
                column = jnp.minimum(cursor.block * pages + j, last)
                page = self.arrays.page_table[seq, column]
                source = self.arrays.pages.at[pl.ds(page * rows, rows)]
                target = self.scratch.raw.at[buffer, pl.ds(j * rows, rows)]
                pltpu.make_async_copy(source, target, self.scratch.raw_arrived.at[buffer]).start()

    def _wait_pages(self, k: jax.Array) -> None:
        buffer = jax.lax.rem(k, RING)
        raw = self.scratch.raw.at[buffer]
        pltpu.make_async_copy(raw, raw, self.scratch.raw_arrived.at[buffer]).wait()

    def _each_query(self, tile, act) -> None:
        """Starts or awaits the copies of a tile's queries and lists."""
        slot = jax.lax.rem(tile, 2)

        def one(i, carry):
            token = self.tiles.token[tile] + i
            for source, target in (
                (self.arrays.ql_nope, self.scratch.ql_nope),
                (self.arrays.q_pe, self.scratch.q_pe),
                (self.arrays.topk, self.scratch.topk),
            ):
                sem = self.scratch.q_arrived.at[slot]
                act(pltpu.make_async_copy(source.at[token], target.at[slot, i], sem))
            return carry

        jax.lax.fori_loop(0, self.tiles.count[tile], one, 0)

    def _each_output(self, tile, act) -> None:
        """Starts or awaits the copies of a tile's output and lse."""
        slot = jax.lax.rem(tile, 2)

        def one(i, carry):
            token = self.tiles.token[tile] + i
            for source, target in (
                (self.scratch.out, self.arrays.out),
                (self.scratch.lse, self.arrays.lse),
            ):
                sem = self.scratch.out_left.at[slot]
                act(pltpu.make_async_copy(source.at[slot, i], target.at[token], sem))
            return carry

        jax.lax.fori_loop(0, self.tiles.count[tile], one, 0)

    # Between the blocks.

    def _receive(self, tile: jax.Array) -> None:
        """Waits for a tile's queries and lists, calls for the next one's, and makes its masks."""
        sizes, scratch, slot = self.sizes, self.scratch, jax.lax.rem(tile, 2)
        self._each_query(tile, _wait)
        pl.when(tile + 1 < self.num_tiles)(lambda: self._each_query(tile + 1, _start))

        def some(i, carry):
            places = [i * sizes.abreast + j for j in range(sizes.abreast)]
            lists = [scratch.topk[slot, place] for place in places]
            q_pos = [self.tiles.q_pos[tile] + place for place in places]
            counts = _times_named(lists, q_pos, sizes.most_keys // LANES)
            for place, count in zip(places, counts, strict=True):
                scratch.masks[slot, place] = jnp.where(count > 0, 0.0, MASKED)
            return carry

        jax.lax.fori_loop(0, pl.cdiv(self.tiles.count[tile], sizes.abreast), some, 0)

    def _finish(self, tile: jax.Array) -> None:
        """Divides, sends a tile's output and lse off, and makes room for the next tile."""
        scratch, sizes, slot = self.scratch, self.sizes, jax.lax.rem(tile, 2)
        pl.when(tile >= 2)(lambda: self._each_output(tile - 2, _wait))
        out, lse = finished(scratch.running, self.factors[1])
        scratch.out[slot] = out.astype(sizes.q_dtype).reshape(scratch.out.shape[1:])
        for i in range(sizes.block_q):
            of_token = lse[i * sizes.num_heads : (i + 1) * sizes.num_heads]
            scratch.lse[slot, i] = of_token.T[:1]
        total = jnp.sum(scratch.running.l[...])
        pl.when(total != total)(lambda: self._empty_unnamed(slot))
        self._each_output(tile, _start)
        reset(scratch.running)

    def _empty_unnamed(self, slot: jax.Array) -> None:
        """Sets the results of tokens that name nothing: added to NaN, MASKED is NaN."""
        scratch = self.scratch

        def one(place, carry):
            @pl.when(jnp.max(scratch.masks[slot, place]) < 0)
            def _():
                scratch.out[slot, place] = jnp.zeros(scratch.out.shape[2:], scratch.out.dtype)
                scratch.lse[slot, place] = jnp.full(scratch.lse.shape[2:], -jnp.inf)

            return carry

        jax.lax.fori_loop(0, self.sizes.block_q, one, 0)

    # Phases of a block.

    def _unpack(self, cursor: Cursor, k: jax.Array, slot: int) -> None:
        """Block k as the matrix unit wants it; zeros after the tile's last key."""
        sizes, scratch = self.sizes, self.scratch
        count = self._keys(self._listed(cursor.tile)) - cursor.block * sizes.block_kv
        raw = scratch.raw.at[jax.lax.rem(k, RING)]
        unpack(raw, scratch.keys[slot], sizes.row, count=count)

    def _rows(self, part: int) -> Any:
        step = self.sizes.step_q * self.sizes.num_heads
        return pl.ds(part * step, step)

    def _multiply_keys(self, cursor: Cursor, slot: int, part: int) -> None:
        """Products of a block's keys with some tokens' queries."""
        sizes, scratch, row = self.sizes, self.scratch, self.sizes.row
        q_slot = jax.lax.rem(self._listed(cursor.tile), 2)
        tokens = pl.ds(part * sizes.step_q, sizes.step_q)
        q = scratch.ql_nope[q_slot, tokens].reshape(-1, row.rank)
        q_pe = scratch.q_pe[q_slot, tokens].reshape(-1, row.rope_dim)
        queries = jnp.concatenate([q, q_pe], axis=1)
        keys = scratch.keys[slot][:, : row.width]
        scratch.logits[slot][self._rows(part)] = dot(queries, keys, (1, 1), sizes.precision)

    def _multiply_values(self, cursor: Cursor, slot: int, part: int) -> None:
        """Adds a block to some tokens' running softmax."""
        sizes, scratch, rows = self.sizes, self.scratch, self._rows(part)
        products = scratch.logits[slot][rows]
        logits = scaled_logits(products, self.factors[0], sizes.soft_cap)
        logits += self._bias(cursor, part)
        values = scratch.keys[slot].at[:, pl.ds(0, sizes.row.rank)]
        add_block(scratch.running, rows, logits, values, sizes.q_dtype, sizes.precision)

    def _bias(self, cursor: Cursor, part: int) -> jax.Array:
        """float32 [rows, block_kv]: 0 where the row's token names the key, else MASKED."""
        sizes, slot = self.sizes, jax.lax.rem(cursor.tile, 2)
        columns = sizes.block_kv // LANES
        first = cursor.block * columns

        def of_token(place):
            mask = self.scratch.masks.at[slot, place]
            row = jnp.concatenate([mask[pl.ds(first + j, 1)] for j in range(columns)], axis=1)
            return jnp.broadcast_to(row, (sizes.num_heads, sizes.block_kv))

        places = range(part * sizes.step_q, (part + 1) * sizes.step_q)
        return jnp.concatenate([of_token(place) for place in places], axis=0)


def _times_named(lists: list[jax.Array], q_pos: list[jax.Array], rows: int) -> list[jax.Array]:
    """float32 [rows, LANES] for each list: how often it names each position; none after q_pos.

    Args:
        lists: int32 [1, topk] each: positions.
        q_pos: of each list's token.
        rows: positions / LANES.
    """
    high = [
        _one_hot(jnp.where(named <= last, named >> 7, -1), rows)
        for named, last in zip(lists, q_pos, strict=True)
    ]
    low = [_one_hot(named & (LANES - 1), LANES) for named in lists]
    # Of several lists at once only the blocks on the diagonal mean something.
    both = dot(jnp.concatenate(high), jnp.concatenate(low), (1, 1), None)
    return [both[i * rows : (i + 1) * rows, i * LANES : (i + 1) * LANES] for i in range(len(lists))]


def _one_hot(numbers: jax.Array, count: int) -> jax.Array:
    """bfloat16 [count, n] of int32 [1, n]: 1 in each column's row of that number, if there is."""
    row = jax.lax.broadcasted_iota(jnp.int32, (count, numbers.shape[1]), 0)
    return jnp.where(row == numbers, 1.0, 0.0).astype(jnp.bfloat16)


def _start(copy: Any) -> None:
    copy.start()


def _wait(copy: Any) -> None:
    copy.wait()
