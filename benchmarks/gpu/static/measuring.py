"""Compiles one contender's call for one chip, and reads what was made of it."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from attnsel_jax.aot.targets import target_for
from benchmarks.gpu.static import toolkit
from benchmarks.gpu.static.reading import KernelFigures, read_kernels
from benchmarks.work import Work
from pallas_kernels import gpu_chip

TIMEOUT_S = 300.0
COMPILED, REFUSED = "compiled", "refused by the compiler"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of one call.

    Attributes:
        work, contender, options, chip: what was compiled, for what.
        verdict: `COMPILED`, `REFUSED`, or why it was not tried.
        reason: of any other verdict than `COMPILED`.
        kernels: of the program.
        temporaries: bytes of device memory beside arguments and results.
        seconds: of compiling.
    """

    work: str
    contender: str
    options: dict[str, Any]
    chip: str
    verdict: str
    reason: str = ""
    kernels: tuple[KernelFigures, ...] = ()
    temporaries: int = 0
    seconds: float = 0.0

    @property
    def faults(self) -> list[str]:
        """What no fast kernel may have, of all Pallas kernels of the call."""
        return sorted({f for k in self.kernels if k.maker == "mosaic" for f in k.faults})

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self) | {"faults": self.faults}


def check_compiler() -> None:
    """Refuses where nothing compiles for GPUs.

    Raises:
        ValueError: the plugin or the toolkit is not installed.
    """
    target_for(gpu_chip.DEFAULT).check_installed()
    missing = [name for name in ("ptxas", "nvdisasm") if toolkit.program(name) is None]
    if missing or importlib.util.find_spec("absl") is None:
        raise ValueError(
            f"{' and '.join(missing or ['absl'])} not found, must be: {toolkit.INSTALL}; "
            f"pip install absl-py"
        )


def compile_and_read(
    work: Work,
    contender: str,
    chip: str,
    options: dict[str, Any] | None = None,
    *,
    xla_kernels: bool = False,
    keep: pathlib.Path | None = None,
) -> Compiled:
    """Compiles and reads one call.

    Args:
        work: what is computed.
        contender: a name of `contenders.CONTENDERS`.
        chip: a name of `gpu_chip.CHIPS`.
        options: of the contender; None = its own choice.
        xla_kernels: read XLA's own kernels too, and Triton's.
        keep: folder to leave the compiler's files in, made here; None = they are deleted.
    """
    options = options or {}
    given = {"work": dataclasses.asdict(work), "contender": contender, "options": options}
    with tempfile.TemporaryDirectory(prefix="gpu_static_") as temporary:
        folder = keep or pathlib.Path(temporary)
        environment = toolkit.environment(folder, xla_kernels=xla_kernels)
        said = _in_child(given | {"chip": chip}, environment)
        if "refusal" in said:
            return Compiled(work.name, contender, options, chip, REFUSED, said["refusal"])
        kernels = read_kernels(folder, gpu_chip.CHIPS[chip])
    return Compiled(
        work.name, contender, options, chip, COMPILED,
        kernels=tuple(kernels), temporaries=said["temporaries"], seconds=said["seconds"],
    )  # fmt: skip


def _in_child(task: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Runs the child; a compiler that crashes is a refusal too."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu.static.child"],
            input=json.dumps(task), capture_output=True, text=True, errors="replace",
            timeout=TIMEOUT_S, env=environment, cwd=pathlib.Path(__file__).parents[3], check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"refusal": f"stopped after {TIMEOUT_S:.0f} s"}
    last = (done.stdout.splitlines() or [""])[-1]
    if last.startswith("{"):
        return json.loads(last)
    words = "\n".join(done.stderr.splitlines()[-5:])
    return {"refusal": f"the compiler's process ended with {done.returncode}: {words}"[:2000]}
