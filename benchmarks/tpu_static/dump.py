"""libtpu's dumps as data: each kernel's bundles, regions, branches, slot use and allocations."""

import dataclasses
import pathlib
import re
from collections.abc import Iterable

# What libtpu must be told, before it is loaded, to write the files that are read here.
FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=.*(post-ra|utilization|final_bundles).*"
)
_SCHEDULE = re.compile(r"\d+-(.+)-\d+-packed-bundles-post-ra\.txt")
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:")
_REGION = re.compile(r"\s*\$region(\d+):.*?(?:parent=(\d+))?\s*(?://\s*(\w+))?\s*$")
_BRANCH = re.compile(r"sbr\.rel.*region = (\d+)")
_ALLOCATION = re.compile(
    r"\s*(#allocation\S*) \[shape = '.*?', space=(\w+), size = (0x[0-9a-f]+|\d+)"
    r"(?:.*?tag = 'prefetched SMEM operand (\d+)')?"
)


@dataclasses.dataclass(frozen=True)
class KernelDump:
    """One kernel as the compiler wrote it.

    Attributes:
        bundles: text of each bundle of the schedule, stalls included, in order.
        starts, ends: region -> its first and last bundle.
        kinds: region -> what it is ("loop_body", "pred_region", ...).
        branches: (region the branch ends, region it goes to), in the program's order.
        capacity: unit -> slots in a bundle.
        rows: slots used, for each bundle, in `capacity`'s order.
        memory: memory space -> bytes allocated.
        prefetched: scalar operand -> (its allocation in SMEM, bytes).
    """

    bundles: list[str]
    starts: dict[int, int]
    ends: dict[int, int]
    kinds: dict[int, str]
    branches: list[tuple[int, int]]
    capacity: dict[str, int]
    rows: list[list[int]]
    memory: dict[str, int]
    prefetched: dict[int, tuple[str, int]] = dataclasses.field(default_factory=dict)


def read_kernels(folder: pathlib.Path, names: Iterable[str]) -> dict[str, KernelDump]:
    """Kernel -> its dump, for the kernels of those names that are in a dump folder."""
    wanted, found = set(names), {}
    for path in sorted(folder.iterdir()):
        match = _SCHEDULE.fullmatch(path.name)
        if match and match[1] in wanted:
            found[match[1]] = _read(folder, path, match[1])
    return found


def _read(folder: pathlib.Path, schedule: pathlib.Path, name: str) -> KernelDump:
    def text(tail: str) -> str:
        beginning = schedule.name.partition(f"-{name}-")[0]
        found = [
            path
            for path in folder.iterdir()
            if path.name.startswith(f"{beginning}-{name}-") and path.name.endswith(tail)
        ]
        return max(found).read_text(errors="replace")

    capacity, rows = read_slots(text("-pre-delay_hlo-static-per-bundle-utilization.txt"))
    kinds, branches, memory, prefetched = read_regions(text("-post-bundle-packing-post-ra.txt"))
    bundles, starts, ends = read_bundles(schedule.read_text(errors="replace"))
    return KernelDump(bundles, starts, ends, kinds, branches, capacity, rows, memory, prefetched)


def read_bundles(text: str) -> tuple[list[str], dict[int, int], dict[int, int]]:
    """(text of each bundle, region -> first bundle, region -> last bundle)."""
    bundles: list[str] = []
    for line in text.splitlines(keepends=True):
        if _BUNDLE.match(line):
            bundles.append(line)
        elif bundles:
            bundles[-1] += line
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    for i, bundle in enumerate(bundles):
        for region in re.findall(r"Start(?:/End empty)? region (\d+)", bundle):
            starts.setdefault(int(region), i)
        for region in re.findall(r"(?:Start/)?End(?: empty)? region (\d+)", bundle):
            ends[int(region)] = i
    return bundles, starts, ends


def read_regions(
    text: str,
) -> tuple[dict[int, str], list[tuple[int, int]], dict[str, int], dict[int, tuple[str, int]]]:
    """(region -> kind, branches, memory space -> bytes, prefetched operands) of the LLO text."""
    kinds: dict[int, str] = {}
    branches: list[tuple[int, int]] = []
    memory: dict[str, int] = {}
    prefetched: dict[int, tuple[str, int]] = {}
    current = None
    for line in text.splitlines():
        if match := _REGION.match(line):
            current = int(match[1])
            kinds[current] = match[3] or ""
        elif (match := _BRANCH.search(line)) and current is not None:
            branches.append((current, int(match[1])))
        elif match := _ALLOCATION.match(line):
            name, space, size, operand = match[1], match[2], int(match[3], 0), match[4]
            memory[space] = memory.get(space, 0) + size
            if operand is not None:
                prefetched[int(operand)] = (name, size)
    return kinds, branches, memory, prefetched


def read_slots(text: str) -> tuple[dict[str, int], list[list[int]]]:
    """(unit -> slots in a bundle, slots used in each bundle) of the utilization file."""
    units: list[str] = []
    numbers: list[list[int]] = []
    for line in text.splitlines():
        words = line.replace(",", " ").split()
        if words and words[0] in ("MXU", "MATMUL"):
            units = words
        elif units and len(words) == len(units) and words[0].isdigit():
            numbers.append([int(word) for word in words])
    return dict(zip(units, numbers[0], strict=True)) if numbers else {}, numbers[1:]
