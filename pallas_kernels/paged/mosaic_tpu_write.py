"""How the TPU kernel of `paged` writes this step's keys and values into the cache, before it reads.

Rows of a cache are packed in tiles of 8 and more, so a row is written by reading the window of rows
that it lies in, and writing it back. Tokens that are neighbours in a window are written together (a
run); a window that a run fills is not read. Windows are read ahead of being merged, and written
behind, through a ring of buffers; a run whose window is still in the ring waits for it to be gone,
so any slot mapping is honoured. Where each token has a window of its own, as in decodes, some are
merged at once without a branch. All is written before the first page is read: a page may belong to
several sequences.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip
from pallas_kernels.paged.mosaic_tpu_geometry import HALF, LANES, divided, remainder, round_up
from pallas_kernels.stored_values import quantise

RING, AHEAD = 16, 8  # windows in the ring, and read ahead of the one that is merged
TILE, TILES_AHEAD = 64, 2  # tokens that are brought at once; how far ahead
# Rows of a window: a decode step writes a row or two of each, a prompt fills them.
FEW, MANY = 8, 32
FEW_TOKENS = 1024  # up to so many have FEW
GROUP, GROUPS = 8, 4  # tokens apart that are merged without a branch; groups in the ring


class News(NamedTuple):
    """This step's keys and values, and where they go.

    Attributes:
        slots: int32 [num_tokens]: page * page_size + offset; -1 = nowhere.
        run_lengths: int32 [num_tokens]: tokens from each one on that belong to its run; or all 0,
            where every token is written into a window of its own, and groups will do.
        parts: arrays [num_tokens, num_kv_heads, lanes], what a row of the cache is joined of.
        window: rows of a window; static.
    """

    slots: jax.Array
    run_lengths: jax.Array
    parts: tuple[jax.Array, ...]
    window: int

    @property
    def tile(self) -> int:
        """Tokens that are brought at once."""
        return min(TILE, self.slots.shape[0])


def news(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
) -> News:
    """What is to be written into a side-by-side cache.

    Args:
        kv_pages: [num_pages, num_kv_heads, tiles, page_size, 128].
        k, v: [num_tokens, num_kv_heads, head_dim], true values.
        slot_mapping: int32 [num_tokens]; outside the cache (-1) = written nowhere.
        k_scale, v_scale: float32 [] or [num_kv_heads]: true value = stored value * scale; None = 1.
    """
    num_pages, page_size = kv_pages.shape[0], kv_pages.shape[3]
    slots = jnp.where(
        (slot_mapping >= 0) & (slot_mapping < num_pages * page_size), slot_mapping, -1
    )
    window = math.gcd(FEW if k.shape[0] <= FEW_TOKENS else MANY, page_size)
    parts = (_stored(k, k_scale, kv_pages.dtype), _stored(v, v_scale, kv_pages.dtype))
    if round_up(k.shape[-1], HALF) % LANES:  # whole registers, or one array
        padding = ((0, 0), (0, 0), (0, -k.shape[-1] % HALF))
        parts = (jnp.concatenate([jnp.pad(part, padding) for part in parts], axis=-1),)
    tile = min(TILE, k.shape[0])
    lengths = _run_lengths(slots, window, tile)
    if _may_be_apart(k.shape[0]):
        lengths = jnp.where(_are_apart(slots, window), 0, lengths)
    return News(slots, lengths, parts, window)


def _stored(values: jax.Array, scale: jax.Array | None, dtype) -> jax.Array:
    """Values as the cache stores them; what needs no scale is left to the kernel."""
    if scale is None and values.dtype == dtype:
        return values
    return quantise(values, scale[:, None] if scale is not None and scale.ndim else scale, dtype)


def _run_lengths(slots: jax.Array, window: int, tile: int) -> jax.Array:
    """For each token: how many tokens from it on belong to its run. Runs end with their tile.

    Tokens written nowhere are runs of their own kind.
    """
    index = jnp.arange(slots.shape[0], dtype=jnp.int32)
    before = jnp.concatenate([slots[:1], slots[:-1]])
    goes_on = jnp.where(slots < 0, before < 0, (slots == before + 1) & (slots % window != 0))
    begins = jnp.where(goes_on & (index % tile != 0), slots.shape[0], index)
    following = lax.cummin(jnp.concatenate([begins[1:], jnp.full(1, slots.shape[0])]), reverse=True)
    return following.astype(jnp.int32) - index


def _may_be_apart(num_tokens: int) -> bool:
    """Whether it is asked if tokens are apart, to be written by groups."""
    return num_tokens <= FEW_TOKENS and num_tokens % GROUP == 0


def _are_apart(slots: jax.Array, window: int) -> jax.Array:
    """Whether every token is written, each into a window that is no other's."""
    number = slots // window
    index = jnp.arange(slots.shape[0], dtype=jnp.int32)
    meet = (number[:, None] == number) & (index[:, None] != index)
    return ~jnp.any(meet | (slots < 0)[:, None])


def scratch_shapes(new: News, kv_pages: jax.Array) -> list:
    """What `write_all` works with: tiles as they come, in 32 bits, the ring, semaphores, cells."""
    heads, tiles = kv_pages.shape[1:3]
    # Room for windows that reach over either end.
    rows = new.window + new.tile + new.window
    ring = GROUPS * GROUP if _may_be_apart(new.slots.shape[0]) else RING
    return [
        *(
            pltpu.VMEM((TILES_AHEAD + 1, new.tile, *part.shape[1:]), part.dtype)
            for part in new.parts
        ),
        pltpu.VMEM((tiles, rows * _stride(heads), LANES), jnp.float32),
        pltpu.VMEM((ring, heads, tiles, new.window, LANES), kv_pages.dtype),
        pltpu.SemaphoreType.DMA((TILES_AHEAD + 1,)),
        pltpu.SemaphoreType.DMA((ring,)),
        pltpu.SemaphoreType.DMA((ring,)),
        pltpu.SMEM((RING,), jnp.int32),
        pltpu.SMEM((_CELLS,), jnp.int32),
    ]


def _stride(heads: int) -> int:
    """Rows from one token's to the next in the tile in 32 bits: whole registers."""
    return round_up(heads, tpu_chip.SUBLANES)


# Tokens at which the next run to read begins; runs read, merged, and gone.
_READ_AT, _READ, _MERGED, _GONE, _CELLS = range(5)


class _Ring(NamedTuple):
    """References of the kernel, and its static sizes."""

    slots: Any
    run_lengths: Any
    kv_pages: Any
    buffers: Any
    read: Any
    written: Any
    windows: Any
    cells: Any
    window: int

    def place(self, number):
        """Where the window with this number lies in the cache."""
        windows_per_page = self.kv_pages.shape[3] // self.window
        page = divided(number, windows_per_page)
        row = remainder(number, windows_per_page) * self.window
        return self.kv_pages.at[page, :, :, pl.ds(pl.multiple_of(row, self.window), self.window)]

    def reading(self, at, number):
        """The copy of a window into a buffer."""
        return pltpu.make_async_copy(self.place(number), self.buffers.at[at], self.read.at[at])

    def writing(self, at, number):
        """The copy of a buffer into its window."""
        return pltpu.make_async_copy(self.buffers.at[at], self.place(number), self.written.at[at])

    # Tokens in windows of their own, some at once without a branch.

    def _each_of(self, group, copy, act) -> None:
        """Starts or awaits the copies of a group's windows."""
        for i in range(GROUP):
            at = remainder(group, GROUPS) * GROUP + i
            act(copy(at, divided(self.slots[group * GROUP + i], self.window)))

    def read_group(self, group) -> None:
        """Starts reading a group's windows, if there is such a group, where there is room."""

        @pl.when(group < self.slots.shape[0] // GROUP)
        def _():
            pl.when(group >= GROUPS)(lambda: self._await_group(group - GROUPS))
            self._each_of(group, self.reading, lambda copy: copy.start())

    def _await_group(self, group) -> None:
        """Waits until a group is written."""
        self._each_of(group, self.writing, lambda copy: copy.wait())

    def write_group(self, wide, group, first_token) -> None:
        """Merges a group's rows, of a tile that begins with `first_token`, and writes them."""
        self.read_group(group + GROUPS // 2)
        self._each_of(group, self.reading, lambda copy: copy.wait())
        index = lax.broadcasted_iota(jnp.int32, (self.window, 1), 0)
        for i in range(GROUP):
            token = group * GROUP + i
            row = remainder(self.slots[token], self.window)
            begin = token - first_token + self.window - row
            at = remainder(group, GROUPS) * GROUP + i
            _merge(self, wide, at, begin, index == row)
        self._each_of(group, self.writing, lambda copy: copy.start())

    def begin_groups(self) -> None:
        """Starts reading the first windows."""
        for group in range(GROUPS // 2):
            self.read_group(jnp.int32(group))

    def end_groups(self) -> None:
        """Waits until every group is written."""
        stop = self.slots.shape[0] // GROUP
        for group in range(max(stop - GROUPS, 0), stop):
            self._await_group(jnp.int32(group))

    # Runs of tokens in any windows.

    def free_one(self) -> None:
        """Waits until the oldest window is written."""
        at = remainder(self.cells[_GONE], RING)
        self.writing(at, self.windows[at]).wait()
        self.windows[at] = jnp.int32(-1)
        self.cells[_GONE] += 1

    def free_all(self) -> None:
        """Waits until every window is written; all must have been merged."""
        count = self.cells[_MERGED] - self.cells[_GONE]
        lax.fori_loop(0, count, lambda i, _: self.free_one(), None)

    def begin(self) -> None:
        """Nothing is in the ring."""
        for cell in range(_CELLS):
            self.cells[cell] = jnp.int32(0)
        for i in range(RING):
            self.windows[i] = jnp.int32(-1)

    def read_ahead(self) -> None:
        """Starts reading the next runs' windows, as far as may be."""
        cells, num_tokens = self.cells, self.slots.shape[0]

        def read_next(_):
            token = cells[_READ_AT]
            slot, length = self.slots[token], self.run_lengths[token]
            number = divided(slot, self.window)
            taken = self.windows[0] == number
            for i in range(1, RING):
                taken |= self.windows[i] == number
            taken &= slot >= 0
            blocked = taken & (cells[_READ] > cells[_MERGED])

            @pl.when((slot >= 0) & jnp.logical_not(blocked))
            def _():
                pl.when(taken)(self.free_all)
                pl.when(cells[_READ] - cells[_GONE] == RING)(self.free_one)
                at = remainder(cells[_READ], RING)
                self.windows[at] = number
                pl.when(length < self.window)(lambda: self.reading(at, number).start())
                cells[_READ] += 1

            pl.when(jnp.logical_not(blocked))(lambda: self._skip(token + length))
            return may_go_on() & jnp.logical_not(blocked)

        def may_go_on():
            ahead = cells[_READ] - cells[_MERGED]
            return (ahead < AHEAD) & (cells[_READ_AT] < num_tokens)

        lax.while_loop(lambda more: more, read_next, may_go_on())

    def _skip(self, token) -> None:
        self.cells[_READ_AT] = token


def write_all(slots, run_lengths, parts, kv_pages, scratch, window: int) -> None:
    """Writes every token's row, and waits until all are in the cache."""
    staged, scratch = scratch[: len(parts)], scratch[len(parts) :]
    wide, buffers, brought, read, written, windows, cells = scratch
    ring = _Ring(slots, run_lengths, kv_pages, buffers, read, written, windows, cells, window)
    num_tokens, tile = slots.shape[0], staged[0].shape[1]
    tiles = pl.cdiv(num_tokens, tile)

    def first_of(i):
        # The last tile ends with the tokens, and begins among those of the tile before.
        return jnp.minimum(i * tile, num_tokens - tile)

    def copies(i):
        at = lax.rem(i, TILES_AHEAD + 1)
        for part, there in zip(parts, staged, strict=True):
            source = part.at[pl.ds(first_of(i), tile)]
            yield pltpu.make_async_copy(source, there.at[at], brought.at[at])

    def bring(i):
        for copy in copies(i):
            copy.start()

    def next_tile(i):
        """Waits for a tile, and widens it; returns the token at which it stops."""
        pl.when(i + TILES_AHEAD < tiles)(lambda: bring(i + TILES_AHEAD))
        for copy in copies(i):
            copy.wait()
        at = lax.rem(i, TILES_AHEAD + 1)
        _widen([there.at[at] for there in staged], wide, window, buffers.dtype)
        return jnp.minimum((i + 1) * tile, num_tokens)

    def write_groups(i, _):
        stop = next_tile(i)
        groups = divided(i * tile, GROUP), divided(stop, GROUP)
        lax.fori_loop(*groups, lambda g, _: ring.write_group(wide, g, first_of(i)), None)

    def write_tile(i, _):
        stop = next_tile(i)

        def merge_run(token):
            slot, length = slots[token], run_lengths[token]

            @pl.when(slot >= 0)
            def _():
                ring.read_ahead()
                at = remainder(cells[_MERGED], RING)
                whole, row = length == window, remainder(slot, window)
                begin = token - first_of(i) + window - row
                pl.when(whole)(lambda: _merge(ring, wide, at, begin, None))

                @pl.when(jnp.logical_not(whole))
                def _():
                    ring.reading(at, divided(slot, window)).wait()
                    index = lax.broadcasted_iota(jnp.int32, (window, 1), 0)
                    _merge(ring, wide, at, begin, (index >= row) & (index < row + length))

                ring.writing(at, divided(slot, window)).start()
                cells[_MERGED] += 1

            return token + length

        lax.while_loop(lambda token: token < stop, merge_run, i * tile)

    def write_runs():
        ring.begin()
        lax.fori_loop(0, tiles, write_tile, None)
        ring.free_all()

    def write_singles():
        ring.begin_groups()
        lax.fori_loop(0, tiles, write_groups, None)
        ring.end_groups()

    for i in range(min(TILES_AHEAD, tiles)):
        bring(i)
    if any(there.shape[-1] % LANES for there in staged):
        wide[...] = jnp.zeros_like(wide)  # what heads are padded with
    if not _may_be_apart(num_tokens):
        write_runs()
        return
    pl.when(run_lengths[0] != 0)(write_runs)
    pl.when(run_lengths[0] == 0)(write_singles)


def _widen(staged: list, wide, window: int, dtype) -> None:
    """A tile in 32 bits, where a row is a row, keys and values beside each other in registers."""
    largest = None if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    tile = 0
    for part in staged:
        tokens, heads, size = part.shape
        stride = _stride(heads)
        values = part[...].astype(jnp.float32)
        if largest is not None:
            values = jnp.clip(values, -largest, largest)
        if stride > heads:
            rest = jnp.zeros((tokens, stride - heads, size), jnp.float32)
            values = jnp.concatenate([values, rest], axis=1)
        values = values.reshape(tokens * stride, size)
        there = pl.ds(window * stride, tokens * stride)
        for begin in range(0, size, LANES):
            columns = values[:, begin : begin + LANES]
            wide[tile, there, : columns.shape[1]] = columns
            tile += 1


def _merge(ring: _Ring, wide, at, begin, mine) -> None:
    """Puts a run's rows into the window in its buffer: those that are `mine`, None = all."""
    window, (num_heads, tiles) = ring.window, ring.buffers.shape[1:3]
    stride = _stride(num_heads)
    for head in range(num_heads):
        for tile in range(tiles):
            new = wide[tile, pl.ds(begin * stride + head, window, stride=stride), :]
            if mine is not None:
                new = jnp.where(mine, new, ring.buffers[at, head, tile].astype(jnp.float32))
            ring.buffers[at, head, tile] = new.astype(ring.buffers.dtype)
