"""A compiled program's text as computations: which calls which, and how often.

The text is the compiler's own (`jax.stages.Compiled.as_text`), in the order in which it runs where
the compiler schedules ahead of time, as a TPU's does (`is_scheduled=true`).
"""

import re
from collections.abc import Iterator

Computations = dict[str, list[str]]
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_BODY = re.compile(r" while\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|called_computations|to_apply|branch_computations|(?:true|false)_computation)=\{?([^}=]*)"
)
_KNOWN = re.compile(r"known_trip_count\W+n\W+(\d+)")


def computations_of(text: str) -> tuple[Computations, str | None]:
    """Each computation's lines by its name, and the name of the one that is run."""
    found: Computations = {}
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


def called(computations: Computations, line: str) -> Iterator[tuple[str, int]]:
    """The computations that an instruction runs, and how often each; of branches, every one."""
    loop = _BODY.search(line)
    if loop:
        yield loop[2], _trips(line, computations.get(loop[1], []))
        return
    for names in _CALLED.findall(line):
        for name in re.findall(r"[\w.\-]+", names):
            if name in computations:
                yield name, 1


def _trips(line: str, condition: list[str]) -> int:
    """How often a loop goes round: as the compiler says, else the constant its condition names."""
    known = _KNOWN.search(line)
    if known:
        return int(known[1])
    bounds = [int(n) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(condition))]
    return bounds[0] if len(bounds) == 1 else 1
