"""What compiling for a chip brought: memory and cost, or the compiler's own words."""

import dataclasses
from typing import Any

from attnsel_jax.aot.collectives import Collective


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """What compiling for a chip brought.

    Attributes:
        chip: the chip's name.
        kernel: dotted path of what was compiled.
        gradients: whether the backward pass was compiled too.
        seconds: of tracing, lowering and compiling.
        memory: bytes: "arguments", "outputs", "temporaries", "code" (see `memory_of`).
        cost: "flops" and "bytes" by the compiler's own count, which is one pass through a loop's
            body where it does not know the trip count; None where it does not say.
        sent: bytes that one device sends to others, by kind of collective; over a mesh only.
        collectives: each of them, as `attnsel_jax.aot.collectives.Collective`; over a mesh only.
        refusal: the compiler's own words; None = it compiled.
        versions: of jax, jaxlib and the compiler's package.
    """

    chip: str
    kernel: str
    gradients: bool = False
    seconds: float | None = None
    memory: dict[str, int | None] = dataclasses.field(default_factory=dict)
    cost: dict[str, float | None] = dataclasses.field(default_factory=dict)
    sent: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    refusal: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def compiled(self) -> bool:
        """Whether the compiler took it."""
        return self.refusal is None

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return dataclasses.asdict(self) | {"compiled": self.compiled}


def memory_of(compiled: Any) -> dict[str, int | None]:
    """Bytes that a `jax.stages.Compiled` needs on its device; None where it does not say."""
    stats = compiled.memory_analysis()
    fields = {
        "arguments": "argument_size_in_bytes",
        "outputs": "output_size_in_bytes",
        "aliased": "alias_size_in_bytes",
        "temporaries": "temp_size_in_bytes",
        "code": "generated_code_size_in_bytes",
    }
    return {name: getattr(stats, field, None) for name, field in fields.items()}


def cost_of(compiled: Any) -> dict[str, float | None]:
    """Floating-point operations and bytes by the compiler's count; None where it does not say."""
    said = compiled.cost_analysis() or {}
    if isinstance(said, list):  # one dict a program, in some versions
        said = said[0] if said else {}
    return {"flops": said.get("flops"), "bytes": said.get("bytes accessed")}
