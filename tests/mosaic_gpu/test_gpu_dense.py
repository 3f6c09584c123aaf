"""Dense attention on GPUs, in the Mosaic GPU interpreter against the oracle, and by the compiler.

Key tiles are cut to 64 keys where a problem is to have many of them: first and last tiles with
something to mask on either side, tiles with nothing to mask, and slots of the ring used again.
"""

import dataclasses

import jax.numpy as jnp
import pytest
from gpu_interpreter import gpu_interpreter, needs_gpu_interpreter

from attnsel_jax.aot import compile_for, target_for
from attnsel_jax.aot.arguments import dense_arguments
from attnsel_jax.backends.mosaic_gpu import DENSE, HEAD_SIZES_V, MosaicGpuBackend
from attnsel_jax.compare import compare
from attnsel_jax.compare.comparison import PASS
from attnsel_jax.platforms import Device
from attnsel_jax.problems import QUICK, Problem
from attnsel_jax.problems.dense_inputs import dense_inputs
from pallas_kernels.dense import mosaic_gpu, mosaic_gpu_tiles

needs_gpu_interpreter()

KERNEL = MosaicGpuBackend.kernels["dense"]
CUT = mosaic_gpu_tiles.Tiles(block_kv=64, stages=2)
SHAPE = {"heads": (2, 1), "head_size": 64, "q_len": 260, "dtype": "bfloat16"}


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
    problem("segments", segments=3, causal=True, q_len=140, batch=2, q_lens=(140, 77)),
    problem("everything", batch=2, sinks=True, alibi=True, soft_cap=8.0, q_len=150,
            q_lens=(150, 70), kv_len=170, kv_lens=(170, 130), bias=(True, True, True, True),
            segments=2, sliding_window=90, attention_chunk_size=100, causal=True),
)  # fmt: skip


@pytest.fixture
def cut_tiles(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "forward_tiles", lambda *_: CUT)


def check(case, chip="h200"):
    with gpu_interpreter(chip):
        (row,) = compare([case], {"MOSAIC_GPU": mosaic_gpu.dense_attention}).rows
        assert row.verdict == PASS, str(row)


@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_many_tiles_agree_with_the_oracle(case, cut_tiles):
    check(case)


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


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.name)
def test_the_contract_s_problems_agree_with_the_oracle(case):
    check(case)


def compiles(chip, **options):
    missing = target_for(chip).missing()
    if missing:
        pytest.skip(f"no compiler for {chip} here: {missing}")
    options = {"batch": 1, "q_len": 1100, "kv_len": 1100, "num_heads": 4, "num_kv_heads": 2,
               "head_size": 128, "dtype": "bfloat16", "causal": True} | options  # fmt: skip
    size_v = options.pop("head_size_v", options["head_size"])
    arguments = dense_arguments(**options)
    arguments["v"] = arguments["v"].update(shape=(*arguments["v"].shape[:3], size_v))
    report = compile_for(chip, KERNEL, arguments)
    assert report.compiled, report.refusal


@pytest.mark.parametrize("chip", ["h200"])
def test_it_compiles_for_a_gpu(chip):
    compiles(chip)


SIZES = [(size, size_v) for size in DENSE.head_size.values for size_v in HEAD_SIZES_V.get(size, (size,))]


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("causal", [True, False])
def test_every_declared_size_compiles(dtype, sizes, causal):
    compiles("h200", dtype=dtype, head_size=sizes[0], head_size_v=sizes[1], causal=causal)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mask": jnp.ones((1, 1, 4, 4), bool)}, "mask is given, must be None"),
        ({"dtype": "float32"}, "q has dtype float32, must be one of bfloat16, float16"),
        ({"head_size": 72}, "head_dim/head_dim_v is 72/72, must be one of 64/64, 80/80"),
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
