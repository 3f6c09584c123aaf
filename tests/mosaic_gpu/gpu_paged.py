"""What tests of the paged kernels share: batches, a chip interpreted, the oracle, the compiler."""

import dataclasses

import jax
import numpy as np
import pytest
from gpu_compiler import compiled_cleanly, kinds_of_kernels, program_of
from gpu_interpreter import gpu_interpreter

from attnsel_jax.aot.report import memory_of
from attnsel_jax.backends.mosaic_gpu import MosaicGpuBackend
from attnsel_jax.cache_layouts import LAYOUTS
from attnsel_jax.compare.deviations import deviation
from attnsel_jax.compare.expected import expected
from attnsel_jax.compare.kernel_runs import run
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.platforms import Device
from attnsel_jax.problems import QUICK
from attnsel_jax.problems.paged_inputs import paged_inputs
from pallas_kernels import gpu_chip
from pallas_kernels.paged import mosaic_gpu_attend, mosaic_gpu_merge, mosaic_gpu_pages

KERNEL = MosaicGpuBackend.get_kernel("paged")
# A decode, a prompt over two tiles that begins off a multiple of 8, nothing, a speculative decode.
LONG = ((1, 70, 0, 3), (150, 131, 7, 60))
EVERYTHING = {"sinks": True, "alibi": True, "soft_cap": 8.0, "sliding_window": 37}
LARGE = {"cache_pages": 10_000, "heads": (8, 2), "head_size": 128}  # options of `arguments_of`
# What masks most and leaves the logits as they are: tiles are those of a plain call.
MASKS = {
    "both ends": {"sliding_window": 37, "attention_chunk_size": 64, "sinks": True},
    "two-sided": {"causal": False, "sliding_window": (30, 3)},
}


def with_cores(monkeypatch, chip, cores):
    """A chip of fewer cores: sequences are cut where they would be on one with many."""
    fewer = dataclasses.replace(gpu_chip.CHIPS[chip], num_cores=cores)
    monkeypatch.setitem(gpu_chip.CHIPS, chip, fewer)


def results_of(arguments, chip):
    with gpu_interpreter(chip):
        return run(KERNEL, "paged", arguments, layout="by_head")


def check(arguments, chip, *, answers_of=None):
    """Out, lse and the written cache, each within the oracle's budget.

    Args:
        arguments: of the kernel.
        chip: that is interpreted.
        answers_of: what the oracle is asked, where it is not the same.
    """
    results = results_of(arguments, chip)
    for name, answer in expected("paged", answers_of or arguments).items():
        found = deviation(name, results[name], answer)
        assert found.passed, str(found)
    return results


def batch(q_lens, kv_lens, *, seed=0, **options):
    """Arguments of a ragged batch, NaN wherever nothing may be read."""
    shape = {"heads": (4, 2), "head_size": 64, "page_size": 16, "pad_tokens": 3}
    shape["dtype"] = "bfloat16"
    rng = np.random.default_rng(seed)
    return paged_inputs(rng, q_lens=q_lens, kv_lens=kv_lens, **shape | options)


def sweep(*values):
    return pytest.param(*values, marks=pytest.mark.sweep)


def refusals(chip, **question):
    """Why the backend refuses a question."""
    asked = {"head_size": 128, "dtype": "bfloat16", "kv_cache_dtype": "auto", "op": "paged"}
    config = AttentionSelectorConfig(**asked | question)
    return MosaicGpuBackend.validate_configuration(config, Device.named(chip))


def reasons(chip, **question):
    """The arguments that it refuses it for."""
    return [reason.argument for reason in refusals(chip, **question)]


def made(problem, chip):
    """Arguments of a problem; skips what the chip's backend refuses, with its reasons."""
    refused = MosaicGpuBackend.validate_configuration(problem.config, Device.named(chip))
    if refused:
        pytest.skip("; ".join(map(str, refused)))
    return problem.make()


def _in_16_bits(problem):
    """A problem as the kernels take it: in bfloat16 where it asks for float32."""
    options = dict(problem.options)
    if options.get("dtype") == "float32":
        options["dtype"] = "bfloat16"
    return dataclasses.replace(problem, options=options)


PROBLEMS = {problem.name: _in_16_bits(problem) for problem in QUICK if problem.op == "paged"}

# Faults of what all chips share: what is planted -> (module, name, the fault).
SHARED_FAULTS = {
    "a partial result": (
        mosaic_gpu_merge, "_places",
        lambda *given, places=mosaic_gpu_merge._places: (
            places(*given)[0], places(*given)[1] - 1, *places(*given)[2:],
        ),
    ),
    "the mask": (
        mosaic_gpu_attend, "_mask",
        lambda interval, first_key, shape, mask=mosaic_gpu_attend._mask: mask(
            (interval[0], interval[1] + 1), first_key, shape
        ),
    ),
}  # fmt: skip


def reversed_pages(module):
    """The fault of a tile's pages in the wrong order."""

    def reverse(span, tile, part, keys, table, geometry, *first, right=mosaic_gpu_pages.page_of):
        part = keys // geometry.page_size - 1 - part
        return right(span, tile, part, keys, table, geometry, *first)

    return module, "page_of", reverse


def expired(window, heads, low, high):
    """Pages before every query's window: their table entries are junk, the oracle's are not."""
    arguments = batch((1, 70), (150, 171), heads=heads, writes=False, sliding_window=window)
    table = arguments["page_table"].copy()
    table[0, : (150 - window) // 16] = low
    table[1, : (171 - 69 - window) // 16] = high
    clipped = np.clip(table, 0, arguments["kv_pages"].shape[1] - 1)
    return arguments | {"page_table": table}, arguments | {"page_table": clipped}


def see_nothing():
    """More queries than keys, and a sequence that does not exist."""
    arguments = batch((5, 1, 70), (7, 3, 72), heads=(2, 1), writes=False)
    sinks = np.array([0, -np.inf], np.float32)
    return arguments | {"kv_lens": np.array([2, 0, 9, 10**6], np.int32), "sinks": sinks}


def no_sequences():
    arguments = batch((3, 1), (9, 4), heads=(1, 1))
    arguments["slot_mapping"] = np.full_like(arguments["slot_mapping"], -1)
    return arguments | {"num_seqs": np.array(0, np.int32)}


def compiled(monkeypatch, chip, **options):
    """Lets ptxas have the kernels, with a cache in the backend's layout; their memory."""
    monkeypatch.undo()  # the chip and the kernel as they are, not as they are interpreted
    return compiled_cleanly(chip, MosaicGpuBackend.kernels["paged"], arguments_of(**options))


def arguments_of(cache_pages=None, q_lens=(1, 40, 3), kv_lens=(70, 75, 9), **options):
    """Of a batch of sequences, and so many pages."""
    arguments = batch(q_lens, kv_lens, pad_tokens=0, **options)
    _, num_pages, page_size, num_heads, head_dim = arguments["kv_pages"].shape
    shape = LAYOUTS["by_head"].shape(cache_pages or num_pages, page_size, num_heads, head_dim)
    pages = jax.ShapeDtypeStruct(shape, arguments["kv_pages"].dtype)
    return arguments | {"kv_pages": pages}


def compiled_in_place(monkeypatch, chip, **options):
    """A large cache is written where it lies."""
    check_in_place(compiled(monkeypatch, chip, **LARGE, **options))


def launched(monkeypatch, **options):
    """Kinds of all that a call over a large cache launches on an H200, which it writes in place."""
    monkeypatch.undo()
    arguments = arguments_of(**LARGE, **options)
    program = program_of("h200", MosaicGpuBackend.kernels["paged"], arguments)
    check_in_place(memory_of(program), arguments["kv_pages"].dtype.itemsize)
    return kinds_of_kernels(program)


def check_in_place(memory, itemsize=2):
    """Asserts that `LARGE`'s cache is not copied."""
    cache_bytes = 2 * 10_000 * 2 * 16 * 128 * itemsize
    assert memory["aliased"] >= cache_bytes
    assert memory["temporaries"] < cache_bytes / 10
