"""Reads machine code (nvdisasm -c): what each kernel's instructions are, and its innermost loops.

A loop that holds tensor-core instructions has a static bound on their use: the matrix work's clocks
over the larger of those and the clocks that the other instructions take to issue (`overlapped`), or
over both together (`alone`). It knows nothing of memory, waits and tails.
"""

import dataclasses
import re

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*)")
_LABEL = re.compile(r"^\s*(?:[-:0-9YxA-Fa-f&]*\s+)?(\.L_x?_?\w+):")
_FUNCTION = re.compile(r"^\s*(?:\S*\s+)?\.text\.(\S+):\s*$")
_TENSOR = re.compile(r"([HQIDO]GMMA|UTC\w*MMA|[HIDQO]MMA)\b")
_KIND = re.compile(r"[A-Z]+(?:\.(?:SP\.)?(\d+x\d+x\d+|\d+))?")
# Dense 16-bit operations a clock of one multiprocessor's tensor cores, by compute capability; a
# quarter of it issues one instruction a clock, and finishes a warp's MUFU every eighth.
TENSOR_FLOPS = {8: 2048, 9: 4096}
MUFU_CLOCKS = 8
COUNTED = {
    "tma_loads": r"UTMALDG|UBLKCP\.(?!.*G\.S)", "tma_stores": r"UTMASTG|UTMAREDG",
    "cp_async": r"LDGSTS", "ex2": r"MUFU\.EX2", "mufu": r"MUFU", "ffma": r"FFMA", "fmul": r"FMUL",
    "fadd": r"FADD", "max": r"FMNMX", "convert": r"F2FP|F2F|I2F|F2I", "local": r"LDL|STL",
    "global": r"LDG\b|LDG\.|STG\b|STG\.", "shared": r"LDS\b|LDS\.|LDSM|STS\b|STS\.|STSM",
    "tensor_memory": r"LDTM|STTM", "shuffle": r"SHFL", "barrier": r"BAR|SYNCS|WARPSYNC",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Code:
    """Instructions of a kernel, or of one loop.

    Attributes:
        instructions: how many.
        tensor: tensor-core instructions by kind ("HGMMA.64x128x16" -> 16).
        flops: of them, for a warpgroup.
        mix: the others by kind, names of `COUNTED`.
    """

    instructions: int
    tensor: dict[str, int]
    flops: int
    mix: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop with tensor-core instructions, and its bounds on their use (shares)."""

    code: Code
    overlapped: float | None
    alone: float | None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One function's code and its loops, the shortest first."""

    code: Code
    loops: tuple[Loop, ...]


def read_sass(text: str, major: int) -> dict[str, Kernel]:
    """Function name -> its code.

    Args:
        text: of nvdisasm -c.
        major: compute capability's first number.
    """
    functions: dict[str, tuple[list, dict[str, int]]] = {}
    current = None
    for line in text.splitlines():
        if function := _FUNCTION.search(line):
            current = functions.setdefault(function[1], ([], {}))
        elif current is None:
            continue
        elif label := _LABEL.match(line):
            current[1][label[1]] = len(current[0])
        elif found := _INSTRUCTION.search(line):
            current[0].append((found[2], found[3], bool(found[1])))
    return {name: _kernel(*function, major) for name, function in functions.items()}


def _kernel(instructions, labels, major: int) -> Kernel:
    loops = natural_loops(instructions, labels)
    tensor = [loop for loop in loops if any(_TENSOR.match(instructions[i][0]) for i in loop)]
    inner = [loop for loop in tensor if not any(other < loop for other in tensor)]
    codes = [counted([instructions[i][0] for i in sorted(loop)]) for loop in sorted(inner, key=len)]
    whole = counted([name for name, _, _ in instructions])
    return Kernel(whole, tuple(_bounded(code, major) for code in codes))


def counted(names: list[str]) -> Code:
    """What a list of instructions is made of; empty ones are left out."""
    names = [name for name in names if name != "NOP"]
    tensor: dict[str, int] = {}
    for name in names:
        if _TENSOR.match(name):
            kind = _KIND.match(name)[0]
            tensor[kind] = tensor.get(kind, 0) + 1
    mix = {
        kind: sum(bool(re.match(pattern, name)) for name in names)
        for kind, pattern in COUNTED.items()
    }
    return Code(len(names), tensor, sum(map(tensor_flops, names)), mix)


def tensor_flops(name: str) -> int:
    """Operations of one warpgroup's (HGMMA, QGMMA), or four warps' (HMMA), instruction."""
    if shape := re.match(r"[HQI]GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)", name):
        return 2 * int(shape[1]) * int(shape[2]) * int(shape[3])
    if shape := re.match(r"[HI]MMA\.(?:SP\.)?(16)(8)(\d+)\.", name):
        return 4 * 2 * 16 * 8 * int(shape[3])
    return 0


def _bounded(code: Code, major: int) -> Loop:
    if major not in TENSOR_FLOPS or not code.flops:
        return Loop(code, None, None)
    rate = TENSOR_FLOPS[major] * (2 if any(kind.startswith("QG") for kind in code.tensor) else 1)
    clocks = code.flops / rate
    issued = code.instructions - sum(code.tensor.values())
    other = max(issued, MUFU_CLOCKS * code.mix["mufu"])
    return Loop(code, clocks / max(clocks, other), clocks / (clocks + other))


def natural_loops(instructions, labels: dict[str, int]) -> list[set[int]]:
    """The instructions of each natural loop: a branch back to a block that dominates it."""
    starts, successors, end = _blocks(instructions, labels)
    predecessors = {b: {p for p in starts if b in successors[p]} for b in starts}
    dominators = _dominators(starts, predecessors)
    loops: dict[int, set[int]] = {}
    for block in starts:
        for head in successors[block] & dominators[block]:
            body, todo = loops.setdefault(head, {head}), [block]
            while todo:
                found = todo.pop()
                if found not in body:
                    body.add(found)
                    todo.extend(predecessors[found])
    return [{i for block in body for i in range(block, end[block])} for body in loops.values()]


def _blocks(instructions, labels):
    """Basic blocks by their first instruction: starts, successors, ends."""
    count, target = len(instructions), {}
    for i, (name, operands, _) in enumerate(instructions):
        label = re.search(r"`\((\.L\w+)\)", operands)
        if name.startswith("BRA") and label and label[1] in labels:
            target[i] = min(labels[label[1]], count - 1)
    after = {i + 1 for i in target} | {
        i + 1 for i, (name, _, _) in enumerate(instructions) if name == "EXIT"
    }
    starts = sorted({0, *target.values(), *(i for i in after if i < count)})
    end = dict(zip(starts, [*starts[1:], count], strict=True))
    successors: dict[int, set[int]] = {}
    for block in starts:
        last = end[block] - 1
        name, operands, predicated = instructions[last]
        # A predicate may be an operand: BRA P0, or BRA.U UP0.
        predicated = predicated or re.match(r"!?U?P\d", operands.strip()) is not None
        successors[block] = {target[last]} if last in target else set()
        leaves = name.startswith(("BRA", "EXIT", "BRX", "RET")) and not predicated
        if not leaves and end[block] < count:
            successors[block].add(end[block])
    return starts, successors, end


def _dominators(starts, predecessors) -> dict[int, set[int]]:
    dominators = {block: set(starts) for block in starts}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in starts[1:]:
            before = [dominators[p] for p in predecessors[block]]
            new = {block} | (set.intersection(*before) if before else set())
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators
