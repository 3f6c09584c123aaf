"""The attending half of MLA on TPU: tiles of queries over blocks of latents, software-pipelined.

A pass goes through a list of tiles (some queries of one sequence, all their heads) as one flat
sequence of blocks of keys, and borders between tiles are no borders to the pipeline. A step takes
`blocks` of them, whichever tiles they belong to, as one run of instructions without branches: each
block's tile is looked up, and its queries, running softmax and accumulators are found by it in
rings. Within that run the compiler has the products of some blocks to fill the matrix unit with
while the vector unit is at the softmax of others. So that it has them at the run's ends too, the
products with the keys are `lead` blocks ahead of the softmax, those with the values `lag` behind,
across steps, and a tile that ended is divided in the next run::

    step       k                                k + 1
    DMA      | blocks of step k + 2           | ...     pages into a ring of blocks
    q @ K.T  | 2  3  4  5  |                  | 6 ...   (here: 4 blocks a step, lead 2, lag 1)
    softmax  | 0  1  2  3  |                  | 4 ...
    p @ V    | -1 0  1  2  |                  | 3 ...
    divide   | what ended  |                  | ...
    between  |             | its output leaves; a tile's last page, the next one's queries; ...

A block lies in its buffer as the cache has it, page by page ("striped"); registers come from there
in the order of the keys.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla.mosaic_tpu_pages import clean_page
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
from pallas_kernels.tpu_operands import as_operand

MASKED = -1e30  # a logit that no query sees: finite, so that no difference of two is NaN
LOG2_E, LN_2 = math.log2(math.e), math.log(2)


class Cursor(NamedTuple):
    """Block `block` of tile `tile`; past the last tile, tile is num_tiles."""

    tile: jax.Array
    block: jax.Array


def attend_tiles(
    sizes: Sizes,
    arrays: Arrays,
    tiles: Tiles,
    num_tiles: jax.Array,
    num_blocks: jax.Array,
    first: Callable[[], None] | None,
) -> None:
    """Attends with every listed tile, and writes its output and lse.

    `first`, if any, is done before any page is read, while the first tiles' queries come.
    """

    def scoped(*scratch):
        this = _Pass(sizes, arrays, tiles, num_tiles, num_blocks, Scratch(*scratch))
        this.call_for_queries()
        if first is not None:
            first()
        pl.when(num_tiles > 0)(this.run)

    pl.run_scoped(scoped, *scratch_shapes(sizes))


class _Pass:
    """One pass: the arguments of `attend_tiles`, and the phases of a step as methods."""

    def __init__(self, sizes, arrays, tiles, num_tiles, num_blocks, scratch):
        self.sizes, self.arrays, self.tiles = sizes, arrays, tiles
        self.num_tiles, self.num_blocks, self.scratch = num_tiles, num_blocks, scratch

    def call_for_queries(self) -> None:
        """Starts the copies of the first tiles' queries."""
        ahead = jnp.minimum(self.sizes.queries // 2, self.num_tiles)
        jax.lax.fori_loop(0, ahead, lambda tile, _: self._start_queries(tile), None)

    def _make_nothing(self) -> None:
        """Zeroes the page that comes in place of those past an end, where there is one."""
        if self.scratch.nothing is not None:
            self.scratch.nothing[...] = jnp.zeros_like(self.scratch.nothing)

    def run(self) -> None:
        """Fills the pipeline, and turns it until every block is through."""
        sizes, scratch, zero = self.sizes, self.scratch, jnp.int32(0)
        self._make_nothing()
        coming = Cursor(zero, zero)
        for i in range(sizes.lead):
            coming = self._start_block(coming, jnp.int32(i), AHEAD)
        num_steps = pl.cdiv(self.num_blocks, sizes.blocks)
        for k in range(AHEAD):
            coming = self._start_step(coming, jnp.int32(k), num_steps)
        for state in range(sizes.states + sizes.spare):
            self._reset(state)
        self._wait_latents(sizes.lead, AHEAD)
        self._receive_queries(zero)
        crossed = self._while_ends(zero, zero + sizes.lead, self._cross)
        for i in range(sizes.lead):
            scratch.logits[i] = self._logits(jnp.int32(i))

        def step(k, state, *, starts):
            coming, crossed, finished = state
            first = k * sizes.blocks
            self._wait_latents(sizes.blocks, k % (AHEAD + 1))
            crossed = self._while_ends(crossed, first + sizes.blocks + sizes.lead, self._cross)
            if not sizes.starts_within:
                coming = self._start_step(coming, k + AHEAD, num_steps)
            later = (k + AHEAD) % (AHEAD + 1) if starts else None
            coming = self._straight(coming, finished, first, later)
            done = first - sizes.lag
            for _ in range(sizes.finishes):
                ended = self._has_ended(finished, done)
                pl.when(ended)(functools.partial(self._send, finished))
                finished += ended.astype(jnp.int32)
            finished = self._while_ends(
                finished, done + sizes.blocks, self._finish, but=sizes.finishes
            )
            return coming, crossed, finished

        # The last steps start no copies: nothing would wait for them but the kernel's end.
        border = jnp.maximum(num_steps - AHEAD, 0) if sizes.starts_within else 0
        state = (coming, crossed, zero)
        if sizes.starts_within:
            state = jax.lax.fori_loop(0, border, functools.partial(step, starts=True), state)
        step = functools.partial(step, starts=False)
        *_, finished = jax.lax.fori_loop(border, num_steps, step, state)
        for i in range(sizes.lag):
            self._add_values(*self._late(i), num_steps * sizes.blocks - sizes.lag + i)
        self._while_ends(finished, self.num_blocks, self._finish)
        for last in range(OUTPUTS - 1, 0, -1):
            tile = self.num_tiles - last
            pl.when(tile >= 0)(functools.partial(self._wait_output, tile))

    def _straight(
        self, coming: Cursor, finished: jax.Array, first: jax.Array, sem: jax.Array | None
    ) -> Cursor:
        """The run without branches: `blocks` blocks from `first` on; with a semaphore, copies.

        It divides what earlier runs left of tiles, too, from tile `finished` on.
        """
        sizes, scratch = self.sizes, self.scratch
        for i in range(sizes.finishes):
            tile = finished + i
            ended = self._has_ended(tile, first - sizes.lag)
            state = jnp.where(ended, jax.lax.rem(tile, sizes.states), sizes.states)
            self._divide(tile, state, jnp.where(ended, tile % OUTPUTS, OUTPUTS))
        products = [scratch.logits[i] for i in range(sizes.lead)]
        weights = [self._late(i) for i in range(sizes.lag)]

        def multiply_keys(i: int) -> None:
            nonlocal coming
            products.append(self._logits(first + sizes.lead + i))
            later = first + AHEAD * sizes.blocks + sizes.lead + i
            coming = coming if sem is None else self._start_block(coming, later, sem)

        def weigh(i: int) -> None:
            weights.append(self._softmax(products[i], first + i))

        def add_values(i: int) -> None:
            self._add_values(*weights[i], first - sizes.lag + i)

        # The matrix unit multiplies in the order of the text. Values that lag are ready at once: it
        # is busy with them while the first keys are transposed.
        phases = (multiply_keys, weigh, add_values)
        order = phases[::-1] if sizes.lag else phases
        for i, phase in itertools.product(range(sizes.blocks), order):
            phase(i)
        for i in range(sizes.lead):
            scratch.logits[i] = products[sizes.blocks + i]
        for i in range(sizes.lag):
            scratch.weights[i], scratch.kept[i] = weights[sizes.blocks + i]
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
        """Where in the ring block i is; i is at least -lag."""
        return jax.lax.rem(i + self.sizes.ring, self.sizes.ring)

    def _keys_of_tile(self, tile: jax.Array) -> jax.Array:
        """Keys that some query of the tile sees."""
        return jnp.maximum(self.tiles.q_pos[tile] + self.tiles.count[tile], 0)

    def _has_ended(self, tile: jax.Array, stop: jax.Array) -> jax.Array:
        """Whether there is such a tile, and its last block is before `stop`."""
        return (tile < self.num_tiles) & (self.tiles.end[self._listed(tile)] <= stop)

    def _while_ends(self, tile: jax.Array, stop: jax.Array, act, *, but: int = 0) -> jax.Array:
        """Acts on the tiles from `tile` on that end by `stop`, but the last; returns the next."""

        def one(tile):
            act(tile)
            return tile + 1

        return jax.lax.while_loop(lambda tile: self._has_ended(tile + but, stop), one, tile)

    # Copies.

    def _start_queries(self, tile: jax.Array) -> None:
        self._each_query(tile, lambda copy: copy.start())

    def _each_query(self, tile, act) -> None:
        """Starts or awaits the copies of a tile's queries."""
        slot = jax.lax.rem(tile, self.sizes.queries)
        tokens, rows = self._tokens(tile)
        for source, target in (
            (self.arrays.ql_nope, self.scratch.ql_nope),
            (self.arrays.q_pe, self.scratch.q_pe),
        ):
            sem = self.scratch.q_arrived.at[slot]
            act(pltpu.make_async_copy(source.at[tokens], target.at[slot, rows], sem))

    def _tokens(self, tile):
        """Where a tile's tokens are in the arrays, and in its slot of a ring."""
        token = self.tiles.token[tile]
        if self.sizes.block_q == 1:
            return token, 0
        count = self.tiles.count[tile]
        return pl.ds(token, count), pl.ds(0, count)

    def _start_block(self, at: Cursor, i: jax.Array, sem: jax.Array | int) -> Cursor:
        """Notes where block i is, and starts the copies of its pages; returns the next.

        As many bytes come as are waited for: in place of pages past the tile's last key, and of
        blocks past the last tile, come zeros that are on the chip; or, where a branch would cut a
        run, the sequence's first page (page 0 if it has no key).
        """
        sizes, buffer = self.sizes, self._buffer(i)
        self.scratch.tile_of[buffer] = at.tile
        self.scratch.block_of[buffer] = at.block
        tile, table = self._listed(at.tile), self.arrays.page_table
        row, column = self.tiles.seq[tile] * sizes.columns, at.block * sizes.pages_of_block
        last = (self._keys_of_tile(tile) - 1) >> (sizes.page_size.bit_length() - 1)
        arrived = self.scratch.latents_arrived.at[sem]

        def start(j, source):
            pltpu.make_async_copy(source, self.scratch.latents.at[buffer, j], arrived).start()

        def start_page(j, stand_in=None):
            page = table[row + column + j]
            page = page if stand_in is None else jnp.where(column + j <= last, page, stand_in)
            start(j, self.arrays.pages.at[page])

        def start_some():
            for j in range(sizes.pages_of_block):
                exists = (column + j <= last) & (at.tile < self.num_tiles)
                pl.when(exists)(functools.partial(start_page, j))
                pl.when(~exists)(functools.partial(start, j, self.scratch.nothing))

        def start_all(stand_in=None):
            for j in range(sizes.pages_of_block):
                start_page(j, stand_in)

        is_whole = (column + sizes.pages_of_block - 1 <= last) & (at.tile < self.num_tiles)
        if sizes.starts_within:
            start_all(jnp.where(last >= 0, table[row], 0))
        else:
            jax.lax.cond(is_whole, start_all, start_some)
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
        tokens, rows = self._tokens(tile)
        for source, target in (
            (self.scratch.out, self.arrays.out),
            (self.scratch.lse, self.arrays.lse),
        ):
            sem = self.scratch.out_left.at[slot]
            act(pltpu.make_async_copy(source.at[slot, rows], target.at[tokens], sem))

    def _wait_output(self, tile) -> None:
        self._each_output(tile, lambda copy: copy.wait())

    # Between the runs.

    def _cross(self, tile: jax.Array) -> None:
        """Readies a tile's last block, and the queries of the one after it, for products."""
        self._clean(tile)
        pl.when(tile + 1 < self.num_tiles)(lambda: self._receive_queries(tile + 1))

    def _receive_queries(self, tile: jax.Array) -> None:
        """Waits for a tile's queries, and calls for a later tile's."""
        self._each_query(tile, lambda copy: copy.wait())
        later = tile + self.sizes.queries // 2
        pl.when(later < self.num_tiles)(lambda: self._start_queries(later))

    def _finish(self, tile: jax.Array) -> None:
        """Divides what a tile has gathered, and sends it off."""
        self._divide(tile, jax.lax.rem(tile, self.sizes.states), tile % OUTPUTS)
        self._send(tile)

    def _send(self, tile: jax.Array) -> None:
        """Sends a tile's output and lse off; returns when there is room for the next one's."""
        self._each_output(tile, lambda copy: copy.start())
        next_in_slot = tile + 1 - OUTPUTS
        pl.when(next_in_slot >= 0)(lambda: self._wait_output(next_in_slot))

    def _clean(self, tile: jax.Array) -> None:
        """Zeroes what follows the keys in a tile's last page: NaN would outlive a weight of 0.

        Copies of it follow where it is the sequence's first, too.
        """
        sizes, buffer = self.sizes, self._buffer(self.tiles.end[tile] - 1)
        num_keys = self._keys_of_tile(tile)
        of_block = num_keys - (self.tiles.blocks[tile] - 1) * sizes.block_kv
        first = jnp.maximum(of_block - 1, 0) >> (sizes.page_size.bit_length() - 1)

        def one(j, _):
            page = self.scratch.latents.at[buffer, j]
            clean_page(page, of_block - j * sizes.page_size, sizes.rope_dim)

        if sizes.starts_within:
            stop = jnp.where(num_keys <= sizes.page_size, sizes.pages_of_block, first + 1)
            jax.lax.fori_loop(first, stop, one, None)
        else:
            one(first, None)

    # Phases of a block.

    def _parts(self, i: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Block i's latents [block_kv, rank]; and a list of its rotary tiles, two tokens a line."""
        sizes, rows = self.sizes, self.scratch.latents.at[self._buffer(i)]
        pages = range(sizes.pages_of_block)
        halves = [
            jnp.concatenate(
                [rows[j, half * sizes.stripes + c] for c in range(sizes.stripes)], axis=1
            )
            for j in pages
            for half in range(2)
        ]
        ropes = jnp.concatenate([rows[j, 2 * sizes.stripes] for j in pages], axis=0)
        tile = 32 // sizes.cache_dtype.itemsize
        return (
            as_operand(jnp.concatenate(halves, axis=0), sizes.q_dtype),
            [as_operand(ropes[at : at + tile], sizes.q_dtype) for at in range(0, len(ropes), tile)],
        )

    def _logits(self, i: jax.Array) -> jax.Array:
        """Products of block i's keys with its tile's queries, unscaled."""
        sizes = self.sizes
        latents, ropes = self._parts(i)
        slot = jax.lax.rem(self.scratch.tile_of[self._buffer(i)], sizes.queries)
        q = self.scratch.ql_nope[slot].reshape(sizes.rows, sizes.rank)
        q_pe = self.scratch.q_pe[slot].reshape(sizes.rows, sizes.rope_dim)
        # A line has two tokens' rotary keys. On 256-wide matrix units they are laid under one
        # another; on 128-wide ones that delays the products (v5e 310 us for 284): there each half
        # is masked, and the queries have theirs twice.
        if sizes.rolls_ropes:
            own = [of for x in ropes for of in (x[:, : sizes.rope_dim], x[:, sizes.rope_dim :])]
            q = jnp.concatenate([q, q_pe], axis=1)
        else:
            lane = jax.lax.broadcasted_iota(jnp.int32, (1, 2 * sizes.rope_dim), 1)
            is_first = (lane - sizes.rope_dim) >> 31
            words = [pltpu.bitcast(x, jnp.int32) for x in ropes]
            masked = [x & mask for x in words for mask in (is_first, ~is_first)]
            own = [pltpu.bitcast(x, ropes[0].dtype) for x in masked]
            q = jnp.concatenate([q, q_pe, q_pe], axis=1)
        keys = jnp.concatenate([latents, jnp.concatenate(own, axis=0)], axis=1)
        return _dot(q, keys, contract=(1, 1), precision=sizes.precision)

    def _softmax(self, products: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Adds block i to its tile's running softmax: its weights, and what old ones keep."""
        scratch, sizes = self.scratch, self.sizes
        buffer = self._buffer(i)
        at = Cursor(scratch.tile_of[buffer], scratch.block_of[buffer])
        state = jax.lax.rem(at.tile, sizes.states)
        logits = self._seen(self._scaled(products), at)
        m_old = scratch.m[state]
        m_new = jnp.maximum(m_old, jnp.max(logits, axis=1, keepdims=True))
        kept = jnp.exp2(m_old - m_new)
        p = jnp.exp2(logits - _widened(m_new, sizes.block_kv))
        scratch.m[state] = m_new
        scratch.l[state] = kept * scratch.l[state] + jnp.sum(p, axis=1, keepdims=True)
        return p.astype(sizes.q_dtype), kept

    def _late(self, i: int) -> tuple[jax.Array, jax.Array]:
        """Weights of the last run's last blocks, whose values are not added yet."""
        return self.scratch.weights[i], self.scratch.kept[i]

    def _add_values(self, weights: jax.Array, kept: jax.Array, i: jax.Array) -> None:
        """Adds the weighted values of block i to its tile's; to nobody's where i is negative."""
        scratch, sizes = self.scratch, self.sizes
        state = jax.lax.rem(scratch.tile_of[self._buffer(i)], sizes.states)
        state = jnp.where(i < 0, sizes.states, state)
        values, _ = self._parts(i)
        product = _dot(weights, values, contract=(1, 0), precision=sizes.precision)
        scratch.acc[state] = scratch.acc[state] * _widened(kept, sizes.rank) + product

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
        key = jax.lax.broadcasted_iota(jnp.int32, (1, self.sizes.block_kv), 1)
        kv_pos = key + at.block * self.sizes.block_kv
        q_pos = self.tiles.q_pos[self._listed(at.tile)]
        if self.sizes.block_q == 1:
            return logits + jnp.where(kv_pos <= q_pos, 0.0, MASKED)
        row = jax.lax.broadcasted_iota(jnp.int32, (self.sizes.rows, 1), 0)
        return jnp.where(kv_pos <= q_pos + row // self.sizes.num_heads, logits, MASKED)

    def _divide(self, tile: jax.Array, state: jax.Array, slot: jax.Array) -> None:
        """Divides a state, a tile's, into an output's slot, and clears it for a later tile's."""
        scratch, sizes = self.scratch, self.sizes
        m, l = scratch.m[state], scratch.l[state]
        row = jax.lax.broadcasted_iota(jnp.int32, m.shape, 0)
        last_seen = row // sizes.num_heads + self.tiles.q_pos[self._listed(tile)]
        out = scratch.acc[state] * _widened(self.arrays.kv_scale[0] / l, sizes.rank)
        out = jnp.where(_widened(last_seen, sizes.rank) >= 0, out, 0.0)  # and 0 even if it is NaN
        shape = (sizes.block_q, sizes.num_heads, sizes.rank)
        scratch.out[slot] = out.astype(sizes.q_dtype).reshape(shape)
        lse = jnp.where(last_seen >= 0, (m + jnp.log2(l)) * LN_2, -jnp.inf)
        for i in range(sizes.block_q):
            of_query = lse[i * sizes.num_heads : (i + 1) * sizes.num_heads]
            scratch.lse[slot, i] = _as_row(of_query)
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
