"""Gradients of dense attention on Ampere: interpreted against the oracle, and by the compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_compiler import compiled_cleanly
from gpu_interpreter import gpu_interpreter, needs_gpu_interpreter
from test_gpu_dense_gradients import (
    ADDED,
    BIAS,
    CAP,
    CASES,
    FAR,
    FEATURES,
    HIDDEN,
    KERNEL,
    MORE,
    OF_KEYS,
    REST,
    SEGMENTED,
    SLOPES,
    WINDOWED,
    agrees_though_a_bias_hides_rows,
    agrees_though_rows_are_far,
    biased,
    forgetting,
    gives_every_gradient,
    one_row_less,
    one_tile_less,
    problem,
    row_of,
    without_delta,
    without_distance,
    without_slope,
)

from attnsel_jax.compare.comparison import FAIL
from pallas_kernels import gpu_mma
from pallas_kernels.dense import (
    mosaic_gpu,
    mosaic_gpu_ampere_backward,
    mosaic_gpu_ampere_dbias,
    mosaic_gpu_backward,
    mosaic_gpu_dq,
    mosaic_gpu_tiles,
)

needs_gpu_interpreter()

SIZES = tuple(mosaic_gpu_tiles.AMPERE_BACKWARD_TILES)
EVERYTHING = {"soft_cap": 8.0, "alibi": True, "segments": 2, "sinks": True, "causal": True,
              "q_len": 70, "kv_len": 100}  # fmt: skip
ADDED_TO = [
    problem(f"everything added, head size {size}", head_size=size, bias=bias, **EVERYTHING)
    for size, bias in (
        (64, (True, True, True, True)), (80, (False, False, True, True)),
        (96, (False, True, False, True)), (128, (False, True, True, True)),
    )
]  # fmt: skip
OF_QUERIES = problem("bias of queries", bias=(False, True, True, False), heads=(1, 1), q_len=70)
OF_A_HEAD = problem("bias of a head", bias=(False, True, False, False), heads=(1, 1), q_len=70)
DECLARED = [
    *(case for case in (*CASES, *MORE) if case.options["head_size"] in SIZES),
    *(*ADDED_TO, OF_QUERIES, OF_A_HEAD),
]
BY_DEFAULT = ("window, capped, sinks", BIAS.name)
CAPPED = problem("capped", causal=True, soft_cap=8.0, q_len=70)
LONG = problem("long", causal=True, q_len=200, heads=(1, 1))


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c.name in BY_DEFAULT else pytest.mark.sweep) for c in DECLARED],
    ids=lambda case: case.name,
)
def test_gradients_agree_with_the_oracle(case):
    gives_every_gradient(case, "a100")


@pytest.mark.sweep
@pytest.mark.parametrize("name", FAR)
def test_a_bias_of_queries_may_be_as_large_as_it_likes(name):
    agrees_though_rows_are_far(name, "a100")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.sweep] * (i > 0)) for i, n in enumerate(HIDDEN)]
)
def test_rows_that_a_bias_hides_whole(name):
    agrees_though_a_bias_hides_rows(name, "a100")


def one_key_tile_less(*args):
    tiles = seen_tiles(*args)
    return tiles._replace(count=jnp.maximum(tiles.count - 1, 0))


def sums_of_nothing(*args):
    return [0.0 * part for part in sums_over_keys(*args)]


def waiting_for_too_little(groups):
    arrived(groups and groups + 1)


seen_tiles, arrived = mosaic_gpu_ampere_backward.seen_tiles, gpu_mma.arrived
sums_over_keys = mosaic_gpu_dq.sums_over_keys
HERE, OF_BIAS = mosaic_gpu_ampere_backward, mosaic_gpu_ampere_dbias
FAULTS = {
    "the causal edge": (LONG, mosaic_gpu_backward, "backward", forgetting(causal=False)),
    "the cap's slope": (CAPPED, HERE, "weights", without_slope),
    "delta": (LONG, HERE, "logit_gradients", without_delta),
    "a tile of queries": (LONG, HERE, "steps_of", one_tile_less),
    "a tile of keys": (LONG, HERE, "seen_tiles", one_key_tile_less),
    "a copy is not waited for": (LONG, gpu_mma, "arrived", waiting_for_too_little),
    "a row that shares the bias": (BIAS, OF_BIAS, "steps_of", one_row_less),
    "queries that share a bias of keys": (OF_KEYS, OF_BIAS, "steps_of", one_row_less),
    "the slopes' distance": (BIAS, mosaic_gpu_dq, "distances", without_distance),
    "sums over keys": (BIAS, HERE, "sums_over_keys", sums_of_nothing),
    "delta, of the bias": (BIAS, OF_BIAS, "logit_gradients", without_delta),
    "a slot is overwritten": (LONG, gpu_mma, "free_slot", lambda slot, stages: slot),
}


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "module", "name", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_goes_red(monkeypatch, case, module, name, fault):
    monkeypatch.setattr(module, name, fault)
    assert row_of(case, "a100").verdict == FAIL


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
    "size", [pytest.param(s, marks=[] if s == 64 else pytest.mark.sweep) for s in SIZES]
)
def test_gradients_compile(size):
    compiles(size)


ALL = WINDOWED | CAP | SEGMENTED | REST
MORE_FEATURES = {
    "bias of keys, slopes, all": biased((2, 4, 1, 1101), "bfloat16") | SLOPES | ALL,
    "bias of queries, slopes, all": biased((1, 4, 1101, 1), "bfloat16") | SLOPES | ALL,
    "bias of float32, slopes, all": biased((2, 4, 1101, 1101)) | SLOPES | ALL,
    "bias, slopes, all, float16": ADDED | ALL | {"dtype": "float16"},
}


@pytest.mark.sweep
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("features", FEATURES | MORE_FEATURES)
def test_gradients_of_every_feature_compile(size, features):
    compiles(size, **(FEATURES | MORE_FEATURES)[features])
