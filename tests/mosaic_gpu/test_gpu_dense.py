"""Dense attention on GPUs, in the Mosaic GPU interpreter against the oracle, and by the compiler.

Key tiles are cut to 64 keys where a problem is to have many of them: first and last tiles with
something to mask on either side, tiles with nothing to mask, and slots of the ring used again.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_compiler import compiled_cleanly
from gpu_interpreter import RACE, gpu_interpreter, needs_gpu_interpreter

from attnsel_jax.aot.arguments import dense_arguments
from attnsel_jax.backends.mosaic_gpu import MosaicGpuBackend
from attnsel_jax.compare import compare
from attnsel_jax.compare.comparison import FAIL, PASS
from attnsel_jax.platforms import Device
from attnsel_jax.problems import QUICK, Problem
from attnsel_jax.problems.dense_inputs import dense_inputs
from pallas_kernels.dense import (
    mosaic_gpu,
    mosaic_gpu_forward,
    mosaic_gpu_geometry,
    mosaic_gpu_plan,
    mosaic_gpu_softmax,
    mosaic_gpu_tiles,
)

needs_gpu_interpreter()

KERNEL = MosaicGpuBackend.kernels["dense"]
CUT = mosaic_gpu_tiles.Tiles(block_kv=64, stages=2, turns=True)
SHAPE = {"heads": (2, 1), "head_size": 64, "q_len": 260, "dtype": "bfloat16"}


STATIC = mosaic_gpu_geometry.Static(
    scale=1.0, causal=False, sliding_window=(None, None), attention_chunk_size=None, soft_cap=None,
    offset=0, lengths=False, group=1, batch=1, num_q_heads=1, q_len=1, kv_len=1, head_dim=64,
    head_dim_v=64, bias=None, segments=False, alibi=False, sinks=False, tiles=CUT,
    capability=(9, 0),
)  # fmt: skip


def problem(name, **options):
    return Problem(name, "dense", name, dense_inputs, SHAPE | options)


TILED = (
    problem("causal, head size 128, odd lengths", causal=True, q_len=257, kv_len=259,
            heads=(2, 2), head_size=128),
    problem("window", causal=True, sliding_window=70, q_len=300),
    problem("two-sided window, keys past the queries", sliding_window=(50, 90), q_len=70,
            kv_len=300),
    problem("offsets, empty rows, float16", batch=2, q_len=140, kv_len=350, q_offset=(-80, 150),
            causal=True, dtype="float16"),
    problem("lengths", batch=2, q_len=130, kv_len=333, q_lens=(130, 60), kv_lens=(330, 123)),
    problem("lengths past the arrays", batch=2, q_len=130, kv_len=70, q_lens=(131, 900),
            kv_lens=(100, 1000)),
    problem("segments", segments=3, causal=True, q_len=140, batch=2, q_lens=(140, 77)),
    problem("everything", batch=2, sinks=True, alibi=True, soft_cap=8.0, q_len=150,
            q_lens=(150, 70), kv_len=170, kv_lens=(170, 130), bias=(True, True, True, True),
            segments=2, sliding_window=90, attention_chunk_size=100, causal=True),
)  # fmt: skip


@pytest.fixture
def cut_tiles(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "forward_tiles", lambda *_, **__: CUT)


def compared(case, chip="h200"):
    with gpu_interpreter(chip):
        (row,) = compare([case], {"MOSAIC_GPU": mosaic_gpu.dense_attention}).rows
        assert row.verdict in (PASS, FAIL), str(row)
    return row


def check(case):
    row = compared(case)
    assert row.verdict == PASS, str(row)


# "everything" has these, too.
ON_DEMAND = ("window", "lengths", "segments")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.sweep if c.name in ON_DEMAND else ()) for c in TILED],
    ids=lambda case: case.name,
)
def test_many_tiles_agree_with_the_oracle(case, cut_tiles):
    check(case)


def few_cores(monkeypatch, cores=2):
    """A GPU of few cores: each walks over blocks of queries; False = it is never planned."""
    planned = mosaic_gpu_plan.plan
    monkeypatch.setattr(
        mosaic_gpu_forward,
        "plan",
        lambda static, together, _: planned(static, together, cores) if cores else None,
    )


WALKS = (
    problem("causal, whole tiles", causal=True, q_len=384, kv_len=384, heads=(2, 1)),
    problem("full, odd lengths", q_len=257, kv_len=150, heads=(2, 2)),
    problem("window, chunks, a sink", causal=True, sliding_window=90, attention_chunk_size=100,
            sinks=True, q_len=300, kv_len=300, heads=(3, 1)),
    problem("values of shorter heads", causal=True, q_len=200, kv_len=130, head_size=192,
            head_size_v=128),
)  # fmt: skip


# One of them on each push; the others are swept.
WALKED = [(case, *sizes) for case in WALKS for sizes in ((1, 2), (2, 2), (2, 3))]
ON_EACH_PUSH = (7,)


@pytest.mark.parametrize(
    ("case", "slots", "consumers"),
    [
        pytest.param(*each, marks=() if at in ON_EACH_PUSH else pytest.mark.sweep)
        for at, each in enumerate(WALKED)
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_core_that_walks_computes_the_same_numbers(case, slots, consumers, monkeypatch):
    tiles = dataclasses.replace(CUT, walking=(2, slots), consumers=consumers)
    monkeypatch.setattr(mosaic_gpu, "forward_tiles", lambda *_, **__: tiles)
    x = {name: jnp.asarray(v) if hasattr(v, "shape") else v for name, v in case.make().items()}
    found = []
    for cores in (2, False):
        with monkeypatch.context() as patch, gpu_interpreter():
            few_cores(patch, cores)
            found.append(mosaic_gpu.dense_attention(**x))
    for walked, apart in zip(*found, strict=True):
        np.testing.assert_array_equal(np.asarray(walked), np.asarray(apart))
    with monkeypatch.context() as patch:
        few_cores(patch)
        check(case)


def test_a_plan_has_every_block_once_and_balances():
    static = dataclasses.replace(
        STATIC, causal=True, batch=2, num_q_heads=4, q_len=4096, kv_len=4096
    )
    table = mosaic_gpu_plan.plan(static, 2, 7)
    walks = [row[1 : 1 + row[0]] for row in table]
    np.testing.assert_array_equal(np.sort(np.concatenate(walks)), np.arange(2 * 4 * 32))
    cost = [sum(64 - 2 * int(n // 2 % 32) for n in walk) for walk in walks]
    assert max(cost) - min(cost) <= 64


def as_declared(case):
    """A problem of the contract in a dtype and a head size that are declared, if it can be."""
    options = dict(case.options)
    if options["dtype"] == "float32":
        options["dtype"] = "bfloat16"
    return dataclasses.replace(case, options=options, gradients=False)


ACCEPTED = [
    as_declared(case)
    for case in QUICK
    if case.op == "dense"
    and not MosaicGpuBackend.validate_configuration(as_declared(case).config, Device.named("h200"))
]


# What the problems of many tiles above do not have is run by default.
SINGLE = ("key-bias", "head-sizes", "one-query", "encoder")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case.name.split(".")[-1] in SINGLE else pytest.mark.sweep)
        for case in ACCEPTED
    ],
    ids=lambda case: case.name,
)
def test_the_contract_s_problems_agree_with_the_oracle(case):
    check(case)


# What is planted -> a problem that must then go red.


def ignoring(**fields):
    """The forward kernel told of a call without these."""
    forward = mosaic_gpu_forward.forward

    def faulty(static, x):
        return forward(dataclasses.replace(static, **fields), x)

    return mosaic_gpu.FORWARD, (9, 0), faulty


def interval(low=0, high=0):
    """Every query's keys, moved at either end."""
    seen = mosaic_gpu_geometry.seen_interval

    def faulty(static, row, query):
        first, last = seen(static, row, query)
        return first + low, last + high

    return mosaic_gpu_softmax, "seen_interval", faulty


def unmasked_tile():
    """One tile too many without masks."""
    tiles = mosaic_gpu_forward.key_tiles

    def faulty(*args):
        found = tiles(*args)
        return found._replace(inner_stop=jnp.minimum(found.inner_stop + 1, found.stop))

    return mosaic_gpu_forward, "key_tiles", faulty


def unscaled():
    """Sums that are not brought to the new maximum."""
    step = mosaic_gpu_forward.softmax_step

    def faulty(*args, **options):
        p, alpha, after = step(*args, **options)
        return p, jnp.ones_like(alpha), after

    return mosaic_gpu_forward, "softmax_step", faulty


FAULTS = {
    "unseen values stay": (
        lambda: (mosaic_gpu_forward, "clear_unseen", lambda *_: None),
        problem("keys end inside a tile", q_len=20, kv_len=80, kv_lens=(70,), heads=(1, 1)),
    ),
    "causal, one key more": (
        lambda: interval(high=1), problem("causal", causal=True, q_len=40, heads=(1, 1)),
    ),
    "window, one key less": (
        lambda: interval(low=1),
        problem("window", causal=True, sliding_window=9, q_len=40, heads=(1, 1)),
    ),
    "one tile more without masks": (
        unmasked_tile, problem("causal", causal=True, q_len=100, heads=(1, 1)),
    ),
    "sums not rescaled": (unscaled, problem("long", q_len=20, kv_len=200, heads=(1, 1))),
    "sinks": (lambda: ignoring(sinks=False), problem("sinks", sinks=True, q_len=20)),
    "soft cap": (lambda: ignoring(soft_cap=None), problem("soft cap", soft_cap=5.0, q_len=20)),
    "segments": (lambda: ignoring(segments=False), problem("segments", segments=2, q_len=20)),
    "bias": (
        lambda: ignoring(bias=None),
        problem("bias", bias=(True, True, True, True), q_len=20, heads=(1, 1)),
    ),
    "ALiBi": (lambda: ignoring(alibi=False), problem("ALiBi", alibi=True, q_len=40)),
    "chunk": (
        lambda: ignoring(attention_chunk_size=None),
        problem("chunk", attention_chunk_size=7, causal=True, q_len=20, heads=(1, 1)),
    ),
    "offset": (
        lambda: ignoring(offset=0),
        problem("offset", q_offset=30, kv_len=60, q_len=20, causal=True, heads=(1, 1)),
    ),
    "lengths": (
        lambda: ignoring(lengths=False),
        problem("lengths", kv_lens=(20, 9), batch=2, q_len=20, heads=(1, 1)),
    ),
    "groups": (lambda: ignoring(group=1), problem("groups", q_len=20)),
}  # fmt: skip


# That an argument is forgotten is seen by the same numbers in every kernel: on demand.
FORGOTTEN = ("sinks", "soft cap", "segments", "bias", "ALiBi", "chunk", "lengths", "offset")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.sweep if n in FORGOTTEN else ()) for n in FAULTS],
)
def test_a_planted_fault_goes_red(name, monkeypatch, cut_tiles):
    plant, case = FAULTS[name]
    if name == "offset":  # a problem's offsets are arrays
        case = dataclasses.replace(case, build=lambda rng, **o: dense_inputs(rng, **o)
                                   | {"q_offset": case.options["q_offset"]})  # fmt: skip
    place, name, faulty = plant()
    setter = monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr
    setter(place, name, faulty)
    assert compared(case).verdict == FAIL


def test_a_slot_that_is_still_read_is_not_overwritten(monkeypatch, cut_tiles):
    """The interpreter sees it where the ring is not waited for: with one slot less than it has."""
    case = problem("long", q_len=20, kv_len=300, heads=(1, 1))
    check(case)
    x = case.make()
    monkeypatch.setattr(mosaic_gpu_forward, "slot_of", lambda static, n: n * 0)
    seen = "RACE DETECTED|already at phase"  # newer jax; older, where the ring breaks first
    with pytest.raises(RACE, match=seen), gpu_interpreter():
        mosaic_gpu.dense_attention(**x)


@pytest.mark.parametrize(
    ("tiles", "exact"),
    [
        pytest.param(mosaic_gpu_tiles.Tiles(64, 3, 2), True, marks=pytest.mark.sweep),
        (mosaic_gpu_tiles.Tiles(64, 4, 3, turns=True), True),
        (mosaic_gpu_tiles.Tiles(64, 2, tied=True, by_square=True, registers=(240, 24)), True),
        (mosaic_gpu_tiles.Tiles(128, 2), False),
    ],
    ids=str,
)
def test_tuning_changes_speed_and_never_numbers(tiles, exact, monkeypatch, cut_tiles):
    case = problem("causal window", causal=True, sliding_window=100, q_len=250, heads=(1, 1))
    x = {name: jnp.asarray(v) if hasattr(v, "shape") else v for name, v in case.make().items()}
    with gpu_interpreter():
        wanted = mosaic_gpu.dense_attention(**x)
        monkeypatch.setattr(mosaic_gpu, "forward_tiles", lambda *_, **__: tiles)
        found = mosaic_gpu.dense_attention(**x)
    for w, f in zip(wanted, found, strict=True):
        w, f = np.asarray(w, np.float32), np.asarray(f, np.float32)
        if exact:
            np.testing.assert_array_equal(f, w)
        else:  # sums in another order: a rounding of the weights, and of the output
            np.testing.assert_allclose(f, w, rtol=2**-6, atol=2**-8)


def test_registers_of_a_block_s_roles_fit_what_it_is_launched_with():
    registers = [*mosaic_gpu_forward.REGISTERS.items()]
    for by_class in mosaic_gpu_tiles.TILES[9, 0].values():
        registers += [(t.consumers, t.registers) for t in by_class.values() if t.registers]
    for consumers, (consumer, producer) in registers:
        launched = 65536 // (128 * (consumers + 1)) // 8 * 8 * (consumers + 1)
        assert consumers * consumer + producer <= launched


def compiles(chip, **options):
    options = {"batch": 1, "q_len": 1100, "kv_len": 1100, "num_heads": 4, "num_kv_heads": 2,
               "head_size": 128, "dtype": "bfloat16", "causal": True} | options  # fmt: skip
    size_v = options.pop("head_size_v", options["head_size"])
    arguments = dense_arguments(**options)
    arguments["v"] = arguments["v"].update(shape=(*arguments["v"].shape[:3], size_v))
    compiled_cleanly(chip, KERNEL, arguments)


@pytest.mark.parametrize("chip", ["h200", "a100", "b200"])
def test_a_sink_of_nothing_is_none_for_rows_that_see_nothing(chip):
    q, k, v = (jnp.ones((1, 8, 1, 64), jnp.bfloat16) for _ in range(3))
    sinks, kv_lens = jnp.full(1, -jnp.inf), jnp.zeros(1, jnp.int32)
    with gpu_interpreter(chip):
        out, lse = jax.jit(mosaic_gpu.dense_attention)(q, k, v, sinks=sinks, kv_lens=kv_lens)
    assert not np.asarray(out, np.float32).any()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("cores", [2, False])
def test_it_compiles_for_a_gpu(cores, monkeypatch):
    few_cores(monkeypatch, cores)
    compiles("h200")


SIZES = list(mosaic_gpu_tiles.TILES[9, 0])


@pytest.mark.parametrize("capability", mosaic_gpu_tiles.TILES)
def test_which_kernel_heads_are_padded_for(capability):
    """As `mosaic_gpu_limits` has it: what is refused at one size is refused at what is padded."""
    for size, size_v in itertools.product(range(8, 257, 8), repeat=2):
        padded = mosaic_gpu_tiles.padded_sizes(capability, size, size_v)
        assert padded[0] >= size
        assert padded[1] >= size_v
        largest = max(size, size_v)
        assert (padded == (256, 256)) == (largest > 192)
        assert (padded == (192, 192)) == (largest <= 192 and size_v > 128)
        assert (max(padded) > 128) == (largest > 128)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("causal", [True, False])
def test_every_size_of_the_kernel_compiles(dtype, sizes, causal):
    compiles("h200", dtype=dtype, head_size=sizes[0], head_size_v=sizes[1], causal=causal)


FEATURES = (
    {"sliding_window": (300, 200), "causal": False},
    {"attention_chunk_size": 300},
    {"soft_cap": 30.0},
    {"q_offset": -7},
    {"bias": jax.ShapeDtypeStruct((1, 4, 1100, 1100), "bfloat16")},
    {"bias": jax.ShapeDtypeStruct((1, 1, 1, 1100), "float32")},
    {"bias": jax.ShapeDtypeStruct((1, 4, 1100, 1), "float16")},
    {"bias": jax.ShapeDtypeStruct((1, 4, 1, 1), "float32")},
    {"alibi_slopes": jax.ShapeDtypeStruct((4,), "float32")},
    {
        "q_segment_ids": jax.ShapeDtypeStruct((1, 1100), "int32"),
        "kv_segment_ids": jax.ShapeDtypeStruct((1, 1100), "int32"),
    },
    {"kv_lens": jax.ShapeDtypeStruct((1,), "int32")},
    {"sinks": jax.ShapeDtypeStruct((4,), "float32")},
    {"q_offset": jax.ShapeDtypeStruct((1,), "int32"), "causal": False},
    {"q_len": 1},
    {"q_len": 33, "kv_len": 3},
    {"kv_len": 20000},
    {"sliding_window": 300, "kv_lens": jax.ShapeDtypeStruct((1,), "int32")},
    {"sliding_window": 300, "q_offset": jax.ShapeDtypeStruct((1,), "int32")},
)
ADDED = FEATURES[4] | FEATURES[8]  # a bias and slopes, which spilled where each alone did not
PAIRS = ADDED, ADDED | FEATURES[2], ADDED | FEATURES[9], FEATURES[2] | FEATURES[9]


def features_of(features):
    """Options of a call; "all" = many in one."""
    if features != "all":
        return features
    chosen = (*FEATURES[1:5], *FEATURES[8:12])
    return {name: value for feature in chosen for name, value in feature.items()}


@pytest.mark.sweep
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("features", [*FEATURES, *PAIRS, "all"], ids=str)
def test_every_declared_feature_compiles(features, sizes, monkeypatch):
    few_cores(monkeypatch)  # the sizes above are compiled with a block of the grid for each
    compiles("h200", head_size=sizes[0], head_size_v=sizes[1], **features_of(features))


# At 256 all of these spilled but segments alone, 4 + 4 to 64 + 72 bytes; at 64 and 80 slopes did.
SEGMENTS, SLOPES = (
    next(x for x in FEATURES if name in x) for name in ("q_segment_ids", "alibi_slopes")
)
BIASES = {
    "no bias": {},
    "bias": FEATURES[4],
    "float32 bias": {"bias": jax.ShapeDtypeStruct((1, 4, 1100, 1100), "float32")},
    "bias of keys": FEATURES[5],
}
ADDED_TO = {"slopes": SLOPES, "slopes and a cap": SLOPES | FEATURES[2], "no slopes": {}}


@pytest.mark.sweep
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("more", ADDED_TO.values(), ids=ADDED_TO)
@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_segments_beside_what_is_added_compile(bias, more, causal, sizes):
    options = SEGMENTS | bias | more | {"causal": causal}
    compiles("h200", head_size=sizes[0], head_size_v=sizes[1], **options)


@pytest.mark.sweep
def test_segments_beside_a_bias_and_slopes_at_the_largest_head_size():
    check(problem("marked", head_size=256, q_len=140, kv_len=150, segments=2, alibi=True,
                  bias=(True, True, True, True), heads=(1, 1)))  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mask": jnp.ones((1, 1, 4, 4), int)}, "mask has dtype int32, must be one of bool"),
        ({"dtype": "float32"}, "q has dtype float32, must be one of bfloat16, float16"),
        ({"head_size": 68}, "head_dim is 68, must be a multiple of 8 up to 256"),
        ({"head_size": 264}, "head_dim is 264, must be a multiple of 8 up to 256"),
        ({"q_segment_ids": jnp.zeros((1, 4), jnp.int32)}, "must be both or neither"),
        ({"soft_cap": 0.0}, "soft_cap is 0.0, must be above 0"),
        ({"sliding_window": (3, 0)}, "sliding_window is 0, must be above 0"),
        ({"q_offset": jnp.zeros(3, jnp.int32)}, r"q_offset is int32\[3\], must be"),
    ],
)
def test_what_it_does_not_take_is_refused(arguments, text):
    size, dtype = arguments.pop("head_size", 64), arguments.pop("dtype", "bfloat16")
    x = jnp.zeros((1, 4, 2, size), dtype)
    with pytest.raises(ValueError, match=text):
        mosaic_gpu.dense_attention(x, x, x, **arguments)
