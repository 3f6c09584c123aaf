"""Dense attention on Ampere: the interpreter against the oracle, planted faults, the compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import gpu_interpreter, needs_gpu_interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_gpu_dense import FEATURES, FORGOTTEN, SINGLE, SIZES, as_declared, compiles, problem

from attnsel_jax.backends.mosaic_gpu import MosaicGpuBackend
from attnsel_jax.compare import compare
from attnsel_jax.compare.comparison import FAIL, PASS
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.platforms import Device
from attnsel_jax.problems import QUICK
from pallas_kernels import gpu_mma
from pallas_kernels.dense import mosaic_gpu, mosaic_gpu_ampere, mosaic_gpu_softmax, mosaic_gpu_tiles

needs_gpu_interpreter()


def verdict_of(case):
    with gpu_interpreter("a100"):
        (row,) = compare([case], {"MOSAIC_GPU": mosaic_gpu.dense_attention}).rows
    assert row.verdict in (PASS, FAIL), str(row)
    return row


def check(case):
    row = verdict_of(case)
    assert row.verdict == PASS, str(row)


def sweep(case):
    return pytest.param(case, marks=pytest.mark.sweep)


EVERYTHING = {
    "batch": 2, "sinks": True, "alibi": True, "soft_cap": 8.0, "q_len": 150, "q_lens": (150, 70),
    "kv_len": 170, "kv_lens": (170, 130), "bias": (True, True, True, True), "segments": 2,
    "sliding_window": 90, "attention_chunk_size": 100, "causal": True,
}  # fmt: skip
TILED = (
    problem("causal, odd lengths", causal=True, q_len=133, kv_len=259, heads=(2, 2),
            head_size=128),
    problem("head size 96, window", causal=True, sliding_window=70, q_len=200, head_size=96),
    problem("offsets, empty rows, float16", batch=2, q_len=70, kv_len=200, q_offset=(-40, 100),
            causal=True, dtype="float16"),
    problem("everything", **EVERYTHING),
    *(sweep(problem(f"everything, head sizes {size} and {size_v}, float16", head_size=size,
                    head_size_v=size_v, dtype="float16", **EVERYTHING))
      for size, size_v in SIZES if size not in (64, 96, 128)),
    sweep(problem("head size 80", head_size=80, causal=True, q_len=133, kv_len=140)),
    sweep(problem("head sizes 192 and 128", head_size=192, head_size_v=128, q_len=70, kv_len=200,
                  causal=True, heads=(2, 2))),
    sweep(problem("head size 192", head_size=192, q_len=70, kv_len=200, sliding_window=33)),
    sweep(problem("head size 256", head_size=256, q_len=70, kv_len=200, sinks=True)),
    sweep(problem("two-sided window", sliding_window=(50, 90), q_len=70, kv_len=300)),
    sweep(problem("lengths", batch=2, q_len=130, kv_len=333, q_lens=(130, 60),
                  kv_lens=(330, 123))),
    sweep(problem("segments", segments=3, causal=True, q_len=140, batch=2, q_lens=(140, 77))),
)  # fmt: skip


@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_many_tiles_agree_with_the_oracle(case):
    check(case)


def accepted():
    """Problems of the contract that Ampere declares, those of many features by default."""
    for case in map(as_declared, (case for case in QUICK if case.op == "dense")):
        if not MosaicGpuBackend.validate_configuration(case.config, Device.named("a100")):
            by_default = case.name.split(".")[-1] in SINGLE
            yield case if by_default else sweep(case)


@pytest.mark.parametrize("case", list(accepted()), ids=lambda case: case.name)
def test_the_contract_s_problems_agree_with_the_oracle(case):
    check(case)


# What is planted -> a problem that must then go red.


def ignoring(**fields):
    """The kernel told of a call without these."""
    forward = mosaic_gpu_ampere.forward

    def faulty(static, x):
        return forward(dataclasses.replace(static, **fields), x)

    return mosaic_gpu.FORWARD, (8, 0), faulty


def interval(low=0, high=0):
    """Every query's keys, moved at either end."""
    seen = mosaic_gpu_softmax.seen_interval

    def faulty(static, row, query):
        first, last = seen(static, row, query)
        return first + low, last + high

    return mosaic_gpu_softmax, "seen_interval", faulty


def unmasked_tile():
    """One tile too many without masks."""
    tiles = mosaic_gpu_ampere.key_tiles

    def faulty(*args):
        found = tiles(*args)
        return found._replace(inner_stop=jnp.minimum(found.inner_stop + 1, found.stop))

    return mosaic_gpu_ampere, "key_tiles", faulty


def unscaled():
    """Sums that are not brought to the new maximum."""
    step = mosaic_gpu_ampere.softmax_step

    def faulty(y, factor, state, may_be_empty):
        p, alpha, after = step(y, factor, state, may_be_empty)
        return p, jnp.ones_like(alpha), after

    return mosaic_gpu_ampere, "softmax_step", faulty


def waiting_for_too_little():
    """`cp.async` groups in flight when they are read."""

    def faulty(n):
        plgpu.wait_gmem_to_smem(n + 1)

    return gpu_mma, "arrived", faulty


def slot_too_early():
    """Tiles sent for into the slot that is read."""
    return gpu_mma, "free_slot", lambda slot, stages: slot


ONE = {"q_len": 20, "heads": (1, 1)}
FAULTS = {
    "unseen values stay": (
        lambda: (mosaic_gpu_ampere, "_seen_values", lambda *_: None),
        problem("keys end inside a tile", kv_len=80, kv_lens=(70,), **ONE),
    ),
    "causal, one key more": (lambda: interval(high=1), problem("causal", causal=True, **ONE)),
    "window, one key less": (
        lambda: interval(low=1), problem("window", causal=True, sliding_window=9, **ONE),
    ),
    "one tile more without masks": (unmasked_tile, problem("causal", causal=True, **ONE)),
    "sums not rescaled": (unscaled, problem("long", kv_len=200, **ONE)),
    "a copy is not waited for": (waiting_for_too_little, problem("long", kv_len=200, **ONE)),
    "a slot is overwritten": (slot_too_early, problem("long", kv_len=200, **ONE)),
    "sinks": (lambda: ignoring(sinks=False), problem("sinks", sinks=True, **ONE)),
    "soft cap": (lambda: ignoring(soft_cap=None), problem("soft cap", soft_cap=5.0, **ONE)),
    "segments": (lambda: ignoring(segments=False), problem("segments", segments=2, **ONE)),
    "bias": (
        lambda: ignoring(bias=None), problem("bias", bias=(True, True, True, True), **ONE),
    ),
    "ALiBi": (lambda: ignoring(alibi=False), problem("ALiBi", alibi=True, **ONE)),
    "chunk": (
        lambda: ignoring(attention_chunk_size=None),
        problem("chunk", attention_chunk_size=7, causal=True, **ONE),
    ),
    "lengths": (
        lambda: ignoring(lengths=False), problem("lengths", kv_lens=(20, 9), batch=2, **ONE),
    ),
    "offset": (
        lambda: ignoring(offset=0), problem("offset", q_offset=(30,), kv_len=60, causal=True, **ONE)
    ),
    "groups": (lambda: ignoring(group=4), problem("groups", q_len=20, heads=(4, 2))),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.sweep if n in FORGOTTEN else ()) for n in FAULTS],
)
def test_a_planted_fault_goes_red(name, monkeypatch):
    plant, case = FAULTS[name]
    where, what, faulty = plant()
    if isinstance(where, dict):
        monkeypatch.setitem(where, what, faulty)
    else:
        monkeypatch.setattr(where, what, faulty)
    assert verdict_of(case).verdict == FAIL


@pytest.mark.parametrize(
    ("tiles", "exact"), [((64, 3, 64), True), ((64, 2, 128), True), ((32, 2, 64), False)]
)
def test_tuning_changes_speed_and_never_numbers(tiles, exact, monkeypatch):
    case = problem("window", causal=True, sliding_window=100, q_len=150, heads=(1, 1))
    x = {name: jnp.asarray(v) if hasattr(v, "shape") else v for name, v in case.make().items()}
    block_kv, stages, rows = tiles
    other = mosaic_gpu_tiles.Tiles(block_kv, stages, 1, rows=rows)
    with gpu_interpreter("a100"):
        wanted = mosaic_gpu.dense_attention(**x)
        monkeypatch.setattr(mosaic_gpu, "forward_tiles", lambda *_, **__: other)
        found = mosaic_gpu.dense_attention(**x)
    for w, f in zip(wanted, found, strict=True):
        w, f = np.asarray(w, np.float32), np.asarray(f, np.float32)
        if exact:
            np.testing.assert_array_equal(f, w)
        else:
            np.testing.assert_allclose(f, w, rtol=2**-6, atol=2**-8)


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_left_operand_s_registers_hold_what_the_results_held(rows, dtype):
    """No interpreter sees the cast of layouts: here each register's elements are looked up."""
    shape = (rows, 64)
    orders = []
    for layout in (plgpu.Layout.MMA_ACC(dtype), plgpu.Layout.MMA_LHS(dtype)):
        layout = layout.to_mgpu()
        held = np.arange(rows * 64).reshape(shape)
        for tile in layout.tiling.tiles:
            lead, last = held.shape[: -len(tile)], held.shape[-len(tile) :]
            split = [part for n, t in zip(last, tile, strict=True) for part in (n // t, t)]
            held = held.reshape(*lead, *split)
            order = [len(lead) + i for i in (*range(0, len(split), 2), *range(1, len(split), 2))]
            held = held.transpose(*range(len(lead)), *order)
        of_thread = [d for d in (*layout.warp_dims, *layout.lane_dims) if isinstance(d, int)]
        threads = [d + held.ndim for d in of_thread]
        vector = layout.vector_dim + held.ndim
        registers = [d for d in range(held.ndim) if d not in (*threads, vector)]
        orders.append(held.transpose(*threads, *registers, vector).reshape(128, -1, 2))
    np.testing.assert_array_equal(*orders)


def test_what_ampere_does_not_have_is_refused():
    def reasons(**question):
        asked = {"head_size": 128, "dtype": "bfloat16", "kv_cache_dtype": "auto", "op": "dense"}
        config = AttentionSelectorConfig(**asked | question)
        found = MosaicGpuBackend.validate_configuration(config, Device.named("a100"))
        return [reason.argument for reason in found]

    assert reasons() == reasons(needs_grad=True, has_alibi=True, has_bias=True) == []
    assert reasons(head_size=80, needs_grad=True) == []
    assert reasons(head_size=256) == reasons(head_size=192, head_size_v=128) == []
    assert reasons(head_size=136, needs_grad=True) == ["head_size"]
    wide = jnp.ones((1, 8, 1, 192), "bfloat16")
    message = "head_dim is 192, must be one of 64, 80, 96, 128 where gradients"
    with gpu_interpreter("a100"), pytest.raises(ValueError, match=message):
        jax.grad(lambda q: mosaic_gpu.dense_attention(q, q, q)[0].sum())(wide)


def test_it_compiles_for_ampere():
    compiles("a100")


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("size", "size_v"), SIZES)
@pytest.mark.parametrize("features", [{}, *FEATURES], ids=str)
def test_everything_that_the_kernel_takes_compiles(features, size, size_v, dtype):
    compiles("a100", **{"head_size": size, "head_size_v": size_v, "dtype": dtype} | features)
