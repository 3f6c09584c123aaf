"""Who computes a work: our backends' kernels, and those of other libraries, by name.

A contender is a module with

    PACKAGE                                what must be installed
    refuses(work) -> str | None            why it does not serve a work; None = it does
    choices(work, generation) -> [options] tile sizes worth measuring; the best of them counts
    program(work, **options) -> Program    the call; imports the library

and importing that module imports nothing heavy.
"""

import importlib
import importlib.util
from typing import Any, Protocol

from benchmarks.batches import Program
from benchmarks.work import Work

OURS = "ours"
CONTENDERS: dict[str, str] = {
    OURS: "benchmarks.tpu_static.ours",
    "jax flash": "benchmarks.tpu_static.peers.jax_flash",
    "jax splash": "benchmarks.tpu_static.peers.jax_splash",
    "tokamax splash": "benchmarks.tpu_static.peers.tokamax_splash",
    "jax ragged paged": "benchmarks.tpu_static.peers.jax_ragged_paged",
    "jax paged": "benchmarks.tpu_static.peers.jax_paged",
    "tpu-inference ragged paged v3": "benchmarks.tpu_static.peers.tpu_inference_ragged",
    "tpu-inference ragged paged v3 hd64": "benchmarks.tpu_static.peers.tpu_inference_ragged_hd64",
    "tpu-inference mla v2": "benchmarks.tpu_static.peers.tpu_inference_mla",
}


class Contender(Protocol):
    """What a contender's module has; see this file's first lines."""

    PACKAGE: str

    def refuses(self, work: Work) -> str | None:
        """Why it does not serve a work; None = it does."""

    def choices(self, work: Work, generation: str) -> list[dict[str, Any]]:
        """Options worth measuring."""

    def program(self, work: Work, **options: Any) -> Program:
        """The call."""


def contender(name: str) -> Contender:
    """The module of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in CONTENDERS:
        raise ValueError(f"contender is {name!r}, must be one of {', '.join(CONTENDERS)}")
    return importlib.import_module(CONTENDERS[name])  # type: ignore[return-value]


def is_installed(name: str) -> bool:
    """Whether the contender's package is here."""
    return importlib.util.find_spec(contender(name).PACKAGE) is not None


def program_of(name: str, work: Work, options: dict[str, Any]) -> Program:
    """The call of one contender at one work."""
    return contender(name).program(work, **options)
