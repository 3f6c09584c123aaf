"""Who computes a work on a GPU: our backends' kernels, and those of other libraries, by name.

A contender is a module with

    PACKAGE                                what must be installed
    MEASURES                               whether compiling it times candidates on the GPU
    refuses(work) -> str | None            why it does not serve a work; None = it does
    choices(work) -> [options]             tile sizes worth measuring; the best of them counts
    program(work, **options) -> Program    the call; imports the library

and importing that module imports nothing heavy. PyTorch runs in a process of its own
(`torch_child`), and is no contender here.
"""

import importlib
import importlib.util
from typing import Any, Protocol

from benchmarks.batches import Program
from benchmarks.work import Work

OURS = "ours"
CONTENDERS: dict[str, str] = {
    OURS: "benchmarks.gpu.ours",
    "jax.nn cudnn": "benchmarks.gpu.peers.jax_nn_cudnn",
    "jax.nn xla": "benchmarks.gpu.peers.jax_nn_xla",
    "tokamax mosaic": "benchmarks.gpu.peers.tokamax_mosaic",
    "jax attention_mgpu": "benchmarks.gpu.peers.jax_mgpu",
    "jax paged (triton)": "benchmarks.gpu.peers.jax_paged",
}


class Contender(Protocol):
    """What a contender's module has; see this file's first lines."""

    PACKAGE: str
    MEASURES: bool

    def refuses(self, work: Work) -> str | None:
        """Why it does not serve a work; None = it does."""

    def choices(self, work: Work) -> list[dict[str, Any]]:
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


def reason_against(name: str, work: Work) -> str | None:
    """Why a contender cannot be asked for a work here; None = it can."""
    module = contender(name)
    if importlib.util.find_spec(module.PACKAGE) is None:
        return f"{module.PACKAGE} is not installed: `pip install --no-deps {module.PACKAGE}`"
    return module.refuses(work)


def program_of(name: str, work: Work, options: dict[str, Any]) -> Program:
    """The call of one contender at one work."""
    return contender(name).program(work, **options)
