"""The support matrix: which backend takes what, and where, read off the declarations.

Everything here is a pure function of the registered declarations: no device is asked, no kernel is
imported, and the installed jax does not matter, so the same text comes out on every machine. It is
the source of `docs/backends.md` and of the block in README.md between `BEGIN` and `END`.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from attnsel_jax.backend import FAMILIES, AttentionBackend
from attnsel_jax.capabilities import Capabilities
from attnsel_jax.config import AttentionSelectorConfig, AttentionType
from attnsel_jax.constraints import NEVER, Constraint
from attnsel_jax.platforms import CHIPS, Device
from attnsel_jax.registry import BUILT_IN, AttentionBackendEnum, automatic_backends

BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"
PAGE = "docs/backends.md"
COMMAND = "attnsel matrix --write ."

# Field of `Capabilities` -> heading. The fields that are values, then those that are features.
VALUES = {
    "dtype": "dtype of q, k, v",
    "kv_cache_dtype": "cache dtype",
    "head_size": "head size",
    "head_size_v": "head size of v",
    "block_size": "page size",
    "num_heads": "query heads",
    "num_kv_heads": "kv heads",
    "num_index_heads": "index heads",
    "index_head_dim": "index head size",
    "attn_type": "attention type",
    "jax_version": "jax",
}
FEATURES = {
    "causal": "causal",
    "has_sliding_window": "window",
    "has_attention_chunk": "chunk",
    "has_soft_cap": "soft cap",
    "has_sink": "sink",
    "has_bias": "bias",
    "has_alibi": "ALiBi",
    "has_mask": "mask",
    "has_segment_ids": "segments",
    "has_lens": "lengths",
    "has_q_offset": "q offset",
    "needs_grad": "gradient",
    "needs_lse": "lse",
}
_MACHINE = ("platform", "compute_capability", "generation")
_OF_THE_INDEXER = ("num_index_heads", "index_head_dim")
_DENSE_HAS_NONE = ("kv_cache_dtype", "block_size")  # no cache: the question never asks


@dataclasses.dataclass(frozen=True)
class Row:
    """What one backend accepts for one op."""

    backend: type[AttentionBackend]
    op: str
    capabilities: Capabilities

    @property
    def name(self) -> str:
        """As it stands in the tables."""
        return f"{self.backend.name} {self.op}"

    def value(self, field: str) -> str:
        """A value field's allowed values, as text."""
        allowed = getattr(self.capabilities, field)
        if self.op == "dense" and field in _DENSE_HAS_NONE:
            return "-"
        if self.op != "sparse_mla" and field in _OF_THE_INDEXER:
            return "-"
        if field == "head_size_v" and allowed is None:
            return "as head size"
        return _short(allowed, field)

    def feature(self, field: str) -> str:
        """One of yes, no, and always (the feature cannot be left out)."""
        if field == "has_lens" and self.op != "dense":
            return "always"  # a ragged batch has its lengths
        allowed = getattr(self.capabilities, field)
        if True not in allowed:
            return "no"
        return "yes" if False in allowed else "always"

    def runs_on(self, chip: Device) -> bool:
        """Whether its declaration names the chip."""
        return all(
            getattr(chip, field) is None
            or getattr(chip, field) in getattr(self.capabilities, field)
            for field in _MACHINE
        )

    def to_json(self) -> dict[str, Any]:
        """The row as plain data."""
        return {
            "backend": self.backend.name,
            "op": self.op,
            "family": self.backend.family,
            "chips": [name for name, chip in CHIPS.items() if self.runs_on(chip)],
            "values": {field: self.value(field) for field in VALUES},
            "features": {field: self.feature(field) for field in FEATURES},
            "besides": besides(self.backend),
        }


def rows(names: Iterable[str] | None = None) -> list[Row]:
    """One row for each op of each backend, in order of priority.

    Args:
        names: registered names; None = every backend, plug-ins included.
    """
    chosen = [member.name for member in AttentionBackendEnum] if names is None else list(names)
    classes = [AttentionBackendEnum[name].get_class() for name in chosen]
    return [Row(cls, op, cls.capabilities[op]) for cls in classes for op in cls.capabilities]


def without_kernels(names: Iterable[str] | None = None) -> list[str]:
    """The backends that declare no op yet."""
    chosen = [member.name for member in AttentionBackendEnum] if names is None else list(names)
    return [name for name in chosen if not AttentionBackendEnum[name].get_class().capabilities]


def besides(backend: type[AttentionBackend]) -> str:
    """What `supports_combination` asks beyond single fields: its docstring's first line."""
    own = backend.supports_combination.__func__
    if own is AttentionBackend.supports_combination.__func__:
        return ""
    return (own.__doc__ or "see its supports_combination").strip().splitlines()[0]


def automatic_choice(op: str, chip: Device, names: Iterable[str]) -> str:
    """The backend that automatic selection takes for a plain question (bfloat16) about this op.

    By declarations only: the installed jax, the environment and what is forced do not matter.
    """
    config = AttentionSelectorConfig(
        head_size=128 if op in FAMILIES["standard"] else 576,
        dtype="bfloat16",
        op=op,
        use_mla=op not in FAMILIES["standard"],
        use_sparse=op == "sparse_mla",
    )
    names = set(names)
    for member in automatic_backends():
        if member.name not in names:
            continue
        reasons = member.get_class().validate_configuration(config, chip)
        if all(reason.argument == "jax_version" for reason in reasons):
            return member.name
    return "-"


def to_json(names: Iterable[str] | None = None) -> dict[str, Any]:
    """The whole matrix as plain data."""
    known = [member.name for member in AttentionBackendEnum] if names is None else list(names)
    return {
        "rows": [row.to_json() for row in rows(known)],
        "without_kernels": without_kernels(known),
        "automatic": {
            chip: {op: automatic_choice(op, CHIPS[chip], known) for op in _ops()} for chip in CHIPS
        },
    }


def readme_block() -> str:
    """The block of README.md: where backends run, what they take; without the markers."""
    names = list(BUILT_IN)
    return "\n\n".join(
        [_values_table(rows(names)), _features_table(rows(names)), _no_kernels(names)]
    )


def docs_page() -> str:
    """The text of `docs/backends.md`."""
    names = list(BUILT_IN)
    table = rows(names)
    notes = {row.backend.name: besides(row.backend) for row in table if besides(row.backend)}
    parts = [
        "# The backends",
        f"Generated from the declarations in `attnsel_jax/backends/` by `{COMMAND}`; a test "
        "compares. What is declared here is tested against the float64 oracle; what a backend does "
        "not declare, selection refuses with that reason (`attnsel select --help`).",
        "## Values",
        _values_table(table),
        "\n".join(f"{name}, besides: {note}" for name, note in notes.items()),
        "## Features",
        _features_table(table),
        "## Chips",
        "Any chip of a kind answers as the one named here (`attnsel devices`).",
        _chips_table(table),
        "## What automatic selection takes",
        "For a plain question: bfloat16, head size 128 (MLA: 576).",
        _automatic_table(names),
        _no_kernels(names),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def with_block(text: str, block: str) -> str:
    """A text with what stands between `BEGIN` and `END` replaced.

    Raises:
        ValueError: the text does not have each marker once, in this order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise ValueError(
            f"README.md has {text.count(BEGIN)} {BEGIN} and {text.count(END)} {END}, must have one "
            f"of each, in this order: put them where the matrix is to stand"
        )
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def markdown_table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _values_table(table: Sequence[Row]) -> str:
    shown = [f for f in VALUES if any(row.value(f) not in ("any", "-") for row in table)]
    header = ["backend, op", "runs on", *(VALUES[field] for field in shown)]
    body = [[row.name, _platforms(row), *(row.value(field) for field in shown)] for row in table]
    return markdown_table(header, body)


def _features_table(table: Sequence[Row]) -> str:
    header = ["backend, op", *FEATURES.values()]
    return markdown_table(
        header, [[row.name, *map(_dashed, map(row.feature, FEATURES))] for row in table]
    )


def _chips_table(table: Sequence[Row]) -> str:
    body = [
        [row.name, *("yes" if row.runs_on(chip) else "-" for chip in CHIPS.values())]
        for row in table
    ]
    return markdown_table(["backend, op", *CHIPS], body)


def _automatic_table(names: Sequence[str]) -> str:
    body = [
        [name, *(automatic_choice(op, chip, names) for op in _ops())]
        for name, chip in CHIPS.items()
    ]
    return markdown_table(["chip", *_ops()], body)


def _no_kernels(names: Sequence[str]) -> str:
    missing = without_kernels(names)
    return f"Named, but without kernels yet: {', '.join(missing)}." if missing else ""


def _ops() -> list[str]:
    return [op for ops in FAMILIES.values() for op in ops]


def _platforms(row: Row) -> str:
    """The platforms that its declaration names, with the chips where it does not name all."""
    said = []
    for platform in dict.fromkeys(chip.platform for chip in CHIPS.values()):
        here = {name: chip for name, chip in CHIPS.items() if chip.platform == platform}
        taken = [name for name, chip in here.items() if row.runs_on(chip)]
        if taken:
            said.append(platform if len(taken) == len(here) else f"{platform} ({' '.join(taken)})")
    return ", ".join(said) or "nothing"


def _dashed(answer: str) -> str:
    return "-" if answer == "no" else answer


def _short(allowed: Constraint, field: str) -> str:
    """A constraint in a table's cell."""
    text = str(allowed).removeprefix("one of ")
    if field == "attn_type" and all(kind in allowed for kind in AttentionType):
        return "all"
    if text in ("anything", "a multiple of 1"):
        return "any"
    return "none" if allowed == NEVER else text
