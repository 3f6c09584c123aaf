"""Gradients of dense attention on GPUs: interpreted against the oracle, and by the compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_compiler import compiled_cleanly
from gpu_interpreter import gpu_interpreter, needs_gpu_interpreter

from attnsel_jax.backends.mosaic_gpu import MosaicGpuBackend
from attnsel_jax.compare import compare
from attnsel_jax.compare.comparison import FAIL, PASS
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.platforms import Device
from attnsel_jax.problems import Problem
from attnsel_jax.problems.dense_inputs import dense_inputs
from pallas_kernels.dense import (
    mosaic_gpu,
    mosaic_gpu_backward,
    mosaic_gpu_dkv,
    mosaic_gpu_dq,
    mosaic_gpu_tiles,
    mosaic_gpu_weights,
)

needs_gpu_interpreter()

KERNEL = MosaicGpuBackend.kernels["dense"]
SHAPE = {"heads": (2, 1), "head_size": 64, "q_len": 140, "dtype": "bfloat16"}


def problem(name, **options):
    return Problem(name, "dense", name, dense_inputs, SHAPE | options, gradients=True)


PLAIN = problem("causal, groups, odd lengths", causal=True, heads=(4, 2), q_len=131, kv_len=137)
WINDOW = problem("window, capped, sinks", causal=True, sliding_window=40, soft_cap=8.0, sinks=True)
SEGMENTS = problem("segments", segments=3, causal=True, batch=2, q_len=90, q_lens=(90, 70))
SPLIT = problem("keys past the queries, head sizes 192 and 128", heads=(2, 2), head_size=192,
                head_size_v=128, q_len=70, kv_len=100, causal=True, soft_cap=8.0)  # fmt: skip
CASES = (
    PLAIN, WINDOW, SEGMENTS, SPLIT,
    problem("offsets, empty rows, float16", batch=2, q_len=70, kv_len=150, q_offset=(-30, 150),
            causal=True, dtype="float16"),
    problem("lengths", batch=2, q_len=70, kv_len=133, q_lens=(66, 0), kv_lens=(130, 23)),
)  # fmt: skip
MORE = (
    problem("two-sided window", sliding_window=(50, 30), q_len=70, kv_len=200),
    problem("chunks", attention_chunk_size=50, causal=True, q_len=170),
    problem("head size 128", head_size=128, causal=True, q_len=200),
    problem("head size 256", head_size=256, heads=(2, 2), q_len=100, causal=True),
    problem("head size 80", head_size=80, q_len=100),
    problem("head size 96", head_size=96, q_len=100, sliding_window=33),
    problem("head size 192", head_size=192, q_len=100, sinks=True),
    problem("one query", q_len=1, kv_len=65),
)


def row_of(case):
    with gpu_interpreter("h200"):
        (row,) = compare([case], {"MOSAIC_GPU": mosaic_gpu.dense_attention}).rows
        assert row.verdict in (PASS, FAIL), str(row)
    return row


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(c, marks=pytest.mark.sweep) for c in MORE)],
    ids=lambda case: case.name,
)  # fmt: skip
def test_gradients_agree_with_the_oracle(case):
    row = row_of(case)
    assert row.verdict == PASS, str(row)
    assert {"grad q", "grad k", "grad v"} <= {d.quantity for d in row.deviations}


def forgetting(**fields):
    """The backward told of a call without these."""
    backward = mosaic_gpu_backward.backward
    return lambda static, *rest: backward(dataclasses.replace(static, **fields), *rest)


def without_slope(*args, **kwargs):
    return mosaic_gpu_weights.weights(*args, **kwargs | {"sloped": False})._replace(slope=None)


def without_delta(w, dp, delta, *, queries):
    return w.p * dp if w.slope is None else w.p * dp * w.slope


def one_tile_less(*args):
    steps = mosaic_gpu_dkv_steps(*args)
    return steps._replace(count=jnp.maximum(steps.count - 1, 0))


mosaic_gpu_dkv_steps = mosaic_gpu_dkv.steps_of
FAULTS = {
    "the causal edge": (PLAIN, mosaic_gpu_backward, "backward", forgetting(causal=False)),
    "the window": (
        WINDOW, mosaic_gpu_backward, "backward", forgetting(sliding_window=(None, None)),
    ),
    "the cap's slope, of queries": (WINDOW, mosaic_gpu_dq, "weights", without_slope),
    "the cap's slope, of keys": (SPLIT, mosaic_gpu_dkv, "weights", without_slope),
    "segments": (SEGMENTS, mosaic_gpu_backward, "backward", forgetting(segments=False)),
    "delta": (PLAIN, mosaic_gpu_dq, "logit_gradients", without_delta),
    "a tile of queries": (PLAIN, mosaic_gpu_dkv, "steps_of", one_tile_less),
}  # fmt: skip


@pytest.mark.parametrize(("case", "module", "name", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_goes_red(monkeypatch, case, module, name, fault):
    monkeypatch.setattr(module, name, fault)
    assert row_of(case).verdict == FAIL


def test_tiles_change_no_numbers_and_a_second_call_gives_the_same_bits(monkeypatch):
    arguments = PLAIN.make()
    q, k, v = (jnp.asarray(arguments[name]) for name in "qkv")

    def gradients():
        with gpu_interpreter("h200"):
            out, pull_back = jax.vjp(
                lambda *qkv: mosaic_gpu.dense_attention(*qkv, causal=True)[0], q, k, v
            )
            return [np.asarray(g) for g in pull_back(out)]

    once = gradients()
    for mine, again in zip(once, gradients(), strict=True):
        np.testing.assert_array_equal(mine, again)
    tiles = mosaic_gpu_tiles.BackwardTiles(64, 3, 1, 3, split=False)
    monkeypatch.setattr(mosaic_gpu_backward, "backward_tiles", lambda *_, **__: tiles)
    for mine, tuned in zip(once, gradients(), strict=True):
        np.testing.assert_array_equal(mine, tuned)


@pytest.mark.parametrize("name", ["bias", "alibi"])
def test_gradients_beside_a_bias_are_refused(name):
    config = AttentionSelectorConfig(
        64, "bfloat16", op="dense", needs_grad=True, **{f"has_{name}": True}
    )
    (reason,) = MosaicGpuBackend.validate_configuration(config, Device.named("h200"))
    assert str(reason) == f"has_{name} is True, must be False with needs_grad"
    argument = {"bias": {"bias": jnp.zeros((1, 1, 8, 8))},
                "alibi": {"alibi_slopes": jnp.zeros(1)}}[name]  # fmt: skip
    q = jnp.ones((1, 8, 1, 64), jnp.bfloat16)
    with gpu_interpreter("h200"), pytest.raises(ValueError, match="must be None where gradients"):
        jax.grad(lambda q: mosaic_gpu.dense_attention(q, q, q, **argument)[0].sum())(q)


SIZES = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))


WINDOW = {"causal": True, "sliding_window": (300, 200)}
CAP = {"soft_cap": 30.0}
SEGMENTS = {
    "q_segment_ids": jax.ShapeDtypeStruct((2, 1101), "int32"),
    "kv_segment_ids": jax.ShapeDtypeStruct((2, 1101), "int32"),
}
REST = {
    "causal": False,
    "attention_chunk_size": 300,
    "kv_lens": jax.ShapeDtypeStruct((2,), "int32"),
    "q_offset": jax.ShapeDtypeStruct((2,), "int32"),
    "sinks": jax.ShapeDtypeStruct((4,), "float32"),
}


def compiles(sizes, dtype="bfloat16", **features):
    def array(heads, size):
        return jax.ShapeDtypeStruct((2, 1101, heads, size), dtype)

    arguments = {"q": array(4, sizes[0]), "k": array(2, sizes[0]), "v": array(2, sizes[1])}
    compiled_cleanly("h200", KERNEL, arguments | {"causal": True} | features, gradients=True)


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(s, marks=[] if s == (192, 128) else pytest.mark.sweep) for s in SIZES],
    ids=str,
)
def test_gradients_compile(sizes):
    compiles(sizes)


@pytest.mark.sweep
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    "features",
    [WINDOW, CAP, SEGMENTS, REST, WINDOW | CAP | SEGMENTS | REST, {"dtype": "float16"}],
    ids=["window", "cap", "segments", "rest", "all", "float16"],
)
def test_gradients_of_every_feature_compile(sizes, features):
    compiles(sizes, **features)
