"""How this step's rows get into a "striped" latent cache on TPU, by the attending kernel itself.

A register packs rows of narrow dtypes into words, so what can be copied alone is a *tile* of rows,
16 of bfloat16; and a tile of rotary keys belongs to two tiles of latents, together a *unit*. A run
of tokens that go to one unit is one read, merge and write of the tiles that it touches. Runs are
taken in groups: all tiles of a group are on their way at once, and no unit is twice in a group.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_chip import LANES, SUBLANES

RUNS = 64  # of a group, at most
MOST_TOKENS = 256  # that a group's runs are looked for in
WAITED = 16  # tiles that are awaited at once
SET_WORDS = 64  # words of 32 bits: units of a group, by the last bits of their numbers


class Writes(NamedTuple):
    """What is written, and where: slot_mapping in SMEM, the others in HBM."""

    slot_mapping: Any  # int32 [num_tokens]
    rows: Any  # float32 [padded num_tokens, SUBLANES, LANES]: see `stored_rows`
    pages: Any  # [num_pages, parts, page_size / 2, LANES]

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return 32 // self.pages.dtype.itemsize

    @property
    def tokens(self) -> int:
        """Tokens that a group's runs are looked for in."""
        return min(MOST_TOKENS, self.rows.shape[0])


class _Scratch(NamedTuple):
    latents: Any  # [RUNS, 2, parts / 2, tile, LANES]
    ropes: Any  # [RUNS, tile, LANES]
    rows: Any  # float32 [tokens, SUBLANES, LANES]
    unit: Any  # SMEM [RUNS + 1], the last nobody's: the unit, counted through all pages
    first: Any  # SMEM [RUNS + 1]: its first token
    stop: Any  # SMEM [RUNS + 1]: the token after its last
    tiles: Any  # SMEM [RUNS + 1]: bits of its tiles of latents that are touched
    seen: Any  # SMEM [SET_WORDS]
    arrived: Any
    left: Any


def stored_rows(latents: jax.Array, ropes: jax.Array) -> jax.Array:
    """Each token's row as one register: the latent, then its rotary key twice.

    Args:
        latents, ropes: [num_tokens, rank], [num_tokens, rope_dim], as the cache stores them.

    Returns:
        float32 [num_tokens up to whole groups', SUBLANES, LANES].
    """
    group = min(MOST_TOKENS, latents.shape[0])
    rows = jnp.concatenate([latents, ropes, ropes], axis=-1).astype(jnp.float32)
    missing = SUBLANES * LANES - rows.shape[1]
    rows = jnp.pad(rows, ((0, -rows.shape[0] % group), (0, missing)))
    return rows.reshape(-1, SUBLANES, LANES)


def write_rows(writes: Writes) -> None:
    """Puts every token's row at its slot; returns when all of them are there."""
    parts, tile = writes.pages.shape[1], writes.tile

    def scoped(*scratch):
        _write_groups(writes, _Scratch(*scratch))

    pl.run_scoped(
        scoped,
        pltpu.VMEM((RUNS, 2, parts // 2, tile, LANES), writes.pages.dtype),
        pltpu.VMEM((RUNS, tile, LANES), writes.pages.dtype),
        pltpu.VMEM((writes.tokens, SUBLANES, LANES), jnp.float32),
        *[pltpu.SMEM((RUNS + 1,), jnp.int32)] * 4,
        pltpu.SMEM((SET_WORDS,), jnp.int32),
        *[pltpu.SemaphoreType.DMA(())] * 2,
    )


def _write_groups(writes, scratch) -> None:
    """Group after group until no token is left."""
    num_tokens = writes.slot_mapping.shape[0]

    def one_group(token):
        base = token // writes.tokens * writes.tokens
        in_hbm = writes.rows.at[pl.ds(base, writes.tokens)]
        rows = pltpu.make_async_copy(in_hbm, scratch.rows, scratch.arrived)
        rows.start()
        stop = jnp.minimum(base + writes.tokens, num_tokens)
        token, runs, pairs = _gather_runs(writes, scratch, token, stop)

        def merge(j):
            _merge(writes, scratch, j, base)
            _start_run(writes, scratch, j, into=False)

        jax.lax.fori_loop(0, runs, lambda j, _: _start_run(writes, scratch, j, into=True), None)
        rows.wait()
        _wait_tiles(scratch, scratch.arrived, runs, pairs)
        jax.lax.fori_loop(0, runs, lambda j, _: merge(j), None)
        _wait_tiles(scratch, scratch.left, runs, pairs)
        return token

    jax.lax.while_loop(lambda token: token < num_tokens, one_group, jnp.int32(0))


class _Run(NamedTuple):
    """A run of tokens, as far as it is known."""

    unit: jax.Array
    first: jax.Array
    stop: jax.Array
    tiles: jax.Array


def _gather_runs(writes, scratch, token, stop) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lists the runs of the next group, of tokens before `stop`.

    Returns:
        The token after, runs, and how many of them touch both of their tiles of latents.
    """
    num_pages, _, half, _ = writes.pages.shape
    size, num_slots = 2 * writes.tile, 2 * half * num_pages
    for i in range(SET_WORDS):
        scratch.seen[i] = 0

    def is_open(state):
        token, *_, ended = state
        return (token < stop) & ~ended

    def one_token(state):
        token, runs, pairs, last, _ = state
        slot = writes.slot_mapping[token]
        exists = (slot >= 0) & (slot < num_slots)
        unit = slot // size
        joins = (last.unit == unit) & (last.stop == token)
        # Most units are found to be new at once, by a set of the last bits of their numbers.
        word, bit = (unit >> 5) & (SET_WORDS - 1), jnp.left_shift(1, unit & 31)
        seen = scratch.seen[word]
        searched = jnp.where(joins | (seen & bit == 0), 0, runs)
        taken = jax.lax.fori_loop(
            0, searched, lambda j, found: found | (scratch.unit[j] == unit), jnp.bool_(False)
        )
        ends = exists & ~joins & (taken | (runs == RUNS))
        listed = exists & ~ends
        before = jnp.where(joins, last.tiles, 0)
        tiles = before | jnp.left_shift(1, slot % size // writes.tile)
        run = _Run(unit, jnp.where(joins, last.first, token), token + 1, tiles)
        at = jnp.where(listed, jnp.where(joins, runs - 1, runs), RUNS)
        for name, value in run._asdict().items():
            getattr(scratch, name)[at] = value
        scratch.seen[word] = jnp.where(listed, seen | bit, seen)
        pairs += (listed & (tiles == 3) & (before != 3)).astype(jnp.int32)
        runs += (listed & ~joins).astype(jnp.int32)
        last = _Run(*(jnp.where(listed, new, old) for new, old in zip(run, last, strict=True)))
        return token + (~ends).astype(jnp.int32), runs, pairs, last, ends

    none = jnp.int32(-1)
    state = (token, jnp.int32(0), jnp.int32(0), _Run(none, none, none, none), jnp.bool_(False))
    token, runs, pairs, *_ = jax.lax.while_loop(is_open, one_token, state)
    return token, runs, pairs


def _start_run(writes, scratch, j, *, into: bool) -> None:
    """Starts the copies of a run's tiles, into VMEM or back."""
    num_stripes, half = writes.pages.shape[1] // 2, writes.pages.shape[2]
    units_of_page = half // writes.tile
    page, unit = scratch.unit[j] // units_of_page, scratch.unit[j] % units_of_page

    def copy(in_hbm, in_vmem):
        if into:
            pltpu.make_async_copy(in_hbm, in_vmem, scratch.arrived).start()
        else:
            pltpu.make_async_copy(in_vmem, in_hbm, scratch.left).start()

    def one_tile(i):
        at = (2 * unit + i) * writes.tile
        stripes = pl.ds(at // half * num_stripes, num_stripes)
        in_hbm = writes.pages.at[page, stripes, _aligned(at % half, writes.tile)]
        copy(in_hbm, scratch.latents.at[j, i])

    tiles = scratch.tiles[j]
    one_tile(jnp.where(tiles == 2, 1, 0))
    pl.when(tiles == 3)(lambda: one_tile(1))
    at = _aligned(unit * writes.tile, writes.tile)
    copy(writes.pages.at[page, 2 * num_stripes, at], scratch.ropes.at[j])


def _wait_tiles(scratch, sem, runs, pairs) -> None:
    """Waits for a group's tiles, by their bytes, many at once."""
    for ref, count in ((scratch.latents.at[:, 0], runs + pairs), (scratch.ropes, runs)):

        def wait(size, ref=ref):
            some = ref.at[pl.ds(0, size)]
            pltpu.make_async_copy(some, some, sem).wait()

        jax.lax.fori_loop(0, count // WAITED, lambda _, x, wait=wait: wait(WAITED), None)
        jax.lax.fori_loop(0, count % WAITED, lambda _, x, wait=wait: wait(1), None)


def _aligned(at: jax.Array, size: int) -> pl.Slice:
    return pl.ds(pl.multiple_of(at, size), size)


def _merge(writes, scratch, j, base) -> None:
    """Puts a run's rows into its tiles; `base` is the token of the first row in VMEM."""
    tile, num_stripes = writes.tile, scratch.latents.shape[2]
    # No boolean vector is widened here: the Mosaic of libtpu 0.0.50 gives those no layout.
    line = jax.lax.broadcasted_iota(jnp.int32, (tile, LANES), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (tile, LANES), 1)
    token_of_rope = line + tile * (1 + ((lane - LANES // 2) >> 31))

    def put(ref, is_own, row):
        ref[...] = jnp.where(is_own, row, ref[...].astype(jnp.float32)).astype(ref.dtype)

    def one_row(token, _):
        at = writes.slot_mapping[token] % (2 * tile)
        row = [scratch.rows[token - base, pl.ds(c, 1)] for c in range(num_stripes + 1)]
        for stripe in range(num_stripes):
            put(scratch.latents.at[j, at // tile, stripe], line == at % tile, row[stripe])
        put(scratch.ropes.at[j], token_of_rope == at, row[num_stripes])

    first = scratch.first[j]
    one_row(first, None)
    jax.lax.fori_loop(first + 1, scratch.stop[j], one_row, None)
