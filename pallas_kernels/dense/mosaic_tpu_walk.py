"""How a dense TPU kernel walks its work list inside one grid step: two tiles to a block.

A kernel splits what it does with a tile in two: `first_half` fills one of two slots (products of
the matrix unit), `second_half` empties it (more products). Which has the vector work is the
kernel's, and so is whether one slot does, filled step by step as it is emptied. One straight-line
block of code does the second half of a tile and the first half of the next, so that the units
overlap::

    tile 0   first │ second
    tile 1         │ first  │ second
    tile 2                  │ first  │ second

A grid step begins with one half of its first tile that needs a mask. Then come the tiles in which
every query sees every key, `Static.together` of them to one run of code without a branch, and then
the others with a mask, two to a run; nothing is done alone where the kinds meet. Where those with a
mask are the diagonal, they are one run in all, and a step's keys meet only the queries that are not
before them. The more tiles to a run, the less often the matrix unit runs empty at its end; each has
a fixed slot.
"""

import enum
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.dense import mosaic_tpu_schedule as schedule
from pallas_kernels.dense.mosaic_tpu_logits import Where
from pallas_kernels.dense.mosaic_tpu_schedule import Static, Work


class Kind(enum.Enum):
    """What code a tile needs.

    Attributes:
        FREE: every query sees every key.
        MASKED: who sees whom is computed.
        DIAGONAL: its queries' positions are its keys': a step's keys are seen by no query before
            them, and these are left out.
    """

    FREE = 0
    MASKED = 1
    DIAGONAL = 2


FREE, MASKED, DIAGONAL = Kind


class Tile(NamedTuple):
    """A tile of a grid step: its row of queries, and its column of keys."""

    row: jax.Array
    column: jax.Array


def before(sums: jax.Array, start: jax.Array, size: int, first: jax.Array) -> jax.Array:
    """What a part is added to: sums of `size` columns, or, at first, the end, where nothing is."""
    end = sums.shape[1] - size
    start = jnp.where(first, end, start)
    return sums[:, pl.ds(pl.multiple_of(start, math.gcd(end, size)), size)]


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

    def unseen(self, step: int, kind: Kind) -> int:
        """How many of a tile's queries are left out of a step."""
        return step * self.static.tiles.step_kv if kind == DIAGONAL else 0

    def where(self, t: Tile, step: int, kind: Kind) -> Where:
        """A step of a tile, in its major blocks and in the call."""
        tiles, unseen = self.static.tiles, self.unseen(step, kind)
        q = t.row * tiles.block_q + unseen
        q = pl.multiple_of(q, math.gcd(tiles.block_q, unseen))
        kv = t.column * tiles.block_kv + step * tiles.step_kv
        kv = pl.multiple_of(kv, tiles.step_kv)
        index = self.q_major * tiles.major_q + q, self.kv_major * tiles.major_kv + kv
        return Where(q, kv, *index, (tiles.step_kv, tiles.block_q - unseen), self.facts)

    def of_major(self, what: int) -> jax.Array:
        """A fact of the pair of major blocks."""
        at = (self.list_of * self.static.q_majors + self.q_major) * self.static.kv_majors
        return self.work.majors[what, at + self.kv_major]

    def of_row(self, what: int, row: jax.Array) -> jax.Array:
        """A fact of a row of tiles."""
        at = (self.list_of * self.static.kv_majors + self.kv_major) * self.static.q_majors
        return self.work.rows[what, (at + self.q_major) * self.static.rows + row]

    def of_column(self, what: int, column: jax.Array) -> jax.Array:
        """A fact of a tile's keys."""
        at = (self.list_of * self.static.kv_majors + self.kv_major) * self.static.columns
        return self.work.columns[what, at + column]

    def begins_keys(self, t: Tile) -> jax.Array:
        """Whether no tile with these keys was walked before, for this query head."""
        row = self.q_major * self.static.rows + t.row
        return row == self.of_column(schedule.FIRST_ROW, t.column)

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
        first_half: Callable[[Tile, int, Kind], None],
        both_halves: Callable[[Tile, Tile | None, int, Kind, Kind], None],
    ) -> None:
        """Every tile of the grid step.

        Args:
            first_half: of (tile, slot, kind).
            both_halves: of (tile, following tile, slot, kind of the tile, of the following one):
                the second half of the tile, from the slot, and the first half of the following
                one, if it is given, into the other. A free tile stands for a masked one there.
        """
        free, masked = self.of_major(schedule.FREE), self.of_major(schedule.MASKED)
        first_free, first_masked = self.first_of(FREE), self.first_of(MASKED)
        pl.when(masked > 0)(lambda: first_half(first_masked, 0, MASKED))
        pl.when((masked == 0) & (free > 0))(lambda: first_half(first_free, 0, FREE))

        def several(_, tiles: list[Tile]) -> list[Tile]:
            for i in range(together):
                both_halves(tiles[i], tiles[i + 1], i % 2, FREE, FREE)
            return self._ahead_of(tiles[-1], together, FREE)  # among the vectors: costs no cycles

        together = self.static.together
        begun = self._ahead_of(first_free, together, FREE)
        begun = jax.tree.map(
            lambda after, alone: jnp.where(masked > 0, after, alone),
            [first_masked, *begun[:-1]],
            begun,
        )
        last, *_ = lax.fori_loop(0, free // together, several, begun)
        if self.static.diagonal:
            pl.when(masked > 0)(lambda: self._diagonal(last, first_masked, both_halves))
        else:
            pl.when(masked > 0)(lambda: self._masked(last, first_masked, masked, both_halves))

    def first_of(self, kind: Kind) -> Tile:
        """The first tile of a kind, free or masked, if there is one."""
        what = schedule.FIRST_FREE if kind == FREE else schedule.FIRST_MASKED
        row = self.of_major(what)
        return Tile(row, self.start_of(row, kind != FREE))

    def _ahead_of(self, t: Tile, count: int, kind: Kind) -> list[Tile]:
        """A tile and those of a kind that follow it."""
        tiles = [t]
        for _ in range(count):
            tiles.append(self.following(tiles[-1], kind != FREE))
        return tiles

    def _masked(self, last: Tile, first: Tile, count: jax.Array, both_halves: Callable) -> None:
        """What is in slot 0, and all masked tiles but the first one, which has been before."""

        def two(_, tiles: list[Tile]) -> list[Tile]:
            for i in range(2):
                both_halves(tiles[i], tiles[i + 1], i % 2, MASKED, MASKED)
            return self._ahead_of(tiles[-1], 2, MASKED)

        begun = [last, *self._ahead_of(first, 2, MASKED)[1:]]
        tiles = lax.fori_loop(0, count // 2, two, begun)
        pl.when(count % 2 == 1)(lambda: both_halves(tiles[0], None, 0, MASKED, MASKED))

    def _diagonal(self, last: Tile, first: Tile, both_halves: Callable) -> None:
        """The same where they are the diagonal: all in one run."""
        on = [Tile(first.row + i, first.column + i) for i in range(self.static.diagonal)]
        kinds = [FREE, *[DIAGONAL] * (len(on) - 1), FREE]
        tiles = [last, *on[1:], None]
        for i in range(len(on)):
            both_halves(tiles[i], tiles[i + 1], i % 2, kinds[i], kinds[i + 1])
