"""The attending half of MLA on TPU: tiles of queries over blocks of latents, software-pipelined.

A pass goes through a list of tiles (some queries of one sequence, all their heads) as one flat
sequence of steps, a step being one tile and one block of keys, and borders between tiles are no
borders to the pipeline. While step k is at its softmax and its product with the values, step k + 1
is multiplied with the keys, and the pages of the steps after it are on their way::

    DMA      | k+2      | k+3      | k+4       pages into a ring of buffers
    q @ K.T  | k+1      | k+2      | k+3       logits, unscaled
    p @ V    | k        | k+1      | k+2       accumulators; output at a tile's last step

Both products of a step are independent of one another, so the compiler fills the matrix unit with
one while the vector unit works for the other.

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


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is static of a pass.

    Attributes:
        block_q: queries of a tile.
        block_kv: keys of a step; whole pages.
        buffers: blocks of latents in VMEM, at least 3: one at its values, one at its keys, and one
            on its way.
        num_heads, rank, rope_dim, page_size: of the arrays.
        q_dtype: of queries and output.
        cache_dtype: of the latents as they are stored.
        scale, soft_cap: of the logits.
    """

    block_q: int
    block_kv: int
    buffers: int
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
        """Pages of a step."""
        return self.block_kv // self.page_size

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
    blocks: Any  # steps that it takes, at least one


class Cursor(NamedTuple):
    """One step: block `block` of tile `tile`."""

    tile: jax.Array
    block: jax.Array


class Scratch(NamedTuple):
    """What a pass has in VMEM, and its semaphores."""

    ql_nope: Any  # [2, block_q, num_heads, rank]: this tile's, the next one's
    q_pe: Any  # [2, block_q, num_heads, rope_dim]
    rope: Any  # [2, rows, 2 * rope_dim]: q_pe where an even token has its rotary key; an odd one
    latents: Any  # [buffers, block_kv / 2, 2 * (rank + rope_dim)]
    logits: Any  # float32 [rows, block_kv]: of the step after the one that is at its values
    m: Any  # float32 [rows, LANES]: the same in every lane
    l: Any
    acc: Any  # float32 [rows, rank]
    out: Any  # [2, block_q, num_heads, rank]
    lse: Any  # float32 [2, block_q, 1, num_heads]
    q_arrived: Any
    latents_arrived: Any
    out_left: Any


def scratch_shapes(sizes: Sizes) -> Scratch:
    """The shapes of a pass's scratch."""
    s = sizes
    both = 2 * (s.rank + s.rope_dim)
    return Scratch(
        ql_nope=pltpu.VMEM((2, s.block_q, s.num_heads, s.rank), s.q_dtype),
        q_pe=pltpu.VMEM((2, s.block_q, s.num_heads, s.rope_dim), s.q_dtype),
        rope=pltpu.VMEM((2, s.rows, 2 * s.rope_dim), s.q_dtype),
        latents=pltpu.VMEM((s.buffers, s.block_kv // 2, both), s.cache_dtype),
        logits=pltpu.VMEM((s.rows, s.block_kv), jnp.float32),
        m=pltpu.VMEM((s.rows, LANES), jnp.float32),
        l=pltpu.VMEM((s.rows, LANES), jnp.float32),
        acc=pltpu.VMEM((s.rows, s.rank), jnp.float32),
        out=pltpu.VMEM((2, s.block_q, s.num_heads, s.rank), s.q_dtype),
        lse=pltpu.VMEM((2, s.block_q, 1, s.num_heads), jnp.float32),
        q_arrived=pltpu.SemaphoreType.DMA((2,)),
        latents_arrived=pltpu.SemaphoreType.DMA((s.buffers,)),
        out_left=pltpu.SemaphoreType.DMA((2,)),
    )


def attend_tiles(
    sizes: Sizes, arrays: Arrays, tiles: Tiles, num_tiles: jax.Array, num_steps: jax.Array
) -> None:
    """Attends with every listed tile, and writes its output and lse."""

    @pl.when(num_tiles > 0)
    def _():
        def scoped(*scratch):
            _Pass(sizes, arrays, tiles, num_tiles, num_steps, Scratch(*scratch)).run()

        pl.run_scoped(scoped, *scratch_shapes(sizes))


class _Pass:
    """One pass: the arguments of `attend_tiles`, and the phases of a step as methods."""

    def __init__(self, sizes, arrays, tiles, num_tiles, num_steps, scratch):
        self.sizes, self.arrays, self.tiles = sizes, arrays, tiles
        self.num_tiles, self.num_steps, self.scratch = num_tiles, num_steps, scratch

    def run(self) -> None:
        """Fills the pipeline, and turns it until every step is through."""
        ahead, scratch = self.sizes.buffers - 1, self.scratch
        start = Cursor(jnp.int32(0), jnp.int32(0))
        self._reset()
        self._start_queries(jnp.int32(0))
        coming = start
        for k in range(ahead):
            coming = self._start_latents(coming, jnp.int32(k))
        self._receive(start, jnp.int32(0))
        scratch.logits[...] = self._logits(start.tile, jnp.int32(0))

        def step(k, cursors):
            coming, following, current = cursors
            coming = self._start_latents(coming, k + ahead)
            pl.when(k + 1 < self.num_steps)(lambda: self._receive(following, k + 1))
            logits = scratch.logits[...]  # read before it is written: the compiler looks no deeper
            scratch.logits[...] = self._logits(following.tile, k + 1)
            self._softmax_and_values(logits, current, k)
            pl.when(current.block + 1 == self.tiles.blocks[current.tile])(
                lambda: self._finish(current.tile)
            )
            return coming, self._after(following), following

        jax.lax.fori_loop(0, self.num_steps, step, (coming, self._after(start), start))
        for last in (2, 1):
            tile = self.num_tiles - last
            pl.when(tile >= 0)(functools.partial(self._wait_output, tile))

    # Where a step is.

    def _after(self, step: Cursor) -> Cursor:
        """The next step; past the last one, some step that exists."""
        is_last = step.block + 1 >= self.tiles.blocks[step.tile]
        tile = jnp.where(is_last, step.tile + 1, step.tile)
        block = jnp.where(is_last, 0, step.block + 1)
        return Cursor(jnp.minimum(tile, self.num_tiles - 1), block)

    def _stop(self, tile: jax.Array) -> jax.Array:
        """The first position that no query of the tile sees."""
        return jnp.maximum(self.tiles.q_pos[tile] + self.tiles.count[tile], 0)

    def _keys(self, step: Cursor) -> jax.Array:
        """Keys of the step that some query sees: 0 to block_kv."""
        left = self._stop(step.tile) - step.block * self.sizes.block_kv
        return jnp.clip(left, 0, self.sizes.block_kv)

    # Copies.

    def _start_queries(self, tile: jax.Array) -> None:
        self._each_query(tile, lambda copy: copy.start())

    def _each_query(self, tile, act) -> None:
        """Starts or awaits the copies of a tile's queries."""
        slot = tile % 2

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

    def _start_latents(self, step: Cursor, k: jax.Array) -> Cursor:
        """Starts the copies of step k's pages, if there is such a step; returns the one after."""
        num_pages = pl.cdiv(self._keys(step), self.sizes.page_size)
        is_whole = num_pages == self.sizes.pages_of_block
        exists = k < self.num_steps

        @pl.when(exists & is_whole)
        def _():
            for j in range(self.sizes.pages_of_block):
                self._page_copy(step, k, j).start()

        @pl.when(exists & ~is_whole)
        def _():
            self._each_page(step, k, num_pages, lambda copy: copy.start())

        return self._after(step)

    def _wait_latents(self, step: Cursor, k: jax.Array) -> None:
        """Waits for a step's pages: a whole block's at once, by their bytes together."""
        num_pages = pl.cdiv(self._keys(step), self.sizes.page_size)
        is_whole = num_pages == self.sizes.pages_of_block

        @pl.when(is_whole)
        def _():
            slot = k % self.sizes.buffers
            block, sem = self.scratch.latents.at[slot], self.scratch.latents_arrived.at[slot]
            pltpu.make_async_copy(block, block, sem).wait()

        @pl.when(~is_whole)
        def _():
            self._each_page(step, k, num_pages, lambda copy: copy.wait())

    def _each_page(self, step, k, num_pages, act) -> None:
        """Starts or awaits the copies of a step's first pages."""

        def one(j, _):
            act(self._page_copy(step, k, j))
            return _

        jax.lax.fori_loop(0, num_pages, one, 0)

    def _page_copy(self, step, k, j):
        """The copy of page j of step k into its place in the ring."""
        half = self.sizes.page_size // 2
        slot = k % self.sizes.buffers
        page = self.arrays.page_table[
            self.tiles.seq[step.tile], step.block * self.sizes.pages_of_block + j
        ]
        target = self.scratch.latents.at[slot, pl.ds(pl.multiple_of(j * half, half), half)]
        sem = self.scratch.latents_arrived.at[slot]
        return pltpu.make_async_copy(self.arrays.pages.at[page], target, sem)

    def _each_output(self, tile, act) -> None:
        """Starts or awaits the copies of a tile's output and lse."""
        slot = tile % 2

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

    # Phases of a step.

    def _receive(self, step: Cursor, k: jax.Array) -> None:
        """Waits for a step's pages, and at a tile's first step for its queries."""
        self._wait_latents(step, k)
        num_keys = self._keys(step)
        pl.when(num_keys < self.sizes.block_kv)(
            lambda: self._clear_from(k % self.sizes.buffers, num_keys)
        )
        pl.when(step.block == 0)(lambda: self._receive_queries(step.tile))

    def _receive_queries(self, tile: jax.Array) -> None:
        """Waits for a tile's queries, sets the rotary ones out, and calls for the next tile's."""
        self._each_query(tile, lambda copy: copy.wait())
        pl.when(tile + 1 < self.num_tiles)(lambda: self._start_queries(tile + 1))
        q_pe = self.scratch.q_pe[tile % 2].reshape(self.sizes.rows, self.sizes.rope_dim)
        zero = jnp.zeros_like(q_pe)
        self.scratch.rope[0] = jnp.concatenate([q_pe, zero], axis=-1)
        self.scratch.rope[1] = jnp.concatenate([zero, q_pe], axis=-1)

    def _clear_from(self, slot: jax.Array, num_keys: jax.Array) -> None:
        """Zeroes what a buffer holds from a key on: NaN there would outlive a weight of 0."""
        packed, width = 32 // self.sizes.cache_dtype.itemsize, self.scratch.latents.shape[-1]
        key = token_of_value((packed, width), self.sizes.rank, self.sizes.rope_dim)

        def one(i, _):
            at = (slot, pl.ds(pl.multiple_of(i * packed, packed), packed))
            old = self.scratch.latents[at].astype(jnp.float32)
            kept = jnp.where(key + 2 * packed * i < num_keys, old, 0)
            self.scratch.latents[at] = kept.astype(self.sizes.cache_dtype)
            return _

        first = num_keys // (2 * packed)
        jax.lax.fori_loop(first, self.sizes.block_kv // 2 // packed, one, 0)

    def _halves(self, k: jax.Array):
        """Latents of the even and of the odd keys of step k, and their rotary keys side by side."""
        rank = self.sizes.rank
        rows = self.scratch.latents.at[k % self.sizes.buffers]
        return tuple(
            rows[:, at].astype(self.sizes.q_dtype)
            for at in (slice(0, rank), slice(rank, 2 * rank), slice(2 * rank, None))
        )

    def _logits(self, tile: jax.Array, k: jax.Array) -> jax.Array:
        """Products of the tile's queries with step k's keys, unscaled."""
        even, odd, ropes = self._halves(k)
        q = self.scratch.ql_nope[tile % 2].reshape(self.sizes.rows, self.sizes.rank)
        dot = functools.partial(_dot, contract=(1, 1), precision=self.sizes.precision)
        parts = [
            dot(
                jnp.concatenate([q, self.scratch.rope[i]], axis=1),
                jnp.concatenate([latents, ropes], axis=1),
            )
            for i, latents in enumerate((even, odd))
        ]
        return jnp.concatenate(parts, axis=1)

    def _softmax_and_values(self, products: jax.Array, step: Cursor, k: jax.Array) -> None:
        """Adds step k to the running softmax."""
        scratch = self.scratch
        logits = self._seen(self._scaled(products), step)
        m_old = scratch.m[...]
        m_new = jnp.maximum(m_old, jnp.max(logits, axis=1, keepdims=True))
        kept = jnp.exp2(m_old - m_new)
        p = jnp.exp2(logits - _widened(m_new, self.sizes.block_kv))
        scratch.m[...] = m_new
        scratch.l[...] = kept * scratch.l[...] + jnp.sum(p, axis=1, keepdims=True)
        even, odd, _ = self._halves(k)
        values = jnp.concatenate([even, odd], axis=0)
        product = _dot(
            p.astype(values.dtype), values, contract=(1, 0), precision=self.sizes.precision
        )
        scratch.acc[...] = scratch.acc[...] * _widened(kept, self.sizes.rank) + product

    def _scaled(self, products: jax.Array) -> jax.Array:
        """Logits in base 2."""
        # A vector at once: a product of two scalars would be a scalar unit's, and in its way.
        factor = jnp.full((1, self.sizes.block_kv), self.arrays.kv_scale[0]) * self.sizes.scale
        if self.sizes.soft_cap is None:
            return products * (factor * LOG2_E)
        capped = jnp.tanh(products * (factor / self.sizes.soft_cap))
        return capped * (self.sizes.soft_cap * LOG2_E)

    def _seen(self, logits: jax.Array, step: Cursor) -> jax.Array:
        """Logits with those of keys after the query's own position masked."""
        half = self.sizes.block_kv // 2
        column = jax.lax.broadcasted_iota(jnp.int32, (1, self.sizes.block_kv), 1)
        key = jnp.where(column < half, 2 * column, 2 * (column - half) + 1)
        kv_pos = key + step.block * self.sizes.block_kv
        q_pos = self.tiles.q_pos[step.tile]
        if self.sizes.block_q == 1:
            return logits + jnp.where(kv_pos <= q_pos, 0.0, MASKED)
        row = jax.lax.broadcasted_iota(jnp.int32, (self.sizes.rows, 1), 0)
        return jnp.where(kv_pos <= q_pos + row // self.sizes.num_heads, logits, MASKED)

    def _finish(self, tile: jax.Array) -> None:
        """Divides, sends a tile's output and lse off, and makes room for the next tile."""
        scratch, sizes = self.scratch, self.sizes
        slot = tile % 2
        pl.when(tile >= 2)(lambda: self._wait_output(tile - 2))
        m, l = scratch.m[...], scratch.l[...]
        seen = m > 0.5 * MASKED
        factor = jnp.where(seen, self.arrays.kv_scale[0] / l, 0.0)
        out = scratch.acc[...] * _widened(factor, sizes.rank)
        shape = (sizes.block_q, sizes.num_heads, sizes.rank)
        scratch.out[slot] = out.astype(sizes.q_dtype).reshape(shape)
        lse = jnp.where(seen, (m + jnp.log2(l)) * LN_2, -jnp.inf)
        for i in range(sizes.block_q):
            of_query = lse[i * sizes.num_heads : (i + 1) * sizes.num_heads]
            scratch.lse[slot, i] = of_query.T[:1]
        self._each_output(tile, lambda copy: copy.start())
        self._reset()

    def _reset(self) -> None:
        """Nothing seen yet."""
        self.scratch.m[...] = jnp.full_like(self.scratch.m, MASKED)
        self.scratch.l[...] = jnp.zeros_like(self.scratch.l)
        self.scratch.acc[...] = jnp.zeros_like(self.scratch.acc)


def _dot(a, b, *, contract, precision) -> jax.Array:
    """The product in float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _widened(x: jax.Array, width: int) -> jax.Array:
    """[rows, LANES] with equal lanes as [rows, width]."""
    return x[:, :width] if width <= LANES else jnp.tile(x, (1, width // LANES))
