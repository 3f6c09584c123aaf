"""Gradients of dense attention on Ampere: interpreted against the oracle, and by the compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_compiler import compiled_cleanly
from gpu_interpreter import gpu_interpreter, needs_gpu_interpreter
from test_gpu_dense_gradients import (
    CAP,
    CASES,
    KERNEL,
    MORE,
    REST,
    SEGMENTS,
    WINDOW,
    one_tile_less,
    problem,
    without_delta,
    without_slope,
)

from attnsel_jax.compare import compare
from attnsel_jax.compare.comparison import FAIL, PASS
from attnsel_jax.mosaic_gpu_limits import AMPERE_SIZES
from pallas_kernels import gpu_mma
from pallas_kernels.dense import (
    mosaic_gpu,
    mosaic_gpu_ampere_backward,
    mosaic_gpu_backward,
    mosaic_gpu_tiles,
)

needs_gpu_interpreter()

SIZES = AMPERE_SIZES["dense"]
DECLARED = [case for case in (*CASES, *MORE) if case.options["head_size"] in SIZES]
BY_DEFAULT = ("window, capped, sinks",)
CAPPED = problem("capped", causal=True, soft_cap=8.0, q_len=70)
LONG = problem("long", causal=True, q_len=200, heads=(1, 1))


def row_of(case):
    with gpu_interpreter("a100"):
        (row,) = compare([case], {"MOSAIC_GPU": mosaic_gpu.dense_attention}).rows
        assert row.verdict in (PASS, FAIL), str(row)
    return row


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c.name in BY_DEFAULT else pytest.mark.sweep) for c in DECLARED],
    ids=lambda case: case.name,
)
def test_gradients_agree_with_the_oracle(case):
    row = row_of(case)
    assert row.verdict == PASS, str(row)
    assert {"grad q", "grad k", "grad v"} <= {d.quantity for d in row.deviations}


def forgetting(**fields):
    """The backward told of a call without these."""
    backward = mosaic_gpu_backward.backward
    return lambda static, *rest: backward(dataclasses.replace(static, **fields), *rest)


def one_key_tile_less(*args):
    tiles = seen_tiles(*args)
    return tiles._replace(count=jnp.maximum(tiles.count - 1, 0))


def waiting_for_too_little(groups):
    arrived(groups and groups + 1)


seen_tiles, arrived = mosaic_gpu_ampere_backward.seen_tiles, gpu_mma.arrived
HERE = mosaic_gpu_ampere_backward
FAULTS = {
    "the causal edge": (LONG, mosaic_gpu_backward, "backward", forgetting(causal=False)),
    "the cap's slope": (CAPPED, HERE, "weights", without_slope),
    "delta": (LONG, HERE, "logit_gradients", without_delta),
    "a tile of queries": (LONG, HERE, "steps_of", one_tile_less),
    "a tile of keys": (LONG, HERE, "seen_tiles", one_key_tile_less),
    "a copy is not waited for": (LONG, gpu_mma, "arrived", waiting_for_too_little),
    "a slot is overwritten": (LONG, gpu_mma, "free_slot", lambda slot, stages: slot),
}


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "module", "name", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_goes_red(monkeypatch, case, module, name, fault):
    monkeypatch.setattr(module, name, fault)
    assert row_of(case).verdict == FAIL


@pytest.mark.sweep
def test_tiles_change_no_numbers_and_a_second_call_gives_the_same_bits(monkeypatch):
    arguments = LONG.make()
    q, k, v = (jnp.asarray(arguments[name]) for name in "qkv")

    def gradients():
        with gpu_interpreter("a100"):
            out, pull_back = jax.vjp(
                lambda *qkv: mosaic_gpu.dense_attention(*qkv, causal=True)[0], q, k, v
            )
            return [np.asarray(g) for g in pull_back(out)]

    once = gradients()
    for mine, again in zip(once, gradients(), strict=True):
        np.testing.assert_array_equal(mine, again)
    tiles = mosaic_gpu_tiles.BackwardTiles(32, 3, 3, 3, split=False, block_q=32)
    monkeypatch.setattr(mosaic_gpu_backward, "backward_tiles", lambda *_, **__: tiles)
    for mine, tuned in zip(once, gradients(), strict=True):
        mine, tuned = mine.astype(np.float32), tuned.astype(np.float32)
        np.testing.assert_allclose(mine, tuned, rtol=2**-6, atol=2**-8)


def compiles(size, dtype="bfloat16", **features):
    def array(heads):
        return jax.ShapeDtypeStruct((2, 1101, heads, size), dtype)

    arguments = {"q": array(4), "k": array(2), "v": array(2), "causal": True}
    compiled_cleanly("a100", KERNEL, arguments | features, gradients=True)


@pytest.mark.parametrize(
    "size", [pytest.param(s, marks=[] if s == 64 else pytest.mark.sweep) for s in SIZES.values]
)
def test_gradients_compile(size):
    compiles(size)


@pytest.mark.sweep
@pytest.mark.parametrize("size", SIZES.values)
@pytest.mark.parametrize(
    "features",
    [WINDOW, CAP, SEGMENTS, REST, WINDOW | CAP | SEGMENTS | REST, {"dtype": "float16"}],
    ids=["window", "cap", "segments", "rest", "all", "float16"],
)
def test_gradients_of_every_feature_compile(size, features):
    compiles(size, **features)
