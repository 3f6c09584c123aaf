"""Dense attention on Blackwell, in the interpreter against the oracle, and by the compiler.

No Blackwell GPU has run it.
"""

import dataclasses

import jax.numpy as jnp
import pytest
from gpu_interpreter import needs_gpu_interpreter
from test_gpu_dense import compared, compiles, problem

from attnsel_jax.compare.comparison import FAIL, PASS
from pallas_kernels import gpu_chip
from pallas_kernels.dense import mosaic_gpu, mosaic_gpu_blackwell, mosaic_gpu_tiles
from pallas_kernels.dense import mosaic_gpu_blackwell_softmax as softmax

needs_gpu_interpreter()

ONE = {"heads": (1, 1), "q_len": 40}
PROVED = problem("causal, groups, odd lengths", causal=True, q_len=300, kv_len=389, head_size=128)
UNPROVED = (
    problem("two-sided window", sliding_window=(50, 90), q_len=70, kv_len=400, heads=(1, 1)),
    problem("offsets, float16", batch=2, q_len=140, kv_len=350, q_offset=(-80, 150), causal=True,
            dtype="float16", heads=(1, 1)),
    problem("everything", batch=2, sinks=True, alibi=True, soft_cap=8.0, q_len=150,
            q_lens=(150, 70), kv_len=170, kv_lens=(170, 130), bias=(True, True, True, True),
            segments=2, sliding_window=90, attention_chunk_size=100, causal=True),
)  # fmt: skip


def test_it_agrees_with_the_oracle():
    row = compared(PROVED, "b200")
    assert row.verdict == PASS, str(row)


@pytest.fixture
def unproved(monkeypatch):
    """Lets through what is written and refused: before it is allowed, these must pass."""
    monkeypatch.setattr(mosaic_gpu_blackwell, "check_proved", lambda *_: None)


@pytest.mark.sweep
@pytest.mark.parametrize("case", UNPROVED, ids=lambda case: case.name)
def test_what_is_not_proved_agrees_with_the_oracle(case, unproved):
    row = compared(case, "b200")
    assert row.verdict == PASS, str(row)


def ignoring(**fields):
    """The kernel told of a call without these."""

    def faulty(static, x):
        return mosaic_gpu_blackwell.forward(dataclasses.replace(static, **fields), x)

    return mosaic_gpu.FORWARD, (10, 0), faulty


def unscaled():
    """Sums in TMEM that are not brought to the new maximum."""
    brought = softmax._brought_to
    return softmax, "_brought_to", lambda o, state, top, _: brought(o, state, top, jnp.bool_(True))


FAULTS = {
    "unseen values stay": (
        lambda: (mosaic_gpu_blackwell.hopper, "clear_unseen", lambda *_: None),
        problem("keys end inside a tile", kv_len=80, kv_lens=(70,), **ONE),
    ),
    "sums not rescaled": (unscaled, problem("long", kv_len=600, **ONE)),
    "sinks": (lambda: ignoring(sinks=False), problem("sinks", sinks=True, **ONE)),
    "soft cap": (lambda: ignoring(soft_cap=None), problem("soft cap", soft_cap=5.0, **ONE)),
    "segments": (lambda: ignoring(segments=False), problem("segments", segments=2, **ONE)),
    "bias": (lambda: ignoring(bias=None), problem("bias", bias=(True,) * 4, **ONE)),
    "ALiBi": (lambda: ignoring(alibi=False), problem("ALiBi", alibi=True, **ONE)),
    "causal": (lambda: ignoring(causal=False), problem("causal", causal=True, **ONE)),
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_goes_red(name, monkeypatch, unproved):
    plant, case = FAULTS[name]
    place, key, faulty = plant()
    (monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr)(place, key, faulty)
    assert compared(case, "b200").verdict == FAIL


@pytest.mark.sweep  # alone: what a process compiles after it is compiled for sm_100a too
@pytest.mark.xfail(strict=True, reason="it compiles, but 48 + 176 bytes of scalars are spilled")
def test_it_compiles():
    compiles("b200", q_len=1024, kv_len=1024)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dtype": "float16"}, "dtype is float16, must be bfloat16 with compute_capability 10.0"),
        ({"size": 64}, "head_dim/head_dim_v is 64/64, must be 128/128 with"),
        ({"causal": False}, "causal is False, must be True with"),
        ({"soft_cap": 3.0}, "soft_cap is 3.0, must be None with"),
        ({"q_offset": 3}, "q_offset is 3, must be 0 with"),
        ({"sinks": jnp.zeros((1,), jnp.float32)}, "sinks is given, must be None with"),
        ({"kv_lens": jnp.ones((1,), jnp.int32)}, "q_lens or kv_lens is given, must be None with"),
    ],
)
def test_what_is_not_proved_is_refused(arguments, text):
    arguments = dict(arguments)
    x = jnp.zeros((1, 8, 1, arguments.pop("size", 128)), arguments.pop("dtype", "bfloat16"))
    with pytest.raises(ValueError, match=text), gpu_chip.for_chip("b200"):
        mosaic_gpu.dense_attention(x, x, x, **{"causal": True} | arguments)


def test_registers_of_a_block_s_roles_fit_what_it_is_launched_with():
    for consumers, (consumer, other) in mosaic_gpu_blackwell.REGISTERS.items():
        launched = 65536 // (128 * (consumers + 1)) // 8 * 8 * (consumers + 1)
        assert consumers * consumer + other <= launched


def test_tmem_holds_every_declared_size():
    for (_, size_v), classes in mosaic_gpu_tiles.TILES[10, 0].items():
        for tiles in classes.values():
            assert tiles.consumers * (tiles.block_kv + size_v) <= 512
