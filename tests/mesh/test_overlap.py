"""In the schedule that a TPU's compiler made, keys go on to the next device beside the attention.

Read off the compiled program: between the start of each exchange of the ring's steps and its end
stand the kernels that attend to the keys which are here.
"""

import pathlib

import pytest

from attnsel_jax.aot import MeshCall, compile_for, target_for
from attnsel_jax.aot.arguments import dense_arguments
from attnsel_jax.aot.collectives import Work, collectives_of

DEVICES = {"v5e": 4, "v6e": 4, "7x": 8}  # the least with a loop of several steps
MOSAIC = (
    "attnsel_jax.backends.mosaic_tpu:MosaicTpuBackend",
    "pallas_kernels.dense.mosaic_tpu:dense_attention",
)
XLA = ("attnsel_jax.backends.xla:XlaBackend", "attnsel_jax.xla.dense:dense_attention")
SERIAL = ("serial_ring:MosaicTpuBackend", MOSAIC[1])
# What stands beside an exchange is the compiler's doing, not jax's.
pytestmark = pytest.mark.once
# Of the pieces of queries and keys, three pairs meet in zig-zag order; backward, each is computed
# again, and pulled back.
FORWARD, BACKWARD = Work(kernels=3), Work(kernels=6)


def steps(chip, backend, gradients=False):
    """What stands beside each exchange of the ring's steps: those that the loop runs n - 1 times.

    The last step sends nothing on; zig-zag exchanges, and the gradients' last way home, are not of
    the steps, and run once.
    """
    missing = target_for(chip).missing()
    if missing:
        pytest.skip(f"no compiler for {chip} here: {missing}")
    n = DEVICES[chip]
    arguments = dense_arguments(
        batch=1, q_len=256 * n, kv_len=256 * n, num_heads=2, num_kv_heads=1, head_size=128,
        dtype="bfloat16", causal=True,
    )  # fmt: skip
    over = MeshCall(backend[0], "dense", {"seq": n}, context="seq", form="ring")
    report = compile_for(chip, backend[1], arguments, over=over, gradients=gradients)
    assert report.compiled, report.refusal
    return [c.beside for c in report.collectives if c.times == n - 1]


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_keys_go_on_beside_the_kernels(chip):
    assert steps(chip, MOSAIC) == [FORWARD] * 2  # k, v


@pytest.mark.once
def test_keys_and_their_gradients_go_on_beside_the_kernels_of_the_backward_pass():
    beside = steps("v6e", MOSAIC, gradients=True)
    assert sorted(beside) == [FORWARD] * 2 + [BACKWARD] * 4  # k, v; k, v, dk, dv


def test_keys_go_on_beside_what_xla_makes_of_attention():
    beside = steps("v5e", XLA)
    # Two products a pair at least: XLA may clone them.
    assert len(beside) == 2
    assert min(work.products for work in beside) >= 6


@pytest.mark.sweep
@pytest.mark.parametrize("chip", ["v5e", "v6e", "7x"])
@pytest.mark.parametrize("backend", [MOSAIC, XLA], ids=["MOSAIC_TPU", "XLA"])
def test_everywhere(chip, backend):
    beside = steps(chip, backend, gradients=True)
    assert len(beside) == 6
    assert all(work.kernels + work.products >= 3 for work in beside)


@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=pytest.mark.sweep)])
def test_a_ring_that_waits_is_seen(gradients, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent), prepend=":")
    beside = steps("v5e", SERIAL, gradients)
    assert beside == [Work()] * (6 if gradients else 2)


TEXT = """HloModule jit_f, is_scheduled=true

%product (p: f32[2,8]) -> f32[2,8] {
  %dot.1 = f32[2,8]{1,0} convolution(%p, %p), dim_labels=bf_io->bf
}

%cond.1 (p: (s32[], f32[2,8])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
}

%body.1 (p: (s32[], f32[2,8])) -> (s32[], f32[2,8]) {
  %f.1 = f32[2,8]{1,0} fusion(%p), kind=kOutput, calls=%product
  %k.1 = f32[2,8]{1,0} custom-call(%p), custom_call_target="tpu_custom_call"
  %a.1 = f32[2,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
}

ENTRY %main (q: f32[2,8]) -> f32[2,8] {
  %early = (f32[2,8]{1,0}, f32[2,8]{1,0}) collective-permute-start(%q), source_target_pairs={{0,1},{1,0}}
  %late = (f32[2,8]{1,0}, f32[2,8]{1,0}) collective-permute-start(%q), source_target_pairs={{0,1},{1,0}}
  %while.1 = (s32[], f32[2,8]) while(%t), condition=%cond.1, body=%body.1
  %early.d = f32[2,8]{1,0} collective-permute-done(%early)
  %k.2 = f32[2,8]{1,0} custom-call(%q), custom_call_target="tpu_custom_call"
  %late.d = f32[2,8]{1,0} collective-permute-done(%late)
  %now = f32[2,8]{1,0} all-reduce(%q), replica_groups={{0,1}}
}
"""  # noqa: E501


def test_what_stands_between_is_read_off_a_program_s_text():
    assert [c.beside for c in collectives_of(TEXT)] == [Work(3, 3), Work(4, 3), Work()]
