"""A schedule's scalar code as Python source: one function a basic block, vector code left out.

The schedule is in order and its stalls are explicit, so control flow is all that is missing to turn
it into cycles. Some 30 opcodes steer it: integer arithmetic, compares, predicates, SMEM loads and
stores, branches with their delay slots, DMAs and semaphores. In the source, `V` holds the values,
`P` what edges leave behind for phis, `M` is SMEM, `c` the cycle; `dma`, `wait` and `sync` are the
machine's (`replay`). What is not understood reads as 0 and is counted in `unmodelled`.
"""

import collections
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

M32 = 0xFFFFFFFF
_REGISTER = re.compile(r"%([sp])(\d+)_([sp]\d+)")
_OPERATION = re.compile(r"\s*(?:(%\S+)\s*=\s*)?([a-z_][\w.]*)\s*(.*)", re.DOTALL)
_GUARD = re.compile(r"\((!?%p\d+_p\d+)(?:, ([^()]+))?\)")
_DELAY_SLOTS = 12  # more than any generation has; a branch acts within so many bundles
_ARITHMETIC = {
    "sadd": "({0}+{1})&M32", "ssub": "({0}-{1})&M32", "smul": "({0}*{1})&M32",
    "sshll": "({0}<<({1}&31))&M32", "sshrl": "{0}>>({1}&31)", "sshra": "(S({0})>>({1}&31))&M32",
    "sand": "{0}&{1}", "sor": "{0}|{1}", "sxor": "{0}^{1}",
    "pand": "{0} and {1}", "por": "{0} or {1}", "pnand": "not ({0} and {1})",
    "pnor": "not ({0} or {1})", "pneg": "not {0}", "pxor": "bool({0})!=bool({1})", "pmov": "{0}",
    "int_to_ptr": "{0}", "smulhi": "({0}*{1})>>32", "smin": "min({0},{1})",
    "smax": "max({0},{1})", "scalar_select": "({1} if {0} else {2})",
    "sclz": "32-({0}).bit_length()", "smov": "{0}", "sld": "M.get({0},0)",
}  # fmt: skip
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


class Operation(NamedTuple):
    """One operation of a bundle: the value it defines, its name, its operands as text."""

    target: str | None
    name: str
    operands: str


class ScalarCode:
    """The scalar code of one kernel.

    Args:
        bundles, starts, ends, branches: of `dump.KernelDump`.
        scalars: operand -> its value, for operands that are one number and come in a register.

    Attributes:
        source: functions `b0`, `b1`, ...: cycle in, (next block or None, cycle) out.
        blocks: (first bundle, last bundle) of each.
        values: how many values there are.
        unmodelled: scalar opcodes that are read as 0, and how many of each.
    """

    def __init__(
        self,
        bundles: Sequence[str],
        starts: dict[int, int],
        ends: dict[int, int],
        branches: Sequence[tuple[int, int]],
        scalars: Mapping[int, int] = MappingProxyType({}),
    ):
        self._scalars = scalars
        self.unmodelled: collections.Counter[str] = collections.Counter()
        self._indices: dict[str, int] = {}
        self._allocations: dict[str, int] = {}
        self._phis_of: dict[str, list[str]] = collections.defaultdict(list)
        self._bundles = [split(bundle) for bundle in bundles]
        for operation in (op for bundle in self._bundles for op in bundle if is_phi(op)):
            for register in _REGISTER.finditer(operation.operands):
                self._phis_of[register[2]].append(operation.target)
        self._jumps = dict(self._read_branches(starts, ends, branches))
        leaders = {0}
        for end, target, _ in self._jumps.values():
            leaders |= {end + 1, target}
        firsts = sorted(i for i in leaders if 0 <= i < len(bundles))
        self.blocks = [
            (first, following - 1)
            for first, following in zip(firsts, [*firsts[1:], len(bundles)], strict=True)
        ]
        self._block_at = {first: k for k, (first, _) in enumerate(self.blocks)}
        self.source = "\n".join(line for k in range(len(self.blocks)) for line in self._block(k))
        self.values = len(self._indices)

    def _read_branches(
        self, starts: dict[int, int], ends: dict[int, int], branches: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, tuple[int, int, str | None]]]:
        """(bundle of a branch, (bundle after which it acts, its target, its guard))."""
        in_order = iter(branches)
        for i, bundle in enumerate(self._bundles):
            for operation in bundle:
                if operation.name == "sbr.rel":
                    source, region = next(in_order)
                    named = re.search(r"bundleno = (\d+)", operation.operands)
                    target = int(named[1]) if named else starts[region]
                    guard = _GUARD.search(operation.operands)
                    end = ends[source]
                    if not i <= end <= i + _DELAY_SLOTS:
                        raise ValueError(f"the branch in bundle {i} ends in {end}, must be near")
                    yield i, (end, target, self._expression(guard[1]) if guard else None)

    def _block(self, k: int) -> Iterator[str]:
        """The Python function of a basic block."""
        first, last = self.blocks[k]
        yield f"def b{k}(c):"
        at, exits = first, []
        for i in range(first, last + 1):
            lines = [*self._take_phis(i), *self._statements(i)]
            if any(re.search(r"\bc\b", line) for line in lines):
                yield f" c+={i - at}"
                at = i
            for line in lines:
                yield f" {line}"
            if i in self._jumps:
                _, target, guard = self._jumps[i]
                yield f" t{len(exits)}=bool({guard or True})"
                exits.append(self._block_at.get(target))
        yield f" c+={last + 1 - at}"
        for j, target in enumerate(exits):
            yield f" if t{j}: return {target},c"
        yield f" return {k + 1 if k + 1 < len(self.blocks) else None},c"

    def _take_phis(self, i: int) -> list[str]:
        """Phis first, all at once: they read what the edges left behind."""
        phis = [op.target for op in self._bundles[i] if is_phi(op)]
        lines = [f"V[{self._index(phi)}]=P[{self._index(phi)}]" for phi in phis]
        return lines + [
            f"P[{self._index(later)}]=V[{self._index(phi)}]"
            for phi in phis
            for later in self._phis_of.get(phi, ())
        ]

    def _statements(self, i: int) -> list[str]:
        """What a bundle's scalar operations do, phis and branches aside."""
        scalar = [
            op
            for op in self._bundles[i]
            if not is_phi(op)
            and op.name != "sbr.rel"
            and (op.name[0] in "spid" or op.name.startswith("vsync") or "pop" in op.name)
        ]
        return [line for line in map(self._statement, scalar) if line]

    def _statement(self, operation: Operation) -> str | None:
        """One operation, with its guard."""
        target, name, operands = operation
        guard = otherwise = None
        if found := _GUARD.search(operands):
            guard = self._expression(found[1])
            otherwise = found[2] and self._expression(found[2])
            operands = operands[: found.start()] + operands[found.end() :]
        operands = re.sub(r"\[(thread|resolvable):[^\]]*\]", "", operands).strip(" ,")
        operands = re.sub(r"(?<=[\w\]]) \[#allocation\w+\]", "", operands)  # annotations
        effect = self._effect(name, operands)
        if effect or target is None:
            return f"if {guard}: {effect}" if effect and guard else effect
        value = self._value(name, arguments(operands))
        if otherwise is not None:
            value = f"({value}) if {guard} else {otherwise}"
        variable = f"V[{self._index(target)}]"
        line = f"{variable}={value}"
        for phi in self._phis_of.get(target, ()):
            line += f"; P[{self._index(phi)}]={variable}"
        return f"if {guard}: {line}" if guard and otherwise is None else line

    def _effect(self, name: str, operands: str) -> str | None:
        """The statement of an operation that defines nothing: DMA, wait, semaphore, SMEM store."""
        given = arguments(operands)
        if name.startswith("dma.done"):
            return f"c+=wait(c,{self._expression(given[0])},{self._expression(given[1])})"
        if name.startswith("dma."):
            if len(given) < 4:
                return None
            size, flag = self._expression(given[1]), self._expression(given[3])
            return f"dma(c,{name[4:]!r},{size},{flag})"
        if name == "vsyncadd":
            return f"sync({self._expression(given[0])},{self._expression(given[1])})"
        if name == "sst":
            found = re.match(r"(\[smem:.*?\]\])\s*(.*)", operands)
            found = found or re.match(r"(\[.*?\])\s*(.*)", operands)
            if found:
                stored = self._expression(found[2].strip(" ,"))
                return f"M[{self._expression(found[1])}]={stored}"
        return None

    def _value(self, name: str, given: list[str]) -> str:
        """The Python expression of an operation's result."""
        root, _, kind = name.partition(".")
        if root == "inlined_call_operand":
            found = re.search(r"index: (\d+), kind: input", ", ".join(given))
            return str(self._scalars.get(int(found[1]), 0) & M32) if found else "0"
        operands = [self._expression(text) for text in given]
        if root == "scalar_lea":
            return f"({'+'.join(operands)})&M32"
        if root == "scmp" and "f32" not in kind:
            compare, _, signedness = kind.partition(".")
            form = "S({})" if signedness.startswith("s32") else "{}"
            left, right = (form.format(operand) for operand in operands[:2])
            return f"{left}{_COMPARE[compare]}{right}"
        if root in _ARITHMETIC and "f32" not in kind:
            return _ARITHMETIC[root].format(*operands)
        if root != "scmp" and (name[0] in "sp" or "pop" in name):
            self.unmodelled[name] += 1
        return "0"

    def _expression(self, text: str) -> str:
        """The Python expression of one operand or address."""
        text = text.strip()
        negated, text = text.startswith("!"), text.lstrip("!").strip()
        text = re.sub(r"^\[(?:smem|sflag|vmem|hbm):", "[", text)
        if text.startswith("["):
            terms = text.strip("[] ").split(" + ")
            return "(" + "+".join(self._expression(term) for term in terms) + ")"
        if register := _REGISTER.fullmatch(text):
            variable = f"V[{self._index(register[2])}]"
            return f"(not {variable})" if negated else variable
        if text.startswith("#allocation"):
            return str(self.address(text))
        try:
            return str(int(text.lstrip("$"), 0) & M32)
        except ValueError:
            return "0"

    def address(self, allocation: str) -> int:
        """Where an allocation begins, in words."""
        return self._allocations.setdefault(allocation, (len(self._allocations) + 1) << 20)

    def _index(self, value: str) -> int:
        return self._indices.setdefault(value, len(self._indices))


def split(bundle: str) -> list[Operation]:
    """The operations of a bundle's text, comments left out."""
    bundle = re.sub(r"/\*.*?\*/", "", bundle, flags=re.DOTALL)
    inside = bundle[bundle.index("{") + 1 : bundle.rindex("}")] if "{" in bundle else ""
    operations = []
    for text in inside.split(";;"):
        if found := _OPERATION.match(text):
            target = _REGISTER.match(found[1] or "")
            operations.append(Operation(target and target[2], found[2], " ".join(found[3].split())))
    return operations


def is_phi(operation: Operation) -> bool:
    """Whether it takes its value from the edge that led here."""
    return operation.name in ("sphi", "pphi")


def arguments(operands: str) -> list[str]:
    """Operands, split on the commas outside brackets."""
    found, depth = [""], 0
    for character in operands:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return [text.strip() for text in found if text.strip()]
