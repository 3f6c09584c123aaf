"""Dense attention on Blackwell, in the interpreter against the oracle, and by the compiler.

No Blackwell GPU has run it.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from gpu_interpreter import RACE, gpu_interpreter, needs_gpu_interpreter
from test_gpu_dense import (
    ACCEPTED,
    FEATURES,
    SIZES,
    compared,
    compiles,
    features_of,
    problem,
)

from attnsel_jax.backends.mosaic_gpu import DENSE, MosaicGpuBackend
from attnsel_jax.compare.comparison import FAIL, PASS
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.platforms import Device
from pallas_kernels import gpu_chip
from pallas_kernels.dense import mosaic_gpu, mosaic_gpu_blackwell, mosaic_gpu_tiles
from pallas_kernels.dense import mosaic_gpu_blackwell_softmax as softmax

needs_gpu_interpreter()

ONE = {"heads": (1, 1), "q_len": 40}
EVERYTHING = problem("everything", batch=2, sinks=True, alibi=True, soft_cap=8.0, q_len=150,
                     q_lens=(150, 70), kv_len=170, kv_lens=(170, 130), segments=2,
                     bias=(True, True, True, True), sliding_window=90, attention_chunk_size=100,
                     causal=True)  # fmt: skip
TILED = (
    problem("two-sided window", sliding_window=(50, 90), q_len=70, kv_len=400, heads=(1, 1)),
    problem("offsets, float16", batch=2, q_len=140, kv_len=350, q_offset=(-80, 150), causal=True,
            dtype="float16", heads=(1, 1)),
    problem("chunks, lengths", batch=2, attention_chunk_size=100, causal=True, q_len=270,
            kv_len=290, q_lens=(270, 190), kv_lens=(281, 200), heads=(1, 1)),
    problem("segments", segments=3, causal=True, q_len=140, batch=2, q_lens=(140, 77)),
    problem("three slots, used again", head_size=96, attention_chunk_size=500, q_len=140,
            kv_len=600, q_offset=360, causal=True, heads=(1, 1)),
)  # fmt: skip


def check(case):
    row = compared(case, "b200")
    assert row.verdict == PASS, str(row)


def test_causal_groups_odd_lengths():
    check(problem("at 128", causal=True, q_len=300, kv_len=389, head_size=128))


@pytest.mark.sweep
@pytest.mark.parametrize("case", [EVERYTHING, *TILED], ids=lambda case: case.name)
def test_many_tiles_agree_with_the_oracle(case):
    check(case)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DENSE.dtype.values)
@pytest.mark.parametrize("sizes", SIZES)
def test_every_declared_size_agrees_with_the_oracle(sizes, dtype):
    check(problem("size", head_size=sizes[0], head_size_v=sizes[1], causal=True, dtype=dtype,
                  q_len=150, kv_len=219, heads=(1, 1), sinks=True))  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.name)
def test_the_contract_s_problems_agree_with_the_oracle(case):
    check(case)


def ignoring(**fields):
    """The kernel told of a call without these."""

    def faulty(static, x):
        return mosaic_gpu_blackwell.forward(dataclasses.replace(static, **fields), x)

    return mosaic_gpu.FORWARD, (10, 0), faulty


def unscaled():
    """Sums in TMEM that are not brought to the new maximum."""
    brought = softmax._brought_to
    return softmax, "_brought_to", lambda o, state, top, _: brought(o, state, top, jnp.bool_(True))


def interval(low=0, high=0):
    """Every query's keys, moved at either end."""
    seen = softmax.seen_interval

    def faulty(static, row, query):
        first, last = seen(static, row, query)
        return first + low, last + high

    return softmax, "seen_interval", faulty


FAULTS = {
    "unseen values stay": (
        lambda: (mosaic_gpu_blackwell.hopper, "clear_unseen", lambda *_: None),
        problem("keys end inside a tile", kv_len=80, kv_lens=(70,), **ONE),
    ),
    "causal, one key more": (lambda: interval(high=1), problem("causal", causal=True, **ONE)),
    "window, one key less": (
        lambda: interval(low=1), problem("window", causal=True, sliding_window=9, **ONE),
    ),
    "sums not rescaled": (unscaled, problem("long", kv_len=600, **ONE)),
    "sinks": (lambda: ignoring(sinks=False), problem("sinks", sinks=True, **ONE)),
    "soft cap": (lambda: ignoring(soft_cap=None), problem("soft cap", soft_cap=5.0, **ONE)),
    "segments": (lambda: ignoring(segments=False), problem("segments", segments=2, **ONE)),
    "bias": (lambda: ignoring(bias=None), problem("bias", bias=(True,) * 4, **ONE)),
    "ALiBi": (lambda: ignoring(alibi=False), problem("ALiBi", alibi=True, **ONE)),
    "causal": (lambda: ignoring(causal=False), problem("causal", causal=True, **ONE)),
    "chunk": (
        lambda: ignoring(attention_chunk_size=None),
        problem("chunk", attention_chunk_size=7, causal=True, **ONE),
    ),
    "lengths": (
        lambda: ignoring(lengths=False), problem("lengths", kv_lens=(20, 9), batch=2, **ONE),
    ),
    "groups": (lambda: ignoring(group=1), problem("groups", q_len=40)),
}  # fmt: skip
QUICK_FAULTS = ("unseen values stay",)


@pytest.mark.parametrize(
    "name", [n if n in QUICK_FAULTS else pytest.param(n, marks=pytest.mark.sweep) for n in FAULTS]
)
def test_a_planted_fault_goes_red(name, monkeypatch):
    plant, case = FAULTS[name]
    place, key, faulty = plant()
    (monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr)(place, key, faulty)
    assert compared(case, "b200").verdict == FAIL


@pytest.mark.sweep
def test_a_slot_that_is_still_read_is_not_overwritten(monkeypatch):
    """The interpreter sees it where the ring is not waited for: with one slot less than it has."""
    case = problem("long", kv_len=600, **ONE)
    monkeypatch.setattr(mosaic_gpu_blackwell.hopper, "slot_of", lambda static, n: n * 0)
    x, seen = case.make(), "RACE DETECTED|already at phase"
    with pytest.raises(RACE, match=seen), gpu_interpreter("b200"):
        mosaic_gpu.dense_attention(**x)


def test_registers_of_a_block_s_roles_fit_what_it_is_launched_with():
    for consumers, (consumer, other) in mosaic_gpu_blackwell.REGISTERS.items():
        launched = 65536 // (128 * (consumers + 1)) // 8 * 8 * (consumers + 1)
        assert consumers * consumer + other <= launched


def test_tmem_holds_every_declared_size():
    assert list(mosaic_gpu_tiles.TILES[10, 0]) == SIZES
    for (_, size_v), classes in mosaic_gpu_tiles.TILES[10, 0].items():
        for tiles in classes.values():
            assert tiles.consumers * (tiles.block_kv + size_v) <= 512


def test_what_blackwell_does_not_have_is_refused():
    def reasons(**asked):
        question = {"op": "dense", "head_size": 128, "dtype": "bfloat16"} | asked
        config = AttentionSelectorConfig(**question)
        found = MosaicGpuBackend.validate_configuration(config, Device.named("b200"))
        return [(reason.argument, str(reason.allowed)) for reason in found]

    assert reasons(head_size=256) == reasons(needs_grad=True, head_size=192) == []
    refused = ("head_size", "a multiple of 8, at most 192")
    assert reasons(needs_grad=True, head_size=256) == [refused]
    x = jnp.zeros((1, 8, 1, 256), jnp.bfloat16)
    text = "head_dim is 256, must be one of 64, 80, 96, 128, 192 where gradients are taken on"
    with gpu_chip.for_chip("b200"), pytest.raises(ValueError, match=re.escape(text)):
        jax.eval_shape(jax.grad(lambda q: mosaic_gpu.dense_attention(q, x, x)[0].sum()), x)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DENSE.dtype.values)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("causal", [True, False])
def test_every_declared_size_compiles(dtype, sizes, causal):
    compiles("b200", dtype=dtype, head_size=sizes[0], head_size_v=sizes[1], causal=causal)


@pytest.mark.sweep
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("features", [*FEATURES, "all"], ids=str)
def test_every_declared_feature_compiles(features, sizes):
    compiles("b200", head_size=sizes[0], head_size_v=sizes[1], **features_of(features))
