"""Paged attention by mma.sync (Ampere, Blackwell): the oracle, planted faults, the compiler.

No GPU has run it.
"""

import functools

import gpu_paged
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import RACE, needs_gpu_interpreter
from gpu_paged import (
    EVERYTHING,
    LONG,
    MASKS,
    PROBLEMS,
    SHARED_FAULTS,
    batch,
    check,
    made,
    sweep,
)

from attnsel_jax.backends.mosaic_gpu import PAGED as DECLARED
from attnsel_jax.cache_layouts import LAYOUTS
from pallas_kernels import gpu_chip, gpu_mma, gpu_tma_ring
from pallas_kernels.paged import (
    mosaic_gpu,
    mosaic_gpu_ampere,
    mosaic_gpu_attend,
    mosaic_gpu_blackwell,
    mosaic_gpu_pages,
    mosaic_gpu_tiles,
)

needs_gpu_interpreter()

CHIPS = ("a100", "b200")
# Those of the kernels, by chip; what each takes of (queries, cache).
SIZES = [(chip, size) for chip in CHIPS for size in mosaic_gpu_tiles.TILES[chip][2]]
HALVES = (("bfloat16", "bfloat16"), ("bfloat16", "float16"), ("float16", "float16"))
FLOAT8 = [(dtype, f"float8_{kind}") for dtype in ("bfloat16", "float16")
          for kind in ("e4m3fn", "e5m2")]  # fmt: skip
each_chip = pytest.mark.parametrize("chip", CHIPS)


@pytest.fixture(autouse=True)
def few_cores(monkeypatch):
    """Two cores of two blocks: sequences are cut where they would be on a chip with many."""
    for chip in CHIPS:
        gpu_paged.with_cores(monkeypatch, chip, 2)


def with_tiles(monkeypatch, chip, keys, stages, itemsize=2):
    phase = mosaic_gpu_tiles.Phase(keys, stages, 1)
    tiles = mosaic_gpu_tiles.Tiles(phase, phase, alignment=16)
    monkeypatch.setitem(mosaic_gpu_tiles.TILES[chip], itemsize, {64: tiles})


@pytest.mark.sweep
@each_chip
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_contract_s_problems_agree_with_the_oracle(chip, name):
    check(made(PROBLEMS[name], chip), chip)


MIXED = {
    "everything": ((4, 2), EVERYTHING),
    "window": ((3, 1), {"sliding_window": 20, "sinks": True, "page_size": 32}),
    "two-sided": ((2, 2), {"causal": False, "sliding_window": (30, 3), "page_size": 128}),
    "chunked": ((2, 1), {"attention_chunk_size": 24, "head_size": 128, "page_size": 64}),
    "bfloat16 on float16": (
        (2, 1), {"cache_dtype": "float16", "head_size": 96, "page_size": 256},
    ),
    "float16": ((1, 1), {"dtype": "float16", "head_size": 96, "alibi": True}),
    "256": ((1, 1), {"head_size": 256}),
    "e4m3": ((1, 1), {"cache_dtype": "float8_e4m3fn", "scales": "head", "alibi": True}),
    "e5m2": ((2, 1), {"cache_dtype": "float8_e5m2", "scales": "tensor", "dtype": "float16"}),
    "e4m3 at 80": ((1, 1), {"cache_dtype": "float8_e4m3fn", "scales": "head", "head_size": 80}),
    "e4m3 at 96": ((2, 1), {"cache_dtype": "float8_e4m3fn", "scales": "head", "head_size": 96}),
}  # fmt: skip

FLOAT8_NAMES = [name for name in MIXED if name.startswith(("e4m3", "e5m2"))]
NOT_THERE = {("b200", "256"), *(("a100", name) for name in FLOAT8_NAMES)}


@pytest.mark.parametrize(
    ("chip", "name"),
    [
        (chip, name) if (chip, name) == ("a100", "everything") else sweep(chip, name)
        for chip in CHIPS for name in MIXED if (chip, name) not in NOT_THERE
    ],
)  # fmt: skip
def test_mixed_batches(chip, name):
    heads, options = MIXED[name]
    check(batch(*LONG, heads=heads, **options), chip)


@pytest.mark.parametrize(
    ("kv_lens", "options"),
    [((130, 75), {}), sweep((200, 75), {"cache_dtype": "float8_e4m3fn", "scales": "head"})],
    ids=["16 bits", "float8"],
)
def test_blackwell_s_ring_goes_round(monkeypatch, kv_lens, options):
    with_tiles(monkeypatch, "b200", 64, 2, itemsize=1 if options else 2)
    gpu_paged.with_cores(monkeypatch, "b200", 1)
    check(batch((1, 70), kv_lens, heads=(1, 1), sinks=True, **options), "b200")


@pytest.mark.sweep
@pytest.mark.parametrize(("chip", "head_size"), SIZES)
@pytest.mark.parametrize("page_size", DECLARED.block_size.values)
def test_every_size(chip, head_size, page_size):
    check(batch(*LONG, heads=(2, 1), head_size=head_size, page_size=page_size), chip)


@pytest.mark.sweep
@each_chip
def test_more_query_heads_than_rows(chip):
    """71 heads of one group: two tiles of rows, one head more than there is."""
    check(batch((1,), (40,), heads=(71, 1), sinks=True, alibi=True), chip)


@pytest.mark.sweep
@each_chip
def test_sequences_that_see_nothing_and_one_that_does_not_exist(chip):
    lse = check(gpu_paged.see_nothing(), chip)["lse"]
    assert np.isneginf(lse[[0, 1, 2, 5], 1]).all()


@pytest.mark.sweep
@each_chip
def test_no_sequences(chip):
    check(gpu_paged.no_sequences(), chip)


expired = functools.partial(gpu_paged.expired, 6, (1, 1), -7, 10**5)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", ["a100", "b200"])
def test_expired_pages_are_not_asked_for(chip):
    """Nothing clips on Ampere: the interpreter raises at a copy from outside the cache."""
    junk, clipped = expired()
    check(junk, chip, answers_of=clipped)


@pytest.mark.sweep
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("keys", [64, 128])
@each_chip
def test_tiles_change_speed_and_never_numbers(monkeypatch, chip, keys, stages):
    with_tiles(monkeypatch, chip, keys, stages)
    check(batch(*LONG, heads=(2, 1), **EVERYTHING), chip)


@pytest.mark.sweep
@each_chip
def test_a_result_comes_again_bit_for_bit(chip):
    arguments = batch((1, 3, 70), (150, 60, 90), heads=(2, 1))
    first, second = (gpu_paged.results_of(arguments, chip) for _ in range(2))
    for name in ("out", "lse"):
        np.testing.assert_array_equal(first[name], second[name])


def faults_of(chip):
    """What is planted -> (module, name, the fault)."""
    attends = {"a100": mosaic_gpu_ampere, "b200": mosaic_gpu_blackwell}[chip]
    faults = SHARED_FAULTS | {
        "values of slots that hold no key": (
            mosaic_gpu_ampere, "weighted_sum",
            lambda acc, p, v, seen: gpu_mma.weighted_sum(acc, p, v, None),
        ),
        "the page table": gpu_paged.reversed_pages(
            mosaic_gpu_pages if chip == "a100" else mosaic_gpu_blackwell
        ),
        "one tile more without masks": (
            attends, "seen_of",
            lambda span, *given: mosaic_gpu_attend.seen_of(span, *given)._replace(
                late=span.num_tiles
            ),
        ),
    }  # fmt: skip
    if chip == "b200":
        return faults
    wait = gpu_mma.arrived
    return faults | {
        "a copy is not waited for": (
            gpu_mma, "arrived", lambda groups: wait(groups and groups + 1),
        ),
        "a slot is overwritten": (gpu_mma, "free_slot", lambda slot, stages: slot),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("chip", "fault"),
    [
        (chip, fault)
        if chip == "a100" and fault.startswith("values")
        else sweep(chip, fault)
        for chip in CHIPS for fault in faults_of(chip)
    ],
)  # fmt: skip
def test_a_planted_fault_goes_red(monkeypatch, chip, fault):
    gpu_paged.with_cores(monkeypatch, chip, 1)
    monkeypatch.setattr(*faults_of(chip)[fault])
    with pytest.raises(AssertionError, match="outside the budget"):
        check(batch((1, 3), (300, 61), heads=(1, 1)), chip)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "fault"),
    [("arrived", lambda full: None), ("reads_come_first", lambda: None)],
    ids=["a tile is not waited for", "a slot is written while it is read"],
)
def test_a_planted_race_is_seen(monkeypatch, name, fault):
    with_tiles(monkeypatch, "b200", 64, 2)
    monkeypatch.setattr(gpu_tma_ring, name, fault)
    with pytest.raises(RACE, match=r"RACE DETECTED|already at phase"):
        check(batch((70,), (200,), heads=(1, 1)), "b200")


@pytest.mark.sweep
def test_a_junk_page_is_seen(monkeypatch):
    pages = mosaic_gpu_ampere.pages_of
    monkeypatch.setattr(mosaic_gpu_ampere, "pages_of", lambda *given: pages(*given[:-1]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="outside its array"):
        gpu_paged.results_of(expired()[0], "a100")


@each_chip
def test_what_a_chip_does_not_have_is_refused(chip):
    reasons = functools.partial(gpu_paged.reasons, chip)
    assert reasons() == reasons(kv_cache_dtype="float16") == reasons(block_size=256) == []
    narrow = ["kv_cache_dtype"] if chip == "a100" else []
    assert reasons(kv_cache_dtype="fp8_e4m3", head_size=96) == narrow
    assert reasons(kv_cache_dtype="fp8_e5m2") == (narrow or ["head_size"])
    assert reasons(head_size=80) == (["head_size"] if chip == "a100" else [])
    assert reasons(head_size=192) == reasons(head_size=256) == ["head_size"]
    assert reasons(dtype="float16", kv_cache_dtype="bfloat16") == ["kv_cache_dtype"]


SETS = {  # chip -> caches beside queries of float16; head sizes over 16 bits and over float8
    "a100": ("float16", "one of 64, 96, 128", "one of 64, 96, 128"),
    "b200": ("one of float16, fp8_e4m3, fp8_e5m2", "one of 64, 80, 96, 128", "one of 64, 80, 96"),
    "h200": ("one of float16, fp8_e4m3, fp8_e5m2", None, "one of 64, 80, 96, 128"),
}


@pytest.mark.parametrize("chip", SETS)
def test_a_refusal_has_one_set_of_each_argument(chip):
    caches, wide, narrow = SETS[chip]
    beside = gpu_paged.refusals(chip, dtype="float16", kv_cache_dtype="bfloat16")
    assert [(r.argument, str(r.allowed)) for r in beside] == [("kv_cache_dtype", caches)]
    for cache, sizes in (("bfloat16", wide), ("fp8_e4m3", narrow)):
        refused = gpu_paged.refusals(chip, head_size=192, kv_cache_dtype=cache)
        of_sizes = [str(r.allowed) for r in refused if r.argument == "head_size"]
        assert of_sizes == ([] if sizes is None else [sizes])


@pytest.mark.parametrize(
    ("chip", "options", "message"),
    [
        ("a100", {"cache_dtype": "float8_e4m3fn"}, "kv_pages has 1 byte a number, must have 2 on"),
        ("a100", {"head_size": 80}, "head_dim is 80, must be one of 64, 96, 128, 192"),
        ("b200", {"head_size": 192}, "head_dim is 192, must be one of 64, 80, 96, 128 on b200"),
        (
            "b200",
            {"head_size": 128, "cache_dtype": "float8_e5m2"},
            "must be one of 64, 80, 96 on b200 with a cache of 1 byte a number: use XLA",
        ),
    ],
)
def test_the_door_refuses(chip, options, message):
    arguments = batch((3, 1), (9, 4), **options)
    arguments["kv_pages"] = LAYOUTS["by_head"].join(*jnp.asarray(arguments["kv_pages"]))
    with gpu_chip.for_chip(chip), pytest.raises(ValueError, match=message):
        mosaic_gpu.paged_attention(**arguments)


@each_chip
def test_a_sample_compiles_and_writes_the_cache_where_it_lies(monkeypatch, chip):
    gpu_paged.compiled_in_place(monkeypatch, chip)


@pytest.mark.sweep
@pytest.mark.parametrize("page_size", DECLARED.block_size.values)
@pytest.mark.parametrize(
    ("chip", "head_size", "dtypes"),
    [(*size, dtypes) for size in SIZES for dtypes in HALVES]
    + [("b200", size, dtypes) for size in mosaic_gpu_tiles.BLACKWELL[1] for dtypes in FLOAT8],
)
@pytest.mark.parametrize("features", [{}, EVERYTHING], ids=["plain", "everything"])
def test_everything_declared_compiles(monkeypatch, chip, features, head_size, page_size, dtypes):
    dtype, cache_dtype = dtypes
    gpu_paged.compiled(
        monkeypatch, chip, head_size=head_size, page_size=page_size, dtype=dtype,
        cache_dtype=cache_dtype, **features,
    )  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("features", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(
    ("chip", "head_size", "cache_dtype"),
    [(*size, "bfloat16") for size in SIZES]
    + [("b200", size, "float8_e4m3fn") for size in mosaic_gpu_tiles.BLACKWELL[1]],
)
def test_masks_compile(monkeypatch, chip, features, head_size, cache_dtype):
    gpu_paged.compiled(monkeypatch, chip, head_size=head_size, cache_dtype=cache_dtype, **features)
