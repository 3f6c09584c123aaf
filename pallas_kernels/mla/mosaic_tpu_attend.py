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

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla.mosaic_tpu_scratch import (
    AHEAD,
    OUTPUTS,
    Arrays,
    Scratch,
    Sizes,
    Tiles,
    scratch_shapes,
)
from pallas_kernels.tpu_chip import LANES

MASKED = -1e30  # a logit that no query sees: finite, so that no difference of two is NaN
LOG2_E, LN_2 = math.log2(math.e), math.log(2)


class Cursor(NamedTuple):
    """Block `block` of tile `tile`; past the last tile, tile is num_tiles."""

    tile: jax.Array
    block: jax.Array


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

        num_steps = pl.cdiv(self.num_blocks, sizes.blocks)
        for k in range(AHEAD):
            coming = self._start_step(coming, jnp.int32(k), num_steps)
        received, cleaned = self._receive(zero, zero, zero + sizes.lead)
        for i in range(sizes.lead):
            scratch.logits[i] = self._logits(jnp.int32(i))

        def step(k, state, *, starts):
            coming, received, cleaned, finished = state
            first = k * sizes.blocks
            self._wait_latents(sizes.blocks, k % (AHEAD + 1))
            received, cleaned = self._receive(received, cleaned, first + sizes.blocks + sizes.lead)
            if not sizes.starts_within:
                coming = self._start_step(coming, k + AHEAD, num_steps)
            later = (k + AHEAD) % (AHEAD + 1) if starts else None
            coming = self._straight(coming, first, later)
            finished = self._while_ends(finished, first + sizes.blocks, self._finish)
            return coming, received, cleaned, finished

        # The last steps start no copies: nothing would wait for them but the kernel's end.
        border = jnp.maximum(num_steps - AHEAD, 0) if sizes.starts_within else 0
        state = (coming, received, cleaned, zero)
        if sizes.starts_within:
            state = jax.lax.fori_loop(0, border, functools.partial(step, starts=True), state)
        jax.lax.fori_loop(border, num_steps, functools.partial(step, starts=False), state)
        for last in range(OUTPUTS, 0, -1):
            tile = self.num_tiles - last
            pl.when(tile >= 0)(functools.partial(self._wait_output, tile))

    def _straight(self, coming: Cursor, first: jax.Array, sem: jax.Array | None) -> Cursor:
        """The run without branches: `blocks` blocks from `first` on; with a semaphore, copies."""
        sizes, logits = self.sizes, self.scratch.logits
        products = [logits[i] for i in range(sizes.lead)]
        for i in range(sizes.blocks):
            products.append(self._logits(first + sizes.lead + i))
            later = first + AHEAD * sizes.blocks + sizes.lead + i
            coming = coming if sem is None else self._start_block(coming, later, sem)
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
        one again (page 0 if it has none), in place of blocks past the last tile ones of that tile.
        """
        sizes, buffer = self.sizes, self._buffer(i)
        self.scratch.tile_of[buffer] = at.tile
        self.scratch.block_of[buffer] = at.block
        tile = self._listed(at.tile)
        seq, last = self.tiles.seq[tile], self._keys_of_tile(tile) - 1
        has_keys, last = last >= 0, jnp.maximum(last, 0) // sizes.page_size
        for j in range(sizes.pages_of_block):
            column = jnp.minimum(at.block * sizes.pages_of_block + j, last)
            page = jnp.where(has_keys, self.arrays.page_table[seq, column], 0)
            half = sizes.page_size // 2
            target = self.scratch.latents.at[buffer, pl.ds(j * half, half)]
            arrived = self.scratch.latents_arrived.at[sem]
            pltpu.make_async_copy(self.arrays.pages.at[page], target, arrived).start()
        return self._after(at)

    def _start_step(self, coming: Cursor, k: jax.Array, num_steps: jax.Array) -> Cursor:
        """Starts the copies of step k, if there is such a step, in a loop of their own."""
        sizes = self.sizes

        def one(i, coming):
            return self._start_block(coming, k * sizes.blocks + sizes.lead + i, k % (AHEAD + 1))

        return jax.lax.fori_loop(0, jnp.where(k < num_steps, sizes.blocks, 0), one, coming)

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
        block = sizes.block_kv // 2
        buffer = self._buffer(self.tiles.end[tile] - 1)
        num_keys = self._keys_of_tile(tile) - (self.tiles.blocks[tile] - 1) * sizes.block_kv

        def kept(is_odd):
            """Bits of the words of a register's lanes; `packed` rows share a word."""
            row = jax.lax.broadcasted_iota(jnp.int32, (block // packed, LANES), 0)
            words = jnp.zeros_like(row)
            for i in range(packed):
                key = 2 * (packed * row + i) + is_odd
                words |= ((key - num_keys) >> 31) & field(i)
            return words

        def field(i):
            bits = ((1 << 32 // packed) - 1) << (i * 32 // packed)
            return jnp.int32(bits - (bits >> 31 << 32))

        @pl.when(num_keys < sizes.block_kv)
        def _():
            lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
            even, odd = ([kept(i)] * (sizes.rank // LANES) for i in (0, 1))
            ropes = kept(1 + ((lane - sizes.rope_dim) >> 31))
            mask = jnp.concatenate([*even, *odd, ropes], axis=1)
            words = pltpu.bitcast(self.scratch.latents[buffer], jnp.int32) & mask
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
        slot = jax.lax.rem(self.scratch.tile_of[self._buffer(i)], sizes.queries)
        q = self.scratch.ql_nope[slot].reshape(sizes.rows, sizes.rank)
        q_pe = self.scratch.q_pe[slot].reshape(sizes.rows, sizes.rope_dim)
        # A row has two tokens' rotary keys. On 256-wide matrix units they are laid under one
        # another; on 128-wide ones that delays the products (v5e 310 us for 284): there each half
        # is masked, and the queries have theirs twice.
        if sizes.rolls_ropes:
            of_both = [ropes[:, : sizes.rope_dim], ropes[:, sizes.rope_dim :]]
            q = jnp.concatenate([q, q_pe], axis=1)
        else:
            lane = jax.lax.broadcasted_iota(jnp.int32, (1, 2 * sizes.rope_dim), 1)
            is_even = (lane - sizes.rope_dim) >> 31
            words = pltpu.bitcast(ropes, jnp.int32)
            of_both = [pltpu.bitcast(words & mask, sizes.q_dtype) for mask in (is_even, ~is_even)]
            q = jnp.concatenate([q, q_pe, q_pe], axis=1)
        keys = jnp.concatenate([latents, jnp.concatenate(of_both, axis=0)], axis=1)
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
            scratch.lse[slot, i] = _as_row(of_query)
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


def _as_row(x: jax.Array) -> jax.Array:
    """[n, LANES] with equal lanes as [1, n]: off the diagonals, which takes no transposition."""
    parts = []
    for at in range(0, x.shape[0], LANES):
        part = x[at : at + LANES]
        row = jax.lax.broadcasted_iota(jnp.int32, part.shape, 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, part.shape, 1)
        diagonal = jnp.where(row == lane, part, 0)
        parts.append(jnp.sum(diagonal, axis=0, keepdims=True)[:, : part.shape[0]])
    return jnp.concatenate(parts, axis=1)
