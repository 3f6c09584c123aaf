"""Which dense calls on TPU are of short sequences, and how their heads follow one another.

Where a head's queries and keys all fit into a block, its products, its softmax and its values wait
for one another, and a grid step of one head overlaps nothing. So a grid step takes several heads,
of one or more rows of the batch, and walks them without a pause, some units (a head's row of
queries) to a run of code without a branch::

    unit 0   first │ second
    unit 1         │ first  │ second
    unit 2                  │ first  │ second        `Plan.ahead` units ahead where they are small

A unit meets all keys at once: nothing runs along with a maximum, and what meets what is the same
for all heads, and known when the kernel is traced. Every operand has its length along lanes, as XLA
lays out heads of 64.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip
from pallas_kernels.dense import mosaic_tpu_logits as logits
from pallas_kernels.dense import mosaic_tpu_schedule as schedule
from pallas_kernels.dense.mosaic_tpu_logits import Extras, Where
from pallas_kernels.dense.mosaic_tpu_schedule import Masks, Static
from pallas_kernels.dense.mosaic_tpu_tiles import Tiles

LANES, SUBLANES = tpu_chip.LANES, tpu_chip.SUBLANES
LONGEST = 1536  # queries, and keys; 0 = every call is a long one
MOST_ROWS = 1 << 14  # of the batch, whose facts are in SMEM
MOST_AHEAD = 7
# Queries of a unit at most, and keys of a step. On v6e, 32 x 512 tokens, 16 heads of 64, forward
# takes 178 us; with (512, 128) 225, (512, 512) 183, (256, 256) 212, (128, 256) 293.
BLOCK_Q, STEP_KV = 512, 256
AREA = BLOCK_Q * BLOCK_Q  # logits of a large unit
STEP_AREAS = 20  # of them in a grid step
LEAST_STEPS = 4  # of the grid where a call allows: one's copies go on beside another's work
RUN_AREAS = 11  # and in a run of code, of bfloat16 and without more than products in the logits
MOST_AREAS = 32  # the same where a group's heads have to be there
RUN_UNITS = 32  # units in a run, at most


class Step(NamedTuple):
    """Some keys against a row of a head's queries.

    Attributes:
        kv, size: the first key, and how many.
        unseen: so many queries of the row are left out, which see none of the keys.
        whole: from this query on all see every key.
        cleaned: whether nobody may see some of the keys.
    """

    kv: int
    size: int
    unseen: int
    whole: int
    cleaned: bool

    @property
    def keys(self) -> slice:
        """In the call."""
        return slice(self.kv, self.kv + self.size)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the heads of a call are walked.

    Attributes:
        rows: the steps that each row of a head's queries takes; the first one leaves nobody out.
        heads: query heads of a grid step, all of a row of the batch where it has several rows.
        batch: rows of the batch of a grid step.
        run: heads in one run of code, a multiple of a group where `by_groups` was asked.
        ahead: how many units the first half is ahead of the second.
    """

    rows: tuple[tuple[Step, ...], ...]
    heads: int
    batch: int
    run: int
    ahead: int

    @property
    def slots(self) -> int:
        """What is between the two halves of a unit, so many times."""
        return self.ahead + 1


class Unit(NamedTuple):
    """A row of a head's queries.

    Attributes:
        b, h, kv: row of the batch, query head and kv head, in their blocks.
        row: of queries.
        member: which of its group the head is, where a run has whole groups.
        slot: what is between its halves is there.
    """

    b: jax.Array
    h: jax.Array
    kv: jax.Array
    row: int
    member: int
    slot: int

    @property
    def head(self) -> tuple[jax.Array, jax.Array]:
        """Where its queries' head is in a block."""
        return self.b, self.h

    @property
    def kv_head(self) -> tuple[jax.Array, jax.Array]:
        """Where its keys' head is in a block."""
        return self.b, self.kv


def planned(
    static: Static, who: Masks, x: Any, bias_of: str, *, backward: bool = False
) -> tuple[Static, Plan | None]:
    """The call with tiles as these kernels have them; its plan, or None if it is no short one.

    Args:
        static, who: the call.
        x: what is differentiated, in the contract's layout.
        bias_of: along what the bias runs.
        backward: whether the plan is the backward kernel's, which takes whole groups.
    """
    rows, kv_len = -(-static.q_len // BLOCK_Q), _up(static.kv_len)
    block_q = _up(-(-static.q_len // rows))
    tiles = Tiles(block_q, LANES, LANES, rows * block_q, kv_len)
    static = dataclasses.replace(static, tiles=tiles)
    size, dims = x.q.dtype.itemsize, x.q.shape[3] + x.v.shape[3]
    of_tokens = (1 + backward) * (tiles.major_q + kv_len) * dims * size
    of_rows = (3 if backward else 1) * tiles.major_q * 4 * SUBLANES
    of_logit = x.bias.dtype.itemsize if bias_of == "both" else 0
    of_logit += 4 * (backward and static.bias_gradient) + (who.mask is not None)
    extras = x.bias is not None or x.alibi_slopes is not None or static.soft_cap is not None
    weight = (1 + backward) * (1 + extras + static.by_arrays) * (3 if size == 4 else 1)
    return static, _planned(
        static,
        who,
        num_heads=x.q.shape[2],
        bytes_of_head=2 * (of_tokens + of_rows + of_logit * tiles.major_q * kv_len),
        bytes_of_logit=2 * size if backward else 4,
        weight=weight,
        by_groups=backward,
    )


def _up(size: int) -> int:
    return -(-size // LANES) * LANES


def _planned(
    static: Static,
    who: Masks,
    *,
    num_heads: int,
    bytes_of_head: int,
    bytes_of_logit: int,
    weight: int,
    by_groups: bool,
) -> Plan | None:
    """The plan of a call with its tiles.

    Args:
        static, who: the call.
        num_heads: query heads.
        bytes_of_head: of a query head's blocks in VMEM.
        bytes_of_logit: what is kept of each between the halves.
        weight: how much code a logit is, beside the least.
        by_groups: whether a group's heads have to be in one run of code.
    """
    if max(static.q_len, static.kv_len) > LONGEST or static.batch > MOST_ROWS:
        return None
    rows, tiles, batch = _rows(static, who), static.tiles, static.batch
    area = sum(s.size * (tiles.block_q - s.unseen) for steps in rows for s in steps) / AREA
    slots = 1 + min(max(round(len(rows) / area), 1), MOST_AHEAD)
    vmem = tpu_chip.current().vmem_bytes
    room = vmem * 3 // 4 - (slots + 1) * bytes_of_logit * tiles.block_q * tiles.major_kv
    unit = static.group if by_groups else 1
    if room < unit * bytes_of_head or unit * area * weight > MOST_AREAS:
        return None
    most = min(STEP_AREAS, batch * num_heads * area / LEAST_STEPS) / area
    most = max(min(most, room / bytes_of_head), unit)
    heads = _divisor(num_heads, most, unit)
    if static.group % heads:  # not a part of one group: whole ones
        heads = _divisor(num_heads, most, static.group) if most >= static.group else unit
    rows_of_batch = _divisor(batch, most / heads) if heads == num_heads else 1
    run, slots = _run(heads * rows_of_batch, len(rows), area, RUN_AREAS / weight, unit, slots)
    return Plan(rows, heads, rows_of_batch, run, slots - 1)


def _divisor(number: int, most: float, unit: int = 1) -> int:
    """The largest divisor of a number up to `most`, a multiple of `unit`; `unit` at least."""
    return max(n for n in range(unit, number + 1, unit) if number % n == 0 and n <= max(most, unit))


def _run(heads: int, rows: int, area: float, most: float, unit: int, slots: int) -> tuple[int, int]:
    """Heads in a run of code, and slots, of which a run that is repeated has a multiple."""

    def fitting(run: int) -> int:
        if run == heads:
            return slots
        numbers = [n for n in range(2, slots + 2) if run * rows % n == 0]
        return min(numbers, key=lambda n: abs(n - slots), default=0)

    def cost(run: int) -> tuple[float, int]:
        # On v6e a run takes some 300 cycles beside the 520 of each area.
        return -(-heads // run) * (run * area + 0.6), run

    longest = min(heads, max(min(most / area, RUN_UNITS // rows), 2 * unit))
    runs = [run for run in range(unit, int(longest) + 1, unit) if fitting(run)]
    best = min(runs, key=cost)
    return best, fitting(best)


def _rows(static: Static, who: Masks) -> tuple[tuple[Step, ...], ...]:
    """The steps of each row of a head's queries, by what is known of who sees whom."""
    tiles = static.tiles
    some, every, _ = _met(
        dataclasses.replace(static, tiles=dataclasses.replace(tiles, block_q=LANES))
    )
    _, _, lone = _met(static)
    if who.q_offset is not None:
        some = np.ones_like(some)
    if static.by_arrays:
        every, lone = np.zeros_like(every), np.ones_like(lone)
    across, rows = tiles.block_q // LANES, []
    for row in range(static.rows):
        here, steps = slice(row * across, (row + 1) * across), []
        for kv in range(0, tiles.major_kv, STEP_KV):
            size = min(STEP_KV, tiles.major_kv - kv)
            keys = slice(kv // LANES, (kv + size) // LANES)
            met, whole = some[here, keys].any(axis=1), every[here, keys].all(axis=1)
            if met.any():
                unseen = int(np.argmax(met)) * LANES if steps else 0
                end = int(max([0, *np.flatnonzero(~whole) + 1])) * LANES
                cleaned = bool(lone[row, keys].any())
                steps.append(Step(kv, size, unseen, max(unseen, end), cleaned))
        rows.append(
            tuple(steps) or (Step(0, min(STEP_KV, tiles.major_kv), 0, tiles.block_q, True),)
        )
    return tuple(rows)


def _met(static: Static) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[rows of tiles, tiles] each: does one see one there, each each, is some key seen by none."""
    sizes = [np.full(1, n, np.int32) for n in (static.q_offset, static.q_len, static.kv_len)]
    some, every = schedule.meetings(np, static, Masks(*[None] * len(Masks._fields)), *sizes)
    at = schedule.edges(np, static, *sizes)
    return some[0], every[0], ((at.lo < at.start) | (at.hi >= at.stop))[0]


class Blocks(NamedTuple):
    """How the grid, (blocks of heads, blocks of rows of the batch), brings what a step takes."""

    static: Static
    plan: Plan

    @property
    def kv_heads(self) -> int:
        """Of a grid step."""
        return max(self.plan.heads // self.static.group, 1)

    def queries(self, size: int) -> pl.BlockSpec:
        """Of [batch, num_q_heads, size, q_len]."""
        block = (self.plan.batch, self.plan.heads, size, self.static.tiles.major_q)
        return pl.BlockSpec(block, lambda h, b, *_: (b, h, 0, 0))

    def keys(self, size: int) -> pl.BlockSpec:
        """Of [batch, num_kv_heads, size, kv_len]."""
        block = (self.plan.batch, self.kv_heads, size, self.static.tiles.major_kv)
        heads, group = self.plan.heads, self.static.group

        def index(h, b, *_):
            return b, h if heads >= group else parted(h * heads, group)[0], 0, 0

        return pl.BlockSpec(block, index)

    def extras(self, x: Any, bias_of: str) -> dict[str, pl.BlockSpec]:
        """Of what else there is in the operands."""
        plan, tiles = self.plan, self.static.tiles
        specs = dict.fromkeys(("slopes", "sinks", "has_nan"), pl.BlockSpec(memory_space=pltpu.SMEM))
        for name, size in (("q_segments", tiles.major_q), ("kv_segments", tiles.major_kv)):
            specs[name] = pl.BlockSpec((plan.batch, 1, size), lambda h, b, *_: (b, 0, 0))
        for name, of in (("bias", bias_of), ("mask", "both")):
            array = getattr(x, name)
            if array is not None:
                specs[name] = self._of_logits(array, logits.bias_block(tiles, of)[2:])
        return specs

    def _of_logits(self, x: jax.Array, sizes: tuple[int, ...]) -> pl.BlockSpec:
        """Of a bias or a mask, where one row of the batch or head may stand for all."""
        of_step = (self.plan.batch, self.plan.heads)
        block = [n if x.shape[axis] > 1 else 1 for axis, n in enumerate(of_step)]
        return pl.BlockSpec(
            (*block, *sizes), lambda h, b, *_: (*logits.row_and_head(x, b, h), 0, 0)
        )


class Heads(NamedTuple):
    """One grid step's heads.

    Attributes:
        static, plan: the call.
        facts: int32 [3, 1 or batch] in SMEM, as `Work.facts`; None = all is known.
        x: the operands' blocks, by name.
        bias_of: along what the bias runs.
    """

    static: Static
    plan: Plan
    facts: jax.Array | None
    x: dict[str, jax.Array]
    bias_of: str

    @property
    def block_q(self) -> int:
        """Queries of a unit."""
        return self.static.tiles.block_q

    def steps(self, u: Unit) -> tuple[Step, ...]:
        """What a unit meets."""
        return self.plan.rows[u.row]

    def queries(self, u: Unit, first: int = 0) -> slice:
        """Of the unit, from one on."""
        return slice(u.row * self.block_q + first, (u.row + 1) * self.block_q)

    def index_of_head(self, u: Unit) -> jax.Array:
        """Its query head in the call."""
        return pl.program_id(0) * self.plan.heads + u.h

    def facts_of(self, u: Unit) -> tuple[jax.Array | int, ...]:
        """Q_OFFSET, Q_LEN, KV_LEN of the unit's row of the batch."""
        if self.facts is None:
            return self.static.q_offset, self.static.q_len, self.static.kv_len
        row = pl.program_id(1) * self.plan.batch + u.b if self.facts.shape[1] > 1 else 0
        return tuple(self.facts[what, row] for what in range(3))

    def where(self, u: Unit, step: Step, stop: int | None = None) -> Where:
        """A step of a unit, up to one of its queries."""
        q = u.row * self.block_q + step.unseen
        shape = step.size, (self.block_q if stop is None else stop) - step.unseen
        return Where(q, step.kv, q, step.kv, shape, self.facts_of(u))

    def extras(self, u: Unit) -> Extras:
        """What else its logits depend on."""
        x = self.x
        bias, mask = (
            x[name].at[logits.row_and_head(x[name], u.b, u.h)] if name in x else None
            for name in ("bias", "mask")
        )
        return Extras(
            bias=bias,
            bias_of=self.bias_of,
            slope=x["slopes"][self.index_of_head(u)] if "slopes" in x else None,
            q_segments=x["q_segments"].at[u.b] if "q_segments" in x else None,
            kv_segments=x["kv_segments"].at[u.b] if "kv_segments" in x else None,
            mask=mask,
        )

    def hidden(self, u: Unit, step: Step, s: jax.Array) -> jax.Array:
        """Logits of a step, -inf where the key is not seen: a mask only where it can differ."""
        count = step.whole - step.unseen
        if not count:
            return s
        mask = logits.seen(self.static, self.extras(u), self.where(u, step, step.whole))
        some = logits.hidden(mask, s[:, :count])
        return some if count == s.shape[1] else jnp.concatenate([some, s[:, count:]], axis=1)

    def used(self, u: Unit, step: Step) -> logits.Used:
        """Which keys of a step some query of the unit sees."""
        at, extras = self.where(u, step), self.extras(u)
        by_tile = extras.q_segments is not None or extras.mask is not None
        mask = logits.seen(self.static, extras, at) if by_tile else None
        return logits.used(self.static, extras, at, mask)

    def units(self, first: jax.Array | int, count: int) -> list[Unit]:
        """So many units from a run's first head on."""
        plan, group, units = self.plan, self.static.group, []
        for i in range(count):
            member, row = divmod(i, len(plan.rows))
            head = first + member
            b, h = (0, head) if plan.batch == 1 else parted(head, plan.heads)
            kv = h if group == 1 else parted(h, group)[0]
            units.append(Unit(b, h, kv, row, member % group, i % plan.slots))
        return units

    def walk(
        self, first_half: Callable[[Unit], None], both: Callable[[Unit, Unit | None], None]
    ) -> None:
        """Every unit of the grid step.

        Args:
            first_half: of a unit.
            both: the second half of a unit, and the first half of another, if it is given.
        """
        plan, heads = self.plan, self.plan.heads * self.plan.batch
        count = plan.run * len(plan.rows)
        for u in self.units(0, min(plan.ahead, count)):
            first_half(u)

        def run(i: jax.Array | int, repeated: bool = True) -> None:
            # The last run begins earlier where heads are over, and the one after it is the same.
            first, after = (jnp.minimum(n * plan.run, heads - plan.run) for n in (i, i + 1))
            units = self.units(first if repeated else 0, count)
            following = self.units(after, plan.ahead) if repeated else [None] * plan.ahead
            for u, v in zip(units, [*units, *following][plan.ahead :], strict=True):
                both(u, v)

        if heads == plan.run:
            run(0, repeated=False)
        else:
            lax.fori_loop(0, -(-heads // plan.run), lambda i, _: run(i), None)


def parted(n: jax.Array | int, size: int) -> tuple[jax.Array | int, jax.Array | int]:
    """Which of the groups of a size a number is in, and where: n // size, n % size.

    Of numbers that are not below 0. Mosaic cannot lower `//` where JAX has 64-bit numbers.
    """
    if isinstance(n, int):
        return divmod(n, size)
    return lax.div(n, jnp.asarray(size, n.dtype)), lax.rem(n, jnp.asarray(size, n.dtype))


def between(steps: tuple[Step, ...], others: tuple[Step, ...]) -> list[tuple[Step, ...]]:
    """For each step, those others' that come with it, spread evenly."""
    ends = [i * len(others) // len(steps) for i in range(len(steps) + 1)]
    return [others[a:b] for a, b in itertools.pairwise(ends)]
