"""The answer: what a backend accepts, field by field as the question asks it, and why not.

`Capabilities.compare` holds a question and a device against a declaration, and yields one
`Rejection(argument, asked, allowed)` for each field that does not fit. Errors, tables, the support
matrix in the docs and the skips of the tests are all prints of those.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.constraints import ANYTHING, NEVER, Constraint, OneOf, written
from attnsel_jax.jax_versions import jax_version
from attnsel_jax.platforms import Device


@dataclasses.dataclass(frozen=True)
class Rejection:
    """One reason why a backend does not serve a question.

    Attributes:
        argument: the question's field, or the device's.
        asked: the value asked for.
        allowed: the values that would do (a constraint, or text).
        way_out: what to do about it, where that is not plain.
        cause: the exception behind it, if one is.
    """

    argument: str
    asked: Any
    allowed: Constraint | str
    way_out: str = ""
    cause: Exception | None = dataclasses.field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        way_out = f": {self.way_out}" if self.way_out else ""
        return f"{self.argument} is {written(self.asked)}, must be {self.allowed}{way_out}"

    def to_json(self) -> dict[str, str]:
        """The reason as text fields."""
        return {
            "argument": self.argument,
            "asked": written(self.asked),
            "allowed": str(self.allowed),
            "way_out": self.way_out,
        }


DECODER = OneOf("decoder")
# What to do about a refused field, where that is not plain.
WAYS_OUT = {
    "needs_grad": "pass needs_grad=False where no gradient is taken",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What one backend accepts for one op: every feature is absent unless declared.

    The first four fields are asked of the device and of jax; the others are the question's own
    (`AttentionSelectorConfig`). A value that the question leaves open (None) is accepted.
    """

    platform: Constraint = ANYTHING
    compute_capability: Constraint = ANYTHING
    generation: Constraint = ANYTHING
    jax_version: Constraint = ANYTHING

    dtype: Constraint
    kv_cache_dtype: Constraint = ANYTHING
    head_size: Constraint
    head_size_v: Constraint | None = None  # None = as head_size
    block_size: Constraint = ANYTHING
    attn_type: Constraint = DECODER
    num_heads: Constraint = ANYTHING
    num_kv_heads: Constraint = ANYTHING
    num_index_heads: Constraint = ANYTHING
    index_head_dim: Constraint = ANYTHING
    causal: Constraint = OneOf(True)
    has_sink: Constraint = NEVER
    has_sliding_window: Constraint = NEVER
    has_attention_chunk: Constraint = NEVER
    has_soft_cap: Constraint = NEVER
    has_bias: Constraint = NEVER
    has_alibi: Constraint = NEVER
    has_mask: Constraint = NEVER
    has_segment_ids: Constraint = NEVER
    has_lens: Constraint = NEVER
    has_q_offset: Constraint = NEVER
    needs_grad: Constraint = NEVER
    needs_lse: Constraint = NEVER

    def compare(self, config: AttentionSelectorConfig, device: Device) -> Iterator[Rejection]:
        """Yields a rejection for each field whose asked value is not allowed."""
        for field in dataclasses.fields(self):
            allowed = getattr(self, field.name)
            asked = _asked(field.name, config, device)
            if asked is None:
                continue
            if field.name == "head_size_v" and allowed is None:
                yield Rejection("head_size_v", asked, f"{config.head_size}, as head_size")
            elif asked not in allowed:
                yield Rejection(field.name, asked, allowed, _way_out(field.name, config))


def _way_out(name: str, config: AttentionSelectorConfig) -> str:
    """What to do about a refused field, or where it came from."""
    if name == "needs_lse" and config.context_axis is not None:
        return (
            f"mesh axis {config.context_axis!r} spreads a sequence's keys, and partial results are "
            f"merged by lse"
        )
    return WAYS_OUT.get(name, "")


def _asked(name: str, config: AttentionSelectorConfig, device: Device) -> Any:
    """The value that a question, a device or the installed jax has for a field; None = not said."""
    if name == "jax_version":
        return jax_version()
    if name in ("platform", "compute_capability", "generation"):
        return getattr(device, name)
    if name == "kv_cache_dtype":
        return config.cache_dtype if config.op != "dense" else None
    if name == "block_size" and config.op == "dense":
        return None
    if name == "has_lens" and config.op != "dense":  # a ragged batch has its lengths always
        return None
    return getattr(config, name)
