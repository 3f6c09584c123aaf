"""The CUDA programs that compile and disassemble, and how they are made to leave what they make."""

import os
import pathlib
import shutil
import subprocess
import sys

# XLA runs ptxas as a program for its own kernels and Triton's, and has no option to keep what it
# makes: this stands in ptxas's place and does.
_RECORDER = """#!/bin/sh
out=; prev=
for arg in "$@"; do [ "$prev" = -o ] && out=$arg; prev=$arg; done
"{ptxas}" -v "$@" 2> "{keep}/$$.log"
status=$?
cat "{keep}/$$.log" >&2
[ -n "$out" ] && cp "$out" "{keep}/$$.cubin" 2>/dev/null
exit $status
"""
INSTALL = "pip install --no-deps nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-nvdisasm"


def program(name: str) -> str | None:
    """A CUDA program: of CUDA_ROOT where that is set, else of the installed Python packages.

    Machine code depends on ptxas's version: set CUDA_ROOT to the toolkit that will be run with.
    """
    root = os.environ.get("CUDA_ROOT")
    if root and pathlib.Path(root, "bin", name).exists():
        return str(pathlib.Path(root, "bin", name))
    for folder in sys.path:
        for found in sorted(pathlib.Path(folder or ".").glob(f"nvidia/*/bin/{name}")):
            return str(found)
    return shutil.which(name)


def recording_toolkit(folder: pathlib.Path, keep: pathlib.Path) -> pathlib.Path | None:
    """A CUDA folder like the real one, whose ptxas leaves its reports and cubins in `keep`."""
    ptxas = program("ptxas")
    if ptxas is None:
        return None
    real, fake = pathlib.Path(ptxas).resolve().parent.parent, folder / "cuda"
    (fake / "bin").mkdir(parents=True)
    for file in [*real.iterdir(), *(real / "bin").iterdir()]:
        link = fake / file.relative_to(real)
        if file.name not in ("bin", "ptxas", "nvdisasm") and not link.exists():
            link.symlink_to(file)
    disassembler = program("nvdisasm")
    if disassembler is not None:  # a package of its own, not part of every toolkit
        (fake / "bin" / "nvdisasm").symlink_to(disassembler)
    recorder = fake / "bin" / "ptxas"
    recorder.write_text(_RECORDER.format(ptxas=ptxas, keep=keep))
    recorder.chmod(0o755)
    return fake


def disassembled(cubin: pathlib.Path) -> str:
    """The machine code of a cubin as text; empty where there is no disassembler."""
    disassembler = program("nvdisasm")
    if disassembler is None or not cubin.exists():
        return ""
    command = [disassembler, "-ndf", "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def environment(folder: pathlib.Path, *, xla_kernels: bool) -> dict[str, str]:
    """What a compiling process needs to leave its dumps in `folder`, which is made."""
    for name in ("mosaic", "xla"):
        (folder / name).mkdir(parents=True)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    if xla_kernels:
        flags += f" --xla_dump_to={folder / 'xla'}"
    new = {
        "JAX_PLATFORMS": "cpu",  # with the plugin's own start-up the topology is refused
        "MOSAIC_GPU_DUMP_TO": str(folder / "mosaic"),
        "TMPDIR": str(folder),  # jaxlib leaves folders in the temporary one
        "XLA_FLAGS": flags.strip(),
    }
    fake = recording_toolkit(folder, folder / "xla")
    return dict(os.environ) | new | ({} if fake is None else {"CUDA_ROOT": str(fake)})
