"""Compiles a kernel for a GPU that is not here, and holds what ptxas says of it to the rules.

    memory = compiled_cleanly("h200", kernel, arguments)

Hopper's are compiled in this process: to start another for each of some hundred programs takes
longer than ptxas does. Other chips' are not: jaxlib (0.12) has everything that a process compiles
compiled for the architecture of the first.
"""

import contextlib
import ctypes
import io
import json
import os
import re
import subprocess
import sys
import tempfile

import pytest
from gpu_tma_addresses import misaligned
from jax.experimental.mosaic.gpu import layout_inference

from attnsel_jax.aot import target_for
from attnsel_jax.aot.arguments import described
from attnsel_jax.aot.child import compiled
from attnsel_jax.aot.report import memory_of
from attnsel_jax.envs import environment_for_compiling
from benchmarks.gpu.static.ptxas import read_ptxas
from pallas_kernels import gpu_chip

# Mosaic prints what ptxas -v says, and how much shared memory it will ask for.
PRINTED = ("MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_RESOURCES")
IN_THIS_PROCESS = (9, 0)
SMEM = re.compile(r"smem_scratch_bytes=(\d+)")
KERNEL_HASH = re.compile(r'kernel_hash = "((?:[^"\\]|\\.)*)"')
# A load of a slice, by what layout inference says of it: its swizzled tile, and the slice's type.
SMALL_TILE = re.compile(r"#mosaic_gpu\.tile<\[1, \d+\]>, #mosaic_gpu\.swizzle<")
ENTRY_LINE = re.compile(r"^\s+(?:ROOT )?%\S+ = (?:\(.*?\)|\S+) ([\w-]+)\(", re.M)
NO_KERNELS = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast")
# Where a view of shared memory begins, how its numbers lie, and what they are; and a declaration.
VIEW = re.compile(
    r'(%\S+) = "mosaic_gpu.slice_smem"\(\) <\{.*?offset = (\d+) : i32\}> '
    r"\{out_transforms = \[(.*)\]\} : \(\) -> memref<(?:\d+x)*(\w+),"
)
DECLARED = re.compile(r'"mosaic_gpu.with_transforms"\((%\S+)\)')
SEEN: set[str] = set()  # kernels compiled in this process before: none is again, nor told of again


def compiled_cleanly(chip, kernel, arguments, *, gradients=False):
    """The memory of a call's program, none of whose kernels spills or is too large for the chip.

    Skips where there is no compiler for the chip.
    """
    if gpu_chip.CHIPS[chip].capability == IN_THIS_PROCESS:
        return memory_of(program_of(chip, kernel, arguments, gradients=gradients))
    said = said_by_a_child(_task(chip, kernel, arguments, gradients))
    check(said, chip)
    return json.loads(said.splitlines()[-1])["memory"]


def program_of(chip, kernel, arguments, *, gradients=False):
    """The program itself, held to the same rules; of chips whose programs are compiled here."""
    task = _task(chip, kernel, arguments, gradients)
    with pytest.MonkeyPatch.context() as patch, _printed() as printed:
        for name in PRINTED:
            patch.setenv(name, "1")
        inferred, elsewhere = _inferred(patch), misaligned(patch)
        program = compiled(task)
    assert not elsewhere, elsewhere[0]
    assert not (lost := loads_that_lose_their_phase("\n".join(inferred))), lost[0]
    for text in inferred:
        assert not (otherwise := views_that_lie_otherwise(text)), otherwise
    kernels = set(KERNEL_HASH.findall(program.as_text()))
    new = kernels - SEEN
    SEEN.update(kernels)
    if new or not kernels:
        check(printed[0], chip, at_least=max(1, len(new)))
    return program


def kinds_of_kernels(program):
    """What a program launches, in order, by XLA's words."""
    text = program.as_text()
    entry = text[text.index("ENTRY ") :]
    return [k for k in ENTRY_LINE.findall(entry[: entry.index("\n}")]) if k not in NO_KERNELS]


def _inferred(patch):
    """A list that every kernel's text is put into, as layout inference leaves it."""
    real, texts = layout_inference.infer_layout, []

    def recorded(module, *args, **kwargs):
        real(module, *args, **kwargs)
        texts.append(str(module))

    patch.setattr(layout_inference, "infer_layout", recorded)
    return texts


def loads_that_lose_their_phase(text):
    """Lines that load a slice of what Mosaic decided to swizzle row by row.

    Which of eight rows a row is, is in its address; Mosaic (jax 0.11.2 to 0.12.0.1) takes it from
    the row's place in the slice. Wrong on an H100, right in the interpreter.
    """
    return [
        line
        for line in text.splitlines()
        if "vector_load" in line and "strided<" in line and SMALL_TILE.search(line)
    ]


def views_that_lie_otherwise(text):
    """Views of memory that is read as numbers of several types, where Mosaic decided on a swizzle.

    It decides for each view by itself (jax 0.11.2 to 0.12.0.1) where no transform is declared: what
    is written through one and read through another has to lie plain for all of them.
    """
    latest, views = {}, []
    for line in text.splitlines():
        if found := VIEW.search(line):
            name, *view = found.groups()
            latest[name] = [*view, False]
            views.append(latest[name])
        elif (found := DECLARED.search(line)) and found[1] in latest:
            latest[found[1]][-1] = True
    free = [tuple(view) for *view, is_declared in views if not is_declared]
    types = {offset: {dtype for at, _, dtype in free if at == offset} for offset, *_ in free}
    return [view for view in free if len(types[view[0]]) > 1 and view[1] != "[]"]


def _task(chip, kernel, arguments, gradients):
    target = target_for(chip)
    if missing := target.missing():
        pytest.skip(f"no compiler for {chip} here: {missing}")
    return {"target": target.to_json(), "kernel": kernel, "arguments": described(arguments),
            "gradients": gradients, "mesh": None}  # fmt: skip


def said_by_a_child(task):
    """What compilers print in a process of their own, its answer last."""
    done = subprocess.run(
        [sys.executable, "-m", "attnsel_jax.aot.child"], input=json.dumps(task), text=True,
        capture_output=True, check=True,
        env=environment_for_compiling(None) | dict.fromkeys(PRINTED, "1"),
    )  # fmt: skip
    answer = json.loads(done.stdout.splitlines()[-1])
    assert "refusal" not in answer, answer["refusal"]
    return done.stdout


def check(text, chip, at_least=1):
    """Asserts that so many kernels were compiled, and how."""
    kernels, asked = read_ptxas(text), [int(size) for size in SMEM.findall(text)]
    assert len(kernels) >= at_least, f"{len(kernels)} kernels were compiled, not {at_least}"
    assert len(asked) >= len(kernels), "a kernel's shared memory is not known"
    assert max(asked) <= gpu_chip.CHIPS[chip].smem_bytes, f"shared memory: {asked}"
    faults = {}
    for name, found in kernels.items():
        bytes_of = {"spill stores": found.spill_stores, "spill loads": found.spill_loads,
                    "stack": found.stack}  # fmt: skip
        said = [f"{count} B {what}" for what, count in bytes_of.items() if count]
        if said or found.faults:
            faults[name] = [*said, *found.faults]
    assert not faults, str(faults)


@contextlib.contextmanager
def _printed():
    """A list that what is printed inside, by Python and by compilers, is put into at the end."""
    said, libc, of_python = [], ctypes.CDLL(None), io.StringIO()
    libc.fflush(None)
    before = os.dup(1)
    with tempfile.TemporaryFile() as file, contextlib.redirect_stdout(of_python):
        os.dup2(file.fileno(), 1)
        try:
            yield said
        finally:
            libc.fflush(None)
            os.dup2(before, 1)
            os.close(before)
            file.seek(0)
            said.append(of_python.getvalue() + file.read().decode(errors="replace"))
