"""In which order the TPU kernel of `paged` visits queries and pages, and how pages get to VMEM.

The tokens are visited in order, as spans: a span is what one tile of queries has of one sequence.
Each span walks over the blocks of pages that its queries can see. A cursor runs `num_buffers - 1`
blocks ahead of the computation along the same walk, over the borders of spans, tiles and sequences,
and starts the copies.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged.mosaic_tpu_geometry import ROWS, Geometry, Masks, divided, remainder


class Batch(NamedTuple):
    """The ragged batch, references to SMEM; page_table is flat."""

    page_table: Any
    kv_lens: Any
    cu_q_lens: Any
    num_seqs: Any


class Span(NamedTuple):
    """Tokens [begin, end) of one sequence in one tile, and the keys [start, stop) they can see.

    q_pos = first_q + token - begin; last_q is the last one's.
    """

    seq: jax.Array
    begin: jax.Array
    end: jax.Array
    first_q: jax.Array
    last_q: jax.Array
    start: jax.Array
    stop: jax.Array


# The cursor's cells, and the buffers that the next copy fills and that the next block lies in.
NEXT_SEQ, NEXT_TOKEN, SEQ, BLOCK, BLOCK_END, PAGE_BEGIN, PAGE_END, TO_FILL, FILLED = range(9)
CELLS = 9


class Walk(NamedTuple):
    """The walk, and what it copies: references of the kernel."""

    geometry: Geometry
    masks: Masks
    batch: Batch
    kv_pages: Any  # in HBM
    buffers: Any  # [num_buffers, block_pages, num_kv_heads, tiles, page_size, lanes]
    arrived: Any  # DMA semaphores, one for each buffer
    cells: Any  # SMEM

    def first_seq(self, seq: jax.Array) -> jax.Array:
        """The first sequence from `seq` on that has tokens; num_seqs if there is none."""
        cu, num_seqs = self.batch.cu_q_lens, self.batch.num_seqs[0]

        def has_none(s):
            there = jnp.minimum(s, jnp.maximum(num_seqs - 1, 0))
            return (s < num_seqs) & (cu[there + 1] <= cu[there])

        return lax.while_loop(has_none, lambda s: s + 1, jnp.int32(seq))

    def span(self, seq: jax.Array, token: jax.Array) -> Span:
        """The span that begins with this token."""
        cu, tile = self.batch.cu_q_lens, self.geometry.tile_tokens
        first, last = cu[seq], cu[seq + 1]
        kv_len = self.batch.kv_lens[seq]
        of_rows, of_tile = ((divided(token, size) + 1) * size for size in (ROWS, tile))
        end = jnp.minimum(last, jnp.where(last - first <= ROWS, of_rows, of_tile))
        offset = kv_len - (last - first) - first
        first_q, last_q = offset + token, offset + end - 1
        start, stop = self.masks.bounds(first_q, last_q, kv_len)
        return Span(seq, token, end, first_q, last_q, start, jnp.maximum(stop, start))

    def after(self, span: Span) -> tuple[jax.Array, jax.Array]:
        """Sequence and token with which the next span begins; sequence num_seqs after the last."""
        over = span.end >= self.batch.cu_q_lens[span.seq + 1]
        return self.first_seq(span.seq + over.astype(jnp.int32)), span.end

    def blocks(self, span: Span) -> tuple[jax.Array, jax.Array]:
        """[first, last) of the blocks that the span walks over."""
        size = self.geometry.block_tokens
        some = span.stop > span.start
        last = jnp.where(some, divided(span.stop + size - 1, size), 0)
        return jnp.where(some, divided(span.start, size), 0), last

    def pages(self, span: Span) -> tuple[jax.Array, jax.Array]:
        """[first, last) of the pages that the span reads."""
        size = self.geometry.page_size
        return divided(span.start, size), divided(span.stop + size - 1, size)

    def _find_block(self, seq: jax.Array, token: jax.Array) -> None:
        """Puts the cursor on the first block of the first span, from this one on, that has any."""
        cells, num_seqs = self.cells, self.batch.num_seqs[0]
        cells[NEXT_SEQ], cells[NEXT_TOKEN] = seq, token
        cells[BLOCK] = cells[BLOCK_END] = jnp.int32(0)

        def look(_):
            span = self.span(cells[NEXT_SEQ], cells[NEXT_TOKEN])
            cells[SEQ] = span.seq
            cells[BLOCK], cells[BLOCK_END] = self.blocks(span)
            cells[PAGE_BEGIN], cells[PAGE_END] = self.pages(span)
            cells[NEXT_SEQ], cells[NEXT_TOKEN] = self.after(span)
            return (cells[BLOCK] >= cells[BLOCK_END]) & (cells[NEXT_SEQ] < num_seqs)

        lax.while_loop(lambda more: more, look, seq < num_seqs)

    def begin(self) -> jax.Array:
        """Starts the first copies; returns the first sequence that has tokens."""
        self.cells[TO_FILL] = self.cells[FILLED] = jnp.int32(0)
        seq = self.first_seq(jnp.int32(0))
        self._find_block(seq, jnp.int32(0))
        for _ in range(self.geometry.num_buffers - 1):
            self.start_next()
        return seq

    def _take(self, cell: int) -> jax.Array:
        """The buffer whose turn it is; the next one is next."""
        buffer = self.cells[cell]
        following = buffer + 1
        self.cells[cell] = jnp.where(following == self.geometry.num_buffers, 0, following)
        return buffer

    def _start_pages(self, buffer, place, at, count: int) -> None:
        """Starts the copies of `count` pages, from this entry of the page table on.

        All are looked up before the first is started: the scalar unit need not wait for each.
        """
        for i, source in enumerate([self._page(at + i) for i in range(count)]):
            there = self.buffers.at[buffer, place + i]
            pltpu.make_async_copy(source, there, self.arrived.at[buffer]).start()

    def _page(self, at):
        """The page, or part of one, that this entry of the page table stands for."""
        parts, size = self.geometry.page_parts, self.geometry.page_size
        if parts == 1:
            return self.kv_pages.at[self.batch.page_table[at]]
        rows = pl.ds(pl.multiple_of(remainder(at, parts) * size, size), size)
        return self.kv_pages.at[self.batch.page_table[divided(at, parts)], :, :, rows]

    def _move_on(self) -> None:
        """Puts the cursor on the next block."""
        cells = self.cells
        cells[BLOCK] += 1
        is_last = cells[BLOCK] >= cells[BLOCK_END]

        @pl.when(is_last & (cells[NEXT_SEQ] < self.batch.num_seqs[0]))
        def _():
            self._find_block(cells[NEXT_SEQ], cells[NEXT_TOKEN])

    def start_next(self) -> None:
        """Starts the copies of the cursor's block, and moves the cursor on."""
        cells, pages = self.cells, self.geometry.block_pages

        @pl.when(cells[BLOCK] < cells[BLOCK_END])
        def _():
            buffer = self._take(TO_FILL)
            first = cells[BLOCK] * pages
            begin = jnp.maximum(cells[PAGE_BEGIN], first)
            end = jnp.minimum(cells[PAGE_END], first + pages)
            row = cells[SEQ] * self.geometry.pages_per_seq

            def start(column, count):
                self._start_pages(buffer, column - first, row + column, count)

            _some_at_once(begin, end, start)
            self._move_on()

    def whole_block_ahead(self) -> jax.Array:
        """Whether every page of the cursor's block is to be copied."""
        cells, pages = self.cells, self.geometry.block_pages
        first = cells[BLOCK] * pages
        some = cells[BLOCK] < cells[BLOCK_END]
        return some & (cells[PAGE_BEGIN] <= first) & (first + pages <= cells[PAGE_END])

    def next_whole_block(self) -> tuple[jax.Array, Callable[[int, int], None]]:
        """As `next_block`, where both the block and the one ahead are whole; starts no copies.

        Returns:
            the buffer; a function that starts part i of n of the copies ahead: where it is called
            beside a computation, without a loop, the compiler puts it there.
        """
        pages = self.geometry.block_pages
        buffer = self._take(FILLED)
        there = self.buffers.at[buffer]
        pltpu.make_async_copy(there, there, self.arrived.at[buffer]).wait()
        ahead = self._take(TO_FILL)
        at = self.cells[SEQ] * self.geometry.pages_per_seq + self.cells[BLOCK] * pages
        self._move_on()

        def start(i: int, n: int) -> None:
            first, last = i * pages // n, (i + 1) * pages // n
            self._start_pages(ahead, first, at + first, last - first)

        return buffer, start

    def next_block(self, span: Span, block: jax.Array) -> jax.Array:
        """Starts a copy ahead, waits for this block of the span, and returns its buffer."""
        self.start_next()
        return self.wait(span, block)

    def wait(self, span: Span, block: jax.Array) -> jax.Array:
        """Waits for this block of the span, and returns its buffer."""
        geometry = self.geometry
        buffer = self._take(FILLED)
        first_page = block * geometry.block_pages
        begin, end = self.pages(span)
        begin = jnp.maximum(begin, first_page)
        end = jnp.minimum(end, first_page + geometry.block_pages)
        whole = end - begin == geometry.block_pages

        @pl.when(whole)
        def _():
            there = self.buffers.at[buffer]
            pltpu.make_async_copy(there, there, self.arrived.at[buffer]).wait()

        @pl.when(jnp.logical_not(whole))
        def _():
            def wait(page, count):
                there = self.buffers.at[buffer, pl.ds(page - first_page, count)]
                pltpu.make_async_copy(there, there, self.arrived.at[buffer]).wait()

            _some_at_once(begin, end, wait)

        return buffer


AT_ONCE = 8  # pages in one round of a loop


def _some_at_once(begin, end, f: Callable[[jax.Array, int], None]) -> None:
    """f(first, count) for [begin, end), some at once and the rest one by one."""
    rounds = divided(end - begin, AT_ONCE)
    lax.fori_loop(0, rounds, lambda i, _: f(begin + AT_ONCE * i, AT_ONCE), None)
    lax.fori_loop(begin + AT_ONCE * rounds, end, lambda i, _: f(i, 1), None)
