"""Paged attention's TPU kernels in the TPU interpreter, against the float64 oracle."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_interpreter import tpu_interpreter

from attnsel_jax.aot import compile_for, target_for
from attnsel_jax.backends.mosaic_tpu import PAGED as DECLARED
from attnsel_jax.backends.mosaic_tpu import MosaicTpuBackend
from attnsel_jax.cache_layouts import LAYOUTS
from attnsel_jax.compare.deviations import deviation
from attnsel_jax.compare.expected import expected
from attnsel_jax.compare.kernel_runs import run
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.kv_cache import KVCache
from attnsel_jax.platforms import Device
from attnsel_jax.problems import QUICK
from attnsel_jax.problems.paged_inputs import paged_inputs
from pallas_kernels import tpu_chip
from pallas_kernels.paged import mosaic_tpu, mosaic_tpu_decode, mosaic_tpu_tiles, mosaic_tpu_write

KERNEL = MosaicTpuBackend.get_kernel("paged")
PAGED = [problem for problem in QUICK if problem.op == "paged"]
# So small that short sequences have several tiles, blocks and chunks.
SMALL = mosaic_tpu_tiles.Tiles(tile_tokens=32, block_tokens=32, chunk_tokens=16, num_buffers=3)


def check(arguments, generation="v5e", kernel=KERNEL):
    """Out, lse and the written cache, each within the oracle's budget."""
    with tpu_interpreter(generation):
        results = run(kernel, "paged", arguments, layout="side_by_side")
    for name, answer in expected("paged", arguments).items():
        found = deviation(name, results[name], answer)
        assert found.passed, str(found)
    return results


def sweep(*values):
    return pytest.param(*values, marks=pytest.mark.sweep)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "tiles_for", lambda *_: SMALL)


def batch(q_lens, kv_lens, *, seed=0, **options):
    """Arguments of a ragged batch, NaN wherever nothing may be read."""
    shape = {"heads": (4, 2), "head_size": 64, "page_size": 8, "pad_tokens": 3}
    rng = np.random.default_rng(seed)
    return paged_inputs(rng, q_lens=q_lens, kv_lens=kv_lens, **shape | options)


# On each push the extremes, one of each kind of cache, and what "everything" has on demand alone.
ON_DEMAND = ("page-32", "page-64", "page-128", "page-256", "e4m3", "e4m3-unscaled", "e5m2", "int8",
             "bfloat16", "bfloat16-cache", "window", "two-sided-window", "chunked", "sinks",
             "soft-cap", "alibi", "encoder-only")  # fmt: skip


ON_OLD_JAX_TOO = ("mixed", "cross", "everything")


def when(problem):
    """The marks of a quick problem."""
    name = problem.name.split(".")[-1]
    if name in ON_DEMAND:
        return pytest.mark.sweep
    return () if name in ON_OLD_JAX_TOO else pytest.mark.once


@pytest.mark.parametrize(
    "problem",
    [pytest.param(problem, marks=when(problem), id=problem.name) for problem in PAGED],
)
def test_quick_problems(problem, monkeypatch):
    if problem.name.endswith("everything"):  # takes 42 s to compile with the table's tiles
        monkeypatch.setattr(mosaic_tpu, "tiles_for", lambda *_: SMALL)
    reasons = MosaicTpuBackend.validate_configuration(problem.config, Device.named("v5e"))
    if reasons:
        pytest.skip("; ".join(map(str, reasons)))
    check(problem.make())


PADDED = (8, 40, 72, 112, 160, 224)  # head sizes that the cache pads
SIZES = (8, 64, 72, 80, 128, 160, 192, 256)  # of each way to store and to turn heads


# A decode, a chunk over two tiles, nothing, speculative decodes over a row tile's border, a decode.
LONG = ((1, 28, 0, 5, 11, 1), (70, 59, 9, 29, 24, 33))


@pytest.mark.once
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32", "sliding_window": 19, "sinks": True},
        sweep({"causal": False, "sliding_window": (30, 3)}),
        sweep({"attention_chunk_size": 24, "soft_cap": 6.0, "alibi": True}),
    ],
    ids=["window", "two-sided", "chunked"],
)
def test_spans_tiles_and_blocks(options):
    check(batch(*LONG, **options))


# Up to four tokens each, one of them in two tiles; six over a row tile's border, and six in one.
FEW = (4, 3, 1, 4, 1, 6, 4, 3, 4, 4, 2, 0, 4, 1, 6)


@pytest.mark.once
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((4, 2), {"sliding_window": 19, "sinks": True, "alibi": True, "soft_cap": 6.0}),
        sweep((4, 2), {"head_size": 128, "sliding_window": 3}),
        sweep((3, 1), {"head_size": 128, "dtype": "float32", "attention_chunk_size": 7}),
        sweep((6, 2), {"causal": False, "sliding_window": (30, 3)}),
        sweep((10, 5), {"cache_dtype": "int8", "scales": "head"}),
        sweep((64, 1), {}),
    ],
    ids=["everything", "window", "chunk", "two-sided", "int8", "too many heads"],
)
@pytest.mark.parametrize("generation", ["v6e", sweep("v5e")])
def test_few_tokens_of_each_sequence(heads, options, generation):
    """Computed as decodes: the keys of all of them come once."""
    more = (0, 13, 40, 1, 4, 28, 5, *[9] * 8)
    kv_lens = [sum(lens) for lens in zip(FEW, more, strict=True)]
    check(batch(FEW, kv_lens, heads=heads, **options), generation)


@pytest.mark.parametrize(
    ("num_tokens", "heads", "tokens"),
    [(64, 32, 1), (65, 32, 2), (192, 32, 4), (512, 32, 8), (513, 8, 1), (512, 64, 1), (256, 64, 4)],
)
def test_how_many_tokens_are_computed_as_a_decode(num_tokens, heads, tokens):
    assert mosaic_tpu_tiles.decode_tokens(num_tokens, 64, heads) == tokens


@pytest.mark.once
@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((2, 1), {"sliding_window": 70, "sinks": True}),
        sweep((2, 2), {"sliding_window": 70, "sinks": True}),
        sweep((3, 3), {"soft_cap": 6.0, "alibi": True, "dtype": "float32"}),
        sweep((2, 1), {"head_size": 192, "cache_dtype": "int8", "scales": "head"}),
        sweep((2, 1), {"head_size": 192, "dtype": "float32"}),
        ((2, 1), {"head_size": 80, "dtype": "bfloat16"}),
        sweep((2, 1), {"head_size": 96, "dtype": "float32"}),
        *(sweep((2, 2), {"head_size": size, "dtype": "bfloat16"}) for size in PADDED),
    ],
    ids=["shares", "window", "odd", "192", "192 float32", "80", "96 float32", *map(str, PADDED)],
)
def test_prompts(monkeypatch, heads, options):
    """Tiles of 128 tokens: keys first. New keys come in four tiles: a buffer is used again."""
    tiles = SMALL._replace(tile_tokens=128, block_tokens=64, chunk_tokens=32)
    monkeypatch.setattr(mosaic_tpu, "tiles_for", lambda *_: tiles)
    check(batch((1, 200, 3), (30, 230, 9), heads=heads, **options))


MANY = {
    "64": ((16, 2), {"sliding_window": 70, "sinks": True}),
    "128": ((16, 2), {"head_size": 128}),
    "float32": ((8, 4), {"head_size": 128, "dtype": "float32"}),
    "int8": ((16, 8), {"cache_dtype": "int8", "scales": "head"}),
    "six": ((6, 1), {"head_size": 128, "soft_cap": 6.0, "alibi": True}),
    "fourteen": ((14, 2), {"head_size": 128, "sinks": True}),
    "odd": ((7, 1), {"head_size": 128}),
}


@pytest.mark.sweep
@pytest.mark.parametrize("case", MANY)
@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_many_heads(monkeypatch, generation, case):
    heads, options = MANY[case]
    tiles = SMALL._replace(tile_tokens=128, block_tokens=64, chunk_tokens=32)
    monkeypatch.setattr(mosaic_tpu, "tiles_for", lambda *_: tiles)
    check(batch((1, 70, 3), (75, 90, 9), heads=heads, **options), generation)


@pytest.mark.once
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"), [((1, 9), (30, 21)), sweep((1, 70, 3), (75, 90, 9))]
)
def test_tiles_change_no_numbers(monkeypatch, q_lens, kv_lens):
    """Every field of the table, from one block a page to all in one; the cache bit for bit."""
    arguments = batch(q_lens, kv_lens, scales="head", cache_dtype="float8_e4m3fn")
    caches = []
    for tiles in ((128, 8, 8, 3), (16, 128, 128, 4)):
        chosen = mosaic_tpu_tiles.Tiles(*tiles)
        monkeypatch.setattr(mosaic_tpu, "tiles_for", lambda *_, chosen=chosen: chosen)
        jax.clear_caches()
        caches.append(check(arguments)["kv_pages"])
    for cache in caches[1:]:
        assert np.array_equal(cache.view(np.uint8), caches[0].view(np.uint8))


@pytest.mark.parametrize(("kv_heads", "buffers"), [(8, 5), (10, 4)])
def test_a_buffer_more_does_not_halve_the_others(kv_heads, buffers):
    q, pages = (jax.ShapeDtypeStruct(shape, jnp.bfloat16)
                for shape in ((64, 8 * kv_heads, 128), (9, kv_heads, 2, 64, 128)))  # fmt: skip
    with tpu_chip.for_generation("7x"):
        table = jax.ShapeDtypeStruct((64, 48), jnp.int32)
        geometry = mosaic_tpu._geometry(q, pages, table)
    assert (geometry.num_buffers, geometry.block_pages * 64) == (buffers, 1024)


def test_the_table_has_every_key():
    """A chip's entry for each width of cache and each class of shapes, and nothing else."""
    classes = {
        mosaic_tpu_tiles.shape_class(tokens, 4, size) for tokens in (4, 5) for size in (64, 80)
    }
    dtypes = {"bfloat16", "float32", "float8_e4m3fn"}
    assert set(mosaic_tpu_tiles.TILES) == set(itertools.product(tpu_chip.CHIPS, dtypes, classes))


@pytest.mark.parametrize(
    ("head_size", "dtype", "along_lanes"),
    [
        (64, "bfloat16", True),
        (64, "float32", False),
        (80, "bfloat16", True),
        (96, "float32", False),
        (128, "bfloat16", False),
        (192, "bfloat16", True),
        (192, "float32", False),
        (256, "bfloat16", False),
    ],
)
def test_which_heads_take_tokens_along_lanes(head_size, dtype, along_lanes):
    """Of prompts only: those that XLA keeps that way, and that were compiled."""
    q = jax.ShapeDtypeStruct((256, 4, head_size), dtype)
    pages = jax.ShapeDtypeStruct(LAYOUTS["side_by_side"].shape(9, 64, 2, head_size), dtype)
    for num_seqs, answer in ((2, along_lanes), (64, False), (256, False)):
        table = jax.ShapeDtypeStruct((num_seqs, 4), "int32")
        assert mosaic_tpu._geometry(q, pages, table).in_columns is answer


def test_one_kernel_writes_and_attends():
    """A single custom call, and the cache that it is given is the cache that it returns."""
    arguments = batch((1, 70, 3), (75, 90, 9))
    arguments["kv_pages"] = LAYOUTS["side_by_side"].join(*jnp.asarray(arguments["kv_pages"]))
    arrays = {name: jnp.asarray(x) for name, x in arguments.items() if hasattr(x, "shape")}
    fixed = {name: x for name, x in arguments.items() if name not in arrays}
    with tpu_chip.for_generation("v5e"):
        traced = jax.jit(lambda given: mosaic_tpu.paged_attention(**given, **fixed)).trace(arrays)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    calls = [line for line in text.splitlines() if "@tpu_custom_call" in line]
    assert len(calls) == 1
    assert "output_tuple_indices = [2]" in calls[0]


@pytest.mark.once
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("heads", [(3, 1), *(sweep(heads) for heads in ((10, 1), (3, 3), (8, 1)))])
def test_groups(heads):
    check(batch((1, 3), (30, 11), heads=heads, page_size=16))


@pytest.mark.once
@pytest.mark.usefixtures("small_tiles")
def test_heads_of_64_in_twos_whose_rows_are_no_power_of_two():
    check(batch((1, 1), (30, 11), heads=(48, 2), head_size=64, page_size=16), "v6e")


@pytest.mark.once
@pytest.mark.parametrize(("generation", "head_size"), [("7x", 64), sweep("v5e", 128)])
def test_sums_by_lane_over_several_parts(monkeypatch, generation, head_size):
    """Chunks of whole registers, as on a chip: row sums are kept by lane from part to part."""
    tiles = mosaic_tpu_tiles.Tiles(32, 256, 128, 3)
    monkeypatch.setattr(mosaic_tpu, "tiles_for", lambda *_: tiles)
    shape = {"head_size": head_size, "page_size": 16, "dtype": "bfloat16", "pad_tokens": 0}
    check(batch((1, 1, 1), (300, 129, 5), **shape), generation)


@pytest.mark.once
@pytest.mark.parametrize(
    "options",
    [
        {"page_size": 16, "sliding_window": 150},
        sweep({"page_size": 16}),
        sweep({"page_size": 64, "sliding_window": 150}),
    ],
    ids=str,
)
def test_copies_start_between_pieces_of_keys(monkeypatch, options):
    """Several pieces to a part, of several pairs of heads."""
    tiles = mosaic_tpu_tiles.Tiles(32, 256, 128, 3)
    monkeypatch.setattr(mosaic_tpu, "tiles_for", lambda *_: tiles)
    monkeypatch.setattr(mosaic_tpu_decode, "PIECE_TOKENS", 64)
    shape = {"heads": (8, 4), "head_size": 64, "dtype": "bfloat16", "pad_tokens": 0}
    check(batch((1, 1, 1, 1), (300, 129, 5, 270), **shape | options), "7x")


@pytest.mark.once
@pytest.mark.usefixtures("small_tiles")
def test_a_decode_of_no_keys_looks_no_page_up():
    arguments = batch((1,) * 24, (40, 1, 33) * 8, pad_tokens=0, writes=False)
    kv_lens, table = arguments["kv_lens"].copy(), arguments["page_table"].copy()
    kv_lens[1::3], table[1::6], table[4::6] = 0, 2**30, -7
    check(arguments | {"kv_lens": kv_lens, "page_table": table})


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.once
@pytest.mark.parametrize("generation", ["7x", sweep("v5e")])
def test_decodes_share_steps(monkeypatch, generation):
    """Parts of any length, and more windows than the ring has."""
    monkeypatch.setattr(mosaic_tpu_write, "GROUPS", 2)
    kv_lens = (1, 16, 17, 33, 5, 40, 2, 3) * 3
    check(batch((1,) * 24, kv_lens, pad_tokens=0), generation)


@pytest.mark.once
@pytest.mark.usefixtures("small_tiles")
def test_a_sequence_of_no_numbers_spoils_no_other():
    """Its values are NaN; they stay in a buffer that a shorter one does not fill."""
    arguments = batch((1,) * 8, (60, 60, 60, 9, 1, 17, 3, 33), pad_tokens=0)
    pages = arguments["kv_pages"].copy()
    pages[1, arguments["page_table"][:3, : 60 // 8].ravel()] = np.nan
    spoiled = arguments | {"kv_pages": pages}
    with tpu_interpreter("v5e"):
        out = run(KERNEL, "paged", spoiled, layout="side_by_side")["out"]
    assert np.isnan(np.asarray(out[:3], np.float32)).all()
    sound = expected("paged", arguments)["out"]
    assert (deviation("out", out, sound).map[3:] <= 1).all()


@pytest.mark.once
@pytest.mark.usefixtures("small_tiles")
def test_large_pages_come_in_parts(monkeypatch):
    """Four parts a page, the last page's only as far as there are keys."""
    monkeypatch.setattr(mosaic_tpu, "MOST_ROWS", 8)
    check(batch((1, 3), (49, 40), heads=(2, 1), page_size=32, sliding_window=20))


@pytest.mark.once
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("head_size", "options"),
    [
        (80, {"dtype": "bfloat16"}),
        sweep(96, {"dtype": "bfloat16", "cache_dtype": "float8_e4m3fn", "scales": "tensor"}),
        *(sweep(size, {}) for size in PADDED),
    ],
)
def test_what_pads_the_heads_of_no_key_may_be_anything(head_size, options):
    def kernel(kv_pages, **others):
        is_none = jnp.isnan(kv_pages[:, :, :1, :, :1])
        spoiled = jnp.where(is_none, jnp.asarray(jnp.nan, kv_pages.dtype), kv_pages)
        return KERNEL(kv_pages=spoiled, **others)

    arguments = batch((1, 40, 3, 1), (35, 75, 9, 20), head_size=head_size, page_size=32, **options)
    check(arguments, kernel=kernel)


@pytest.mark.once
@pytest.mark.usefixtures("small_tiles")
def test_more_queries_than_keys_see_nothing():
    arguments = batch((5, 1, 20), (7, 3, 22), writes=False)
    arguments["kv_lens"] = np.array([2, 0, 9, 10**6], np.int32)
    lse = check(arguments | {"sinks": np.array([0, -np.inf, 1, 2], np.float32)})["lse"]
    assert np.isneginf(lse[[0, 1, 2, 5], 1]).all()


@pytest.mark.once
@pytest.mark.usefixtures("small_tiles")
def test_no_sequences():
    arguments = batch((3, 1), (9, 4))
    arguments["slot_mapping"] = np.full_like(arguments["slot_mapping"], -1)
    arguments["num_seqs"] = np.array(0, np.int32)
    check(arguments)


@pytest.mark.once
@pytest.mark.usefixtures("small_tiles")
def test_expired_pages_may_be_gone():
    """Pages before every query's window: their table entries are junk."""
    arguments = batch((1, 2), (60, 71), writes=False, sliding_window=6)
    table = arguments["page_table"] = arguments["page_table"].copy()
    table[0, : (60 - 6) // 8] = -7
    table[1, : (71 - 7) // 8] = 2**30
    given, arguments["page_table"] = arguments, np.maximum(table, 0) % 10
    with tpu_interpreter("v5e"):
        results = run(KERNEL, "paged", given, layout="side_by_side")
    for name, answer in expected("paged", arguments).items():
        assert deviation(name, results[name], answer).passed


@pytest.mark.once
def test_any_slot_mapping_is_honoured():
    """Tokens of one page far apart, in any order, to pages that nobody reads, and nowhere."""
    arguments = batch((44, 1, 4), (44, 3, 4), page_size=16, dtype="float32")
    slots = arguments["slot_mapping"].copy()
    rng = np.random.default_rng(0)
    slots[10:44] = rng.permutation(slots[10:44])
    slots[0] = 10**6
    _, num_pages, page_size = arguments["kv_pages"].shape[:3]
    unused = set(range(num_pages)) - set(slots[slots < 10**6] // page_size)
    slots[1] = max(unused) * page_size + 3
    oracle_slots = np.where(slots < 10**6, slots, -1)
    pages = np.nan_to_num(arguments["kv_pages"], nan=0.25)  # what is not written is read now
    arguments |= {"kv_pages": pages, "slot_mapping": oracle_slots}
    check(arguments)


def test_the_layout_converts_both_ways():
    rng = np.random.default_rng(0)
    stacked = KVCache(jnp.asarray(rng.standard_normal((2, 5, 8, 3, 80)), jnp.bfloat16))
    there = stacked.converted("side_by_side")
    assert there.pages.shape == LAYOUTS["side_by_side"].shape(5, 8, 3, 80)
    assert (there.num_pages, there.page_size, there.num_kv_heads) == (5, 8, 3)
    np.testing.assert_array_equal(there.converted("stacked").pages, stacked.pages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": None}, "v is None, must be given with k and slot_mapping"),
        ({"cu_q_lens": np.zeros(9, np.int32)}, "cu_q_lens has 9 entries, must have 4"),
        ({"kv_pages": np.zeros((5, 2, 1, 8, 96))}, "kv_pages has dtype float64, must be one of"),
        (
            {"kv_pages": np.zeros((5, 2, 1, 8, 96), np.float32)},
            "1 tiles of 96 lanes, must have 1 of 128: twice",
        ),
        ({"kv_pages": np.zeros((5, 2, 1, 12, 128), np.float32)}, "page_size is 12, must be a"),
        ({"soft_cap": -1.0}, "soft_cap is -1.0, must be above 0"),
    ],
)
def test_refuses(change, message):
    arguments = batch((3, 1), (9, 4))
    arguments["kv_pages"] = LAYOUTS["side_by_side"].join(*jnp.asarray(arguments["kv_pages"]))
    with pytest.raises(ValueError, match=re.escape(message)):
        mosaic_tpu.paged_attention(**arguments | change)


def needs_compiler(chip):
    missing = target_for(chip).missing()
    if missing:
        pytest.skip(f"no compiler for {chip} here: {missing}")


def compiles(chip, q_lens=(1, 40, 3), kv_lens=(70, 75, 9), **options):
    """Lets the chip's own compiler have the kernels, with a cache in the backend's layout."""
    needs_compiler(chip)
    arguments = batch(q_lens, kv_lens, pad_tokens=0, **options)
    pages = LAYOUTS["side_by_side"].join(*jnp.asarray(arguments["kv_pages"]))
    report = compile_for(chip, MosaicTpuBackend.kernels["paged"], arguments | {"kv_pages": pages})
    assert report.compiled, report.refusal


EVERYTHING = {"sinks": True, "alibi": True, "soft_cap": 8.0, "sliding_window": 20}


@pytest.mark.parametrize("chip", ["v5e", "7x", *map(sweep, ("v4", "v5p", "v6e"))])
def test_a_sample_compiles(chip):
    compiles(chip, heads=(8, 2), head_size=128, page_size=16, **EVERYTHING)


@pytest.mark.parametrize(
    ("chip", "larger", "asked", "most"),
    [
        ("v4", "v5e", {"head_size": 128, "num_kv_heads": 32}, 16),
        ("v4", "v5e", {"head_size": 192, "num_kv_heads": 9}, 8),
        ("v4", "7x", {"head_size": 64, "num_kv_heads": 9, "kv_cache_dtype": "float32"}, 8),
        ("7x", "v6e", {"head_size": 128, "num_kv_heads": 128}, 64),
        ("v5p", "v5e", {"head_size": 128, "num_kv_heads": 64, "kv_cache_dtype": "float32"}, 32),
        ("v6e", "cpu", {"head_size": 256, "num_kv_heads": 128}, 64),
    ],
)
def test_vmem_has_room_for_so_many_kv_heads(chip, larger, asked, most):
    def reasons(chip, **changed):
        config = AttentionSelectorConfig(dtype="bfloat16", op="paged", **asked | changed)
        return [str(r) for r in MosaicTpuBackend.validate_configuration(config, Device.named(chip))]

    (reason,) = reasons(chip)
    assert (
        f"num_kv_heads is {asked['num_kv_heads']}, must be at most {most} with head_size" in reason
    )
    assert not reasons(chip, num_kv_heads=most)
    assert not any("at most" in reason for reason in reasons(larger))


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("chip", "heads", "dtype"),
    [("7x", (64, 64, 128), "bfloat16"), ("7x", (32, 32, 256), "bfloat16"),
     ("7x", (32, 32, 128), "float32"), ("v5p", (64, 64, 128), "bfloat16"),
     ("v5e", (128, 128, 128), "bfloat16"), ("v6e", (64, 64, 128), "float32")],
)  # fmt: skip
def test_as_many_heads_as_are_declared_compile(chip, heads, dtype):
    *heads, head_size = heads
    compiles(chip, (2048, 1), (2048, 40), heads=heads, head_size=head_size, dtype=dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("heads", [(64, 16, 64), (64, 8, 128), (16, 16, 128), (8, 8, 256)])
@pytest.mark.parametrize("tokens", [1, 260])
def test_many_heads_compile_for_v4(heads, tokens):
    *heads, head_size = heads
    q_lens, kv_lens = (tokens, 1), (300, 40)
    compiles("v4", q_lens, kv_lens, heads=heads, head_size=head_size, dtype="bfloat16")


@pytest.mark.sweep
@pytest.mark.parametrize("chip", DECLARED.generation.values)
@pytest.mark.parametrize("head_size", SIZES)
@pytest.mark.parametrize("page_size", DECLARED.block_size.values)
@pytest.mark.parametrize("dtype", DECLARED.dtype.values)
def test_every_size_compiles(chip, head_size, page_size, dtype):
    compiles(chip, head_size=head_size, page_size=page_size, dtype=dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", DECLARED.generation.values)
@pytest.mark.parametrize("cache_dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "float32"])
@pytest.mark.parametrize("page_size", [8, 16, 64])
@pytest.mark.parametrize("dtype", DECLARED.dtype.values)
def test_every_cache_compiles(chip, cache_dtype, page_size, dtype):
    compiles(chip, head_size=80, page_size=page_size, dtype=dtype, cache_dtype=cache_dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", DECLARED.generation.values)
@pytest.mark.parametrize(
    ("heads", "cache_dtype"),
    [((32, 8, 64), "bfloat16"), ((32, 16, 128), "bfloat16"), ((32, 8, 128), "float8_e4m3fn"),
     ((32, 8, 128), "float32"), ((8, 1, 192), "int8"), ((16, 8, 256), "bfloat16")],
)  # fmt: skip
def test_few_tokens_of_each_sequence_compile(chip, heads, cache_dtype):
    """As many as are computed as a decode at most: eight."""
    *heads, head_size = heads
    options = {"dtype": "bfloat16", "cache_dtype": cache_dtype, "page_size": 16, **EVERYTHING}
    compiles(chip, (8,) * 8, (40,) * 8, heads=heads, head_size=head_size, **options)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", ["v6e", "7x"])
@pytest.mark.parametrize("cache_dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "float32"])
def test_every_cache_of_heads_in_twos_compiles(chip, cache_dtype):
    """Decodes alone, of head size 64 on 256-wide units: copies start between pieces of keys."""
    options = {"head_size": 64, "page_size": 16, "dtype": "bfloat16", "cache_dtype": cache_dtype}
    compiles(chip, (1, 1, 1), (70, 300, 9), **options)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", DECLARED.generation.values)
@pytest.mark.parametrize("head_size", SIZES)
@pytest.mark.parametrize("dtype", DECLARED.dtype.values)
def test_every_prompt_compiles(chip, head_size, dtype):
    """As many tokens as a whole tile has: keys first, where the others' batches are too short."""
    compiles(chip, (1, 260, 3), (70, 300, 9), head_size=head_size, page_size=64, dtype=dtype)


@pytest.mark.once
@pytest.mark.parametrize("chip", ["v6e", *map(sweep, ("v5e", "7x"))])
@pytest.mark.parametrize("head_size", [80, *map(sweep, (8, 64, 96, 128, 160, 192, 256))])
@pytest.mark.parametrize("dtype", ["bfloat16", sweep("float8_e4m3fn")])
def test_a_donated_cache_is_attended_where_it_lies(chip, head_size, dtype):
    """XLA copies it neither before the kernel nor behind it."""
    needs_compiler(chip)

    def shape(*sizes, dtype="int32"):
        return jax.ShapeDtypeStruct(sizes, dtype)

    q, new = (shape(64, heads, head_size, dtype="bfloat16") for heads in (32, 8))
    pages = shape(*MosaicTpuBackend.get_kv_cache_shape(512, 64, 8, head_size), dtype=dtype)
    batch = {"page_table": shape(64, 48), "kv_lens": shape(64), "cu_q_lens": shape(65),
             "num_seqs": shape(), "slot_mapping": shape(64)}  # fmt: skip
    arguments = {"q": q, "k": new, "v": new, "kv_pages": pages, **batch}
    report = compile_for(chip, MosaicTpuBackend.kernels["paged"], arguments)
    assert report.compiled, report.refusal
    cache_bytes = pages.size * pages.dtype.itemsize
    assert report.memory["aliased"] == cache_bytes
    assert report.memory["temporaries"] < cache_bytes / 20
