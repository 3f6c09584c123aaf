"""Paged attention on Ampere: the interpreter against the oracle, planted faults, the compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_compiler import compiled_cleanly
from gpu_interpreter import gpu_interpreter, needs_gpu_interpreter
from test_gpu_paged import EVERYTHING, KERNEL, LONG, PAGED, batch

from attnsel_jax.backends.mosaic_gpu import PAGED as DECLARED
from attnsel_jax.backends.mosaic_gpu import MosaicGpuBackend
from attnsel_jax.cache_layouts import LAYOUTS
from attnsel_jax.compare.deviations import deviation
from attnsel_jax.compare.expected import expected
from attnsel_jax.compare.kernel_runs import run
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.platforms import Device
from pallas_kernels import gpu_chip, gpu_mma
from pallas_kernels.paged import (
    mosaic_gpu,
    mosaic_gpu_ampere,
    mosaic_gpu_attend,
    mosaic_gpu_merge,
    mosaic_gpu_tiles,
)

needs_gpu_interpreter()

SIZES = tuple(mosaic_gpu_tiles.AMPERE[2])  # those of the kernels


@pytest.fixture(autouse=True)
def few_cores(monkeypatch):
    """Two cores of two blocks: sequences are cut where they would be on a chip with many."""
    chip = dataclasses.replace(gpu_chip.CHIPS["a100"], num_cores=2)
    monkeypatch.setitem(gpu_chip.CHIPS, "a100", chip)


def results_of(arguments):
    with gpu_interpreter("a100"):
        return run(KERNEL, "paged", arguments, layout="by_head")


def check(arguments):
    """Out, lse and the written cache, each within the oracle's budget."""
    results = results_of(arguments)
    for name, answer in expected("paged", arguments).items():
        found = deviation(name, results[name], answer)
        assert found.passed, str(found)
    return results


def sweep(*values):
    return pytest.param(*values, marks=pytest.mark.sweep)


def accepted():
    """Problems of the contract that Ampere declares; in bfloat16 where they ask for float32."""
    for problem in PAGED:
        options = dict(problem.options)
        if options.get("dtype") == "float32":
            options["dtype"] = "bfloat16"
        problem = dataclasses.replace(problem, options=options)
        if not MosaicGpuBackend.validate_configuration(problem.config, Device.named("a100")):
            yield problem


@pytest.mark.sweep
@pytest.mark.parametrize("problem", list(accepted()), ids=lambda problem: problem.name)
def test_the_contract_s_problems_agree_with_the_oracle(problem):
    check(problem.make())


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((4, 2), EVERYTHING),
        sweep((3, 1), {"sliding_window": 20, "sinks": True, "page_size": 32}),
        sweep((2, 2), {"causal": False, "sliding_window": (30, 3), "page_size": 128}),
        sweep((2, 1), {"attention_chunk_size": 24, "head_size": 128, "page_size": 64}),
        sweep((2, 1), {"cache_dtype": "float16", "head_size": 96, "page_size": 256}),
        sweep((1, 1), {"dtype": "float16", "head_size": 96, "alibi": True}),
        sweep((1, 1), {"head_size": 256}),
    ],
    ids=["everything", "window", "two-sided", "chunked", "bfloat16 on float16", "float16", "256"],
)
def test_mixed_batches(heads, options):
    check(batch(*LONG, heads=heads, **options))


@pytest.mark.sweep
@pytest.mark.parametrize("head_size", SIZES)
@pytest.mark.parametrize("page_size", DECLARED.block_size.values)
def test_every_size(head_size, page_size):
    check(batch(*LONG, heads=(2, 1), head_size=head_size, page_size=page_size))


@pytest.mark.sweep
def test_more_query_heads_than_rows():
    """71 heads of one group: two tiles of rows, one head more than there is."""
    check(batch((1,), (40,), heads=(71, 1), sinks=True, alibi=True))


@pytest.mark.sweep
def test_sequences_that_see_nothing_and_one_that_does_not_exist():
    arguments = batch((5, 1, 70), (7, 3, 72), heads=(2, 1), writes=False)
    sinks = np.array([0, -np.inf], np.float32)
    arguments |= {"kv_lens": np.array([2, 0, 9, 10**6], np.int32), "sinks": sinks}
    lse = check(arguments)["lse"]
    assert np.isneginf(lse[[0, 1, 2, 5], 1]).all()


@pytest.mark.sweep
def test_no_sequences():
    arguments = batch((3, 1), (9, 4), heads=(1, 1))
    arguments["slot_mapping"] = np.full_like(arguments["slot_mapping"], -1)
    arguments["num_seqs"] = np.array(0, np.int32)
    check(arguments)


def expired():
    """Pages before every query's window: their table entries are junk, the oracle's are not."""
    arguments = batch((1, 70), (150, 171), heads=(1, 1), writes=False, sliding_window=6)
    table = arguments["page_table"].copy()
    table[0, : (150 - 6) // 16] = -7
    table[1, : (171 - 75) // 16] = 10**5
    clipped = np.clip(table, 0, arguments["kv_pages"].shape[1] - 1)
    return arguments | {"page_table": table}, arguments | {"page_table": clipped}


def test_expired_pages_are_not_asked_for():
    """Nothing clips on Ampere: the interpreter raises at a copy from outside the cache."""
    junk, clipped = expired()
    results = results_of(junk)
    for name, answer in expected("paged", clipped).items():
        assert deviation(name, results[name], answer).passed


@pytest.mark.sweep
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("keys", [64, 128])
def test_tiles_change_speed_and_never_numbers(monkeypatch, keys, stages):
    phase = mosaic_gpu_tiles.Phase(keys, stages, 1)
    tiles = mosaic_gpu_tiles.Tiles(phase, phase, blocks=1)
    monkeypatch.setitem(mosaic_gpu_tiles.TILES["a100"], 2, {64: tiles})
    check(batch(*LONG, heads=(2, 1), **EVERYTHING))


@pytest.mark.sweep
def test_a_result_comes_again_bit_for_bit():
    arguments = batch((1, 3, 70), (150, 60, 90), heads=(2, 1))
    first, second = results_of(arguments), results_of(arguments)
    for name in ("out", "lse"):
        np.testing.assert_array_equal(first[name], second[name])


# What is planted -> (module, name, the fault).
FAULTS = {
    "values of slots that hold no key": (
        mosaic_gpu_ampere, "weighted_sum",
        lambda acc, p, v, seen, add=mosaic_gpu_ampere.weighted_sum: add(acc, p, v, None),
    ),
    "a copy is not waited for": (
        gpu_mma, "arrived", lambda groups, wait=gpu_mma.arrived: (
            wait(groups and groups + 1)
        ),
    ),
    "a slot is overwritten": (gpu_mma, "free_slot", lambda slot, stages: slot),
    "the page table": (
        mosaic_gpu_ampere, "pages_of",
        lambda *given, pages=mosaic_gpu_ampere.pages_of: pages(*given)[::-1],
    ),
    "the mask": (
        mosaic_gpu_attend, "_mask",
        lambda interval, first_key, shape, mask=mosaic_gpu_attend._mask: mask(
            (interval[0], interval[1] + 1), first_key, shape
        ),
    ),
    "one tile more without masks": (
        mosaic_gpu_ampere, "seen_of",
        lambda span, *given, seen=mosaic_gpu_ampere.seen_of: seen(span, *given)._replace(
            late=span.num_tiles
        ),
    ),
    "a partial result": (
        mosaic_gpu_merge, "_places",
        lambda *given, places=mosaic_gpu_merge._places: (
            places(*given)[0], places(*given)[1] - 1, places(*given)[2],
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=[] if f.startswith("values") else pytest.mark.sweep) for f in FAULTS],
)
def test_a_planted_fault_goes_red(monkeypatch, fault):
    chip = dataclasses.replace(gpu_chip.CHIPS["a100"], num_cores=1)
    monkeypatch.setitem(gpu_chip.CHIPS, "a100", chip)
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError, match="outside the budget"):
        check(batch((1, 3), (300, 61), heads=(1, 1)))


@pytest.mark.sweep
def test_a_junk_page_is_seen(monkeypatch):
    pages = mosaic_gpu_ampere.pages_of
    monkeypatch.setattr(mosaic_gpu_ampere, "pages_of", lambda *given: pages(*given[:-1]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="outside its array"):
        results_of(expired()[0])


def test_what_ampere_does_not_have_is_refused():
    def reasons(**question):
        asked = {"head_size": 128, "dtype": "bfloat16", "kv_cache_dtype": "auto", "op": "paged"}
        config = AttentionSelectorConfig(**asked | question)
        found = MosaicGpuBackend.validate_configuration(config, Device.named("a100"))
        return [reason.argument for reason in found]

    assert reasons() == reasons(kv_cache_dtype="float16") == reasons(block_size=256) == []
    assert reasons(kv_cache_dtype="fp8_e4m3") == ["kv_cache_dtype"]
    assert reasons(head_size=80) == reasons(head_size=192) == ["head_size"]
    assert reasons(dtype="float16", kv_cache_dtype="bfloat16") == ["kv_cache_dtype"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_dtype": "float8_e4m3fn"}, "kv_pages has 1 byte a number, must have 2 on a100"),
        ({"head_size": 80}, "head_dim is 80, must be one of 64, 96, 128, 192"),
    ],
)
def test_the_door_refuses(options, message):
    arguments = batch((3, 1), (9, 4), **options)
    arguments["kv_pages"] = LAYOUTS["by_head"].join(*jnp.asarray(arguments["kv_pages"]))
    with gpu_chip.for_chip("a100"), pytest.raises(ValueError, match=message):
        mosaic_gpu.paged_attention(**arguments)


def compiled(monkeypatch, cache_pages=None, **options):
    """Lets ptxas have the kernels, with a cache in the backend's layout; their memory."""
    monkeypatch.undo()  # the chip as it is
    arguments = batch((1, 40, 3), (70, 75, 9), pad_tokens=0, **options)
    _, num_pages, page_size, num_heads, head_dim = arguments["kv_pages"].shape
    shape = LAYOUTS["by_head"].shape(cache_pages or num_pages, page_size, num_heads, head_dim)
    pages = jax.ShapeDtypeStruct(shape, arguments["kv_pages"].dtype)
    kernel = MosaicGpuBackend.kernels["paged"]
    return compiled_cleanly("a100", kernel, arguments | {"kv_pages": pages})


def test_a_sample_compiles_and_writes_the_cache_where_it_lies(monkeypatch):
    memory = compiled(monkeypatch, cache_pages=10_000, heads=(8, 2), head_size=128)
    cache_bytes = 2 * 10_000 * 2 * 16 * 128 * 2
    assert memory["aliased"] >= cache_bytes
    assert memory["temporaries"] < cache_bytes / 10


@pytest.mark.sweep
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("page_size", DECLARED.block_size.values)
@pytest.mark.parametrize("head_size", SIZES)
@pytest.mark.parametrize("features", [{}, EVERYTHING], ids=["plain", "everything"])
def test_everything_declared_compiles(monkeypatch, features, head_size, page_size, cache_dtype):
    compiled(
        monkeypatch, head_size=head_size, page_size=page_size, cache_dtype=cache_dtype, **features
    )
