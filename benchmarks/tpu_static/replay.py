"""Executes a schedule: cycles, waits for DMAs, bytes moved, and how often every bundle ran.

One pipe lies between HBM and the core, shared by every DMA in flight, in and out; a DMA that stays
on the chip waits for nobody. Scalar operands are in SMEM when a kernel starts (`stand_ins`); what
it brings there itself reads as 0.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

from benchmarks.tpu_static.chips import Chip
from benchmarks.tpu_static.dump import KernelDump
from benchmarks.tpu_static.scalar_code import M32, ScalarCode

Scalar = tuple[Sequence[int], int, Sequence[int]]  # shape, bytes of an element, values
LANES, SUBLANES = 128, 8
ON_CHIP = ("vmem", "smem")
LIMIT = 400_000_000  # cycles; a replay that gets there is stopped, and says so


@dataclasses.dataclass(frozen=True)
class Replayed:
    """What became of a schedule.

    Attributes:
        cycles: from the first bundle to the last, waits included.
        complete: whether it came to its end.
        dma_wait: cycles in which it waited for DMAs.
        dmas: DMAs issued.
        bytes_in, bytes_out: moved from HBM, and to HBM.
        unmatched_waits: waits for what no DMA brings: the replay misunderstood something.
        unmodelled: scalar opcodes that it reads as 0.
        runs: for each bundle, how often it ran.
    """

    cycles: int
    complete: bool
    dma_wait: int
    dmas: int
    bytes_in: int
    bytes_out: int
    unmatched_waits: int
    unmodelled: dict[str, int]
    runs: list[int]


class Transfers:
    """The DMAs of a core, and the semaphores they fill."""

    def __init__(self, chip: Chip, cores_busy: int):
        self._chip = chip
        self._pipe = chip.pipe / cores_busy
        self._free_at = 0.0  # the cycle from which the pipe is free
        self._full: dict[int, int] = collections.defaultdict(int)
        self._under_way: dict[int, collections.deque] = collections.defaultdict(collections.deque)
        self.dmas = self.bytes_in = self.bytes_out = self.waited = self.unmatched = 0

    def start(self, cycle: float, kind: str, granules: int, semaphore: int) -> None:
        """A DMA, issued; `kind` is the opcode's, "hbm_to_vmem" for one."""
        if not granules:
            return
        size = granules * self._chip.granule
        self.dmas += 1
        source, _, destination = kind.partition("_to_")
        is_out = destination.startswith("hbm")
        latency = self._chip.latency_out if is_out else self._chip.latency_in
        if is_out or source not in ON_CHIP:
            begins = max(cycle + latency, self._free_at)
            ends = self._free_at = begins + size / self._pipe
            self.bytes_out += size * is_out
            self.bytes_in += size * (not is_out)
        else:
            ends = cycle + latency + size / self._pipe
        self._under_way[semaphore].append((ends, granules))

    def wait(self, cycle: float, semaphore: int, granules: int) -> int:
        """Cycles until the semaphore is full."""
        until, under_way = cycle, self._under_way[semaphore]
        while self._full[semaphore] < granules and under_way:
            ends, brought = under_way.popleft()
            self._full[semaphore] += brought
            until = max(until, ends)
        if self._full[semaphore] < granules:
            self.unmatched += 1
            self._full[semaphore] = granules
        self.waited += int(until - cycle)
        return int(until - cycle)

    def add(self, semaphore: int, amount: int) -> None:
        """Adds to a semaphore; waits are followed by an addition of a negative number."""
        self._full[semaphore] += signed(amount & M32)


def signed(value: int) -> int:
    """A 32-bit word as a signed number."""
    return value - (1 << 32) if value & 0x80000000 else value


def replay(
    kernel: KernelDump,
    chip: Chip,
    cores_busy: int = 1,
    scalars: Sequence[Scalar] = (),
    limit: int = LIMIT,
) -> Replayed:
    """Executes one kernel on one core.

    Args:
        kernel: as dumped.
        chip: that it was compiled for.
        cores_busy: cores that share the pipe.
        scalars: its scalar operands, in order.
        limit: cycles after which it is stopped.

    Raises:
        ValueError: a branch that is not understood.
    """
    numbers = {i: values[0] for i, (_, _, values) in enumerate(scalars) if len(values) == 1}
    code = ScalarCode(kernel.bundles, kernel.starts, kernel.ends, kernel.branches, numbers)
    transfers = Transfers(chip, cores_busy)
    blocks = _compiled(code, transfers, _memory(kernel, code, scalars))
    times = [0] * len(blocks)
    block: int | None = 0
    cycle = 0
    while block is not None and cycle < limit:
        times[block] += 1
        block, cycle = blocks[block](cycle)
    runs = [0] * len(kernel.bundles)
    for count, (first, last) in zip(times, code.blocks, strict=True):
        runs[first : last + 1] = [count] * (last + 1 - first)
    return Replayed(
        int(cycle), block is None, transfers.waited, transfers.dmas, transfers.bytes_in,
        transfers.bytes_out, transfers.unmatched, dict(code.unmodelled), runs,
    )  # fmt: skip


def _memory(kernel: KernelDump, code: ScalarCode, scalars: Sequence[Scalar]) -> dict[int, int]:
    """SMEM before the first bundle: word address -> value."""
    memory = {}
    for operand, (allocation, size) in kernel.prefetched.items():
        if operand < len(scalars):
            begin = code.address(allocation)
            words = _words(scalars[operand], size)
            memory |= {begin + at: word for at, word in words.items()}
    return memory


def _words(scalar: Scalar, size: int) -> dict[int, int]:
    """Offset -> word of an operand, as it lies in SMEM.

    Matrices lie in tiles of up to 8 rows of 128 words each, the tiles of 8 rows side by side; where
    the allocation is too small for that, row after row. Elements of less than 32 bits share words:
    element i is in word i % 128 of its group of 128 words, in part i // 128 of that word.
    """
    shape, itemsize, values = scalar
    columns, parts = max(shape[-1] if shape else 1, 1), 4 // itemsize
    rows = max(len(values) // columns, 1)
    tall, across = min(SUBLANES, 1 << (rows - 1).bit_length()), -(-columns // LANES)
    tiled = rows > 1 and size >= -(-rows // tall) * tall * across * LANES * itemsize
    words: dict[int, int] = {}
    for i, value in enumerate(values):
        at = i
        if tiled:
            (down, row), (right, lane) = divmod(i // columns, tall), divmod(i % columns, LANES)
            at = ((down * across + right) * tall + row) * LANES + lane
        group, part = divmod(at // LANES, parts)
        word = at if parts == 1 else group * LANES + at % LANES
        bits = 8 * itemsize
        words[word] = words.get(word, 0) | (value & ((1 << bits) - 1)) << bits * part * (parts > 1)
    return words


def _compiled(code: ScalarCode, transfers: Transfers, memory: dict[int, int]) -> list[Callable]:
    """The functions of the basic blocks, bound to a machine."""
    machine = {
        "V": [0] * (code.values + 1),
        "P": [0] * (code.values + 1),
        "M": memory,
        "M32": M32,
        "S": signed,
        "dma": transfers.start,
        "wait": transfers.wait,
        "sync": transfers.add,
    }
    exec(compile(code.source, "<schedule>", "exec"), machine)
    return [machine[f"b{k}"] for k in range(len(code.blocks))]
