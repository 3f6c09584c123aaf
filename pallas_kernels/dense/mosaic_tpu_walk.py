"""How a dense TPU kernel walks its work list inside one grid step: two tiles to a block.

A kernel splits what it does with a tile in two: `first_half` fills one of two slots (products of
the matrix unit), `second_half` empties it (vector work, and more products). One straight-line block
of code does the second half of a tile and the first half of the next, so that the units overlap::

    tile 0   first │ second
    tile 1         │ first  │ second
    tile 2                  │ first  │ second

Tiles in which every query sees every key are walked first, `Tiles.together` of them to one run of
code without a branch, then those with a mask, two to a run. The more tiles to a run, the less often
the matrix unit runs empty at its end; each has a fixed slot.
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

    def start_of(self, row: jax.Array, masked: bool) -> jax.Array:
        """The first tile of a kind in a row that has one."""
        if not masked:
            return self.of_row(schedule.FREE_START, row)
        return self._past_free(row, self.of_row(schedule.START, row))

    def following(self, t: Tile, masked: bool) -> Tile:
        """The tile of its kind after this one; after the last, some tile of its row."""
        if masked:
            column = self._past_free(t.row, t.column + 1)
            inside = column < self.of_row(schedule.STOP, t.row)
            next_row = self.of_row(schedule.NEXT_MASKED, t.row)
        else:
            column = t.column + 1
            inside = column < self.of_row(schedule.FREE_STOP, t.row)
            next_row = self.of_row(schedule.NEXT_FREE, t.row)
        row = jnp.where(inside, t.row, next_row)
        return Tile(row, jnp.where(inside, column, self.start_of(row, masked)))

    def _past_free(self, row: jax.Array, column: jax.Array) -> jax.Array:
        """The column, or the one after the free tiles if these begin there."""
        at_free = column == self.of_row(schedule.FREE_START, row)
        return jnp.where(at_free, self.of_row(schedule.FREE_STOP, row), column)

    def run(
        self,
        first_half: Callable[[Tile, int, bool], None],
        both_halves: Callable[[Tile, Tile | None, int, bool], None],
    ) -> None:
        """Every tile of the grid step.

        Args:
            first_half: of (tile, slot, masked).
            both_halves: of (tile, following tile, slot, masked): the second half of the tile, from
                the slot, and the first half of the following one, if it is given, into the other.
        """

        def run_of(masked: bool, together: int, count: jax.Array, row: jax.Array) -> None:
            first = Tile(row, self.start_of(row, masked))
            first_half(first, 0, masked)

            def several(_, tiles: list[Tile]) -> list[Tile]:
                for i in range(together):
                    both_halves(tiles[i], tiles[i + 1], i % 2, masked)
                return ahead_of(tiles[-1])  # among the vectors: no cycles of its own

            def ahead_of(t: Tile) -> list[Tile]:
                """A tile and those that follow it."""
                tiles = [t]
                for _ in range(together):
                    tiles.append(self.following(tiles[-1], masked))
                return tiles

            tiles = lax.fori_loop(0, count // together, several, ahead_of(first))
            if masked:
                pl.when(count % 2 == 1)(lambda: both_halves(tiles[0], None, 0, True))

        together = self.static.tiles.together
        free, masked = self.of_major(schedule.FREE), self.of_major(schedule.MASKED)
        first_free = self.of_major(schedule.FIRST_FREE)
        first_masked = self.of_major(schedule.FIRST_MASKED)
        pl.when(free > 0)(lambda: run_of(False, together, free, first_free))
        pl.when(masked > 0)(lambda: run_of(True, 2, masked, first_masked))
