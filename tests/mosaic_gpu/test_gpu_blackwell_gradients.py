"""Gradients of dense attention on Blackwell: interpreted against the oracle, and by the compiler.

No Blackwell GPU has run them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_compiler import compiled_cleanly
from gpu_interpreter import RACE, gpu_interpreter, needs_gpu_interpreter
from test_gpu_ampere_gradients import ADDED_TO, MORE_FEATURES, OF_A_HEAD, OF_QUERIES
from test_gpu_dense_gradients import (
    BIAS,
    CASES,
    FAR,
    FEATURES,
    HIDDEN,
    KERNEL,
    MORE,
    SEGMENTS,
    agrees_though_a_bias_hides_rows,
    agrees_though_rows_are_far,
    forgetting,
    gives_every_gradient,
    one_tile_less,
    problem,
    row_of,
)

from attnsel_jax.compare.comparison import FAIL
from pallas_kernels.dense import (
    mosaic_gpu,
    mosaic_gpu_ampere_dbias,
    mosaic_gpu_backward,
    mosaic_gpu_blackwell_backward,
    mosaic_gpu_blackwell_weights,
    mosaic_gpu_dq,
    mosaic_gpu_tiles,
)

needs_gpu_interpreter()

SIZES = [
    (size, size_v)
    for size, size_v in mosaic_gpu_tiles.TILES[10, 0]
    if size in mosaic_gpu_tiles.BLACKWELL_BACKWARD_TILES
]
QUICK = problem("causal, capped, window, offset", causal=True, soft_cap=8.0, sliding_window=90,
                q_offset=(110,), q_len=20, kv_len=150, heads=(1, 1))  # fmt: skip
LONG = problem("three tiles either way", causal=True, q_len=270, kv_len=290, heads=(1, 1))
DECLARED = [
    *(LONG, *ADDED_TO, OF_QUERIES, OF_A_HEAD),
    *(case for case in (*CASES, *MORE) if case.options["head_size"] != 256),
    problem("chunks, lengths", attention_chunk_size=100, batch=2, q_lens=(140, 90), kv_len=290,
            kv_lens=(281, 200), q_offset=(-20, 150), heads=(1, 1)),
    problem("two-sided window, float16", sliding_window=(50, 90), q_len=200, kv_len=270,
            dtype="float16", heads=(1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [pytest.param(QUICK, marks=pytest.mark.once),
     *(pytest.param(c, marks=pytest.mark.sweep) for c in DECLARED)],
    ids=lambda case: case.name,
)  # fmt: skip
def test_gradients_agree_with_the_oracle(case):
    gives_every_gradient(case, "b200")


@pytest.mark.sweep
@pytest.mark.parametrize("name", FAR)
def test_a_bias_of_queries_may_be_as_large_as_it_likes(name):
    agrees_though_rows_are_far(name, "b200")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.sweep if i else pytest.mark.once)
     for i, n in enumerate(HIDDEN)],
)  # fmt: skip
def test_rows_that_a_bias_hides_whole(name):
    agrees_though_a_bias_hides_rows(name, "b200")


def without_slope(*args):
    return mosaic_gpu_blackwell_weights.weights(*args)._replace(slope=None)


def one_key_tile_less(*args):
    tiles = mosaic_gpu_dq.seen_tiles(*args)
    return tiles._replace(count=jnp.maximum(tiles.count - 1, 0))


def one_query_more(static, row, key, seeing=mosaic_gpu_blackwell_weights.seeing_interval):
    first, stop = seeing(static, row, key)
    return first - 1, stop


def one_key_more(static, row, query, seen=mosaic_gpu_blackwell_weights.seen_interval):
    low, high = seen(static, row, query)
    return low, high + 1


HERE, OF_STRIPS = mosaic_gpu_blackwell_backward, mosaic_gpu_blackwell_weights
FAULTS = {
    "queries of a causal key": (QUICK, OF_STRIPS, "seeing_interval", one_query_more),
    "keys of a causal query": (QUICK, OF_STRIPS, "seen_interval", one_key_more),
    "the window": (QUICK, mosaic_gpu_backward, "backward", forgetting(sliding_window=(None, None))),
    "the cap's slope": (QUICK, HERE, "weights", without_slope),
    "delta": (QUICK, HERE, "logit_gradients", lambda tile, strip, p, dp: p * dp),
    "a tile of queries": (LONG, HERE, "steps_of", one_tile_less),
    "a tile of keys": (LONG, HERE, "seen_tiles", one_key_tile_less),
    "segments": (SEGMENTS, mosaic_gpu_backward, "backward", forgetting(segments=False)),
    "the slopes' distance": (BIAS, HERE, "distances", lambda *_: 1.0),
    "the bias": (BIAS, OF_STRIPS, "_bias", lambda *_: 0.0),
    "delta, of the bias": (
        BIAS, mosaic_gpu_ampere_dbias, "logit_gradients",
        lambda w, dp, delta, *, queries: w.p * dp,
    ),
}  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "module", "name", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_goes_red(monkeypatch, case, module, name, fault):
    monkeypatch.setattr(module, name, fault)
    assert row_of(case, "b200").verdict == FAIL


def gradients(case):
    made = {name: jnp.asarray(x) for name, x in case.make().items() if name in "qkv"}
    with gpu_interpreter("b200"):

        def attend(x):
            return mosaic_gpu.dense_attention(**x, causal=True)[0]

        out, pull_back = jax.vjp(attend, made)
        return jax.tree.map(np.asarray, pull_back(out)[0])


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "fault"),
    [("_slot", lambda shared, n: n * 0), ("both_have_loaded", lambda shared: None)],
    ids=["a slot is written while it is read", "weights are stored over logits"],
)
def test_a_planted_race_is_seen(monkeypatch, name, fault):
    monkeypatch.setattr(HERE, name, fault)
    with pytest.raises(RACE, match=r"RACE DETECTED|already at phase"):
        gradients(LONG)


@pytest.mark.sweep
def test_tiles_change_no_numbers_and_a_second_call_gives_the_same_bits(monkeypatch):
    once = gradients(LONG)
    jax.tree.map(np.testing.assert_array_equal, once, gradients(LONG))
    tiles = mosaic_gpu_tiles.BackwardTiles(64, 3, 3, 3, split=False, block_q=64)
    monkeypatch.setattr(mosaic_gpu_backward, "backward_tiles", lambda *_, **__: tiles)

    def close(mine, tuned):
        mine, tuned = mine.astype(np.float32), tuned.astype(np.float32)
        np.testing.assert_allclose(mine, tuned, rtol=2**-6, atol=2**-8)

    jax.tree.map(close, once, gradients(LONG))


def test_tmem_and_registers_hold_every_declared_size():
    for size, size_v in SIZES:
        for tiles in mosaic_gpu_tiles.BLACKWELL_BACKWARD_TILES[size].values():
            assert 2 * tiles.block_q + size + size_v <= 512
            assert 2 * tiles.block_kv + size <= 512
    weighing, other = mosaic_gpu_blackwell_backward.REGISTERS
    warpgroups = mosaic_gpu_blackwell_backward.WEIGHERS + 1
    launched = 65536 // (128 * warpgroups) // 8 * 8 * warpgroups
    assert (warpgroups - 1) * weighing + other <= launched


def compiles(sizes, dtype="bfloat16", **features):
    def array(heads, size):
        return jax.ShapeDtypeStruct((2, 1101, heads, size), dtype)

    arguments = {"q": array(4, sizes[0]), "k": array(2, sizes[0]), "v": array(2, sizes[1])}
    arguments |= {"causal": True} | features
    compiled_cleanly("b200", KERNEL, arguments, gradients=True)


def test_gradients_and_what_they_are_of_compile():
    compiles((128, 128))


@pytest.mark.sweep
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("features", FEATURES | MORE_FEATURES | {"plain": {}})
def test_gradients_of_every_feature_compile(sizes, features):
    compiles(sizes, **(FEATURES | MORE_FEATURES | {"plain": {}})[features])
