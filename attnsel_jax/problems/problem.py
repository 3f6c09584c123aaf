"""A named problem: arguments of one op, made from a seed, and the question that they ask."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.problems.question import question


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One named problem.

    Attributes:
        name: such as "llama3.decode".
        op: the kernel's key: dense, paged, mla, sparse_mla, mla_materialized, indexer_scores or
            topk_positions.
        description: one sentence: the model and the shape, and where it departs from the model.
        build: (rng, **options) -> arguments.
        options: what `build` takes.
        gradients: whether gradients are compared too.
        attn_type: what attends to what; None = decoder.
    """

    name: str
    op: str
    description: str
    build: Callable[..., dict[str, Any]]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gradients: bool = False
    attn_type: str | None = None

    def make(self, seed: int = 0) -> dict[str, Any]:
        """The contract's arguments by name: NumPy arrays in the problem's dtypes, and statics."""
        return self.build(np.random.default_rng(seed), **self.options)

    @functools.cached_property
    def config(self) -> AttentionSelectorConfig:
        """The question that the arguments ask, gradients and lse aside."""
        return question(self.op, self.make(), attn_type=self.attn_type)


def given(op: str, arguments: Mapping[str, Any], *, gradients: bool = False) -> Problem:
    """A user's own arguments as a problem."""
    return Problem(
        "given", op, "arguments of the caller", lambda rng: dict(arguments), {}, gradients
    )
