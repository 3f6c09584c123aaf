"""Reads the dumps of one compiled program: a `KernelFigures` for each kernel in it."""

import dataclasses
import pathlib
import re
from typing import Any

from benchmarks.gpu.static import toolkit
from benchmarks.gpu.static.ptxas import Resources, read_ptxas
from benchmarks.gpu.static.sass import Kernel, read_sass
from pallas_kernels.gpu_chip import GpuChip

SPILLS, TOO_MUCH_SMEM = "spills", "shared memory over the chip's"


@dataclasses.dataclass(frozen=True)
class KernelFigures:
    """What the compiler made of one kernel.

    Attributes:
        name: of the kernel.
        maker: "mosaic" (Pallas), or "xla" (XLA's own and Triton's).
        resources: registers, spills, stack.
        smem: shared memory of a block, bytes.
        threads: of a block.
        grid: blocks, where they are static.
        code: machine code and its loops; None without a disassembler.
        faults: what no fast kernel may have.
    """

    name: str
    maker: str
    resources: Resources
    smem: int
    threads: int
    grid: tuple[int, ...]
    code: Kernel | None
    faults: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


def read_kernels(folder: pathlib.Path, chip: GpuChip) -> list[KernelFigures]:
    """Every kernel whose dumps lie in a folder (`toolkit.environment` had them put there)."""
    return [*_mosaic(folder / "mosaic", chip), *_xla(folder / "xla", chip)]


def _mosaic(folder: pathlib.Path, chip: GpuChip):
    for ptx in sorted(folder.glob("*.ptx")):
        dumps = {path.name.removeprefix(ptx.stem): path for path in folder.glob(f"{ptx.stem}.*")}
        text = {
            ending: path.read_text() for ending, path in dumps.items() if path.suffix != ".mlir"
        }
        code = read_sass(text.get(".sass") or text.get(".sass_ctrl", ""), chip.capability[0])
        lines = text.get(".before_layout_inference.txt", "").splitlines()
        launch = next((line for line in lines if "gpu.launch" in line), "")
        asked = re.search(r"dynamic_shared_memory_size %c(\d+)_i32", launch) or re.search(
            r"smem_scratch_bytes=(\d+)", text.get(".resources.txt", "")
        )
        blocks = re.search(r"blocks\([^)]*\) in \(([^)]*)\)", launch)
        threads = re.search(r"\.maxntid (\d+)(?:, (\d+), (\d+))?", text[".ptx"])
        for entry, resources in read_ptxas(text.get(".ptxas", "")).items():
            yield _figures(
                ptx.stem, "mosaic", resources, code.get(entry), chip,
                smem=int(asked[1]) if asked else resources.static_smem,
                threads=_product(threads.groups()) if threads else 0,
                grid=tuple(map(int, re.findall(r"%c(\d+)", blocks[1]))) if blocks else (),
            )  # fmt: skip


def _xla(folder: pathlib.Path, chip: GpuChip):
    thunks = "".join(path.read_text() for path in folder.glob("*thunk_sequence.txt"))
    last: dict[str, KernelFigures] = {}  # some are compiled twice: the last one stays
    for log in sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime_ns):
        code = read_sass(toolkit.disassembled(log.with_suffix(".cubin")), chip.capability[0])
        for entry, resources in read_ptxas(log.read_text()).items():
            launch = re.search(
                rf"\] {re.escape(entry)} grid: \[([^]]*)\] threads: \[([^]]*)\]\s+"
                r"shared_memory: (\d+)",
                thunks,
            )
            if launch is None:  # made while a tiling was chosen, or Mosaic's own
                continue
            last[entry] = _figures(
                entry, "xla", resources, code.get(entry), chip, smem=int(launch[3]),
                threads=_product(launch[2].split(",")),
                grid=tuple(int(size) for size in launch[1].split(",")),
            )  # fmt: skip
    yield from last.values()


def _figures(name, maker, resources, code, chip, *, smem, threads, grid) -> KernelFigures:
    faults = list(resources.faults)
    if resources.spill_stores or resources.spill_loads:
        faults.append(SPILLS)
    if smem > chip.smem_bytes:
        faults.append(f"{TOO_MUCH_SMEM} {chip.smem_bytes}")
    return KernelFigures(name, maker, resources, smem, threads, grid, code, tuple(faults))


def _product(sizes) -> int:
    product = 1
    for size in sizes:
        product *= int(size or 1)
    return product
