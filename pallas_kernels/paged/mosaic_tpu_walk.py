"""In which order the TPU kernel of `paged` visits queries and pages, and how pages get to VMEM.

The tokens are visited in order, as spans: a span is what one tile of queries has of one sequence.
Each span walks over the blocks of pages that its queries can see. A cursor runs `num_buffers - 1`
blocks ahead of the computation along the same walk, over the borders of spans, tiles and sequences,
and starts the copies.

Decodes, spans of one token or of `decode_tokens` at most, are visited together, as many as follow
one another in a tile. A buffer then holds not a block but a step: in each of its chunks a part of
one of them, as they come. A step may have more room than there are parts: the rest see no key.
"""

import functools
from collections.abc import Callable, Iterator
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


class Part(NamedTuple):
    """What a decode computes at once: keys [position, position + chunk_tokens) for its tokens.

    Of sequence `seq`, `count` from `token` on, whose position is q_pos; they see keys [start,
    stop). The sequence's parts are [first, end), one at least; `number` may be `end` or above where
    a step has more room than parts.
    """

    seq: jax.Array
    token: jax.Array
    count: jax.Array | int
    q_pos: jax.Array
    start: jax.Array
    stop: jax.Array
    first: jax.Array
    end: jax.Array
    number: jax.Array
    position: jax.Array


class Cursor(NamedTuple):
    """A part of a sequence, by its number, and where the sequence's parts end."""

    seq: jax.Array
    number: jax.Array
    end: jax.Array


# The cursor's cells, and the buffers that the next copy fills and that the next block lies in. On
# decodes BLOCK and BLOCK_END are the parts of sequence SEQ, which go on until that of LAST; FIRST
# says where each one's tokens are, see `Walk.token`. LAST is -1 elsewhere.
(
    NEXT_SEQ, NEXT_TOKEN, SEQ, BLOCK, BLOCK_END, PAGE_BEGIN, PAGE_END, FIRST, LAST, TO_FILL, FILLED,
    CELLS,
) = range(12)  # fmt: skip
# Of each buffer: the pages under way, whether it is some decodes' last step, and sequence and part
# of each of its chunks.
PAGES, IS_LAST, PARTS = range(3)


class Walk(NamedTuple):
    """The walk, and what it copies: references of the kernel."""

    geometry: Geometry
    masks: Masks
    batch: Batch
    kv_pages: Any  # in HBM
    buffers: Any  # [num_buffers, block_pages, num_kv_heads, tiles, page_size, lanes]
    arrived: Any  # DMA semaphores, one for each buffer
    cells: Any  # SMEM
    filled: Any  # SMEM [num_buffers, PARTS + 2 * chunks]: what a buffer holds

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
        is_short = (last - first <= ROWS) & (last - first > self.geometry.decode_tokens)
        end = jnp.minimum(last, jnp.where(is_short, of_rows, of_tile))
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

    def is_decode(self, span: Span) -> jax.Array:
        """Whether a span is computed as a decode."""
        return span.end - span.begin <= self.geometry.decode_tokens

    def last_decode(self, span: Span) -> Span:
        """The last span of the decodes that begin with this one.

        Of sequences that have no more tokens than a decode, one after another in its tile.
        """
        cu, num_seqs = self.batch.cu_q_lens, self.batch.num_seqs[0]
        most, tile = self.geometry.decode_tokens, self.geometry.tile_tokens
        of_tile = (divided(span.begin, tile) + 1) * tile
        stop = jnp.minimum(num_seqs, span.seq + of_tile - span.begin)

        def goes_on(seq):
            there = jnp.minimum(seq, num_seqs - 1)
            end, count = cu[there + 1], cu[there + 1] - cu[there]
            if most == 1:  # a loop over every sequence of every tile: no more than it takes
                return (seq < stop) & (count == 1)
            return (seq < stop) & (count > 0) & (count <= most) & (end <= of_tile)

        ends = span.end >= cu[span.seq + 1]
        begin = jnp.where(ends, span.seq + 1, stop)
        last = lax.while_loop(goes_on, lambda s: s + 1, begin) - 1
        last = jnp.where(ends, last, span.seq)
        return self.span(last, jnp.maximum(cu[last], span.begin))

    def first_of(self, span: Span) -> jax.Array:
        """What `token` has to know of decodes that begin with this span."""
        return span.begin - (span.seq if self.geometry.decode_tokens == 1 else 0)

    def token(self, seq: jax.Array, first: jax.Array) -> jax.Array:
        """The first token of a decode, by its sequence: numbered alike where each has one token."""
        if self.geometry.decode_tokens == 1:
            return seq + first
        return jnp.maximum(self.batch.cu_q_lens[seq], first)

    def part(self, seq: jax.Array, first: jax.Array, number: jax.Array | None = None) -> Part:
        """A part of a decode, by its number; None = its first part. Without a branch.

        Args:
            seq, number: whose, and which.
            first: of `first_of`.
        """
        size, token = self.geometry.chunk_tokens, self.token(seq, first)
        kv_len, behind = self.batch.kv_lens[seq], self.batch.cu_q_lens[seq + 1]
        count = 1
        if self.geometry.decode_tokens > 1:
            of_tile = (divided(token, self.geometry.tile_tokens) + 1) * self.geometry.tile_tokens
            count = jnp.minimum(self.geometry.decode_tokens, jnp.minimum(behind, of_tile) - token)
        q_pos = kv_len - behind + token
        start, stop = self.masks.bounds(q_pos, q_pos + count - 1, kv_len)
        some = stop > start
        start, stop = jnp.where(some, start, 0), jnp.where(some, stop, 0)
        begin = divided(start, size)
        end = jnp.maximum(divided(stop + size - 1, size), begin + 1)
        number = begin if number is None else number
        return Part(seq, token, count, q_pos, start, stop, begin, end, number, number * size)

    def _find_block(self, seq: jax.Array, token: jax.Array) -> None:
        """Puts the cursor on the first block of the first span, from this one on, that has any."""
        cells, num_seqs = self.cells, self.batch.num_seqs[0]
        cells[NEXT_SEQ], cells[NEXT_TOKEN] = seq, token
        cells[BLOCK] = cells[BLOCK_END] = jnp.int32(0)

        def look(_):
            span = self.span(cells[NEXT_SEQ], cells[NEXT_TOKEN])
            cells[SEQ], cells[FIRST] = span.seq, self.first_of(span)
            is_decode = self.is_decode(span)
            pl.when(is_decode)(functools.partial(look_at_decodes, span))
            pl.when(jnp.logical_not(is_decode))(functools.partial(look_at, span))
            return (cells[BLOCK] >= cells[BLOCK_END]) & (cells[NEXT_SEQ] < num_seqs)

        def look_at_decodes(span):
            last = self.last_decode(span)
            part = self.part(span.seq, self.first_of(span))
            cells[LAST], cells[BLOCK], cells[BLOCK_END] = last.seq, part.first, part.end
            cells[NEXT_SEQ], cells[NEXT_TOKEN] = self.after(last)

        def look_at(span):
            cells[LAST] = jnp.int32(-1)
            cells[BLOCK], cells[BLOCK_END] = self.blocks(span)
            cells[PAGE_BEGIN], cells[PAGE_END] = self.pages(span)
            cells[NEXT_SEQ], cells[NEXT_TOKEN] = self.after(span)

        lax.while_loop(lambda more: more, look, seq < num_seqs)

    def begin(self) -> jax.Array:
        """Starts the first copies; returns the first sequence that has tokens."""
        self.cells[TO_FILL] = self.cells[FILLED] = jnp.int32(0)
        seq = self.first_seq(jnp.int32(0))
        self._find_block(seq, jnp.int32(0))
        ahead = self.geometry.num_buffers - 1
        lax.fori_loop(0, ahead, lambda *_: self.start_next(), None)
        return seq

    def _take(self, cell: int) -> jax.Array:
        """The buffer whose turn it is; the next one is next."""
        buffer = self.cells[cell]
        following = buffer + 1
        self.cells[cell] = jnp.where(following == self.geometry.num_buffers, 0, following)
        return buffer

    def _page(self, at):
        """The page, or part of one, that this entry of the page table stands for."""
        parts, size = self.geometry.page_parts, self.geometry.page_size
        if parts == 1:
            return self.kv_pages.at[self.batch.page_table[at]]
        rows = pl.ds(pl.multiple_of(remainder(at, parts) * size, size), size)
        return self.kv_pages.at[self.batch.page_table[divided(at, parts)], :, :, rows]

    def _start_pages(self, buffer, place, at, begin, end) -> None:
        """Starts the copies of pages [begin, end) of a sequence.

        Args:
            buffer, place: page `begin` goes to this place of this buffer.
            at: entry of the page table that is the sequence's first page.
        """

        def start(page, count):
            # All are looked up before the first is started: the scalar unit waits for one, not all.
            for i, source in enumerate([self._page(at + page + i) for i in range(count)]):
                there = self.buffers.at[buffer, place + page - begin + i]
                pltpu.make_async_copy(source, there, self.arrived.at[buffer]).start()

        _some_at_once(begin, end, start)

    def move_on(self) -> None:
        """Looks for the cursor's next block where there is none left."""
        cells = self.cells
        is_over = cells[BLOCK] >= cells[BLOCK_END]

        @pl.when(is_over & (cells[NEXT_SEQ] < self.batch.num_seqs[0]))
        def _():
            self._find_block(cells[NEXT_SEQ], cells[NEXT_TOKEN])

    def start_next(self) -> None:
        """Starts the copies of the cursor's block, or step, and moves the cursor on."""
        some = self.cells[BLOCK] < self.cells[BLOCK_END]
        is_step = self.cells[LAST] >= 0

        @pl.when(some & jnp.logical_not(is_step))
        def _():
            self._start_block()
            self.move_on()

        @pl.when(some & is_step)
        def _():
            self._start_step()
            self.move_on()

    def _start_block(self) -> None:
        cells, pages = self.cells, self.geometry.block_pages
        buffer = self._take(TO_FILL)
        first = cells[BLOCK] * pages
        begin = jnp.maximum(cells[PAGE_BEGIN], first)
        end = jnp.minimum(cells[PAGE_END], first + pages)
        row = cells[SEQ] * self.geometry.pages_per_seq
        self._start_pages(buffer, begin - first, row, begin, end)
        cells[BLOCK] += 1

    def _start_step(self) -> None:
        buffer, pages = self._take(TO_FILL), self.geometry.chunk_pages

        def start(i, state):
            at, count = state
            part, row, at = self._note_part(buffer, i, at)
            first = part.number * pages
            begin, end = self._pages_of(part)
            self._start_pages(buffer, i * pages + begin - first, row, begin, end)
            return at, count + end - begin

        state = self._cursor(), jnp.int32(0)
        self._note_step(buffer, *lax.fori_loop(0, self.geometry.chunks, start, state))

    def _pages_of(self, part: Part) -> tuple[jax.Array, jax.Array]:
        """[begin, end) of the pages that a part reads; it may read none."""
        size, pages = self.geometry.page_size, self.geometry.chunk_pages
        begin = jnp.maximum(divided(part.start, size), part.number * pages)
        end = jnp.minimum(divided(part.stop + size - 1, size), (part.number + 1) * pages)
        return begin, jnp.maximum(begin, end)

    def _cursor(self) -> Cursor:
        """Where the cursor is among decodes."""
        return Cursor(self.cells[SEQ], self.cells[BLOCK], self.cells[BLOCK_END])

    def _note_part(self, buffer, i, at: Cursor) -> tuple[Part, jax.Array, Cursor]:
        """Chunk i of the buffer is the cursor's part; without a branch.

        Returns:
            the part, the entry of the page table that is its sequence's first page, and where the
            cursor is next.
        """
        cells, (seq, number, _) = self.cells, at
        part = self.part(seq, cells[FIRST], number)
        self.filled[buffer, PARTS + 2 * i] = seq
        self.filled[buffer, PARTS + 2 * i + 1] = number
        goes_over = (number + 1 >= part.end) & (seq < cells[LAST])
        after = seq + goes_over.astype(jnp.int32)
        following = self.part(after, cells[FIRST])
        at = Cursor(after, jnp.where(goes_over, following.first, number + 1), following.end)
        return part, seq * self.geometry.pages_per_seq, at

    def _note_step(self, buffer, at: Cursor, pages) -> None:
        """The buffer's step has so many pages, and the cursor is behind it."""
        self.cells[SEQ], self.cells[BLOCK], self.cells[BLOCK_END] = at
        self.filled[buffer, PAGES] = pages
        self.filled[buffer, IS_LAST] = (at.number >= at.end).astype(jnp.int32)

    def step_ahead(self) -> jax.Array:
        """Whether the cursor is on decodes."""
        return (self.cells[BLOCK] < self.cells[BLOCK_END]) & (self.cells[LAST] >= 0)

    def start_beside(self) -> Iterator[None]:
        """As `start_next`, where the cursor is on decodes; starts nothing by itself.

        Yields:
            after the start of each copy. Where the next one is asked for, beside a computation,
            the compiler puts it there, for it has no branch. A page that there is not is a copy of
            no rows (compiled and interpreted; on no chip yet). After the last, `move_on` is due.
        """
        geometry, pages = self.geometry, self.geometry.chunk_pages
        heads = jnp.int32(geometry.num_kv_heads)
        buffer, at, count = self._take(TO_FILL), self._cursor(), jnp.int32(0)
        for i in range(geometry.chunks):
            part, row, at = self._note_part(buffer, i, at)
            begin, end = self._pages_of(part)
            count += end - begin
            first = part.number * pages
            skipped, stop = begin - first, end - first
            if i == geometry.chunks - 1:
                self._note_step(buffer, at, count)
            for j in range(pages):
                is_there = stop > j
                if self.masks.has_start:
                    is_there &= skipped <= j
                # Of what is none the copy names any page, for a copy has an address.
                source = self._page(row + first + j)
                some = pl.ds(0, jnp.where(is_there, heads, 0))
                there = self.buffers.at[buffer, i * pages + j, some]
                pltpu.make_async_copy(source.at[some], there, self.arrived.at[buffer]).start()
                yield

    def wait_step(self) -> jax.Array:
        """Waits for the pages of a step, and returns its buffer."""
        buffer = self._take(FILLED)
        pages = self.filled[buffer, PAGES]

        @pl.when(pages > 0)
        def _():
            there = self.buffers.at[buffer, pl.ds(0, pages)]
            pltpu.make_async_copy(there, there, self.arrived.at[buffer]).wait()

        return buffer

    def goes_on(self, buffer) -> jax.Array:
        """Whether the buffer's step is not the last one of its decodes."""
        return self.filled[buffer, IS_LAST] == 0

    def part_in(self, buffer, i, first) -> Part:
        """What chunk i of a step's buffer holds; first: of `first_of`."""
        seq, number = (self.filled[buffer, PARTS + 2 * i + j] for j in range(2))
        return self.part(seq, first, number)

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
