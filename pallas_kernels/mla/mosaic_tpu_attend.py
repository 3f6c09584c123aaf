"""The attending half of MLA on TPU: tiles of queries over blocks of latents, software-pipelined.

A pass goes through a list of tiles (some queries of one sequence, all their heads) as one flat
sequence of blocks of keys, and borders between tiles are no borders to the pipeline. A step takes
`blocks` of them, whichever tiles they belong to, as one run of instructions without branches: each
block's tile is looked up, and its queries, running softmax and accumulators are found by it in
rings. Within that run the compiler has the products of some blocks to fill the matrix unit with
while the vector unit is at the softmax of others. So that it has them at the run's ends too, the
products with the keys are `lead` blocks ahead of the rest, across steps::

    step       k                                k + 1
    DMA      | blocks of step k + 1           | ...     pages into a ring of blocks
    q @ K.T  | 2  3  4  5  |                  | 6 ...   (here: 4 blocks a step, lead 2)
    softmax  | 0  1  2  3  |                  | 4 ...
    p @ V    |  0  1  2  3 |                  |  4 ...
    between  |             | tiles that ended: divide, send; that begin: their queries; ...

A block lies in its buffer as the cache has it, two tokens a row ("paired"): even tokens' latents,
odd tokens' latents, both rotary keys. Logits are therefore [rows, even keys then odd keys].
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla.mosaic_tpu_writes import token_of_value
from pallas_kernels.tpu_chip import LANES

MASKED = -1e30  # a logit that no query sees: finite, so that no difference of two is NaN
LOG2_E, LN_2 = math.log2(math.e), math.log(2)
OUTPUTS = 4  # tiles' outputs on their way
AHEAD = 2  # steps whose blocks are on their way


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is static of a pass.

    Attributes:
        block_q: queries of a tile.
        block_kv: keys of a block; whole pages.
        blocks: blocks of a step.
        lead: blocks that products with the keys are ahead of the softmax; at most `blocks`.
        num_heads, rank, rope_dim, page_size: of the arrays.
        q_dtype: of queries and output.
        cache_dtype: of the latents as they are stored.
        scale, soft_cap: of the logits.
    """

    block_q: int
    block_kv: int
    blocks: int
    lead: int
    num_heads: int
    rank: int
    rope_dim: int
    page_size: int
    q_dtype: jnp.dtype
    cache_dtype: jnp.dtype
    scale: float
    soft_cap: float | None

    @property
    def rows(self) -> int:
        """Rows of the matrix products: queries times heads."""
        return self.block_q * self.num_heads

    @property
    def pages_of_block(self) -> int:
        """Pages of a block."""
        return self.block_kv // self.page_size

    @property
    def ring(self) -> int:
        """Blocks of latents in VMEM: a step's, the lead, and those of AHEAD steps on their way."""
        return (AHEAD + 1) * self.blocks + self.lead

    @property
    def queries(self) -> int:
        """Tiles' queries in VMEM: as many tiles as a step may begin, and as many on their way."""
        return 2 * (self.blocks + self.lead)

    @property
    def precision(self) -> jax.lax.Precision | None:
        """Of both products."""
        return jax.lax.Precision.HIGHEST if self.q_dtype == jnp.float32 else None


class Arrays(NamedTuple):
    """The arrays in HBM, and the cache's scale and page table in SMEM."""

    ql_nope: Any
    q_pe: Any
    pages: Any
    out: Any
    lse: Any
    page_table: Any
    kv_scale: Any


class Tiles(NamedTuple):
    """What is known of each tile, in SMEM: int32 [num_tiles]."""

    seq: Any  # row of page_table
    token: Any  # its first query's row in the arrays
    count: Any  # queries in it, at most block_q
    q_pos: Any  # position of its first query; negative where the sequence is too short for it
    blocks: Any  # blocks that it takes, at least one
    end: Any  # blocks of this tile and of those before it


class Cursor(NamedTuple):
    """Block `block` of tile `tile`; past the last tile, tile is num_tiles."""

    tile: jax.Array
    block: jax.Array


class Scratch(NamedTuple):
    """What a pass has in VMEM, and its semaphores; rings by tile are [tiles, ...]."""

    ql_nope: Any  # [queries, block_q, num_heads, rank]
    q_pe: Any  # [queries, block_q, num_heads, rope_dim]
    latents: Any  # [ring, block_kv / 2, 2 * (rank + rope_dim)]
    logits: Any  # float32 [lead, rows, block_kv]: unscaled, of the blocks that are ahead
    m: Any  # float32 [blocks, rows, LANES]: the same in every lane
    l: Any
    acc: Any  # float32 [blocks, rows, rank]
    out: Any  # [OUTPUTS, block_q, num_heads, rank]
    lse: Any  # float32 [OUTPUTS, block_q, 1, num_heads]
    tile_of: Any  # SMEM [ring]: which tile, and which of its blocks, a buffer has
    block_of: Any
    q_arrived: Any
    latents_arrived: Any  # [AHEAD + 1]: of step k, k + AHEAD + 1, ...
    out_left: Any


def scratch_shapes(sizes: Sizes) -> Scratch:
    """The shapes of a pass's scratch."""
    s = sizes
    both = 2 * (s.rank + s.rope_dim)
    return Scratch(
        ql_nope=pltpu.VMEM((s.queries, s.block_q, s.num_heads, s.rank), s.q_dtype),
        q_pe=pltpu.VMEM((s.queries, s.block_q, s.num_heads, s.rope_dim), s.q_dtype),
        latents=pltpu.VMEM((s.ring, s.block_kv // 2, both), s.cache_dtype),
        logits=pltpu.VMEM((s.lead, s.rows, s.block_kv), jnp.float32),
        m=pltpu.VMEM((s.blocks, s.rows, LANES), jnp.float32),
        l=pltpu.VMEM((s.blocks, s.rows, LANES), jnp.float32),
        acc=pltpu.VMEM((s.blocks, s.rows, s.rank), jnp.float32),
        out=pltpu.VMEM((OUTPUTS, s.block_q, s.num_heads, s.rank), s.q_dtype),
        lse=pltpu.VMEM((OUTPUTS, s.block_q, 1, s.num_heads), jnp.float32),
        tile_of=pltpu.SMEM((s.ring,), jnp.int32),
        block_of=pltpu.SMEM((s.ring,), jnp.int32),
        q_arrived=pltpu.SemaphoreType.DMA((s.queries,)),
        latents_arrived=pltpu.SemaphoreType.DMA((AHEAD + 1,)),
        out_left=pltpu.SemaphoreType.DMA((OUTPUTS,)),
    )


def attend_tiles(
    sizes: Sizes, arrays: Arrays, tiles: Tiles, num_tiles: jax.Array, num_blocks: jax.Array
) -> None:
    """Attends with every listed tile, and writes its output and lse."""

    @pl.when(num_tiles > 0)
    def _():
        def scoped(*scratch):
            _Pass(sizes, arrays, tiles, num_tiles, num_blocks, Scratch(*scratch)).run()

        pl.run_scoped(scoped, *scratch_shapes(sizes))


class _Pass:
    """One pass: the arguments of `attend_tiles`, and the phases of a step as methods."""

    def __init__(self, sizes, arrays, tiles, num_tiles, num_blocks, scratch):
        self.sizes, self.arrays, self.tiles = sizes, arrays, tiles
        self.num_tiles, self.num_blocks, self.scratch = num_tiles, num_blocks, scratch

    def run(self) -> None:
        """Fills the pipeline, and turns it until every block is through."""
        sizes, scratch, zero = self.sizes, self.scratch, jnp.int32(0)
        for slot in range(sizes.blocks):
            self._reset(slot)
        ahead = jnp.minimum(sizes.queries // 2, self.num_tiles)
        jax.lax.fori_loop(0, ahead, lambda tile, _: self._start_queries(tile), None)
        coming = Cursor(zero, zero)
        for i in range(sizes.lead):
            coming = self._start_block(coming, jnp.int32(i), AHEAD)
        self._wait_latents(sizes.lead, AHEAD)

        def prefetch(i, coming):
            return self._start_block(coming, sizes.lead + i, i // sizes.blocks)

        coming = jax.lax.fori_loop(0, AHEAD * sizes.blocks, prefetch, coming)
        received, cleaned = self._receive(zero, zero, zero + sizes.lead)
        for i in range(sizes.lead):
            scratch.logits[i] = self._logits(jnp.int32(i))

        def step(k, state):
            coming, received, cleaned, finished = state
            first = k * sizes.blocks
            self._wait_latents(sizes.blocks, k % (AHEAD + 1))
            received, cleaned = self._receive(received, cleaned, first + sizes.blocks + sizes.lead)
            coming = self._straight(coming, first, (k + AHEAD) % (AHEAD + 1))
            finished = self._while_ends(finished, first + sizes.blocks, self._finish)
            return coming, received, cleaned, finished

        num_steps = pl.cdiv(self.num_blocks, sizes.blocks)
        jax.lax.fori_loop(0, num_steps, step, (coming, received, cleaned, zero))
        for k in range(AHEAD):
            self._wait_latents(sizes.blocks, (num_steps + k) % (AHEAD + 1))
        for last in range(OUTPUTS, 0, -1):
            tile = self.num_tiles - last
            pl.when(tile >= 0)(functools.partial(self._wait_output, tile))

    def _straight(self, coming: Cursor, first: jax.Array, sem: jax.Array) -> Cursor:
        """The run without branches: `blocks` blocks from `first` on."""
        sizes, logits = self.sizes, self.scratch.logits
        products = [logits[i] for i in range(sizes.lead)]
        for i in range(sizes.blocks):
            products.append(self._logits(first + sizes.lead + i))
            later = first + AHEAD * sizes.blocks + sizes.lead + i
            coming = self._start_block(coming, later, sem)
            self._softmax_and_values(products[i], first + i)
        for i in range(sizes.lead):
            logits[i] = products[sizes.blocks + i]
        return coming

    # Where a block is.

    def _after(self, at: Cursor) -> Cursor:
        """The next block."""
        is_last = at.block + 1 >= self.tiles.blocks[self._listed(at.tile)]
        tile = jnp.where(is_last, at.tile + 1, at.tile)
        block = jnp.where(is_last, 0, at.block + 1)
        return Cursor(jnp.minimum(tile, self.num_tiles), block)

    def _listed(self, tile: jax.Array) -> jax.Array:
        """The tile, or, past the last one, the last one."""
        return jnp.minimum(tile, self.num_tiles - 1)

    def _buffer(self, i: jax.Array) -> jax.Array:
        """Where in the ring block i is."""
        return jax.lax.rem(i, self.sizes.ring)

    def _keys_of_tile(self, tile: jax.Array) -> jax.Array:
        """Keys that some query of the tile sees."""
        return jnp.maximum(self.tiles.q_pos[tile] + self.tiles.count[tile], 0)

    def _while_ends(self, tile: jax.Array, stop: jax.Array, act) -> jax.Array:
        """Acts on the tiles from `tile` on whose last block is before `stop`; returns the next."""

        def ends(tile):
            return (tile < self.num_tiles) & (self.tiles.end[self._listed(tile)] <= stop)

        def one(tile):
            act(tile)
            return tile + 1

        return jax.lax.while_loop(ends, one, tile)

    # Copies.

    def _start_queries(self, tile: jax.Array) -> None:
        self._each_query(tile, lambda copy: copy.start())

    def _each_query(self, tile, act) -> None:
        """Starts or awaits the copies of a tile's queries."""
        slot = jax.lax.rem(tile, self.sizes.queries)

        def one(i, _):
            token = self.tiles.token[tile] + i
            for source, target in (
                (self.arrays.ql_nope, self.scratch.ql_nope),
                (self.arrays.q_pe, self.scratch.q_pe),
            ):
                sem = self.scratch.q_arrived.at[slot]
                act(pltpu.make_async_copy(source.at[token], target.at[slot, i], sem))
            return _

        jax.lax.fori_loop(0, self.tiles.count[tile], one, 0)

    def _start_block(self, at: Cursor, i: jax.Array, sem: jax.Array | int) -> Cursor:
        """Notes where block i is, and starts the copies of its pages; returns the next.

        All its pages are copied without a branch: in place of those past the tile's last key that
        one again, in place of blocks past the last tile ones of the last tile.
        """
        sizes, buffer = self.sizes, self._buffer(i)
        self.scratch.tile_of[buffer] = at.tile
        self.scratch.block_of[buffer] = at.block
        tile = self._listed(at.tile)
        seq, last = self.tiles.seq[tile], self._keys_of_tile(tile) - 1
        last = jnp.maximum(last, 0) // sizes.page_size
        for j in range(sizes.pages_of_block):
            column = jnp.minimum(at.block * sizes.pages_of_block + j, last)
            page = jnp.clip(self.arrays.page_table[seq, column], 0, self.arrays.pages.shape[0] - 1)
            half = sizes.page_size // 2
            target = self.scratch.latents.at[buffer, pl.ds(j * half, half)]
            arrived = self.scratch.latents_arrived.at[sem]
            pltpu.make_async_copy(self.arrays.pages.at[page], target, arrived).start()
        return self._after(at)

    def _wait_latents(self, count: int, sem: jax.Array | int) -> None:
        """Waits for as many blocks, by their bytes together."""
        blocks = self.scratch.latents.at[pl.ds(0, count)]
        pltpu.make_async_copy(blocks, blocks, self.scratch.latents_arrived.at[sem]).wait()

    def _each_output(self, tile, act) -> None:
        """Starts or awaits the copies of a tile's output and lse."""
        slot = tile % OUTPUTS

        def one(i, _):
            token = self.tiles.token[tile] + i
            for source, target in (
                (self.scratch.out, self.arrays.out),
                (self.scratch.lse, self.arrays.lse),
            ):
                sem = self.scratch.out_left.at[slot]
                act(pltpu.make_async_copy(source.at[slot, i], target.at[token], sem))
            return _

        jax.lax.fori_loop(0, self.tiles.count[tile], one, 0)

    def _wait_output(self, tile) -> None:
        self._each_output(tile, lambda copy: copy.wait())

    # Between the runs.

    def _receive(self, received, cleaned, stop) -> tuple[jax.Array, jax.Array]:
        """Makes the tiles' queries and last blocks ready for products with blocks before `stop`.

        Args:
            received: tiles whose queries are there.
            cleaned: tiles whose last blocks are clean.
            stop: the first block that is not multiplied yet.
        """

        def begins(tile):
            listed = self._listed(tile)
            return (tile < self.num_tiles) & (
                self.tiles.end[listed] - self.tiles.blocks[listed] < stop
            )

        def one(tile):
            self._receive_queries(tile)
            return tile + 1

        received = jax.lax.while_loop(begins, one, received)
        return received, self._while_ends(cleaned, stop, self._clean)

    def _receive_queries(self, tile: jax.Array) -> None:
        """Waits for a tile's queries, and calls for a later tile's."""
        self._each_query(tile, lambda copy: copy.wait())
        later = tile + self.sizes.queries // 2
        pl.when(later < self.num_tiles)(lambda: self._start_queries(later))

    def _clean(self, tile: jax.Array) -> None:
        """Zeroes what follows the keys in a tile's last block: NaN would outlive a weight of 0."""
        sizes, packed = self.sizes, 4 // self.sizes.cache_dtype.itemsize
        block, width = self.scratch.latents.shape[1:]
        buffer = self._buffer(self.tiles.end[tile] - 1)
        num_keys = self._keys_of_tile(tile) - (self.tiles.blocks[tile] - 1) * sizes.block_kv

        @pl.when(num_keys < sizes.block_kv)
        def _():
            bits = 32 // packed
            first = token_of_value((block // packed, width), sizes.rank, sizes.rope_dim, packed)
            kept = jnp.zeros_like(first)
            for row in range(packed):  # of those that share a word
                is_kept = (first + (2 * row - num_keys)) >> 31
                field = ((1 << bits) - 1) << (bits * row)
                kept |= is_kept & jnp.int32(field - (field >> 31 << 32))
            words = pltpu.bitcast(self.scratch.latents[buffer], jnp.int32) & kept
            self.scratch.latents[buffer] = pltpu.bitcast(words, sizes.cache_dtype)

    # Phases of a block.

    def _parts(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Block i's latents [block_kv, rank], even tokens' first; rotary keys, two tokens a row."""
        rank = self.sizes.rank
        rows = self.scratch.latents.at[self._buffer(i)]
        halves = [rows[:, pl.ds(at, rank)] for at in (0, rank)]
        ropes = rows[:, pl.ds(2 * rank, 2 * self.sizes.rope_dim)]
        return (
            jnp.concatenate(halves, axis=0).astype(self.sizes.q_dtype),
            ropes.astype(self.sizes.q_dtype),
        )

    def _logits(self, i: jax.Array) -> jax.Array:
        """Products of block i's keys with its tile's queries, unscaled."""
        sizes = self.sizes
        latents, ropes = self._parts(i)
        of_both = [ropes[:, : sizes.rope_dim], ropes[:, sizes.rope_dim :]]
        keys = jnp.concatenate([latents, jnp.concatenate(of_both, axis=0)], axis=1)
        slot = jax.lax.rem(self.scratch.tile_of[self._buffer(i)], sizes.queries)
        q = self.scratch.ql_nope[slot].reshape(sizes.rows, sizes.rank)
        q_pe = self.scratch.q_pe[slot].reshape(sizes.rows, sizes.rope_dim)
        q = jnp.concatenate([q, q_pe], axis=1)
        return _dot(q, keys, contract=(1, 1), precision=sizes.precision)

    def _softmax_and_values(self, products: jax.Array, i: jax.Array) -> None:
        """Adds block i to its tile's running softmax."""
        scratch, sizes = self.scratch, self.sizes
        buffer = self._buffer(i)
        at = Cursor(scratch.tile_of[buffer], scratch.block_of[buffer])
        slot = jax.lax.rem(at.tile, sizes.blocks)
        logits = self._seen(self._scaled(products), at)
        m_old = scratch.m[slot]
        m_new = jnp.maximum(m_old, jnp.max(logits, axis=1, keepdims=True))
        kept = jnp.exp2(m_old - m_new)
        p = jnp.exp2(logits - _widened(m_new, sizes.block_kv))
        scratch.m[slot] = m_new
        scratch.l[slot] = kept * scratch.l[slot] + jnp.sum(p, axis=1, keepdims=True)
        values, _ = self._parts(i)
        product = _dot(p.astype(values.dtype), values, contract=(1, 0), precision=sizes.precision)
        scratch.acc[slot] = scratch.acc[slot] * _widened(kept, sizes.rank) + product

    def _scaled(self, products: jax.Array) -> jax.Array:
        """Logits in base 2."""
        # A vector at once: a product of two scalars would be a scalar unit's, and in its way.
        factor = jnp.full((1, self.sizes.block_kv), self.arrays.kv_scale[0]) * self.sizes.scale
        if self.sizes.soft_cap is None:
            return products * (factor * LOG2_E)
        capped = jnp.tanh(products * (factor / self.sizes.soft_cap))
        return capped * (self.sizes.soft_cap * LOG2_E)

    def _seen(self, logits: jax.Array, at: Cursor) -> jax.Array:
        """Logits with those of keys after the query's own position masked."""
        half = self.sizes.block_kv // 2
        column = jax.lax.broadcasted_iota(jnp.int32, (1, self.sizes.block_kv), 1)
        key = jnp.where(column < half, 2 * column, 2 * (column - half) + 1)
        kv_pos = key + at.block * self.sizes.block_kv
        q_pos = self.tiles.q_pos[self._listed(at.tile)]
        if self.sizes.block_q == 1:
            return logits + jnp.where(kv_pos <= q_pos, 0.0, MASKED)
        row = jax.lax.broadcasted_iota(jnp.int32, (self.sizes.rows, 1), 0)
        return jnp.where(kv_pos <= q_pos + row // self.sizes.num_heads, logits, MASKED)

    def _finish(self, tile: jax.Array) -> None:
        """Divides, sends a tile's output and lse off, and makes room for a later tile."""
        scratch, sizes = self.scratch, self.sizes
        slot, state = tile % OUTPUTS, jax.lax.rem(tile, sizes.blocks)
        pl.when(tile >= OUTPUTS)(lambda: self._wait_output(tile - OUTPUTS))
        m, l = scratch.m[state], scratch.l[state]
        seen = m > 0.5 * MASKED
        factor = jnp.where(seen, self.arrays.kv_scale[0] / l, 0.0)
        out = scratch.acc[state] * _widened(factor, sizes.rank)
        shape = (sizes.block_q, sizes.num_heads, sizes.rank)
        scratch.out[slot] = out.astype(sizes.q_dtype).reshape(shape)
        lse = jnp.where(seen, (m + jnp.log2(l)) * LN_2, -jnp.inf)
        for i in range(sizes.block_q):
            of_query = lse[i * sizes.num_heads : (i + 1) * sizes.num_heads]
            scratch.lse[slot, i] = of_query.T[:1]
        self._each_output(tile, lambda copy: copy.start())
        self._reset(state)

    def _reset(self, state: jax.Array) -> None:
        """Nothing seen yet."""
        scratch = self.scratch
        scratch.m[state] = jnp.full(scratch.m.shape[1:], MASKED)
        scratch.l[state] = jnp.zeros(scratch.l.shape[1:])
        scratch.acc[state] = jnp.zeros(scratch.acc.shape[1:])


def _dot(a, b, *, contract, precision) -> jax.Array:
    """The product in float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _widened(x: jax.Array, width: int) -> jax.Array:
    """[rows, LANES] with equal lanes as [rows, width]."""
    return x[:, :width] if width <= LANES else jnp.tile(x, (1, width // LANES))
