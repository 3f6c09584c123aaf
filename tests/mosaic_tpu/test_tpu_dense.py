"""Dense attention on TPU, in the TPU interpreter against the oracle, and by the TPU compiler.

Tiles are cut to 128 queries and 128 keys, and major blocks to two of them, so that few tokens have
rows of tiles with nothing, something and everything to see, and odd and even numbers of tiles.
"""

import dataclasses
import functools
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_kernels import CUT, SHAPE, compared, problem, use
from masked_inputs import masked_inputs
from tpu_interpreter import tpu_interpreter

from attnsel_jax.aot import compile_for, target_for
from attnsel_jax.aot.arguments import dense_arguments
from attnsel_jax.backends.mosaic_tpu import MosaicTpuBackend
from attnsel_jax.compare.comparison import PASS
from attnsel_jax.platforms import CHIPS, Device
from attnsel_jax.problems import QUICK, Problem
from attnsel_jax.xla import reference
from pallas_kernels import masks, tpu_chip
from pallas_kernels.dense import (
    mosaic_tpu,
    mosaic_tpu_schedule,
    mosaic_tpu_short,
    mosaic_tpu_tiles,
    mosaic_tpu_walk,
)
from pallas_kernels.dense.mosaic_tpu_schedule import Masks, Static, work_list
from pallas_kernels.dense.mosaic_tpu_tiles import Tiles

KERNEL = MosaicTpuBackend.kernels["dense"]
LONG = mosaic_tpu_short.LONGEST + 164  # for the compiler: shorter calls have other kernels


@pytest.fixture(autouse=True)
def _cut_tiles(monkeypatch):
    use(CUT, monkeypatch)


# Each reaches several tiles, and what a tile alone cannot show.
TILED = (
    problem("causal", causal=True, gradients=True),
    problem("bfloat16, head size 128, odd lengths", causal=True, dtype="bfloat16", head_size=128,
            q_len=257, kv_len=259, heads=(2, 2), gradients=True),
    problem("offsets, empty rows", batch=2, kv_len=350, q_offset=(-140, 13), causal=True,
            heads=(1, 1), gradients=True),
    problem("lengths", batch=2, kv_len=341, q_lens=(260, 118), kv_lens=(341, 123)),
    problem("lengths past the arrays", batch=2, q_len=130, kv_len=70, heads=(1, 1),
            q_lens=(131, 900), kv_lens=(100, 1000), gradients=True),
    problem("segments, some blocks empty", segments=3, causal=True),
    problem("slopes, over two major blocks of keys", alibi=True, heads=(4, 2), q_len=130,
            kv_len=300, sliding_window=(None, 200), dtype="bfloat16", gradients=True),
    problem("slopes, two tiles with a mask", alibi=True, heads=(1, 1), q_len=100, kv_len=250,
            gradients=True),
    problem("packed, padded", segments=3, batch=2, q_len=150, kv_len=270, q_lens=(150, 118),
            kv_lens=(270, 123), sinks=True, soft_cap=8.0, gradients=True),
    problem("bias for keys and heads, two-sided window", bias=(False, True, False, True), batch=2,
            q_len=140, heads=(2, 2), sliding_window=(50, 90), gradients=True),
    problem("everything", batch=2, sinks=True, alibi=True, soft_cap=8.0, q_len=37,
            q_lens=(37, 21), kv_lens=(37, 30), bias=(True, True, True, True), segments=2,
            sliding_window=20, attention_chunk_size=24, causal=True, gradients=True),
)  # fmt: skip
HEADS = tuple(
    problem(f"head size {size}, {dtype}", head_size=size, head_size_v=min(size, limit), dtype=dtype,
            q_len=139, causal=True, gradients=True)
    for size, limit in (*((n, n) for n in (64, 80, 96, 112, 128, 256)), (192, 128))
    for dtype in ("float32", "bfloat16")
)  # fmt: skip
LONGER = (
    problem("two-sided window", sliding_window=(50, 90), gradients=True),
    problem("segments and lengths", segments=3, batch=2, kv_len=341, q_lens=(260, 118),
            kv_lens=(341, 123), gradients=True),
    problem("bias for keys, over three major blocks", bias=(True, False, False, True), q_len=30,
            kv_len=600, heads=(2, 2), gradients=True),
    problem("bias for queries, scale below 0", bias=(False, True, True, False), scale=-0.2,
            gradients=True),
    problem("everything, many tiles", batch=2, sinks=True, alibi=True, soft_cap=8.0,
            q_lens=(260, 210), bias=(True, True, True, True), segments=2, sliding_window=150,
            kv_lens=(260, 250), attention_chunk_size=200, causal=True, gradients=True),
)  # fmt: skip


MASKED = {
    "of pairs": ((True, False, True, True), {"batch": 2, "causal": True, "q_offset": 100}),
    "of heads, with a sink": ((False, True, True, True), {"heads": (4, 2), "sinks": True}),
    "of keys": ((True, False, False, True), {"batch": 2, "q_len": 140, "dtype": "bfloat16"}),
    "of keys, in segments": ((True, True, False, True), {"batch": 2, "q_len": 140, "segments": 2}),
    "of queries, and a bias": (
        (False, False, True, False),
        {"q_len": 140, "kv_len": 100, "bias": (False, True, True, True), "kv_lens": (77,)},
    ),
}


@pytest.mark.once
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case.startswith("of heads") else pytest.mark.sweep)
        for case in MASKED
    ],
)
def test_masks(case):
    of, options = MASKED[case]
    options = SHAPE | options | {"of": of}
    check(Problem(case, "dense", case, masked_inputs, options, gradients=True))


# "everything" has these, too.
ONCE = ("slopes, over two major blocks of keys", "packed, padded",
        "bias for keys and heads, two-sided window", "segments, some blocks empty",
        "lengths past the arrays")  # fmt: skip


def check(case, generation="v5e", *, detect_races=False):
    row = compared(case, generation, detect_races=detect_races)
    assert row.verdict == PASS, str(row)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.once if c.name in ONCE else ()) for c in TILED],
    ids=lambda case: case.name,
)
def test_tiles_agree_with_the_oracle(case):
    check(case, detect_races=case.name == "causal")


@pytest.mark.parametrize(
    ("case", "tiles"),
    [
        (problem("dead parts", q_len=1024, heads=(1, 1), causal=True, soft_cap=8.0, sinks=True,
                 gradients=True), Tiles(256, 256, 128, 1024, 1024)),
        pytest.param(
            problem("five free tiles to a run", q_len=640, heads=(1, 1), causal=True,
                    gradients=True), Tiles(128, 128, 128, 640, 640, longest=7),
            marks=pytest.mark.once,
        ),
        pytest.param(
            problem("major blocks, keys before all queries", q_len=1024, kv_len=1536, q_offset=512,
                    causal=True, alibi=True, gradients=True), Tiles(128, 128, 128, 512, 512),
            marks=pytest.mark.sweep,
        ),
    ],
    ids=lambda x: getattr(x, "name", ""),
)  # fmt: skip
def test_a_diagonal_in_one_run_agrees_with_the_oracle(case, tiles, monkeypatch):
    use(tiles, monkeypatch)
    for key in mosaic_tpu_tiles.TILES:
        if key[2].startswith("forward"):  # takes two slots in turn
            monkeypatch.setitem(mosaic_tpu_tiles.TILES, key, dataclasses.replace(tiles, longest=0))
    check(case, detect_races=True)


def test_a_scale_of_zero_weighs_all_keys_alike():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 20, 1, 8)) for i in range(3))
    with tpu_interpreter():
        out, lse = mosaic_tpu.dense_attention(q, k, v, scale=0.0)
    np.testing.assert_allclose(out, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), rtol=1e-5,
                               atol=1e-6)  # fmt: skip
    np.testing.assert_allclose(lse, np.log(20), rtol=1e-6)


@pytest.mark.once
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 200), pytest.param((1, 2, 200, 200), marks=pytest.mark.sweep)]
)
def test_rows_that_a_bias_hides_whole(shape):
    """Left padding under a causal mask: what such a row gives is even over its keys."""
    keys = [jax.random.key(i) for i in range(5)]
    q, k, v, dout = (jax.random.normal(key, (1, 200, 2, 64)) for key in keys[:4])
    dlse = jax.random.normal(keys[4], (1, 200, 2))
    bias = jnp.zeros(shape).at[..., :150].set(-1e9)

    def everything(kernel):
        attend = functools.partial(kernel, causal=True)
        results, pull = jax.vjp(lambda *x: attend(*x[:3], bias=x[3]), q, k, v, bias)
        return results, pull((dout, dlse))

    with tpu_interpreter():
        ours = jax.jit(everything, static_argnums=0)(mosaic_tpu.dense_attention)
    plain = everything(reference.dense_attention)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


ACCEPTED = [
    case
    for case in QUICK
    if case.op == "dense"
    and not MosaicTpuBackend.validate_configuration(case.config, Device.named("v5e"))
]


# What `TILED` does not have; the sweep has them all.
UNLIKE_TILED = ("chunked", "encoder", "head-sizes", "key-bias", "odd", "one-query")


@pytest.mark.parametrize(
    "case",
    [
        case if case.name.endswith(UNLIKE_TILED) else pytest.param(case, marks=pytest.mark.sweep)
        for case in ACCEPTED
    ],
    ids=lambda case: case.name,
)
def test_the_contract_s_problems_agree_with_the_oracle(case):
    check(dataclasses.replace(case, gradients=False), "v6e")


@pytest.mark.sweep
@pytest.mark.parametrize("case", [*HEADS, *LONGER, *ACCEPTED], ids=lambda case: case.name)
def test_longer_problems_and_every_gradient_agree_with_the_oracle(case):
    check(case, detect_races=True)


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "tiles"),
    [pytest.param({"causal": True, "sliding_window": 200}, Tiles(128, 256, 128, 384, 256),
                  marks=pytest.mark.sweep),
     ({}, Tiles(128, 128, 128, 384, 384, together=4))],
    ids=["other sizes", "four together, two left over"],
)  # fmt: skip
def test_tiles_change_no_numbers(options, tiles, monkeypatch):
    """The same tiles give the same bits; others differ in the order of float32 sums."""
    shape = (1, 300, 1, 64)
    q, k, v, dout = (jax.random.normal(jax.random.key(i), shape) for i in range(4))

    def results(times):
        def attend(q, k, v):
            return mosaic_tpu.dense_attention(q, k, v, **options)

        @jax.jit
        def both(q, k, v):
            (out, lse), pull_back = jax.vjp(attend, q, k, v)
            return out, lse, *pull_back((dout, jnp.ones_like(lse)))

        with tpu_interpreter(detect_races=False):
            return [[np.asarray(x) for x in both(q, k, v)] for _ in range(times)]

    first, second = results(2)
    use(tiles, monkeypatch)
    names = ["out", "lse", "dq", "dk", "dv"]
    for name, cut, again, other in zip(names, first, second, *results(1), strict=True):
        np.testing.assert_array_equal(cut, again, err_msg=name)
        np.testing.assert_allclose(other, cut, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [((128, 384, 256, 256, 384), "block_kv is 384, must be a multiple of 256"),
     ((256, 128, 128, 384, 128), "major_q is 384, must be a multiple of 256"),
     ((128, 128, 128, 128, 128, 3), "together is 3, must be a multiple of 2")],
)  # fmt: skip
def test_tiles_that_are_not_whole_are_refused(sizes, text):
    with pytest.raises(ValueError, match=text):
        Tiles(*sizes)


def test_the_table_has_every_call_that_is_declared():
    shapes = [mosaic_tpu_tiles.shape_class(of, size, bias) for of in ("forward", "backward")
              for size in (128, 136) for bias in (False, True)]  # fmt: skip
    dtypes = MosaicTpuBackend.capabilities["dense"].dtype.values
    generations = MosaicTpuBackend.capabilities["dense"].generation.values
    assert set(mosaic_tpu_tiles.TILES) == set(itertools.product(generations, dtypes, shapes))


def static(**options):
    sizes = {"q_len": 1000, "kv_len": 1000, "sliding_window": (None, None), "causal": True}
    return Static(
        **{"scale": 1.0, "attention_chunk_size": None, "soft_cap": None, "group": 1, "batch": 1,
           "q_offset": 0, "has_kv_lens": False, "by_arrays": False, "tiles": CUT} | sizes | options
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": (300, None)}, {"q_offset": -200}, {"q_offset": 77, "q_len": 130},
     {"attention_chunk_size": 256}, {"causal": False, "sliding_window": (60, 200)}],
    ids=str,
)  # fmt: skip
def test_a_work_list_is_the_same_constant_or_computed(options):
    call = static(**options)
    constant = work_list(call, Masks(*[None] * 6))
    offset = jnp.full(1, call.q_offset, jnp.int32)
    computed = work_list(call, Masks(None, None, offset, None, None, None))
    assert isinstance(constant.rows, np.ndarray)
    for a, b in zip(constant, computed, strict=True):
        assert a.dtype == np.int32
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("options", "tiles"),
    [({"causal": False}, 64), ({}, 36), ({"sliding_window": (1, None)}, 8),
     ({"sliding_window": (129, None)}, 15), ({"attention_chunk_size": 256}, 12)],
    ids=str,
)  # fmt: skip
def test_no_tile_is_computed_that_nobody_sees(options, tiles):
    """8 x 8 tiles of 128; a window of 129 reaches one tile back."""
    work = work_list(static(**options), Masks(*[None] * 6))
    kinds = work.majors[[mosaic_tpu_schedule.FREE, mosaic_tpu_schedule.MASKED]]
    assert kinds.sum() == tiles


def test_free_tiles_go_together_and_the_rest_is_masked():
    """8 x 8 tiles of 128 in one major block: 28 lie below the diagonal; 30 are whole."""
    tiles = dataclasses.replace(CUT, major_q=1024, major_kv=1024)
    schedule = mosaic_tpu_schedule

    def of(together, **options):
        call = static(tiles=dataclasses.replace(tiles, together=together), **options)
        rows, _, majors, _ = work_list(call, Masks(*[None] * 6))
        free = rows[schedule.FREE_STOP] - rows[schedule.FREE_START]
        assert free.sum() == majors[schedule.FREE].item()
        return free.tolist(), majors[schedule.MASKED].item()

    assert of(4) == ([0, 1, 2, 3, 4, 5, 6, 7], 8)
    assert of(6) == ([0, 1, 2, 3, 4, 5, 6, 3], 12)
    assert of(20) == ([0, 1, 2, 3, 4, 5, 5, 0], 16)
    assert of(32) == ([0] * 8, 36)


@pytest.mark.parametrize(
    ("options", "tiles"),
    [
        ({}, 8),
        ({"q_len": 512, "q_offset": 512}, 4),
        ({"q_len": 128, "kv_len": 128}, 1),
        ({"q_len": 256}, 0),  # one free tile is over
        ({"q_len": 512, "q_offset": 640}, 3),  # the last row is past the keys
        ({"q_offset": 1, "q_len": 512}, 0),
        ({"q_len": 1000}, 0),
        ({"causal": False}, 0),
        ({"sliding_window": (700, None)}, 0),
        ({"attention_chunk_size": 1024}, 0),
        ({"by_arrays": True}, 0),
    ],
    ids=str,
)
def test_masked_tiles_are_known_to_be_the_diagonal(options, tiles):
    sizes = {"q_len": 1024, "kv_len": 1024} | options
    call = static(tiles=dataclasses.replace(CUT, major_q=1024, major_kv=1024), **sizes)
    call = dataclasses.replace(call, tiles=mosaic_tpu_tiles.fitted(call.tiles, call.q_len, 1024))
    assert call.diagonal == tiles


@pytest.mark.parametrize(
    ("length", "together"), [(1024, 7), (640, 5), (384, 3), (256, 1), (128, 4)]
)
def test_free_tiles_that_are_known_are_all_taken_in_equal_runs(length, together):
    """28, 10, 3, 1 and no free tiles below the diagonal."""
    tiles = Tiles(128, 128, 128, length, length, 4, longest=7)
    call = static(q_len=length, kv_len=length, tiles=tiles)
    assert call.together == together
    assert call.diagonal == length // 128


@pytest.mark.parametrize("together", [2, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False, "kv_len": 900}, {"sliding_window": (300, 100), "causal": False},
     {"attention_chunk_size": 300, "q_offset": 77}, {"q_len": 130, "q_offset": 800}],
    ids=str,
)  # fmt: skip
def test_a_walk_meets_every_tile_once(options, together, monkeypatch):
    """By plain numbers: free tiles and masked ones, each of its kind, all that anyone sees."""
    plain = types.SimpleNamespace(where=lambda condition, a, b: a if condition else b)
    monkeypatch.setattr(mosaic_tpu_walk, "jnp", plain)
    call = static(tiles=Tiles(128, 128, 128, 1024, 512, together), **options)
    work, schedule = work_list(call, Masks(*[None] * 6)), mosaic_tpu_schedule
    some, every = np.zeros((2, call.q_majors * call.rows, call.kv_majors * call.columns), bool)
    for i, j in np.ndindex(call.q_majors, call.kv_majors):
        walk = mosaic_tpu_walk.Walk(call, work, 0, i, j)
        for masked, count, first in ((False, schedule.FREE, schedule.FIRST_FREE),
                                     (True, schedule.MASKED, schedule.FIRST_MASKED)):  # fmt: skip
            count, row = walk.of_major(count), walk.of_major(first)
            tile = mosaic_tpu_walk.Tile(row, walk.start_of(row, masked)) if count else None
            for _ in range(count):
                at = i * call.rows + tile.row, j * call.columns + tile.column
                assert not some[at], "met before"
                some[at], every[at] = True, not masked
                tile = walk.following(tile, masked)
    q_pos = call.q_offset + np.arange(some.shape[0] * 128)[:, None]
    kv_pos = np.arange(some.shape[1] * 128)
    seen = masks.seen(q_pos, kv_pos, **call.positions)
    seen = np.broadcast_to(True if seen is None else seen, (q_pos.size, kv_pos.size))
    exists = (q_pos < call.q_offset + call.q_len) & (kv_pos < call.kv_len)

    def of_tiles(x, reduce):
        return reduce(x.reshape(some.shape[0], 128, some.shape[1], 128), axis=(1, 3))

    np.testing.assert_array_equal(some, of_tiles(seen & exists, np.any))
    whole = of_tiles(seen & (kv_pos < call.kv_len), np.all)
    assert not (every & ~whole).any(), "a tile that needs a mask has none"


def test_every_row_and_column_knows_the_tile_it_begins_with():
    """4 x 5 tiles of 128, two to a major block; the last row does not reach the first keys."""
    schedule = mosaic_tpu_schedule
    call = static(q_len=512, kv_len=600, sliding_window=(200, None))
    rows, columns, majors, _ = work_list(call, Masks(*[None] * 6))
    here, of_all = rows[[schedule.FIRST_HERE, schedule.FIRST_OF_ALL]].reshape(2, 3, 4).tolist()
    assert here == [[0, 0, 0, 1], [-1, -1, 0, 0], [-1] * 4]
    assert of_all == [[0, 0, 0, 1], [-1] * 4, [-1] * 4]
    assert columns[schedule.FIRST_ROW].tolist()[:4] == [0, 1, 2, 3]
    assert columns[schedule.KEYS_LEFT_OUT].tolist() == [0, 0, 0, 0, 1, 1]
    assert majors[schedule.QUERIES_LEFT_OUT].tolist() == [0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("options", "all_used"),
    [({"q_len": 1024, "kv_len": 1024}, True), ({}, False),
     ({"q_len": 900, "kv_len": 1024}, False),
     ({"q_len": 1024, "kv_len": 1024, "by_arrays": True}, False),
     ({"sliding_window": (300, None), "kv_len": 1024}, False),
     ({"causal": False, "kv_len": 1024}, True)],
    ids=str,
)  # fmt: skip
def test_keys_that_nobody_sees_are_known(options, all_used):
    """Of 1000 keys the last tile has some that do not exist."""
    assert static(**options).uses_every_key == all_used


def test_major_blocks_that_nobody_sees_are_not_loaded():
    """A grid step without work keeps the index of a block that is there already."""
    work = work_list(static(sliding_window=(100, None)), Masks(*[None] * 6))
    first, last = (
        work.majors[row].reshape(4, 4)
        for row in (mosaic_tpu_schedule.FIRST_MAJOR, mosaic_tpu_schedule.LAST_MAJOR)
    )
    np.testing.assert_array_equal(first, np.maximum(np.arange(4) - 1, 0)[:, None] + np.zeros(4))
    np.testing.assert_array_equal(last, np.arange(4)[:, None] + np.zeros(4))


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("mask", {"mask": jnp.ones((1, 1, 4, 4), int)}, "mask has dtype int32, must be one of"),
        ("dtype", {"dtype": "float16"}, "q has dtype float16, must be one of float32, bfloat16"),
        ("head size", {"head_size": 12}, "head_dim is 12, must be a multiple of 8 up to 256"),
        ("large head", {"head_size": 264}, "head_dim is 264, must be a multiple of 8 up to 256"),
        ("segments", {"q_segment_ids": jnp.zeros((1, 4), jnp.int32)}, "must be both or neither"),
        ("soft cap", {"soft_cap": 0.0}, "soft_cap is 0.0, must be above 0"),
        ("window", {"sliding_window": (3, 0)}, "sliding_window is 0, must be above 0"),
        ("offset", {"q_offset": jnp.zeros(3, jnp.int32)}, r"q_offset is int32\[3\], must be"),
    ],
)  # fmt: skip
def test_what_it_does_not_take_is_refused(name, arguments, text):
    size, dtype = arguments.pop("head_size", 8), arguments.pop("dtype", "float32")
    x = jnp.zeros((1, 4, 2, size), dtype)
    with pytest.raises(ValueError, match=text):
        mosaic_tpu.dense_attention(x, x, x, **arguments)


def compiles(chip, **options):
    """In a process of its own, which has the table as it is."""
    missing = target_for(chip).missing()
    if missing:
        pytest.skip(f"no compiler for {chip} here: {missing}")
    options = {"batch": 1, "q_len": LONG, "kv_len": LONG, "num_heads": 4, "num_kv_heads": 2,
               "head_size": 128, "dtype": "bfloat16", "causal": True} | options  # fmt: skip
    gradients = options.pop("gradients", False)
    report = compile_for(chip, KERNEL, dense_arguments(**options), gradients=gradients)
    assert report.compiled, report.refusal


DENSE = MosaicTpuBackend.capabilities["dense"]
TPUS = [
    name for name, chip in CHIPS.items() if chip.generation and chip.generation in DENSE.generation
]


def backward_call(gradients, *given):
    """The line of the lowered program that calls the backward kernel."""
    with tpu_chip.for_generation("v6e"):
        lowered = jax.jit(gradients).trace(*given).lower(lowering_platforms=("tpu",))
    (call,) = (line for line in lowered.as_text().splitlines() if "attention_backward" in line)
    return call


@pytest.mark.once
@pytest.mark.parametrize(
    "longest", [0, pytest.param(mosaic_tpu_short.LONGEST, marks=pytest.mark.sweep)]
)
def test_the_gradient_of_a_constant_bias_is_not_made(longest, monkeypatch):
    """It would be as large as all logits, in float32; the other gradients are the same."""
    monkeypatch.setattr(mosaic_tpu_short, "LONGEST", longest)
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(x, jnp.float32) for x in rng.normal(size=(3, 1, 130, 1, 64))]
    arrays.append(jnp.asarray(rng.normal(size=(1, 1, 130, 130)), jnp.float32))

    def gradients(arrays, asked):
        def loss(*given):
            q, k, v, bias = (*given, *arrays[len(given) :])
            return jnp.sum(jnp.sin(mosaic_tpu.dense_attention(q, k, v, bias=bias)[0]))

        return jax.grad(loss, range(asked))(*arrays[:asked])

    for asked in (3, 4):  # dk, dv, dq, and of all logits
        call = backward_call(functools.partial(gradients, asked=asked), arrays)
        assert call.rpartition("->")[2].count("tensor<") == asked
    with tpu_interpreter("v5e"):
        some, every = (jax.jit(gradients, static_argnums=1)(arrays, n) for n in (3, 4))
    for found, expected in zip(some, every[:3], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_what_the_backward_writes_into_is_in_hbm():
    """In VMEM, where XLA puts small arrays, an operand's block is the operand, and passes its end.

    q, k and dout lose their NaN there.
    """
    x = jax.ShapeDtypeStruct((1, 130, 1, 64), jnp.float32)
    gradients = jax.grad(lambda *x: jnp.sum(mosaic_tpu.dense_attention(*x)[0]), (0, 1, 2))
    call = backward_call(gradients, x, x, x)
    in_hbm = re.findall(r"operand_index\W+22:(\d+)\W+22color\W+22:0", call)
    lists, (q, k, _, dout) = 5, range(4)
    assert [int(operand) - lists for operand in in_hbm] == [q, k, dout]


@pytest.mark.parametrize("chip", ["7x", pytest.param("v4", marks=pytest.mark.sweep)])
def test_it_compiles_for_a_tpu(chip):
    compiles(chip, gradients=True)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_size", [8, 64, 72, 80, 96, 112, 128, 192, 256])
def test_every_declared_size_compiles_for_every_tpu(chip, dtype, head_size):
    compiles(chip, dtype=dtype, head_size=head_size, gradients=True)


def everything(dtype, head_size, length=LONG, *, bias, mask):
    """Arguments of a call with every feature at once, as shapes."""

    def shape(*sizes, of="float32"):
        return jax.ShapeDtypeStruct(sizes, of)

    more = {"bias": shape(1, 4, length, length, of=dtype)} if bias else {}
    more |= {"mask": shape(1, 4, length, length, of="bool")} if mask else {}
    ids = shape(1, length, of="int32")
    one = shape(1, of="int32")
    sizes = {"q_len": length, "kv_len": length, "head_size": head_size, "dtype": dtype}
    return sizes | more | {
        "alibi_slopes": shape(4), "sinks": shape(4), "soft_cap": 20.0, "sliding_window": 700,
        "q_segment_ids": ids, "kv_segment_ids": ids, "q_lens": one, "kv_lens": one,
    }  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_size", [128, 256])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_everything_at_once_compiles_for_every_tpu(chip, dtype, head_size, bias, mask):
    compiles(chip, **everything(dtype, head_size, bias=bias, mask=mask), gradients=True)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_a_mask_compiles_for_every_tpu(chip, dtype, head_size):
    mask = jax.ShapeDtypeStruct((1, 1, LONG, LONG), bool)
    compiles(chip, dtype=dtype, head_size=head_size, mask=mask, causal=False, gradients=True)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", TPUS)
def test_a_smaller_head_of_values_compiles_for_every_tpu(chip):
    v = jax.ShapeDtypeStruct((1, LONG, 2, 128), "bfloat16")
    compiles(chip, head_size=192, v=v, gradients=True)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("lengths", [(1, 33), (37, 37), (3, 271), (8192, 8192), (4096, 20000)])
def test_every_length_compiles_for_every_tpu(chip, lengths):
    compiles(chip, q_len=lengths[0], kv_len=lengths[1], dtype="float32", gradients=True)
