"""What a compiled program sends between devices: how often, how many bytes, beside what.

Read off the compiler's own text (`jax.stages.Compiled.as_text`), so it is what runs, and not what
was meant. A collective inside a loop counts as often as the loop goes round; of a branch that may
be taken, each time.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from attnsel_jax.aot.program_text import Computations, called, computations_of

KINDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
          "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
_CALL = re.compile(rf"^\s*(?:ROOT )?%(\S+) = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*)"')
# One that is cut into fusions stands in each of them.
_CHAIN = re.compile(r'channel_id=(\d+).*?chain_id="(\w+)"')
_PRODUCT = re.compile(r" = [^=]*? (?:convolution|dot)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


class Work(NamedTuple):
    """What a stretch of a program computes, of branches every one.

    Attributes:
        kernels: calls of Pallas kernels.
        products: XLA's matrix products.
    """

    kernels: int = 0
    products: int = 0


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: one of `KINDS`.
        group: devices that take part in one of it.
        times: how often it runs.
        sent: bytes that one device sends each time, by the algorithm that sends least.
        beside: what is scheduled between its start and its end.
    """

    kind: str
    group: int
    times: int
    sent: float
    beside: Work = Work()


def collectives_of(text: str) -> list[Collective]:
    """The collectives of a compiled program's text."""
    computations, entry = computations_of(text)
    return list(_within(computations, entry, 1, set())) if entry else []


def sent_bytes(collectives: list[Collective]) -> dict[str, float]:
    """Bytes that one device sends, by kind."""
    sent: dict[str, float] = {}
    for each in collectives:
        sent[each.kind] = sent.get(each.kind, 0.0) + each.times * each.sent
    return sent


def _within(
    computations: Computations, where: str, times: int, chains: set[tuple[str, ...]]
) -> Iterator[Collective]:
    lines = computations.get(where, [])
    for at, line in enumerate(lines):
        call = _CALL.match(line)
        chain = call and _CHAIN.search(line)
        if chain and chain.groups() in chains:
            continue
        if chain:
            chains.add(chain.groups())
        if call:
            name, result, kind, started = call.groups()
            found = _collective(kind, result, bool(started), line, times)
            until = _end(name, lines[at + 1 :]) if started else 0
            between = lines[at + 1 : at + 1 + until]
            if where.startswith("all-reduce-scatter"):  # a fusion that keeps a share
                found = dataclasses.replace(found, kind="reduce-scatter", sent=found.sent / 2)
            yield dataclasses.replace(found, beside=_work(computations, between))
            continue
        for other, trips in called(computations, line):
            yield from _within(computations, other, times * trips, chains)


def _end(name: str, following: Sequence[str]) -> int:
    """How many instructions stand before the one that waits for the collective of a name."""
    done = re.compile(rf"-done\(%{re.escape(name)}\)")
    return next((i for i, line in enumerate(following) if done.search(line)), 0)


def _work(computations: Computations, lines: Sequence[str]) -> Work:
    """What some instructions compute, with what they call."""
    kernels = products = 0
    for line in lines:
        kernels += bool(_KERNEL.search(line))
        products += bool(_PRODUCT.search(line))
        for other, trips in called(computations, line):
            more = _work(computations, computations[other])
            kernels, products = kernels + trips * more.kernels, products + trips * more.products
    return Work(kernels, products)


def _collective(kind: str, result: str, started: bool, line: str, times: int) -> Collective:
    """A collective with what one device sends in it."""
    if started and kind != "all-reduce":  # operands, results, what the synchronisation keeps
        result = _parts(result)[1]
    received = sum(
        _element(dtype) * math.prod(int(n) for n in sizes.split(",") if n)
        for dtype, sizes in _ARRAY.findall(result)
    )
    group = _group(line)
    share = (group - 1) / group
    factors = {"all-reduce": 2 * share, "reduce-scatter": group - 1, "collective-permute": 1}
    return Collective(kind, group, times, factors.get(kind, share) * received)


def _parts(result: str) -> list[str]:
    """The parts of a tuple's type, each of which may be a tuple."""
    parts, depth = [""], 0
    for letter in result:
        if letter == "," and depth == 1:
            parts.append("")
            continue
        depth += (letter in "([{") - (letter in ")]}")
        parts[-1] += letter
    return parts


def _element(dtype: str) -> int:
    """Bytes of an element; a token of the synchronisation's own counts nothing."""
    return 1 if dtype.startswith("f8") else _BYTES.get(dtype, 0)


def _group(line: str) -> int:
    """Devices of one group, in each way that XLA writes them."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs:
        return pairs[1].count("{")
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
    if iota:
        return int(iota[1])
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return 1
