"""The TPU kernel of `paged` that writes this step's keys and values into the cache.

Rows of a cache are packed in tiles of 8 and more, so a row is written by reading the window of rows
that it lies in, and writing it back. Tokens that are neighbours in a window are written together (a
run); a window that a run fills is not read. Windows are read ahead of being merged, and written
behind, through a ring of buffers; a run whose window is still in the ring waits for it to be gone,
so any slot mapping is honoured.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip
from pallas_kernels.paged.mosaic_tpu_geometry import LANES, ROWS, divided, remainder, round_up

RING, AHEAD = 16, 8  # windows in the ring, and read ahead of the one that is merged
TILE = 64  # tokens of a grid step
# Rows of a window: a decode step writes a row or two of each, a prompt fills them.
FEW, MANY = 8, 32


def write_kv(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
    """Writes this step's keys and values into a side-by-side cache.

    Args:
        kv_pages: [num_pages, num_kv_heads, tiles, page_size, lanes].
        k, v: [num_tokens, num_kv_heads, head_dim], true values.
        slot_mapping: int32 [num_tokens]: page * page_size + offset; outside the cache (-1) =
            written nowhere.
        k_scale, v_scale: float32 [] or [num_kv_heads]: true value = stored value * scale; None = 1.

    Returns:
        kv_pages with the rows written; in place where the argument is donated.
    """
    num_tokens, (num_pages, num_heads, tiles, page_size, _) = k.shape[0], kv_pages.shape
    width = 2 * k.shape[-1]
    few = num_tokens <= 1024
    window = math.gcd(FEW if few else MANY, page_size)
    lanes = round_up(width, LANES)
    rows = jnp.concatenate(
        [_quantised(k, k_scale, kv_pages.dtype), _quantised(v, v_scale, kv_pages.dtype)], axis=-1
    )
    tile = min(TILE, round_up(num_tokens, ROWS))
    padding = ((0, round_up(num_tokens, tile) - num_tokens), (0, 0), (0, lanes - width))
    rows = jnp.pad(rows, padding).reshape(-1, num_heads * lanes)
    slots = jnp.pad(slot_mapping, padding[0], constant_values=-1)
    slots = jnp.where((slots >= 0) & (slots < num_pages * page_size), slots, -1)

    def kernel(*refs):
        _kernel(*refs, window=window, lanes=lanes)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows.shape[0] // tile,),
            in_specs=[
                pl.BlockSpec((tile, rows.shape[1]), lambda j, *_: (j, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((rows.shape[1] // LANES, window + tile + window, LANES), jnp.float32),
                pltpu.VMEM((RING, num_heads, tiles, window, width // tiles), kv_pages.dtype),
                pltpu.SemaphoreType.DMA((RING,)),
                pltpu.SemaphoreType.DMA((RING,)),
                pltpu.SMEM((RING,), jnp.int32),
                pltpu.SMEM((_CELLS,), jnp.int32),
            ],
        ),
        input_output_aliases={3: 0},
        # Checking a copy's ends takes longer than starting it; the slots were checked above.
        compiler_params=dataclasses.replace(
            tpu_chip.compiler_params(["arbitrary"]), disable_bounds_checks=True
        ),
        name="paged_write",
    )(slots, _run_lengths(slots, window, tile), rows, kv_pages)


def _quantised(values: jax.Array, scale: jax.Array | None, dtype) -> jax.Array:
    """Values / scale, saturated into dtype; int8 rounds to nearest even, and has no NaN."""
    stored = values.astype(jnp.float32)
    if scale is not None:
        scale = scale[:, None] if scale.ndim else scale
        # XLA may multiply by the reciprocal of what a loop does not change; not through a barrier.
        stored = stored / lax.optimization_barrier(jnp.broadcast_to(scale, stored.shape))
    if dtype == jnp.int8:
        stored = jnp.where(jnp.isnan(stored), 0, stored)
        return jnp.clip(jnp.round(stored), -128, 127).astype(dtype)
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(stored, -largest, largest).astype(dtype)


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


# Tokens at which the next run to read and to merge begins; runs read, merged, and gone.
_READ_AT, _MERGE_AT, _READ, _MERGED, _GONE, _CELLS = range(6)


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


def _kernel(
    slots, run_lengths, rows, _, kv_pages, wide, buffers, read, written, windows, cells, *, window,
    lanes,
):  # fmt: skip
    """One tile of tokens: every run in it, one after another."""
    ring = _Ring(slots, run_lengths, kv_pages, buffers, read, written, windows, cells, window)
    tile = rows.shape[0]
    first_token = pl.program_id(0) * tile

    @pl.when(pl.program_id(0) == 0)
    def _():
        for cell in range(_CELLS):
            cells[cell] = jnp.int32(0)
        for i in range(RING):
            windows[i] = jnp.int32(-1)

    # In 32 bits, where a row is a row, with room for windows that reach over either end.
    # One register wide: only then may a load begin at any row.
    for i in range(wide.shape[0]):
        columns = slice(i * LANES, (i + 1) * LANES)
        wide[i, pl.ds(window, tile)] = rows[:, columns].astype(jnp.float32)

    def merge_run(token):
        slot, length = slots[token], run_lengths[token]

        @pl.when(slot >= 0)
        def _():
            ring.read_ahead()
            at = remainder(cells[_MERGED], RING)
            pl.when(length < window)(lambda: ring.reading(at, divided(slot, window)).wait())
            _merge(ring, wide, at, token - first_token, remainder(slot, window), length, lanes)
            ring.writing(at, divided(slot, window)).start()
            cells[_MERGED] += 1

        return token + length

    lax.while_loop(lambda token: token < first_token + tile, merge_run, first_token)
    pl.when(pl.program_id(0) == pl.num_programs(0) - 1)(ring.free_all)


def _merge(ring: _Ring, wide, at, token, row, length, lanes: int) -> None:
    """Puts the run's rows into the window in its buffer."""
    window = ring.window
    index = lax.broadcasted_iota(jnp.int32, (window, 1), 0)
    mine = (index >= row) & (index < row + length)
    num_heads, tiles, _, width = ring.buffers.shape[1:]
    for head in range(num_heads):
        for lane in range(0, tiles * width, LANES):
            tile, lane_in_tile = divmod(lane, width)
            columns = slice(lane_in_tile, min(lane_in_tile + LANES, width))
            new = wide[(head * lanes + lane) // LANES, pl.ds(window + token - row, window)]
            old = ring.buffers[at, head, tile, :, columns].astype(jnp.float32)
            merged = jnp.where(mine, new[:, : old.shape[1]], old)
            ring.buffers[at, head, tile, :, columns] = merged.astype(ring.buffers.dtype)
