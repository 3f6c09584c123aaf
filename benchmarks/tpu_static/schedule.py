"""A kernel's figures, off its schedule and the replay of it: units in use, the steady tile, spills.

The steady tile is the run of bundles that all ran equally often and together took the most cycles:
in an attention kernel the work on one block of keys. Its length is what one tile costs.
"""

import dataclasses
import itertools
import re
from typing import Any

from benchmarks.tpu_static.dump import KernelDump
from benchmarks.tpu_static.replay import Replayed

FILL, SPILL = "VLOAD:FILL", "VSTORE:SPILL"
# Read by assertions only: a semaphore's value at the kernel's end, the cookie of two fused cores.
ASSERTED = ("spop.sfrf", "spop")


@dataclasses.dataclass(frozen=True)
class Tile:
    """The bundles where a kernel spends its time.

    Attributes:
        first, last: bundles.
        bundles: its length: cycles of one pass, stalls included, waits for DMAs not.
        stalls: bundles of it in which no unit does anything.
        passes: how often it ran.
        share: of the kernel's cycles.
        use: unit -> share of its slots in use; empty where the compiler has none.
    """

    first: int
    last: int
    bundles: int
    stalls: int
    passes: int
    share: float
    use: dict[str, float]


@dataclasses.dataclass(frozen=True)
class KernelFigures:
    """What is known of one kernel; times are of one core.

    Attributes:
        name: in the compiled program.
        bundles: of the schedule, stalls included.
        vreg_fills, vreg_spills: vector registers read back from VMEM and put there, in the text of
            the schedule.
        spill_passes: the same spills, each as often as it ran.
        sreg_spills: references to spilled scalars.
        memory: memory space -> bytes allocated ("vmem", "smem").
        cycles, dma_wait, dmas, bytes_in, bytes_out: of the replay.
        issue_stalls: cycles in bundles in which no unit does anything.
        use: unit -> share of its slots in use over all cycles.
        tile: where the time goes.
        doubts: what the replay did not understand; empty = nothing.
    """

    name: str
    bundles: int
    vreg_fills: int
    vreg_spills: int
    spill_passes: int
    sreg_spills: int
    memory: dict[str, int]
    cycles: int
    dma_wait: int
    dmas: int
    bytes_in: int
    bytes_out: int
    issue_stalls: int
    use: dict[str, float]
    tile: Tile
    doubts: list[str]

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        return dataclasses.asdict(self)


def figures(name: str, kernel: KernelDump, replayed: Replayed) -> KernelFigures:
    """The figures of one kernel."""
    units, runs = list(kernel.capacity), replayed.runs
    static = dict(zip(units, map(sum, zip(*kernel.rows, strict=True)), strict=True))
    spilled = units.index(SPILL)
    return KernelFigures(
        name=name,
        bundles=len(kernel.rows),
        vreg_fills=static[FILL],
        vreg_spills=static[SPILL],
        spill_passes=sum(n * row[spilled] for n, row in zip(runs, kernel.rows, strict=True)),
        sreg_spills=sum(len(re.findall(r"_spill\]", bundle)) for bundle in kernel.bundles),
        memory={space: kernel.memory.get(space, 0) for space in ("vmem", "smem")},
        cycles=replayed.cycles,
        dma_wait=replayed.dma_wait,
        dmas=replayed.dmas,
        bytes_in=replayed.bytes_in,
        bytes_out=replayed.bytes_out,
        issue_stalls=sum(n for n, row in zip(runs, kernel.rows, strict=True) if not any(row)),
        use=use(kernel, runs, replayed.cycles),
        tile=steady_tile(kernel, replayed),
        doubts=doubts(replayed),
    )


def use(kernel: KernelDump, runs: list[int], cycles: int) -> dict[str, float]:
    """Unit -> share of its slots in use, each bundle counted as often as it ran."""
    totals = [0] * len(kernel.capacity)
    for count, row in zip(runs, kernel.rows, strict=True):
        if count:
            totals = [total + count * slots for total, slots in zip(totals, row, strict=True)]
    return {
        unit: round(total / (max(cycles, 1) * slots), 4)
        for (unit, slots), total in zip(kernel.capacity.items(), totals, strict=True)
        if slots
    }


def steady_tile(kernel: KernelDump, replayed: Replayed) -> Tile:
    """Where the time goes: see this file's first lines."""
    runs = replayed.runs
    best = (0, 0, 0)  # cycles, first, length
    for count, members in itertools.groupby(range(len(runs)), key=runs.__getitem__):
        found = list(members)
        best = max(best, (count * len(found), found[0], len(found)))
    spent, first, length = best
    last = first + max(length, 1) - 1
    once = [int(first <= i <= last) for i in range(len(runs))]
    return Tile(
        first=first,
        last=last,
        bundles=length,
        stalls=sum(not any(row) for row in kernel.rows[first : last + 1]),
        passes=runs[first],
        share=round(spent / max(replayed.cycles, 1), 4),
        use=use(kernel, once, length),
    )


def doubts(replayed: Replayed) -> list[str]:
    """What a reader must know before believing the replay."""
    found = []
    if not replayed.complete:
        found.append(f"stopped after {replayed.cycles} cycles")
    if replayed.unmatched_waits:
        found.append(f"{replayed.unmatched_waits} waits for what no DMA brought")
    unknown = {name: n for name, n in replayed.unmodelled.items() if name not in ASSERTED}
    if unknown:
        said = ", ".join(f"{name} ({n})" for name, n in sorted(unknown.items()))
        found.append(f"read as 0: {said}")
    return found
