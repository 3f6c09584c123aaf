"""The lightning indexer on TPU: scores of every cached position for every token.

The contract (maths, arguments, edge cases) is `pallas_kernels/sparse_mla/__init__.py`.

Tokens are taken eight at a time, the rows of one register, and what a sequence has in such an octet
is a tile: one token of it (decode), or several (prefill). All tiles go through their blocks of keys
as one flat sequence of steps, so that borders are no borders to the pipeline::

    DMA             | k+2      | k+3      | k+4       pages into a ring of buffers
    q @ K.T, relu   | k        | k+1      | k+2       summed over heads, weighted, masked
    rows of scores  |          | octet    |           to HBM when its last tile is through

An octet's scores lie in VMEM, -inf at first, until all of its tiles are through.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip
from pallas_kernels.contract_checks import check_indexer
from pallas_kernels.tpu_chip import LANES, SUBLANES

QUERY_DTYPES = ("float32", "bfloat16")
KEY_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2")
BUFFERS = 3
BLOCK_KV = 2048  # keys of a step, whole pages: see docs/kernels.md for 512 and 1024
OCTET = SUBLANES  # tokens


@dataclasses.dataclass(frozen=True)
class _Sizes:
    num_heads: int
    head_dim: int
    page_size: int
    pages: int  # of a step
    pages_per_seq: int
    q_dtype: jnp.dtype

    @property
    def block_kv(self) -> int:
        return self.pages * self.page_size

    @property
    def width(self) -> int:
        """Columns of scores, whole blocks."""
        return pl.cdiv(self.pages_per_seq, self.pages) * self.block_kv

    @property
    def precision(self) -> jax.lax.Precision | None:
        return jax.lax.Precision.HIGHEST if self.q_dtype == jnp.float32 else None


class _Batch(NamedTuple):
    """In SMEM."""

    page_table: Any  # [max_num_seqs, pages_per_seq]
    kv_lens: Any
    cu_q_lens: Any
    num_seqs: Any  # [1]


class _Arrays(NamedTuple):
    """In HBM; tokens are whole octets."""

    q: Any  # [num_tokens, num_heads, head_dim]
    weights: Any  # float32 [num_tokens, num_heads]
    pages: Any  # [num_pages, page_size, head_dim]
    scores: Any  # float32 [num_tokens, width]


class _Tiles(NamedTuple):
    """In SMEM: int32 [num_tiles]."""

    seq: Any
    token: Any  # its first
    count: Any  # its tokens, of one octet
    q_pos: Any  # position of its first token
    blocks: Any  # steps that it takes, at least one


class _Scratch(NamedTuple):
    q: Any  # [2, OCTET, num_heads, head_dim]: this octet's, the next one's
    weights: Any  # float32 [2, OCTET, num_heads]
    spread: Any  # float32 [OCTET, num_heads, LANES]: this octet's weights, the same in every lane
    keys: Any  # [BUFFERS, pages, page_size, head_dim]
    scores: Any  # float32 [2, OCTET, width]
    q_arrived: Any
    keys_arrived: Any
    scores_left: Any


class _Cursor(NamedTuple):
    """One step: block `block` of tile `tile`."""

    tile: jax.Array
    block: jax.Array


def indexer_scores(
    q_index: jax.Array,
    weights: jax.Array,
    index_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
) -> jax.Array:
    """Scores of every cached position for every token, as the contract of `sparse_mla` has it.

    Pages that no token sees anything of are not read.

    Numerics: products of bfloat16 queries in bfloat16 (float32 keys are rounded to it), of float32
    ones at the highest precision; sums in float32.

    Raises:
        ValueError: a shape or dtype is not the contract's, or not this lowering's: float16, an
            index_head_dim that is no multiple of 128, a page that is no multiple of a packed
            register's rows, more positions than VMEM holds for eight tokens.
    """
    dims = _check(q_index, weights, index_pages, page_table, kv_lens, cu_q_lens, num_seqs)
    num_tokens, num_heads = dims["num_tokens"], dims["num_index_heads"]
    more_tokens, more_heads = -num_tokens % OCTET, -num_heads % 16
    q_index = jnp.pad(q_index, ((0, more_tokens), (0, more_heads), (0, 0)))
    weights = jnp.pad(weights, ((0, more_tokens), (0, more_heads)))
    sizes = _Sizes(
        q_index.shape[1], dims["index_head_dim"], dims["page_size"],
        _pages_of_step(dims["pages_per_seq"], dims["page_size"]), dims["pages_per_seq"],
        q_index.dtype,
    )  # fmt: skip
    cu_q_lens = jnp.clip(cu_q_lens, 0, num_tokens)
    scores = _call(
        _Batch(page_table, kv_lens, cu_q_lens, num_seqs.reshape(1)), q_index, weights, index_pages,
        sizes,
    )  # fmt: skip
    return scores[:num_tokens, : dims["pages_per_seq"] * dims["page_size"]]


def _check(q_index, weights, index_pages, page_table, kv_lens, cu_q_lens, num_seqs):
    """Refuses what the contract or this lowering does not take; returns the dimensions."""
    dims = check_indexer(locals(), dtypes=QUERY_DTYPES, key_dtypes=KEY_DTYPES)
    if dims["index_head_dim"] % LANES:
        raise ValueError(
            f"index_head_dim is {dims['index_head_dim']}, must be a multiple of {LANES}: use "
            f"XLA_MLA_SPARSE for others"
        )
    rows = SUBLANES * 4 // index_pages.dtype.itemsize
    if dims["page_size"] % rows:
        raise ValueError(
            f"page_size is {dims['page_size']}, must be a multiple of {rows} with "
            f"{index_pages.dtype} keys: use XLA_MLA_SPARSE for others"
        )
    positions = dims["pages_per_seq"] * dims["page_size"]
    most = tpu_chip.current().vmem_bytes // 2 // (2 * OCTET * 4)
    if positions > most:
        raise ValueError(
            f"pages_per_seq * page_size is {positions}, must be at most {most}: VMEM holds the "
            f"scores of {2 * OCTET} tokens; use XLA_MLA_SPARSE for longer sequences"
        )
    return dims


def _pages_of_step(pages_per_seq: int, page_size: int) -> int:
    """Pages of a step: whole registers of keys, and a divisor of a table's row where one fits."""
    most = max(1, BLOCK_KV // page_size)
    whole = [n for n in range(1, most + 1) if n * page_size % LANES == 0] or [LANES // page_size]
    return max((n for n in whole if pages_per_seq % n == 0), default=whole[-1])


def _call(batch, q, weights, pages, sizes):
    """The `pallas_call`."""
    num_tokens, max_num_seqs = q.shape[0], batch.kv_lens.shape[0]
    most_tiles = num_tokens // OCTET + max_num_seqs
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        functools.partial(_kernel, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(batch),
            grid=(1,),
            in_specs=[in_hbm] * 3,
            out_specs=in_hbm,
            scratch_shapes=[
                *[pltpu.SMEM((most_tiles,), jnp.int32)] * len(_Tiles._fields),
                pltpu.VMEM((2, OCTET, sizes.num_heads, sizes.head_dim), q.dtype),
                pltpu.VMEM((2, OCTET, sizes.num_heads), jnp.float32),
                pltpu.VMEM((OCTET, sizes.num_heads, LANES), jnp.float32),
                pltpu.VMEM((BUFFERS, sizes.pages, sizes.page_size, sizes.head_dim), pages.dtype),
                pltpu.VMEM((2, OCTET, sizes.width), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((num_tokens, sizes.width), jnp.float32),
        compiler_params=tpu_chip.compiler_params(["arbitrary"], checks_bounds=False),
        name="indexer_scores",
    )(*batch, q, weights, pages)


def _kernel(page_table, kv_lens, cu_q_lens, num_seqs, q, weights, pages, scores, *rest, sizes):
    """Lists the tiles, scores them, and fills the octets that no sequence has a token in."""
    batch = _Batch(page_table, kv_lens, cu_q_lens, num_seqs)
    arrays = _Arrays(q, weights, pages, scores)
    tiles = _Tiles(*rest[: len(_Tiles._fields)])
    scratch = _Scratch(*rest[len(_Tiles._fields) :])
    num_tiles, num_steps = _list_tiles(tiles, batch, sizes)
    pl.when(num_tiles > 0)(
        lambda: _Scoring(sizes, batch, arrays, tiles, num_tiles, num_steps, scratch).run()
    )
    _blank_padding(arrays, scratch, cu_q_lens[num_seqs[0]])


def _list_tiles(tiles: _Tiles, batch: _Batch, sizes: _Sizes) -> tuple[jax.Array, jax.Array]:
    """Cuts sequences where octets end, in order; returns tiles, and steps of all together."""

    def one_sequence(seq, sums):
        first, stop = batch.cu_q_lens[seq], batch.cu_q_lens[seq + 1]
        most = sizes.pages_per_seq * sizes.page_size
        offset = jnp.minimum(batch.kv_lens[seq], most) - stop  # from a token to its position

        def is_left(state):
            return state[0] < stop

        def one_tile(state):
            token, at, steps = state
            count = jnp.minimum(stop, (token // OCTET + 1) * OCTET) - token
            blocks = jnp.maximum(pl.cdiv(offset + token + count, sizes.block_kv), 1)
            tiles.seq[at] = seq
            tiles.token[at] = token
            tiles.count[at] = count
            tiles.q_pos[at] = offset + token
            tiles.blocks[at] = blocks
            return token + count, at + 1, steps + blocks

        return jax.lax.while_loop(is_left, one_tile, (first, *sums))[1:]

    return jax.lax.fori_loop(0, batch.num_seqs[0], one_sequence, (jnp.int32(0), jnp.int32(0)))


class _Scoring:
    """What `_kernel` has, and the phases of a step as methods."""

    def __init__(self, sizes, batch, arrays, tiles, num_tiles, num_steps, scratch):
        self.sizes, self.batch, self.arrays, self.tiles = sizes, batch, arrays, tiles
        self.num_tiles, self.num_steps, self.scratch = num_tiles, num_steps, scratch
        self.num_octets = self._octet(num_tiles - 1) + 1

    def run(self) -> None:
        """Fills the pipeline, turns it until every step is through, and empties it."""
        start = _Cursor(jnp.int32(0), jnp.int32(0))
        self._each_query(jnp.int32(0), _start)
        coming = start
        for k in range(BUFFERS - 1):
            coming = self._start_keys(coming, jnp.int32(k))

        def step(k, cursors):
            coming, current = cursors
            coming = self._start_keys(coming, k + BUFFERS - 1)
            octet = self._octet(current.tile)
            before = self._octet(jnp.maximum(current.tile - 1, 0))
            begins = (current.block == 0) & ((current.tile == 0) | (before != octet))
            pl.when(begins)(lambda: self._begin(octet))
            self._wait_keys(k)
            self._score(current, k)
            after = self._after(current)
            is_last = (k + 1 == self.num_steps) | (self._octet(after.tile) != octet)
            pl.when(is_last)(lambda: self._copy_scores(octet).start())
            return coming, after

        jax.lax.fori_loop(0, self.num_steps, step, (coming, start))
        for back in (2, 1):
            octet = self.num_octets - back
            pl.when(octet >= 0)(lambda octet=octet: self._copy_scores(octet).wait())

    # Where a step is.

    def _octet(self, tile: jax.Array) -> jax.Array:
        return self.tiles.token[tile] // OCTET

    def _after(self, step: _Cursor) -> _Cursor:
        """The next step; past the last one, some step that exists."""
        is_last = step.block + 1 >= self.tiles.blocks[step.tile]
        tile = jnp.where(is_last, step.tile + 1, step.tile)
        return _Cursor(jnp.minimum(tile, self.num_tiles - 1), jnp.where(is_last, 0, step.block + 1))

    # Copies.

    def _each_query(self, octet, act) -> None:
        """Starts or awaits the copies of an octet's queries and weights."""
        at, slot = pl.ds(pl.multiple_of(octet * OCTET, OCTET), OCTET), octet % 2
        sem = self.scratch.q_arrived.at[slot]
        act(pltpu.make_async_copy(self.arrays.q.at[at], self.scratch.q.at[slot], sem))
        act(pltpu.make_async_copy(self.arrays.weights.at[at], self.scratch.weights.at[slot], sem))

    def _start_keys(self, step: _Cursor, k: jax.Array) -> _Cursor:
        """Starts the copies of step k's pages, if there is such a step; returns the one after.

        All of a step's pages, so that nothing is counted: past the last one that the tile sees
        something of, that one again.
        """
        sizes, seq = self.sizes, self.tiles.seq[step.tile]
        stop = self.tiles.q_pos[step.tile] + self.tiles.count[step.tile]
        last = jnp.maximum((stop - 1) // sizes.page_size, 0)
        first, slot = step.block * sizes.pages, k % BUFFERS

        @pl.when(k < self.num_steps)
        def _():
            for j in range(sizes.pages):
                page = self.batch.page_table[seq, jnp.minimum(first + j, last)]
                page = jnp.clip(page, 0, self.arrays.pages.shape[0] - 1)
                target = self.scratch.keys.at[slot, j]
                sem = self.scratch.keys_arrived.at[slot]
                pltpu.make_async_copy(self.arrays.pages.at[page], target, sem).start()

        return self._after(step)

    def _wait_keys(self, k: jax.Array) -> None:
        slot = k % BUFFERS
        keys = self.scratch.keys.at[slot]
        pltpu.make_async_copy(keys, keys, self.scratch.keys_arrived.at[slot]).wait()

    def _copy_scores(self, octet):
        """The copy of an octet's scores to HBM."""
        at, slot = pl.ds(pl.multiple_of(octet * OCTET, OCTET), OCTET), octet % 2
        sem = self.scratch.scores_left.at[slot]
        return pltpu.make_async_copy(self.scratch.scores.at[slot], self.arrays.scores.at[at], sem)

    # Phases of a step.

    def _begin(self, octet: jax.Array) -> None:
        """Makes room for an octet's scores, takes its queries, and calls for the next one's."""
        slot, scratch = octet % 2, self.scratch
        self._each_query(octet, _wait)
        pl.when(octet + 1 < self.num_octets)(lambda: self._each_query(octet + 1, _start))
        pl.when(octet >= 2)(lambda: self._copy_scores(octet - 2).wait())
        _fill(scratch.scores.at[slot])
        weights = scratch.weights[slot].T
        for i in range(OCTET):
            scratch.spread[i] = jnp.broadcast_to(weights[:, i : i + 1], scratch.spread.shape[1:])

    def _score(self, step: _Cursor, k: jax.Array) -> None:
        """Scores a block of keys: of the tile's one token, or of the whole octet."""
        first, count = self.tiles.token[step.tile], self.tiles.count[step.tile]
        slot, row = first // OCTET % 2, first % OCTET
        keys, scores = self.scratch.keys.at[k % BUFFERS], self.scratch.scores
        own = jax.lax.broadcasted_iota(jnp.int32, (OCTET, 1), 0) - row
        is_own = (own >= 0) & (own < count)

        def keep(q, spread):
            for columns, unseen, found in self._strips(step, q, spread, keys):
                found = jnp.where(unseen > own, -jnp.inf, found)
                scores[slot, :, columns] = jnp.where(is_own, found, scores[slot, :, columns])

        q, spread = self.scratch.q, self.scratch.spread
        pl.when(count == 1)(lambda: keep(q[slot, row][None], spread[row][None]))
        pl.when(count > 1)(lambda: keep(q[slot], spread[...]))

    def _strips(self, step: _Cursor, q: jax.Array, spread: jax.Array, keys: Any) -> Iterator:
        """A block's scores, one register of keys after another.

        Args:
            step: whose block it is.
            q: [tokens, num_heads, head_dim].
            spread: [tokens, num_heads, LANES]: their weights.
            keys: [pages, page_size, head_dim].

        Yields:
            Columns of the octet's scores; int32 [1, LANES], how far each key is past the tile's
            first token; float32 [tokens, LANES], all taken as seen.
        """
        sizes = self.sizes
        tokens, heads, head_dim = q.shape
        k = keys[...].reshape(sizes.block_kv, head_dim).astype(sizes.q_dtype)
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        for strip in range(sizes.block_kv // LANES):
            dots = jax.lax.dot_general(
                q.reshape(tokens * heads, head_dim), k[strip * LANES : (strip + 1) * LANES],
                (((1,), (1,)), ((), ())), precision=sizes.precision,
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            weighted = jnp.maximum(dots, 0).reshape(tokens, heads, LANES) * spread
            start = pl.multiple_of(step.block * sizes.block_kv + strip * LANES, LANES)
            unseen = start + lane - self.tiles.q_pos[step.tile]
            yield pl.ds(start, LANES), unseen, jnp.sum(weighted, axis=1)


def _blank_padding(arrays: _Arrays, scratch: _Scratch, num_tokens: jax.Array) -> None:
    """Gives octets without a token of a sequence scores of -inf."""
    first, stop = pl.cdiv(num_tokens, OCTET), arrays.scores.shape[0] // OCTET

    @pl.when(first < stop)
    def _():
        _fill(scratch.scores.at[0])

        def each(act):
            def one(octet, carry):
                at = pl.ds(pl.multiple_of(octet * OCTET, OCTET), OCTET)
                sem = scratch.scores_left.at[0]
                act(pltpu.make_async_copy(scratch.scores.at[0], arrays.scores.at[at], sem))
                return carry

            jax.lax.fori_loop(first, stop, one, 0)

        each(_start)
        each(_wait)


def _fill(scores: Any) -> None:
    """-inf, a block of columns at a time."""
    width = scores.shape[1]
    block = next(n for n in (1024, 512, 256, LANES) if width % n == 0)

    def one(i, carry):
        at = pl.ds(pl.multiple_of(i * block, block), block)
        scores[:, at] = jnp.full((OCTET, block), -jnp.inf, jnp.float32)
        return carry

    jax.lax.fori_loop(0, width // block, one, 0)


def _start(copy: Any) -> None:
    copy.start()


def _wait(copy: Any) -> None:
    copy.wait()
