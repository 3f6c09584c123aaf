"""How a dense TPU kernel walks its work list inside one grid step: two tiles to a block.

A kernel splits what it does with a tile in two: `first_half` fills one of two slots (products of
the matrix unit), `second_half` empties it (vector work, and more products). One straight-line block
of code does the second half of a tile and the first half of the next, so that the units overlap::

    tile 0   first │ second
    tile 1         │ first  │ second
    tile 2                  │ first  │ second

Two such blocks stand in one branch, each with a fixed slot. There are two branches: one for the
case that neither of the coming tiles needs a mask, one that masks both.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.dense import mosaic_tpu_schedule as schedule
from pallas_kernels.dense.mosaic_tpu_logits import Where
from pallas_kernels.dense.mosaic_tpu_schedule import Static, Work


class Tile(NamedTuple):
    """A tile of a grid step: its row of queries, and its column of keys."""

    row: jax.Array
    column: jax.Array


class _Ahead(NamedTuple):
    """A tile, the two that follow it, and whether neither of these needs a mask."""

    tile: Tile
    after: Tile
    last: Tile
    free: jax.Array


class Walk(NamedTuple):
    """One grid step's part of the work list.

    Attributes:
        static, work: the call; `work`'s arrays are in scalar memory.
        list_of: the batch row whose list it is.
        q_major, kv_major: the major blocks.
    """

    static: Static
    work: Work
    list_of: jax.Array
    q_major: jax.Array
    kv_major: jax.Array

    @property
    def facts(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Q_OFFSET, Q_LEN, KV_LEN of the batch row."""
        facts = self.work.facts
        return tuple(
            facts[what, self.list_of]
            for what in (schedule.Q_OFFSET, schedule.Q_LEN, schedule.KV_LEN)
        )

    def where(self, t: Tile, step: int) -> Where:
        """A step of a tile, in its major blocks and in the call."""
        tiles = self.static.tiles
        q = pl.multiple_of(t.row * tiles.block_q, tiles.block_q)
        kv = t.column * tiles.block_kv + step * tiles.step_kv
        kv = pl.multiple_of(kv, tiles.step_kv)
        index = self.q_major * tiles.major_q + q, self.kv_major * tiles.major_kv + kv
        return Where(q, kv, *index, (tiles.step_kv, tiles.block_q), self.facts)

    def of_major(self, what: int) -> jax.Array:
        """A fact of the pair of major blocks."""
        at = (self.list_of * self.static.q_majors + self.q_major) * self.static.kv_majors
        return self.work.majors[what, at + self.kv_major]

    def of_row(self, what: int, row: jax.Array) -> jax.Array:
        """A fact of a row of tiles."""
        at = (self.list_of * self.static.kv_majors + self.kv_major) * self.static.q_majors
        return self.work.rows[what, (at + self.q_major) * self.static.rows + row]

    def following(self, t: Tile) -> Tile:
        """The tile after this one; after the last, some tile of its row."""
        inside = t.column + 1 < self.of_row(schedule.STOP, t.row)
        row = jnp.where(inside, t.row, self.of_row(schedule.NEXT_ROW, t.row))
        start = self.of_row(schedule.START, row)
        return Tile(row, jnp.where(inside, t.column + 1, start))

    def is_free(self, t: Tile) -> jax.Array:
        """Whether every query of the tile sees every key."""
        start = self.of_row(schedule.FREE_START, t.row)
        return (t.column >= start) & (t.column < self.of_row(schedule.FREE_STOP, t.row))

    def run(
        self,
        first_half: Callable[[Tile, int, bool], None],
        both_halves: Callable[[Tile, Tile | None, int, bool], None],
    ) -> None:
        """Every tile of the grid step, in order.

        Args:
            first_half: of (tile, slot, masked).
            both_halves: of (tile, following tile, slot, masked): the second half of the tile, from
                the slot, and the first half of the following one, if it is given, into the other.
        """
        count = self.of_major(schedule.COUNT)

        def two(_, ahead: _Ahead) -> _Ahead:
            def blocks(masked: bool) -> _Ahead:
                both_halves(ahead.tile, ahead.after, 0, masked)
                both_halves(ahead.after, ahead.last, 1, masked)
                return self._ahead_of(ahead.last)  # among the vectors: no cycles of its own

            return lax.cond(ahead.free, lambda: blocks(False), lambda: blocks(True))

        @pl.when(count > 0)
        def _():
            row = self.of_major(schedule.FIRST_ROW)
            first = Tile(row, self.of_row(schedule.START, row))
            first_half(first, 0, True)
            ahead = lax.fori_loop(0, count // 2, two, self._ahead_of(first))
            pl.when(count % 2 == 1)(lambda: both_halves(ahead.tile, None, 0, True))

    def _ahead_of(self, t: Tile) -> "_Ahead":
        """A tile and the two that follow it."""
        after = self.following(t)
        last = self.following(after)
        return _Ahead(t, after, last, self.is_free(after) & self.is_free(last))
