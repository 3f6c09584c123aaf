"""Finds sizes for our Hopper kernels by compiling them with no GPU, and prints the tables' rows.

    python -m benchmarks.gpu tune --op dense --head-dim 128

A candidate that ptxas refuses, that spills or has another fault of `static.reading` is dropped;
the others are ranked by the bound of their steady loop on the tensor cores' share: first if all
else overlaps, then if nothing does, then by bytes in flight. The bound knows nothing of memory: for
decoding, whose loop waits for bytes, `IN_FLIGHT` says how many a core must have asked for. On a GPU
`--measure` ranks who has no fault by time instead: there is no other way for the latent kernels,
whose entries change how often a sequence is split, and no kernel. Tiles change speed, never
numbers: the kernels' own tests hold after tuning as before.
"""

import dataclasses
import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.gpu.static.measuring import COMPILED, Compiled
from benchmarks.work import Work
from pallas_kernels import gpu_chip
from pallas_kernels.gpu_chip import GpuChip

Sizes = dict[str, Any]
DENSE = "pallas_kernels.dense.mosaic_gpu_tiles"
PAGED = "pallas_kernels.paged.mosaic_gpu_tiles"
LATENT = "pallas_kernels.mla.mosaic_gpu_tiles"
OPS = ("dense", "paged", "mla", "sparse_mla")
ROWS = 64  # of a warpgroup's queries
# Little's law: 1 us of latency x 4.8 TB/s / 132 cores. Less in flight, and memory idles.
IN_FLIGHT = 36 << 10


@dataclasses.dataclass(frozen=True)
class Target:
    """One entry of a table.

    Attributes:
        module: where the table is.
        path: keys and field names that lead from `TILES` (or another name, the first) to it.
        kernel: how the name begins of what it is for.
        domain: values worth trying, by field.
        smem: sizes -> bytes of shared memory that the tiles take.
        in_flight: sizes -> bytes of keys and values that are asked for at once.
        says: whether what the compiler makes of it says anything.
        differs: sizes -> whether no others among the candidates make the same kernel.
    """

    module: str
    path: tuple[Any, ...]
    kernel: str
    domain: dict[str, tuple[Any, ...]]
    smem: Callable[[Sizes], int]
    in_flight: Callable[[Sizes], int]
    says: bool = True
    differs: Callable[[Sizes], bool] = lambda sizes: True

    def candidates(self, chip: GpuChip) -> Iterator[Sizes]:
        """Sizes that fit the chip's shared memory."""
        for values in itertools.product(*self.domain.values()):
            sizes = dict(zip(self.domain, values, strict=True))
            if self.differs(sizes) and self.smem(sizes) <= chip.smem_bytes:
                yield sizes

    def use(self, sizes: Sizes) -> None:
        """Puts sizes, which may come as JSON has them, in the entry's place, in this process."""
        sizes = {name: tuple(x) if isinstance(x, list) else x for name, x in sizes.items()}
        table = getattr(importlib.import_module(self.module), self.path[0])
        if len(self.path) == 2:
            table[self.path[1]] = table[self.path[1]]._replace(**sizes)
            return
        *way, of_size, last = self.path[1:]
        for key in way:
            table = table[key]
        row = table[of_size]
        if isinstance(row, tuple):  # of phases
            table[of_size] = row._replace(**{last: getattr(row, last)._replace(**sizes)})
        else:  # of shape classes
            row[last] = dataclasses.replace(row[last], **sizes)


def work_of(op: str, head_dim: int, *, backward: bool, cache_dtype: str) -> Work:
    """A call that an entry is for: 4096 tokens of one sequence, causal; latent: 16 x 16384 decode.

    Raises:
        ValueError: an op that nothing is tuned for.
    """
    if op not in OPS:
        raise ValueError(
            f"op is {op!r}, must be one of {', '.join(OPS)}: nothing else has a choice"
        )
    if op in ("mla", "sparse_mla"):
        return Work(
            f"tune_{op}", f"tune_{op}", op, 128, 1, 576, 512, (1,) * 16, (16384,) * 16, 64,
            topk=2048 if op == "sparse_mla" else None, cache_dtype=cache_dtype,
        )  # fmt: skip
    heads, lens = ((16, 16) if op == "dense" else (32, 8)), (4096,)
    more = {"backward": backward, "causal": True} if op == "dense" else {"cache_dtype": cache_dtype}
    page = () if op == "dense" else (64,)
    name = f"tune_{op}_{head_dim}"
    return Work(name, name, op, *heads, head_dim, head_dim, lens, lens, *page, **more)


def target_of(work: Work, *, phase: str = "prefill", chip: str = gpu_chip.DEFAULT) -> Target:
    """The entry that a work's kernel takes its sizes from.

    Args:
        work: dense (forward, or backward's), paged, mla or sparse_mla.
        phase: of paged, "decode" or "prefill".
        chip: of a latent kernel's entry.
    """
    if work.op == "dense":
        return _backward(work) if work.backward else _forward(work)
    if work.op == "paged":
        return _paged(work, phase)
    return _latent(work, chip)


def _latent(work: Work, chip: str) -> Target:
    bits = 8 if work.cache_dtype.startswith("float8") else 16
    key = (chip, 16, "sparse") if work.op == "sparse_mla" else (chip, bits, "decode")
    domain = {"waves": (1, 2, 3), "least_pairs": (1, 2, 4, 8, 16)}

    def nothing(sizes: Sizes) -> int:
        del sizes
        return 0

    return Target(LATENT, ("TILES", key), work.op, domain, nothing, nothing, says=False)


def _forward(work: Work) -> Target:
    sizes = (work.head_size, work.head_size_v)
    walks = tuple(itertools.product((2, 3, 4), (1, 2)))
    domain = {"block_kv": (64, 128, 192), "stages": (2, 3, 4), "walking": (None, *walks),
              "turns": (False, True), "tied": (False, True)}  # fmt: skip

    def ring(s: Sizes) -> int:
        return 2 * s["stages"] * s["block_kv"] * sum(sizes)

    def smem(s: Sizes) -> int:
        _, slots = s["walking"] or (s["stages"], 1)
        return ring(s) + slots * 4 * ROWS * sizes[0]

    def differs(s: Sizes) -> bool:
        """A walk has stages of its own."""
        return s["walking"] is None or s["stages"] == s["walking"][0]

    path = ("TILES", (9, 0), sizes, "plain")
    return Target(DENSE, path, "attnsel_dense_forward", domain, smem, ring, differs=differs)


def _backward(work: Work) -> Target:
    sizes = (work.head_size, work.head_size_v)
    domain = {"k_stages": (2, 3), "v_stages": (1, 2), "split": (False, True),
              "tied": (False, True)}  # fmt: skip

    def keys(s: Sizes) -> int:
        return 2 * ROWS * (s["k_stages"] * sizes[0] + s["v_stages"] * sizes[1])

    def smem(s: Sizes) -> int:
        return keys(s) + 4 * ROWS * sum(sizes)

    return Target(DENSE, ("BACKWARD_TILES", sizes, "plain"), "attnsel_dense_d", domain, smem, keys)


def _paged(work: Work, phase: str) -> Target:
    itemsize = 1 if work.cache_dtype.startswith("float8") else 2
    table = importlib.import_module(PAGED).HOPPER[itemsize]
    largest = min(size for size in table if size >= work.head_size)
    domain = {"keys": (64, 128), "stages": (2, 3, 4, 6, 8), "warpgroups": (1, 2),
              "tied": (False, True)}  # fmt: skip
    if phase == "prefill" and itemsize == 2:
        domain |= {"overlapped": (False, True), "slots": (1, 2)}
    halves = 2 if phase == "prefill" and work.head_size == 256 else 1  # in which results leave

    def tiles(s: Sizes) -> int:
        return 2 * itemsize * s["stages"] * s["keys"] * work.head_size

    def smem(s: Sizes) -> int:
        slots = s.get("slots", 2) if phase == "prefill" else 1
        queries = 2 * slots * s["warpgroups"] * ROWS * work.head_size
        wide = 4 * s["warpgroups"] * s["keys"] * work.head_size if itemsize == 1 else 0
        return tiles(s) + queries + wide + 4 * ROWS * work.head_size // halves

    path = ("HOPPER", itemsize, largest, phase)
    return Target(PAGED, path, f"paged_{phase}", domain, smem, tiles)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Sizes, and what the compiler made of them.

    Attributes:
        sizes: of the entry.
        faults: why it is dropped; empty = it is not.
        overlapped, alone: bounds on the tensor cores' share, of the worst of the entry's kernels.
        in_flight: bytes of keys and values.
        seconds: of a call on this GPU; None = it was not measured.
    """

    sizes: Sizes
    faults: tuple[str, ...]
    overlapped: float
    alone: float
    in_flight: int
    seconds: float | None = None


def judged(target: Target, sizes: Sizes, found: Compiled) -> Candidate:
    """A candidate by what was compiled."""
    kernels = [kernel for kernel in found.kernels if kernel.name.startswith(target.kernel)]
    faults = [fault for kernel in kernels for fault in kernel.faults]
    if found.verdict != COMPILED or not kernels:
        faults = [found.reason or "no kernel was compiled"]
    shares = []
    for kernel in kernels:
        loops = [loop for loop in (kernel.code.loops if kernel.code else ()) if loop.alone]
        if loops:
            first = max(loops, key=lambda loop: loop.code.flops)
            shares.append((first.overlapped, first.alone))
    overlapped, alone = (min(column) for column in zip(*shares, strict=True)) if shares else (0, 0)
    return Candidate(sizes, tuple(faults), overlapped, alone, target.in_flight(sizes))


def ranked(tried: list[Candidate], *, waits_for_bytes: bool) -> list[Candidate]:
    """The best first; who has a fault comes last.

    Args:
        tried: candidates.
        waits_for_bytes: too little in flight comes after enough of it, whatever the loop.
    """

    def worth(c: Candidate) -> tuple[Any, ...]:
        short = waits_for_bytes and c.in_flight < IN_FLIGHT
        seconds = math.inf if c.seconds is None else c.seconds
        return bool(c.faults), seconds, short, -c.overlapped, -c.alone, -c.in_flight

    return sorted(tried, key=worth)


def timed(tried: list[Candidate], found: Iterable[dict[str, Any]]) -> list[Candidate]:
    """Candidates with what was found of those that have no fault, in their order.

    Args:
        tried: candidates.
        found: "seconds", or the "reason" why there are none, which is a fault.
    """
    answers = iter(found)

    def with_time(c: Candidate) -> Candidate:
        said = {} if c.faults else next(answers)
        if "reason" in said:
            return dataclasses.replace(c, faults=(said["reason"],))
        return dataclasses.replace(c, seconds=said.get("seconds"))

    return [with_time(c) for c in tried]


def row(target: Target, sizes: Sizes) -> str:
    """The entry as the table's file has it."""
    if not target.says:
        return f"{target.path[1]!r}: Tiles({', '.join(map(str, sizes.values()))})"
    kind = {"TILES": "Tiles", "BACKWARD_TILES": "BackwardTiles", "HOPPER": "Phase"}[target.path[0]]
    given = ", ".join(f"{field}={value}" for field, value in sizes.items())
    return f"{target.path[0]}{''.join(f'[{key!r}]' for key in target.path[1:])}: {kind}({given})"
