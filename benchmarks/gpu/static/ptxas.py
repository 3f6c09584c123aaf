"""What ptxas -v says of each kernel: registers, spills, stack, warnings that cost speed."""

import dataclasses
import re

_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_WARNING = re.compile(r"\(C75\d\d\)[^\n]*|Potential Performance Loss[^\n]*")
SERIALISED, NO_SETMAXNREG = "wgmma serialised", "setmaxnreg ignored"


@dataclasses.dataclass
class Resources:
    """Of one kernel.

    Attributes:
        architecture: "sm_90a".
        registers: per thread, at entry.
        spill_stores, spill_loads: bytes.
        stack: bytes of local memory, per thread.
        static_smem: bytes, without what is asked for at launch.
        faults: what ptxas warns of and no fast kernel may have.
    """

    architecture: str
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    static_smem: int = 0
    faults: tuple[str, ...] = ()


def read_ptxas(text: str) -> dict[str, Resources]:
    """Kernel name -> what ptxas printed of it; functions that it calls are added to it."""
    found: dict[str, Resources] = {}
    current: Resources | None = None
    for line in text.splitlines():
        if entry := _ENTRY.search(line):
            current = found.setdefault(entry[1], Resources(entry[2]))
        elif properties := _PROPERTIES.search(line):
            current = found.get(properties[1], current)
        elif current is None:
            continue
        elif frame := _FRAME.search(line):
            current.stack += int(frame[1])
            current.spill_stores += int(frame[2])
            current.spill_loads += int(frame[3])
        elif registers := _REGISTERS.search(line):
            current.registers = int(registers[1])
            shared = _SHARED.search(line)
            current.static_smem = int(shared[1]) if shared else 0
    # A warning precedes the kernel that it is about: it goes to every kernel of the text.
    faults = tuple(sorted({fault for note in _WARNING.findall(text) if (fault := _fault(note))}))
    for resources in found.values():
        resources.faults = faults
    return found


def _fault(note: str) -> str | None:
    if "C7510" in note or "serializ" in note:
        return SERIALISED
    return NO_SETMAXNREG if "C7508" in note or "setmaxnreg" in note else None
