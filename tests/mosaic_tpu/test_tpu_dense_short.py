"""Dense attention on TPU over short sequences, several heads to a grid step, against the oracle.

Tiles are cut to 128 queries and 128 keys, and runs of code to two heads or units, so that few
heads are several runs, and the last one begins among heads that were computed before.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_kernels import compared, problem
from tpu_interpreter import tpu_interpreter

from attnsel_jax.aot import compile_for, target_for
from attnsel_jax.aot.arguments import dense_arguments
from attnsel_jax.backends.mosaic_tpu import MosaicTpuBackend
from attnsel_jax.compare.comparison import FAIL, PASS
from attnsel_jax.platforms import CHIPS
from attnsel_jax.xla import reference
from pallas_kernels import tpu_chip
from pallas_kernels.dense import mosaic_tpu, mosaic_tpu_logits, mosaic_tpu_short

KERNEL = MosaicTpuBackend.kernels["dense"]


@pytest.fixture(autouse=True)
def _cut(monkeypatch):
    cut(monkeypatch)


def cut(monkeypatch, **sizes):
    """Small tiles and runs, and one grid step where more are not asked for."""
    small = {"BLOCK_Q": 128, "STEP_KV": 128, "RUN_UNITS": 2, "LEAST_STEPS": 1}
    for name, size in (small | sizes).items():
        monkeypatch.setattr(mosaic_tpu_short, name, size)


SHORT = (
    problem("three heads of 197 tokens, runs of one", q_len=197, kv_len=197, heads=(3, 3),
            gradients=True),
    problem("groups, causal, two rows of the batch to a step, one of no queries", q_len=120,
            kv_len=130, heads=(2, 1), batch=2, q_lens=(120, 0), q_offset=(0, 50), causal=True,
            sinks=True, dtype="bfloat16", gradients=True),
    problem("everything", batch=2, sinks=True, masked=True, alibi=True, soft_cap=8.0, q_len=37,
            q_lens=(37, 21), kv_lens=(37, 30), bias=(True, True, True, True), segments=2,
            sliding_window=20, attention_chunk_size=24, causal=True, gradients=True),
)  # fmt: skip
LONGER = (
    problem("a mask, batch by batch", q_len=130, kv_len=197, heads=(4, 2), batch=2, masked=True,
            sinks=True, gradients=True),
    problem("five heads, one row each, runs of two", q_len=77, kv_len=77, heads=(5, 5),
            gradients=True),
    problem("keys that no query sees, offsets", q_len=100, kv_len=350, heads=(3, 1), batch=2,
            q_offset=(-140, 13), causal=True, gradients=True),
    problem("lengths", batch=2, q_len=130, kv_len=300, heads=(6, 2), sinks=True,
            kv_lens=(300, 123), q_lens=(130, 5), gradients=True),
    problem("segments, bias for keys and heads", batch=3, heads=(2, 2), segments=3, causal=True,
            q_len=140, kv_len=140, bias=(False, True, False, True), gradients=True),
    problem("rows before all keys, window", q_len=700, kv_len=600, heads=(4, 4), causal=True,
            sliding_window=300, q_offset=-100, gradients=True),
    problem("no row sees a key", q_len=300, kv_len=300, causal=True, q_offset=-400, gradients=True),
    problem("bias for queries, slopes, keys past all queries", q_len=130, kv_len=700, causal=True,
            alibi=True, bias=(False, False, True, True), gradients=True),
    problem("a group of eight, bias of the batch", q_len=260, kv_len=260, heads=(8, 1), batch=2,
            dtype="bfloat16", causal=True, bias=(True, False, True, True), gradients=True),
    *(problem(f"head size {size}, {dtype}", q_len=139, head_size=size, dtype=dtype, causal=True,
              gradients=True)
      for size in (8, 64, 72, 80, 128, 256) for dtype in ("float32", "bfloat16")),
)  # fmt: skip


def check(case, *, detect_races=False):
    row = compared(case, "v6e", detect_races=detect_races)
    assert row.verdict == PASS, str(row)


@pytest.mark.once
@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_short_sequences_agree_with_the_oracle(case):
    check(case, detect_races=case is SHORT[0])


@pytest.mark.sweep
@pytest.mark.parametrize("case", [*SHORT, *LONGER], ids=lambda case: case.name)
@pytest.mark.parametrize(
    "sizes",
    [{}, {"RUN_UNITS": 4, "BLOCK_Q": 256}, {"BLOCK_Q": 512, "STEP_KV": 256, "RUN_UNITS": 32},
     {"MOST_AHEAD": 1, "LEAST_STEPS": 4}],
    ids=str,
)  # fmt: skip
def test_longer_ones_agree_whatever_their_plan(case, sizes, monkeypatch):
    cut(monkeypatch, **sizes)
    check(case, detect_races=True)


@pytest.mark.once
@pytest.mark.parametrize(
    "gradients", [False, pytest.param(True, marks=pytest.mark.sweep)], ids=["forward", "both"]
)
def test_rows_that_a_bias_hides_whole(gradients):
    """Left padding under a causal mask: what such a row gives is even over its keys."""
    keys = [jax.random.key(i) for i in range(4)]
    q, k, v, dout = (jax.random.normal(key, (1, 140, 1, 8)) for key in keys)
    bias = jnp.zeros((1, 1, 1, 140)).at[..., :100].set(-1e9)

    def everything(kernel):
        def attend(q, k, v, bias):
            return kernel(q, k, v, bias=bias, causal=True)

        if not gradients:
            return attend(q, k, v, bias)
        results, pull = jax.vjp(attend, q, k, v, bias)
        return results, pull((dout, jnp.ones((1, 140, 1))))

    with tpu_interpreter("v6e"):
        ours = jax.jit(everything, static_argnums=0)(mosaic_tpu.dense_attention)
    plain = everything(reference.dense_attention)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


FORWARD = dataclasses.replace(SHORT[0], gradients=False)


def everything_seen(real, static, extras, at):
    """No mask."""
    del real, static, extras, at


def one_key_more(real, static, extras, at):
    """The first key of a step is seen by all."""
    mask = real(static, extras, at)
    return mask | (jax.lax.broadcasted_iota(jnp.int32, mask.shape, 0) == 0)


@pytest.mark.once
@pytest.mark.parametrize(
    ("fault", "name", "of"),
    [(everything_seen, "out", FORWARD),
     pytest.param(one_key_more, "lse", SHORT[1], marks=pytest.mark.sweep)],
    ids=lambda x: getattr(x, "__name__", ""),
)  # fmt: skip
def test_a_planted_fault_is_found(fault, name, of, monkeypatch):
    real = mosaic_tpu_logits.seen
    monkeypatch.setattr(mosaic_tpu_logits, "seen", lambda *given: fault(real, *given))
    row = compared(of, "v6e")
    assert row.verdict == FAIL, str(row)
    assert f"{name}:" in str(row)


@pytest.mark.sweep
def test_a_run_that_is_not_begun_again_is_found(monkeypatch):
    """Of five heads in runs of two the last one would be computed with one that is none."""
    real = mosaic_tpu_short.Heads.units

    def too_far(heads, first, count):
        return real(heads, first + 1 if not isinstance(first, int) else first, count)

    monkeypatch.setattr(mosaic_tpu_short.Heads, "units", too_far)
    assert compared(LONGER[0], "v6e").verdict == FAIL


def plan_of(*, batch=1, q_len=512, kv_len=512, heads=(16, 16), head_size=64, dtype="bfloat16",
            generation="v6e", of_backward=False, **options):  # fmt: skip
    """The plan of a call, in the table's own sizes."""
    plans, real = [], mosaic_tpu_short.planned

    def planned(*given, **named):
        plans.append(real(*given, **named)[1])
        return real(*given, **named)

    q = jax.ShapeDtypeStruct((batch, q_len, heads[0], head_size), dtype)
    k = jax.ShapeDtypeStruct((batch, kv_len, heads[1], head_size), dtype)

    def attend(q, k, v, options):
        return mosaic_tpu.dense_attention(q, k, v, **options)[0].astype(jnp.float32).sum()

    static = {name: options.pop(name) for name in ("causal",) if name in options}
    function = jax.grad(attend) if of_backward else attend
    with pytest.MonkeyPatch.context() as patch, tpu_chip.for_generation(generation):
        patch.setattr(mosaic_tpu_short, "planned", planned)
        jax.eval_shape(lambda q, k, v, given: function(q, k, v, given | static), q, k, k, options)
    return plans[-1]


@pytest.mark.parametrize(
    ("call", "expected"),
    [({"batch": 32}, (16, 1, 8, 1)),  # heads, rows of the batch, heads in a run, ahead
     ({"batch": 64, "q_len": 197, "kv_len": 197, "heads": (12, 12)}, (12, 4, 24, 3)),
     ({"batch": 8, "heads": (13, 13)}, (13, 1, 8, 1)),  # a run of 8, and one of the last 8
     ({"batch": 8, "q_len": 1024, "kv_len": 1024, "heads": (32, 1), "causal": True}, (8, 1, 4, 1)),
     ({"batch": 32, "heads": (16, 4), "of_backward": True}, (16, 1, 8, 1)),
     ({"q_len": 2048, "kv_len": 512}, None),
     ({"heads": (64, 1), "of_backward": True}, None)],  # a group is more than a run
    ids=str,
)  # fmt: skip
def test_how_many_heads_a_grid_step_takes(call, expected, monkeypatch):
    monkeypatch.undo()
    plan = plan_of(**call)
    assert (plan and (plan.heads, plan.batch, plan.run, plan.ahead)) == expected


def test_what_meets_what_is_known_when_it_is_traced(monkeypatch):
    """Causal, 600 tokens: queries before a step's keys are left out, and only its edge masked."""
    monkeypatch.undo()
    first, second = plan_of(q_len=600, kv_len=600, causal=True).rows
    assert [tuple(step) for step in first] == [(0, 256, 0, 256, False), (256, 256, 256, 384, True)]
    assert [tuple(step) for step in second] == [
        (0, 256, 0, 0, False), (256, 256, 0, 128, False), (512, 128, 128, 384, True),
    ]  # fmt: skip
    lens = jax.ShapeDtypeStruct((1,), "int32")
    (first, _) = plan_of(q_len=600, kv_len=600, causal=True, kv_lens=lens).rows
    assert [tuple(step) for step in first] == [(0, 256, 0, 384, True), (256, 256, 256, 384, True)]


def compiles(chip, **options):
    """In a process of its own, with the sizes as they are."""
    missing = target_for(chip).missing()
    if missing:
        pytest.skip(f"no compiler for {chip} here: {missing}")
    options = {"batch": 4, "q_len": 197, "kv_len": 197, "num_heads": 4, "num_kv_heads": 2,
               "head_size": 64, "dtype": "bfloat16"} | options  # fmt: skip
    report = compile_for(chip, KERNEL, dense_arguments(**options), gradients=True)
    assert report.compiled, report.refusal


DENSE = MosaicTpuBackend.capabilities["dense"]
TPUS = [
    name for name, chip in CHIPS.items() if chip.generation and chip.generation in DENSE.generation
]


def test_it_compiles_for_a_tpu():
    compiles("v6e")


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("chip", "dtype", "head_size"),
    [*itertools.product(TPUS, ("bfloat16", "float32"), (8, 64, 72, 80, 128, 256))],
)
@pytest.mark.parametrize("length", [77, 512])
def test_every_size_compiles_for_every_tpu(chip, dtype, head_size, length):
    compiles(chip, dtype=dtype, head_size=head_size, q_len=length, kv_len=length,
             causal=length == 77)  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("length", [300, 1024])
@pytest.mark.parametrize("bias", [None, (1, 4, 1, 1), (4, 1, 0, 1), (1, 1, 1, 0)])
def test_everything_at_once_compiles_for_every_tpu(chip, dtype, length, bias):
    def shape(*sizes, of="float32"):
        return jax.ShapeDtypeStruct(sizes, of)

    ids, one = shape(4, length, of="int32"), shape(4, of="int32")
    more = {}
    if bias is not None:
        more["bias"] = shape(*bias[:2], *(length if size else 1 for size in bias[2:]), of=dtype)
    compiles(chip, dtype=dtype, q_len=length, kv_len=length, causal=True, sinks=shape(4),
             soft_cap=20.0, sliding_window=200, q_segment_ids=ids, kv_segment_ids=ids, q_lens=one,
             kv_lens=one, alibi_slopes=shape(4), mask=shape(4, 1, length, length, of="bool"),
             **more)  # fmt: skip
