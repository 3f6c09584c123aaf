"""Dense attention on TPU, in the TPU interpreter against the oracle, and by the TPU compiler.

Tiles are cut to 128 queries and 128 keys, and major blocks to two of them, so that few tokens have
rows of tiles with nothing, something and everything to see, and odd and even numbers of tiles.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_interpreter import tpu_interpreter

from attnsel_jax.aot import compile_for, target_for
from attnsel_jax.aot.arguments import dense_arguments
from attnsel_jax.backends.mosaic_tpu import MosaicTpuBackend
from attnsel_jax.compare import compare
from attnsel_jax.compare.comparison import PASS
from attnsel_jax.platforms import CHIPS, Device
from attnsel_jax.problems import QUICK, Problem
from attnsel_jax.problems.dense_inputs import dense_inputs
from pallas_kernels.dense import mosaic_tpu, mosaic_tpu_tiles

KERNEL = MosaicTpuBackend.kernels["dense"]
CUT = mosaic_tpu_tiles.Tiles(128, 128, 128, 256, 256)
SHAPE = {"heads": (2, 1), "head_size": 64, "q_len": 260, "dtype": "float32"}


@pytest.fixture(autouse=True)
def _cut_tiles(monkeypatch):
    for key in mosaic_tpu_tiles.TILES:
        monkeypatch.setitem(mosaic_tpu_tiles.TILES, key, CUT)


def problem(name, **options):
    gradients = options.pop("gradients", False)
    return Problem(name, "dense", name, dense_inputs, SHAPE | options, gradients)


# Each reaches several tiles, and what a tile alone cannot show.
TILED = (
    problem("causal", causal=True, gradients=True),
    problem("bfloat16, head size 128, odd lengths", causal=True, dtype="bfloat16", head_size=128,
            q_len=257, kv_len=259, heads=(2, 2), gradients=True),
    problem("offsets, empty rows", batch=2, kv_len=350, q_offset=(-140, 13), causal=True,
            heads=(1, 1), gradients=True),
    problem("lengths", batch=2, kv_len=341, q_lens=(260, 118), kv_lens=(341, 123)),
    problem("segments, some blocks empty", segments=3, causal=True),
    problem("slopes, over two major blocks of keys", alibi=True, heads=(4, 2), q_len=130,
            kv_len=300, sliding_window=(None, 200), dtype="bfloat16", gradients=True),
    problem("packed, padded", segments=3, batch=2, q_len=150, kv_len=270, q_lens=(150, 118),
            kv_lens=(270, 123), sinks=True, soft_cap=8.0, gradients=True),
    problem("bias for keys and heads, two-sided window", bias=(False, True, False, True), batch=2,
            q_len=140, heads=(2, 2), sliding_window=(50, 90), gradients=True),
    problem("everything", batch=2, sinks=True, alibi=True, soft_cap=8.0, q_len=37,
            q_lens=(37, 21), kv_lens=(37, 30), bias=(True, True, True, True), segments=2,
            sliding_window=20, attention_chunk_size=24, causal=True, gradients=True),
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


def check(case, generation="v5e", *, detect_races=False):
    with tpu_interpreter(generation, detect_races=detect_races):
        (row,) = compare([case], {"MOSAIC_TPU": mosaic_tpu.dense_attention}).rows
    assert row.verdict == PASS, str(row)


@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_tiles_agree_with_the_oracle(case):
    check(case, detect_races=case.name == "causal")


def test_a_scale_of_zero_weighs_all_keys_alike():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 20, 1, 8)) for i in range(3))
    with tpu_interpreter():
        out, lse = mosaic_tpu.dense_attention(q, k, v, scale=0.0)
    np.testing.assert_allclose(out, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), rtol=1e-5,
                               atol=1e-6)  # fmt: skip
    np.testing.assert_allclose(lse, np.log(20), rtol=1e-6)


ACCEPTED = [
    case
    for case in QUICK
    if case.op == "dense"
    and not MosaicTpuBackend.validate_configuration(case.config, Device.named("v5e"))
]


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.name)
def test_the_contract_s_problems_agree_with_the_oracle(case):
    check(dataclasses.replace(case, gradients=False), "v6e")


@pytest.mark.sweep
@pytest.mark.parametrize("case", [*LONGER, *ACCEPTED], ids=lambda case: case.name)
def test_longer_problems_and_every_gradient_agree_with_the_oracle(case):
    check(case, detect_races=True)


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("mask", {"mask": jnp.ones((1, 1, 4, 4), bool)}, "mask is given, must be None"),
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
    missing = target_for(chip).missing()
    if missing:
        pytest.skip(f"no compiler for {chip} here: {missing}")
    options = {"batch": 1, "q_len": 1100, "kv_len": 1100, "num_heads": 4, "num_kv_heads": 2,
               "head_size": 128, "dtype": "bfloat16", "causal": True} | options  # fmt: skip
    gradients = options.pop("gradients", False)
    report = compile_for(chip, KERNEL, dense_arguments(**options), gradients=gradients)
    assert report.compiled, report.refusal


DENSE = MosaicTpuBackend.capabilities["dense"]
TPUS = [
    name for name, chip in CHIPS.items() if chip.generation and chip.generation in DENSE.generation
]


@pytest.mark.parametrize("chip", ["v5e", "7x"])
def test_it_compiles_for_a_tpu(chip):
    compiles(chip, gradients=True)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_size", [8, 64, 72, 80, 96, 112, 128, 192, 256])
def test_every_declared_size_compiles_for_every_tpu(chip, dtype, head_size):
    compiles(chip, dtype=dtype, head_size=head_size, gradients=True)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("lengths", [(1, 33), (37, 37), (3, 271), (8192, 8192), (4096, 20000)])
def test_every_length_compiles_for_every_tpu(chip, lengths):
    compiles(chip, q_len=lengths[0], kv_len=lengths[1], dtype="float32", gradients=True)
