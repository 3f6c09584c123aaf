"""How the lightning indexer scores on TPU: blocks of keys, one step after another.

All tiles go through their blocks of keys as one flat sequence of steps, so that borders are no
borders to the pipeline. A run is instructions without a branch; where every token is alone in its
sequence (decodes), it has two steps, and products are a step ahead of what is made of them::

    run             | k, k+1                     | k+2, k+3
    DMA             | k+6            k+7         | k+8            k+9      pages into a ring
    q @ K.T         | k+1            k+2         | k+3            k+4      into `dots`
    relu, weighed   | k              k+1         | k+2            k+3      summed over heads, masked
    rows of scores  |                            | octet                   to HBM, whole octets

Octets of prompts take a step at a time: their products alone fill the matrix unit.

A key is a column of the matrix unit's weights. Where the unit is deeper than a key is long, two
keys share a column, one under the other, and a decode's query comes twice, each time beside zeros:
as many products, and half as many weights to push, which take longer than a decode's few rows.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip
from pallas_kernels.tpu_chip import LANES, SUBLANES

OCTET = SUBLANES  # tokens
TOGETHER = 2  # steps of a run, of either parity
BUFFERS = 6  # steps whose keys are here, or on their way


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is known when tracing, of a call on the chip that is traced for."""

    num_heads: int
    head_dim: int
    page_size: int
    pages: int  # of a step
    pages_per_seq: int
    q_dtype: jnp.dtype

    @property
    def block_kv(self) -> int:
        """Keys of a step."""
        return self.pages * self.page_size

    @property
    def beside(self) -> int:
        """Keys that share a column of the matrix unit's weights, for one token."""
        fit = max(1, tpu_chip.current().mxu // self.head_dim)
        return fit if self.block_kv % (fit * LANES) == 0 else 1

    @property
    def width(self) -> int:
        """Columns of scores, whole blocks."""
        return pl.cdiv(self.pages_per_seq, self.pages) * self.block_kv

    @property
    def precision(self) -> jax.lax.Precision | None:
        """Of the products."""
        return jax.lax.Precision.HIGHEST if self.q_dtype == jnp.float32 else None


class Batch(NamedTuple):
    """In SMEM."""

    page_table: Any  # [max_num_seqs * pages_per_seq], pages that exist
    kv_lens: Any
    cu_q_lens: Any
    num_seqs: Any  # [1]


class Arrays(NamedTuple):
    """In HBM; tokens are whole octets."""

    q: Any  # [num_tokens, num_heads, head_dim]
    weights: Any  # float32 [num_tokens, num_heads]
    pages: Any  # [num_pages, page_size, head_dim]
    scores: Any  # float32 [num_tokens, width]


class Tiles(NamedTuple):
    """In SMEM: int32 [num_tiles]."""

    seq: Any
    token: Any  # its first
    count: Any  # its tokens, of one octet
    q_pos: Any  # position of its first token
    blocks: Any  # steps that it takes, at least one


class Scratch(NamedTuple):
    """In VMEM, and semaphores.

    A step's keys and products lie with those of every other one, the even ones' and the odd ones'
    apart: so the compiler knows that a copy into the ones is not read as the others.
    """

    q: Any  # [2, OCTET, num_heads, head_dim]: this octet's, the next one's
    weights: Any  # float32 [2, OCTET, num_heads]
    spread: Any  # float32 [OCTET, num_heads, LANES]: this octet's weights, the same in every lane
    even_keys: Any  # [BUFFERS / 2, pages, page_size, head_dim]
    odd_keys: Any
    dots: Any  # float32 [2, beside * num_heads, block_kv / beside]: of one token
    scores: Any  # float32 [2, OCTET, width]
    q_arrived: Any
    keys_arrived: Any
    scores_left: Any


def scratch_shapes(sizes: Sizes, key_dtype: jnp.dtype) -> Scratch:
    """What `Scoring` needs."""
    keys = BUFFERS // 2, sizes.pages, sizes.page_size, sizes.head_dim
    return Scratch(
        q=pltpu.VMEM((2, OCTET, sizes.num_heads, sizes.head_dim), sizes.q_dtype),
        weights=pltpu.VMEM((2, OCTET, sizes.num_heads), jnp.float32),
        spread=pltpu.VMEM((OCTET, sizes.num_heads, LANES), jnp.float32),
        even_keys=pltpu.VMEM(keys, key_dtype),
        odd_keys=pltpu.VMEM(keys, key_dtype),
        dots=pltpu.VMEM(
            (2, sizes.beside * sizes.num_heads, sizes.block_kv // sizes.beside), jnp.float32
        ),
        scores=pltpu.VMEM((2, OCTET, sizes.width), jnp.float32),
        q_arrived=pltpu.SemaphoreType.DMA((2,)),
        keys_arrived=pltpu.SemaphoreType.DMA((BUFFERS,)),
        scores_left=pltpu.SemaphoreType.DMA((2,)),
    )


class Cursor(NamedTuple):
    """One step: block `block` of tile `tile`."""

    tile: jax.Array
    block: jax.Array


class Scoring:
    """What the kernel has, and the phases of a step as methods."""

    def __init__(self, sizes, batch, arrays, tiles, num_tiles, num_steps, scratch):
        self.sizes, self.batch, self.arrays, self.tiles = sizes, batch, arrays, tiles
        self.num_tiles, self.num_steps, self.scratch = num_tiles, num_steps, scratch
        self.num_octets = self._octet(num_tiles - 1) + 1

    def run(self) -> None:
        """Fills the pipeline, turns it until every step is through, and empties it."""
        begin = Cursor(jnp.int32(0), jnp.int32(0))
        self._each_query(jnp.int32(0), start)
        *called, coming = self._following(begin, BUFFERS)
        for k, step in enumerate(called):
            self._call_for(step, jnp.int32(k), k % 2)

        def several(i, state):
            return self._several(TOGETHER * i, *state)

        runs = pl.cdiv(self.num_steps, TOGETHER)
        jax.lax.fori_loop(0, runs, several, (coming, begin, False))
        for back in (2, 1):
            octet = self.num_octets - back
            pl.when(octet >= 0)(lambda octet=octet: self._copy_scores(octet).wait())

    def _several(self, k: jax.Array, coming: Cursor, current: Cursor, is_ready: Any) -> tuple:
        """Steps from k on, in one run where they can be.

        Args:
            k: number of the first.
            coming: what step k + BUFFERS is.
            current: what step k is.
            is_ready: whether its products are in `dots` already.

        Returns:
            The last three, of the steps that follow these.
        """
        *steps, after = self._following(current, TOGETHER)
        *coming, coming_after = self._following(coming, TOGETHER)
        goes_on = [
            self._goes_on(k + n, *pair)
            for n, pair in enumerate(itertools.pairwise([*steps, after]))
        ]
        together = functools.reduce(jnp.logical_and, goes_on, is_ready)
        together &= k + TOGETHER - 1 + BUFFERS < self.num_steps  # all that it calls for exists

        @pl.when(together)
        def _():
            for n in range(TOGETHER):
                self._wait_keys(k + n + 1)
                self._clean_keys((*steps, after)[n + 1], k + n + 1, (n + 1) % 2)
            for n, step in enumerate(steps):
                following = self._products((*steps, after)[n + 1], k + n + 1, (n + 1) % 2)
                self._start_keys(coming[n], k + n + BUFFERS, n % 2)
                _exhaust(zip(following, self._weighed(step, n % 2), strict=True))

        @pl.when(~together)
        def _():
            ready = is_ready
            for n, step in enumerate(steps):
                one = functools.partial(self._one, k + n, n % 2, coming[n], step, ready)
                pl.when(k + n < self.num_steps)(one)
                ready = goes_on[n]

        return coming_after, after, goes_on[-1]

    def _one(self, k: jax.Array, parity: int, coming: Cursor, current: Cursor, is_ready) -> None:
        """Step k alone; arguments as `_several`'s."""
        alone, octet = self._is_alone(current), self._octet(current.tile)

        @pl.when(~is_ready)
        def _():
            before = self._octet(jnp.maximum(current.tile - 1, 0))
            begins = (current.block == 0) & ((current.tile == 0) | (before != octet))
            pl.when(begins)(lambda: self._begin(octet))
            self._wait_keys(k)

            @pl.when(alone)
            def _():
                self._clean_keys(current, k, parity)
                _exhaust(self._products(current, k, parity))

            pl.when(~alone)(lambda: self._score(current, k, parity))

        self._call_for(coming, k + BUFFERS, parity)  # where step k's keys were
        after = self._after(current)

        @pl.when(self._goes_on(k, current, after))
        def _():
            self._wait_keys(k + 1)
            self._clean_keys(after, k + 1, 1 - parity)
            _exhaust(self._products(after, k + 1, 1 - parity))

        pl.when(alone)(lambda: _exhaust(self._weighed(current, parity)))
        is_last = (k + 1 == self.num_steps) | (self._octet(after.tile) != octet)
        pl.when(is_last)(lambda: self._copy_scores(octet).start())

    # Where a step is.

    def _octet(self, tile: jax.Array) -> jax.Array:
        return self.tiles.token[tile] // OCTET

    def _after(self, step: Cursor) -> Cursor:
        """The next step; past the last one, some step that exists."""
        is_last = step.block + 1 >= self.tiles.blocks[step.tile]
        tile = jnp.where(is_last, step.tile + 1, step.tile)
        return Cursor(jnp.minimum(tile, self.num_tiles - 1), jnp.where(is_last, 0, step.block + 1))

    def _following(self, step: Cursor, count: int) -> list[Cursor]:
        """A step, and as many that follow it."""
        steps = [step]
        for _ in range(count):
            steps.append(self._after(steps[-1]))
        return steps

    def _is_alone(self, step: Cursor) -> jax.Array:
        """Whether a step's tile is one token."""
        return self.tiles.count[step.tile] == 1

    def _goes_on(self, k: jax.Array, step: Cursor, after: Cursor) -> jax.Array:
        """Whether the step after step k exists, is of the same octet, and both are alone."""
        exists = (k + 1 < self.num_steps) & (self._octet(step.tile) == self._octet(after.tile))
        return exists & self._is_alone(step) & self._is_alone(after)

    # Copies.

    def _each_query(self, octet, act) -> None:
        """Starts or awaits the copies of an octet's queries and weights."""
        at, slot = pl.ds(pl.multiple_of(octet * OCTET, OCTET), OCTET), octet % 2
        sem = self.scratch.q_arrived.at[slot]
        act(pltpu.make_async_copy(self.arrays.q.at[at], self.scratch.q.at[slot], sem))
        act(pltpu.make_async_copy(self.arrays.weights.at[at], self.scratch.weights.at[slot], sem))

    def _call_for(self, step: Cursor, k: jax.Array, parity: int) -> None:
        """Starts the copies of step k's pages, if there is such a step."""
        pl.when(k < self.num_steps)(lambda: self._start_keys(step, k, parity))

    def _start_keys(self, step: Cursor, k: jax.Array, parity: int) -> None:
        """Starts the copies of step k's pages.

        All of a step's pages, so that nothing is counted: past the last one that the tile sees
        something of, that one again.
        """
        sizes, tile = self.sizes, step.tile
        stop = self.tiles.q_pos[tile] + self.tiles.count[tile]
        row = self.tiles.seq[tile] * sizes.pages_per_seq
        last = row + jnp.maximum((stop - 1) // sizes.page_size, 0)
        first, keys = row + step.block * sizes.pages, self._keys(k, parity)
        sem = self.scratch.keys_arrived.at[k % BUFFERS]
        for j in range(sizes.pages):
            page = self.batch.page_table[jnp.minimum(first + j, last)]
            pltpu.make_async_copy(self.arrays.pages.at[page], keys.at[j], sem).start()

    def _wait_keys(self, k: jax.Array) -> None:
        keys = self.scratch.even_keys.at[0]  # as many bytes as any step's
        pltpu.make_async_copy(keys, keys, self.scratch.keys_arrived.at[k % BUFFERS]).wait()

    def _clean_keys(self, step: Cursor, k: jax.Array, parity: int) -> None:
        """Makes 0 of whatever follows the keys that step k's one token sees.

        It matters where keys share a column: there 0 times NaN is a seen key's.
        """
        if self.sizes.beside == 1:
            return
        keys, block_kv = self._keys(k, parity), self.sizes.block_kv
        rows = SUBLANES * 4 // keys.dtype.itemsize  # of a register
        sees = self.tiles.q_pos[step.tile] + self.tiles.count[step.tile]
        sees = jnp.clip(sees - step.block * block_kv, 0, block_kv)

        def clean(i: jax.Array, kept: jax.Array) -> jax.Array:
            at = pl.ds(pl.multiple_of(i * rows % self.sizes.page_size, rows), rows)
            register = keys.at[jax.lax.div(i * rows, self.sizes.page_size), at]
            is_kept = jax.lax.broadcasted_iota(jnp.int32, register.shape, 0) < kept
            register[...] = jnp.where(is_kept, register[...], jnp.zeros_like(register))
            return jnp.int32(0)

        first = sees // rows
        jax.lax.fori_loop(first, block_kv // rows, clean, sees - first * rows)

    def _keys(self, k: jax.Array, parity: int) -> Any:
        """Where step k's keys are."""
        keys = (self.scratch.even_keys, self.scratch.odd_keys)[parity]
        # `//` of a loop's index is lowered in 64 bits where the caller has those.
        return keys.at[(k >> 1) % (BUFFERS // 2)]

    def _copy_scores(self, octet):
        """The copy of an octet's scores to HBM."""
        at, slot = pl.ds(pl.multiple_of(octet * OCTET, OCTET), OCTET), octet % 2
        sem = self.scratch.scores_left.at[slot]
        return pltpu.make_async_copy(self.scratch.scores.at[slot], self.arrays.scores.at[at], sem)

    # Phases of a step.

    def _begin(self, octet: jax.Array) -> None:
        """Makes room for an octet's scores, takes its queries, and calls for the next one's."""
        slot, scratch = octet % 2, self.scratch
        self._each_query(octet, wait)
        pl.when(octet + 1 < self.num_octets)(lambda: self._each_query(octet + 1, start))
        pl.when(octet >= 2)(lambda: self._copy_scores(octet - 2).wait())
        fill(scratch.scores.at[slot])
        weights = scratch.weights[slot].T
        for i in range(OCTET):
            scratch.spread[i] = jnp.broadcast_to(weights[:, i : i + 1], scratch.spread.shape[1:])

    def _products(self, step: Cursor, k: jax.Array, parity: int) -> Iterator[None]:
        """Puts the products of a tile's one token with its keys into `dots`, strip by strip."""
        token = self.tiles.token[step.tile]
        q = self.scratch.q[token // OCTET % 2, token % OCTET][None]
        for at, dots in self._dots(q, self._keys(k, parity), self.sizes.beside):
            self.scratch.dots[parity, :, at : at + dots.shape[1]] = dots
            yield

    def _weighed(self, step: Cursor, parity: int) -> Iterator[None]:
        """Makes scores of what `_products` put there, strip by strip."""
        keep, beside = self._kept(step), self.sizes.beside
        spread = self.scratch.spread[self.tiles.token[step.tile] % OCTET][None]
        for at in self._strips(beside):
            dots = self.scratch.dots[parity, :, at]
            for first, these in self._by_register(at.start, dots, beside):
                keep(first, _summed(these, spread))
            yield

    def _score(self, step: Cursor, k: jax.Array, parity: int) -> None:
        """Scores a step's keys for a tile of several tokens."""
        keep, spread = self._kept(step), self.scratch.spread[...]
        q = self.scratch.q[self._octet(step.tile) % 2]
        for at, dots in self._dots(q, self._keys(k, parity), 1):
            for first, these in self._by_register(at, dots, 1):
                keep(first, _summed(these, spread))

    def _strips(self, beside: int) -> list[slice]:
        """Columns of one product after the other: as many as the matrix unit has, if that fits."""
        columns, mxu = self.sizes.block_kv // beside, tpu_chip.current().mxu
        width = mxu if beside > 1 and columns % mxu == 0 else LANES
        return [slice(at, at + width) for at in range(0, columns, width)]

    def _dots(self, q: jax.Array, keys: Any, beside: int) -> Iterator[tuple[int, jax.Array]]:
        """Products of q, [tokens, num_heads, head_dim], with a step's keys, strip by strip.

        Args:
            q: queries.
            keys: [pages, page_size, head_dim].
            beside: keys that share a column.

        Yields:
            First column; float32 [beside * tokens * num_heads, columns]: with the block's first
            keys, and under them with those that share their columns.
        """
        head_dim, dtype = self.sizes.head_dim, self.sizes.q_dtype
        rows, parts = q.reshape(-1, head_dim), range(beside)
        nothing = jnp.zeros_like(rows)
        q = jnp.concatenate(
            [jnp.concatenate([rows if i == j else nothing for j in parts], 1) for i in parts]
        )
        keys = keys[...].reshape(beside, -1, head_dim)
        for at in self._strips(beside):
            these = jnp.concatenate([keys[i, at].astype(dtype) for i in parts], 1)
            yield at.start, jax.lax.dot_general(
                q, these, (((1,), (1,)), ((), ())),
                precision=self.sizes.precision, preferred_element_type=jnp.float32,
            )  # fmt: skip

    def _by_register(
        self, at: int, dots: jax.Array, beside: int
    ) -> Iterator[tuple[int, jax.Array]]:
        """(first key, products with LANES keys) of a strip of `_dots` that begins at a column."""
        rows, columns = dots.shape[0] // beside, self.sizes.block_kv // beside
        for i, lanes in itertools.product(range(beside), range(0, dots.shape[1], LANES)):
            these = dots[i * rows : (i + 1) * rows, lanes : lanes + LANES]
            yield i * columns + at + lanes, these

    def _kept(self, step: Cursor) -> Callable[[int, jax.Array], None]:
        """Keeps scores of a step's tile, float32 [tokens, LANES], with its keys from one on."""
        first, count = self.tiles.token[step.tile], self.tiles.count[step.tile]
        own = jax.lax.broadcasted_iota(jnp.int32, (OCTET, LANES), 0) - first % OCTET
        is_own = (own >= 0) & (own < count)
        begin = pl.multiple_of(step.block * self.sizes.block_kv, self.sizes.block_kv)
        # How far the step's first keys are past what a row's token sees.
        past = jax.lax.broadcasted_iota(jnp.int32, (OCTET, LANES), 1) + begin
        past -= self.tiles.q_pos[step.tile] + own
        scores = self.scratch.scores.at[first // OCTET % 2]

        def keep(key: int, found: jax.Array) -> None:
            columns = pl.ds(pl.multiple_of(begin + key, LANES), LANES)
            scores[:, columns] = jnp.where(is_own, _seen(found, past + key), scores[:, columns])

        return keep


def _seen(scores: jax.Array, past: jax.Array) -> jax.Array:
    """Scores, -inf where a key is past what a token sees."""
    return jnp.where(past > 0, -jnp.inf, scores)


def _summed(dots: jax.Array, spread: jax.Array) -> jax.Array:
    """Scores [tokens, LANES] of products [tokens * num_heads, LANES], by weights in every lane."""
    return jnp.sum(jnp.maximum(dots, 0).reshape(spread.shape) * spread, axis=1)


def _exhaust(steps: Iterator[Any]) -> None:
    """Takes every step of what is written as steps."""
    for _ in steps:
        pass


def fill(scores: Any) -> None:
    """-inf, a block of columns at a time."""
    width = scores.shape[1]
    block = next(n for n in (1024, 512, 256, LANES) if width % n == 0)

    def one(i, carry):
        at = pl.ds(pl.multiple_of(i * block, block), block)
        scores[:, at] = jnp.full((OCTET, block), -jnp.inf, jnp.float32)
        return carry

    jax.lax.fori_loop(0, width // block, one, 0)


def start(copy: Any) -> None:
    """Starts a copy."""
    copy.start()


def wait(copy: Any) -> None:
    """Waits for a copy."""
    copy.wait()
