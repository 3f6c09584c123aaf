"""What a compiled program sends between devices: its collectives, how often, and how many bytes.

Read off the compiler's own text (`jax.stages.Compiled.as_text`), so it is what runs, and not what
was meant. A collective inside a loop counts as often as the loop goes round; of a branch that may
be taken, each time.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
          "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
_CALL = re.compile(rf"^\s*(?:ROOT )?%\S+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_BODY = re.compile(r" while\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|called_computations|to_apply|branch_computations|(?:true|false)_computation)=\{?([^}=]*)"
)
_KNOWN = re.compile(r"known_trip_count\W+n\W+(\d+)")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: one of `KINDS`.
        group: devices that take part in one of it.
        times: how often it runs.
        sent: bytes that one device sends each time, by the algorithm that sends least.
    """

    kind: str
    group: int
    times: int
    sent: float


def collectives_of(text: str) -> list[Collective]:
    """The collectives of a compiled program's text."""
    computations, entry = _computations(text)
    return list(_within(computations, entry, 1)) if entry else []


def sent_bytes(collectives: list[Collective]) -> dict[str, float]:
    """Bytes that one device sends, by kind."""
    sent: dict[str, float] = {}
    for each in collectives:
        sent[each.kind] = sent.get(each.kind, 0.0) + each.times * each.sent
    return sent


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    """Each computation's lines by its name, and the name of the one that is run."""
    found: dict[str, list[str]] = {}
    entry = name = None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header[2]
            found[name] = []
            entry = name if header[1] else entry
        elif name is not None:
            found[name].append(line)
    return found, entry


def _within(computations: dict[str, list[str]], name: str, times: int) -> Iterator[Collective]:
    for line in computations.get(name, ()):
        call = _CALL.match(line)
        if call:
            yield _collective(call[2], call[1], bool(call[3]), line, times)
            continue
        loop = _BODY.search(line)
        if loop:
            trips = _trips(line, computations.get(loop[1], []))
            yield from _within(computations, loop[2], times * trips)
            continue
        for called in _CALLED.findall(line):
            for other in re.findall(r"[\w.\-]+", called):
                if other in computations:
                    yield from _within(computations, other, times)


def _trips(line: str, condition: list[str]) -> int:
    """How often a loop goes round: as the compiler says, else the constant its condition names."""
    known = _KNOWN.search(line)
    if known:
        return int(known[1])
    bounds = [int(n) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(condition))]
    return bounds[0] if len(bounds) == 1 else 1


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
