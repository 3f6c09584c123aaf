"""Dense attention on Blackwell, in the interpreter against the oracle, and by the compiler.

No Blackwell GPU has run it.
"""

import dataclasses

import jax.numpy as jnp
import pytest
from gpu_interpreter import needs_gpu_interpreter
from test_gpu_dense import compared, compiles, problem

from attnsel_jax.backends.mosaic_gpu import MosaicGpuBackend
from attnsel_jax.compare.comparison import FAIL, PASS
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.platforms import Device
from pallas_kernels.dense import mosaic_gpu, mosaic_gpu_blackwell, mosaic_gpu_tiles
from pallas_kernels.dense import mosaic_gpu_blackwell_softmax as softmax

needs_gpu_interpreter()

SIZES = tuple(mosaic_gpu_tiles.TILES[10, 0])
ONE = {"heads": (1, 1), "q_len": 40}
CASES = (
    problem("causal, groups, odd lengths", causal=True, q_len=257, kv_len=389, head_size=128),
    problem("two-sided window", sliding_window=(50, 90), q_len=70, kv_len=400, heads=(1, 1)),
    problem("offsets, float16", batch=2, q_len=140, kv_len=350, q_offset=(-80, 150), causal=True,
            dtype="float16", heads=(1, 1)),
    problem("everything", batch=2, sinks=True, alibi=True, soft_cap=8.0, q_len=150,
            q_lens=(150, 70), kv_len=170, kv_lens=(170, 130), bias=(True, True, True, True),
            segments=2, sliding_window=90, attention_chunk_size=100, causal=True),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_agrees_with_the_oracle(case):
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


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_goes_red(name, monkeypatch):
    plant, case = FAULTS[name]
    place, key, faulty = plant()
    (monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr)(place, key, faulty)
    assert compared(case, "b200").verdict == FAIL


@pytest.mark.sweep
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_every_declared_size_compiles(sizes, causal):
    compiles("b200", head_size=sizes[0], head_size_v=sizes[1], causal=causal)


def test_it_compiles():
    compiles("b200")


def test_gradients_are_refused():
    config = AttentionSelectorConfig(op="dense", head_size=64, dtype="bfloat16", needs_grad=True)
    reasons = MosaicGpuBackend.validate_configuration(config, Device.named("b200"))
    assert any("needs_grad is True" in str(reason) for reason in reasons)
    paged = dataclasses.replace(config, op="paged", needs_grad=False)
    reasons = MosaicGpuBackend.validate_configuration(paged, Device.named("b200"))
    assert any("compute_capability" in str(reason) for reason in reasons)


def test_registers_of_a_block_s_roles_fit_what_it_is_launched_with():
    for consumers, (consumer, other) in mosaic_gpu_blackwell.REGISTERS.items():
        launched = 65536 // (128 * (consumers + 1)) // 8 * 8 * (consumers + 1)
        assert consumers * consumer + other <= launched


def test_tmem_holds_every_declared_size():
    for (_, size_v), classes in mosaic_gpu_tiles.TILES[10, 0].items():
        for tiles in classes.values():
            assert tiles.consumers * (tiles.block_kv + size_v) <= 512
