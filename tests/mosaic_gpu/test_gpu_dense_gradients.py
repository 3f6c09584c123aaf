"""Gradients of dense attention on GPUs: interpreted against the oracle, and by the compiler."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_compiler import compiled_cleanly, program_of
from gpu_interpreter import gpu_interpreter, needs_gpu_interpreter
from hidden_rows import check_hidden_rows
from masked_inputs import masked_inputs

from attnsel_jax.aot import child
from attnsel_jax.backends.mosaic_gpu import MosaicGpuBackend
from attnsel_jax.compare import compare
from attnsel_jax.compare.comparison import FAIL, PASS
from attnsel_jax.compare.expected import gradient_names
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.mesh import merging
from attnsel_jax.platforms import Device
from attnsel_jax.problems import Problem
from attnsel_jax.problems.dense_inputs import dense_inputs
from pallas_kernels.dense import (
    mosaic_gpu,
    mosaic_gpu_backward,
    mosaic_gpu_dbias,
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


PLAIN = problem("causal, groups, odd lengths", causal=True, q_len=131, kv_len=137)
WINDOW = problem("window, capped, sinks", causal=True, sliding_window=40, soft_cap=8.0, sinks=True,
                 heads=(1, 1))  # fmt: skip
SEGMENTS = problem("segments", segments=3, causal=True, batch=2, q_len=90, q_lens=(90, 70),
                   heads=(1, 1))  # fmt: skip
SPLIT = problem("keys past the queries, head sizes 192 and 128", heads=(1, 1), head_size=192,
                head_size_v=128, q_len=70, kv_len=100, causal=True, soft_cap=8.0)  # fmt: skip
BIAS = problem("bias of a head, shared by rows; slopes", batch=2, bias=(False, True, True, True),
               alibi=True, q_len=20, kv_len=70)  # fmt: skip
OF_KEYS = problem("bias of keys, lengths", bias=(True, False, False, True), heads=(1, 1), batch=2,
                  q_len=140, kv_len=40, kv_lens=(40, 20))  # fmt: skip
AHEAD = problem("groups of head sizes 192 and 128, the next step beside this one", heads=(2, 1),
                head_size=192, head_size_v=128, q_len=131, kv_len=137, causal=True)  # fmt: skip
PADDED = problem("head sizes 72 and 40, padded", head_size=72, head_size_v=40, q_len=70, kv_len=100,
                 causal=True, sinks=True, heads=(2, 2))  # fmt: skip
CASES = (PLAIN, WINDOW, SPLIT, AHEAD, BIAS, OF_KEYS, PADDED)
MORE = (
    problem("head sizes 24 and 136, padded", head_size=24, head_size_v=136, q_len=70, kv_len=100),
    SEGMENTS,
    problem("offsets, empty rows, float16", batch=2, q_len=40, kv_len=150, q_offset=(-20, 150),
            causal=True, dtype="float16", heads=(1, 1)),
    problem("lengths", batch=2, q_len=70, kv_len=133, q_lens=(66, 0), kv_lens=(130, 23)),
    problem("four heads of two", causal=True, heads=(4, 2), q_len=131, kv_len=137),
    problem("two-sided window", sliding_window=(50, 30), q_len=70, kv_len=200),
    problem("chunks", attention_chunk_size=50, causal=True, q_len=170),
    problem("head size 128", head_size=128, causal=True, q_len=200),
    problem("head size 256", head_size=256, heads=(2, 2), q_len=100, causal=True),
    problem("head size 80", head_size=80, q_len=100),
    problem("head size 96", head_size=96, q_len=100, sliding_window=33),
    problem("head size 192", head_size=192, q_len=100, sinks=True),
    problem("one query", q_len=1, kv_len=65),
    problem("a bias for each logit", bias=(True, True, True, True), causal=True, batch=2,
            heads=(4, 2)),
    problem("one bias, offsets", bias=(False, False, True, True), causal=True, batch=2,
            q_offset=(-30, 20)),
    problem("bias of keys, causal, window", bias=(False, True, False, True), causal=True,
            sliding_window=50, batch=2, q_len=270, kv_len=140),
    problem("bias of queries, sinks", bias=(True, True, True, False), causal=True, batch=2,
            sinks=True, kv_len=150),
    problem("bias of a head, capped", bias=(False, True, False, False), causal=True, soft_cap=8.0),
    problem("bias of one key", bias=(True, True, True, True), q_len=70, kv_len=1),
    problem("slopes, capped, offsets", alibi=True, soft_cap=8.0, q_offset=(-30, 20), batch=2,
            kv_len=150),
    problem("everything added, split, segments", heads=(2, 2), head_size=192, head_size_v=128,
            q_len=70, kv_len=100, soft_cap=8.0, bias=(False, True, True, True), alibi=True,
            segments=2),
    problem("slopes, head size 256", head_size=256, heads=(1, 1), q_len=70, alibi=True,
            bias=(True, True, True, True)),
)  # fmt: skip


def row_of(case, chip="h200", kernel=mosaic_gpu.dense_attention):
    with gpu_interpreter(chip):
        (row,) = compare([case], {"MOSAIC_GPU": kernel}).rows
        assert row.verdict in (PASS, FAIL), str(row)
    return row


def gives_every_gradient(case, chip="h200"):
    row = row_of(case, chip)
    assert row.verdict == PASS, str(row)
    wanted = {f"grad {name}" for name in gradient_names(case.make())}
    assert wanted == {d.quantity for d in row.deviations if d.quantity.startswith("grad")}


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(c, marks=pytest.mark.sweep) for c in MORE)],
    ids=lambda case: case.name,
)  # fmt: skip
def test_gradients_agree_with_the_oracle(case):
    gives_every_gradient(case)


def of_rows(index, *numbers):
    """Numbers in turn, one for each query."""
    return jnp.asarray(numbers, jnp.float32)[index % len(numbers)][:, None]


def shifted_rows(*, bias, **rest):
    """The call with rows shifted far, which changes no weights; lse follows, and is rounded."""
    shift = of_rows(np.arange(bias.shape[2]), -1e9, 1e4, 0.0, 3e8)
    return mosaic_gpu.dense_attention(bias=bias + shift, **rest)


def raised_rows(*, bias, **rest):
    """The call with rows raised so far that sinks get nothing."""
    shift = of_rows(np.arange(bias.shape[2]), 1e9, 1e4, 1e30)
    sinks = jnp.zeros(rest["q"].shape[2])
    return mosaic_gpu.dense_attention(bias=bias + shift, sinks=sinks, **rest)


def hidden_rows(*, mask, **rest):
    """The call with rows hidden by numbers of a bias that leave them the sink alone."""
    hides = of_rows(np.arange(mask.shape[2]), -1e9, -jnp.inf, -1e30)
    return mosaic_gpu.dense_attention(bias=jnp.where(mask, 0.0, hides), **rest)


def one_row_of_three(rng, **options):
    """Inputs whose mask hides every key from two rows of three."""
    arguments = dense_inputs(rng, **options)
    q_len = arguments["q"].shape[1]
    return arguments | {"mask": (np.arange(q_len) % 3 == 2)[None, None, :, None]}


def beside_a_sink(rng, **options):
    """Inputs with rows whose bias leaves the sink nothing, or everything."""
    arguments = dense_inputs(rng, **options)
    bias = np.resize(np.float32([1e4, 0.0, -1e4, 3.0]), arguments["q"].shape[1])
    return arguments | {"bias": bias[None, None, :, None]}


ROWS = {"heads": (2, 1), "q_len": 70, "kv_len": 90}
FAR = {
    "rows shifted": (problem("shifted", bias=(False, True, True, False), **ROWS), shifted_rows),
    "rows shifted, lengths, causal, capped": (
        problem("shifted more", bias=(True, False, True, False), batch=2, q_lens=(70, 0),
                kv_lens=(90, 20), q_offset=(-20, 20), causal=True, soft_cap=8.0, **ROWS),
        shifted_rows,
    ),
    "rows raised above sinks": (
        problem("raised", bias=(False, True, True, False), **ROWS), raised_rows,
    ),
    "rows hidden, sinks": (
        dataclasses.replace(problem("hidden", sinks=True, batch=2, q_lens=(70, 50), **ROWS),
                            build=one_row_of_three),
        hidden_rows,
    ),
    "rows beside a sink": (
        dataclasses.replace(problem("beside a sink", sinks=True, **ROWS), build=beside_a_sink),
        mosaic_gpu.dense_attention,
    ),
}  # fmt: skip


def agrees_though_rows_are_far(name, chip):
    case, kernel = FAR[name]
    row = row_of(case, chip, kernel)
    moved = kernel in (shifted_rows, raised_rows)
    checked = [d for d in row.deviations if not (moved and d.quantity == "lse")]
    assert len(checked) >= 4
    assert all(d.passed for d in checked), str(row)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "rows shifted" else pytest.mark.sweep) for n in FAR]
)
def test_a_bias_of_queries_may_be_as_large_as_it_likes(name):
    agrees_though_rows_are_far(name, "h200")


SOME = {"q_len": 40, "kv_len": 150}
MASKED = {
    "pairs, causal": ((True, False, True, True),
                      {"batch": 2, "causal": True, "q_offset": 120, **SOME}),
    "heads, in segments": ((False, True, True, True), {"heads": (4, 2), "segments": 2, **SOME}),
    "keys, lengths": ((True, False, False, True),
                      {"batch": 2, "q_lens": (40, 20), "kv_lens": (150, 100), **SOME}),
    "queries, sinks": ((False, True, True, False), {"sinks": True, **SOME}),
    "heads and keys, a bias": ((False, True, False, True),
                               {"bias": (False, False, True, True), **SOME}),
}  # fmt: skip


def agrees_under_a_mask(name, chip):
    of, options = MASKED[name]
    options = SHAPE | options | {"of": of}
    row = row_of(Problem(name, "dense", name, masked_inputs, options, gradients=True), chip)
    assert row.verdict == PASS, str(row)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n.startswith("pairs") else pytest.mark.sweep)
             for n in MASKED]
)  # fmt: skip
def test_masks(name):
    agrees_under_a_mask(name, "h200")


@pytest.mark.sweep
@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("chip", ["a100", "b200"])
def test_masks_of_other_chips(name, chip):
    agrees_under_a_mask(name, chip)


HIDDEN = {
    "no gradient but of queries": {"wrt": "q", "q_len": 20, "kv_len": 20, "hidden": 11},
    "lengths, float16": {"dtype": "float16", "heads": (2, 1), "batch": 2, "kv_lens": (70, 50),
                         "wrt": ("q", "k", "v")},
    "a bias of each logit": {"bias": (True, True, True, True), "far": -3e9},
}  # fmt: skip


def agrees_though_a_bias_hides_rows(name, chip):
    options = {"dtype": "bfloat16", "heads": (1, 1), "q_len": 140, "kv_len": 70, "hidden": 30}
    with gpu_interpreter(chip, detect_races="wrt" not in HIDDEN[name]):
        check_hidden_rows(mosaic_gpu.dense_attention, atol=0.03, **options | HIDDEN[name])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.sweep] * (i > 0)) for i, n in enumerate(HIDDEN)]
)
def test_rows_that_a_bias_hides_whole(name):
    agrees_though_a_bias_hides_rows(name, "h200")


CHIPS = ("h200", *(pytest.param(chip, marks=pytest.mark.sweep) for chip in ("a100", "b200")))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (1, 1, 8, 1)], ids=["of keys", "of queries"])
def test_parts_of_hidden_rows_say_what_they_hold(chip, shape):
    """As a ring over a mesh asks for them."""
    q, bias = jnp.zeros((1, 8, 1, 64), jnp.bfloat16), jnp.full(shape, -1e9)
    k, v = (jax.random.normal(jax.random.key(i), q.shape).astype(q.dtype) for i in range(2))

    @jax.jit
    def part(keys, values, bias):
        attend = mosaic_gpu.dense_attention.with_correction
        return merging.Partial(*attend(q, keys, values, bias=bias))

    with gpu_interpreter(chip, detect_races=False):
        of_keys = (slice(0, 3), slice(3, 8))
        parts = [
            part(k[:, i], v[:, i], bias[..., i if shape[3] > 1 else slice(1)]) for i in of_keys
        ]
    whole = merging.merged(*parts)
    mean = np.broadcast_to(np.asarray(v, np.float32).mean(1, keepdims=True), whole.out.shape)
    np.testing.assert_allclose(whole.out, mean, rtol=0.01, atol=0.01)
    np.testing.assert_allclose(whole.correction, 1 / 8, rtol=1e-5)


def forgetting(**fields):
    """The backward told of a call without these."""
    backward = mosaic_gpu_backward.backward
    return lambda static, *rest: backward(dataclasses.replace(static, **fields), *rest)


def without_slope(*args, **kwargs):
    return mosaic_gpu_weights.weights(*args, **kwargs | {"sloped": False})._replace(slope=None)


def without_delta(w, dp, delta, *, queries):
    return w.p * dp if w.slope is None else w.p * dp * w.slope


def without_distance(at, shape, queries):
    return 0.0 * distances(at, shape, queries) + 1.0


distances = mosaic_gpu_weights.distances


def one_row_less(*args, steps=mosaic_gpu_dbias.steps_of):
    found = steps(*args)
    return found._replace(count=jnp.maximum(found.count - 1, 0))


def one_tile_less(*args):
    steps = mosaic_gpu_dkv_steps(*args)
    return steps._replace(count=jnp.maximum(steps.count - 1, 0))


mosaic_gpu_dkv_steps = mosaic_gpu_dkv.steps_of
FAULTS = {
    "segments": (SEGMENTS, mosaic_gpu_backward, "backward", forgetting(segments=False)),
}
MORE_FAULTS = {
    "a tile of queries": (PLAIN, mosaic_gpu_dkv, "steps_of", one_tile_less),
    "the cap's slope, of queries": (WINDOW, mosaic_gpu_dq, "weights", without_slope),
    "a row that shares the bias": (BIAS, mosaic_gpu_dbias, "steps_of", one_row_less),
    "the slopes' distance": (BIAS, mosaic_gpu_dq, "distances", without_distance),
    "the causal edge": (PLAIN, mosaic_gpu_backward, "backward", forgetting(causal=False)),
    "the window": (
        WINDOW, mosaic_gpu_backward, "backward", forgetting(sliding_window=(None, None)),
    ),
    "the cap's slope, of keys": (SPLIT, mosaic_gpu_dkv, "weights", without_slope),
    "delta": (PLAIN, mosaic_gpu_dq, "logit_gradients", without_delta),
    "queries that share a bias of keys": (OF_KEYS, mosaic_gpu_dbias, "steps_of", one_row_less),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [*FAULTS, *(pytest.param(name, marks=pytest.mark.sweep) for name in MORE_FAULTS)]
)
def test_a_planted_fault_goes_red(monkeypatch, name):
    case, module, function, fault = (FAULTS | MORE_FAULTS)[name]
    monkeypatch.setattr(module, function, fault)
    assert row_of(case).verdict == FAIL


TILED = {"causal": True, "heads": (1, 1), "q_len": 140, "kv_len": 140}


@pytest.mark.sweep
@pytest.mark.parametrize("options", [{}, {"bias": (True,) * 4}], ids=str)
def test_tiles_change_no_numbers_and_a_second_call_gives_the_same_bits(monkeypatch, options):
    made = problem("tiled", **TILED | options).make()
    arguments = {name: jnp.asarray(x) for name, x in made.items() if name != "causal"}

    def gradients():
        def pulled(arguments):
            attend = functools.partial(mosaic_gpu.dense_attention, causal=True)
            out, pull_back = jax.vjp(lambda x: attend(**x)[0], arguments)
            return pull_back(out)[0]

        with gpu_interpreter("h200"):
            compiled = jax.jit(pulled)
            return jax.tree.map(np.asarray, [compiled(arguments) for _ in range(2)])

    once, again = gradients()
    jax.tree.map(np.testing.assert_array_equal, once, again)
    tiles = mosaic_gpu_tiles.BackwardTiles(64, 3, 1, 3, split=False, bias_stages=1)
    monkeypatch.setattr(mosaic_gpu_backward, "backward_tiles", lambda *_, **__: tiles)
    jax.tree.map(np.testing.assert_array_equal, once, gradients()[0])


@pytest.mark.parametrize(
    ("size", "segments", "beside", "message"),
    [
        (256, None, "head size above 192", "head_dim is 256, must be at most 192"),
        (192, jnp.zeros((1, 8), jnp.int32),
         "has_segment_ids, head_size_v above 128", "head_dim_v is 192, must be at most"),
        (200, None, "head size above 192", "head_dim is 256, must be at most 192"),
    ],
    ids=["256", "192", "200"],
)  # fmt: skip
def test_what_would_spill_is_refused(size, segments, beside, message):
    added = "needs_grad and a bias, mask or ALiBi"
    for feature in ("has_alibi", "has_bias", "has_mask"):
        config = AttentionSelectorConfig(
            size, "bfloat16", op="dense", needs_grad=True, has_soft_cap=True,
            has_segment_ids=segments is not None, **{feature: True},
        )  # fmt: skip
        (reason,) = MosaicGpuBackend.validate_configuration(config, Device.named("h200"))
        assert str(reason) == f"has_soft_cap is True, must be False with {added}, {beside}"
    q = jnp.ones((1, 8, 1, size), jnp.bfloat16)
    added = {"alibi_slopes": jnp.zeros(1), "soft_cap": 3.0,
             "q_segment_ids": segments, "kv_segment_ids": segments}  # fmt: skip
    with gpu_interpreter("h200"), pytest.raises(ValueError, match=message):
        jax.grad(lambda q: mosaic_gpu.dense_attention(q, q, q, **added)[0].sum())(q)


SIZES = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
WINDOWED = {"causal": True, "sliding_window": (300, 200)}
CAP = {"soft_cap": 30.0}
SEGMENTED = {
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
SLOPES = {"alibi_slopes": jax.ShapeDtypeStruct((4,), "float32")}


def biased(shape, dtype="float32"):
    return {"bias": jax.ShapeDtypeStruct(shape, dtype)}


ADDED = biased((1, 4, 1101, 1101), "bfloat16") | SLOPES


def compiles(sizes, dtype="bfloat16", by=compiled_cleanly, **features):
    def array(heads, size):
        return jax.ShapeDtypeStruct((2, 1101, heads, size), dtype)

    arguments = {"q": array(4, sizes[0]), "k": array(2, sizes[0]), "v": array(2, sizes[1])}
    arguments |= {"causal": True} | features
    return by("h200", KERNEL, arguments, gradients=True)


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(s, marks=[] if s == (192, 128) else pytest.mark.sweep) for s in SIZES],
    ids=str,
)
def test_gradients_compile(sizes):
    compiles(sizes)


@pytest.mark.sweep
def test_a_bias_s_gradient_that_nobody_asks_for_is_dropped(monkeypatch):
    kernels = ("attnsel_dense_dkv", "attnsel_dense_dbias")
    for wanted, compiled in ((("q", "k", "v"), [True, False]), (("bias",), [False, True])):
        monkeypatch.setattr(child, "DIFFERENTIABLE", wanted)
        text = compiles((64, 64), by=program_of, **biased((1, 4, 1101, 1101))).as_text()
        assert [name in text for name in kernels] == compiled


FEATURES = {
    "window": WINDOWED,
    "cap": CAP,
    "segments": SEGMENTED,
    "rest": REST,
    "all": WINDOWED | CAP | SEGMENTED | REST,
    "float16": {"dtype": "float16"},
    "bias": biased((2, 4, 1101, 1101)),
    "bias of keys": biased((2, 1, 1, 1101)),
    "bias of queries": biased((1, 4, 1101, 1)),
    "slopes": SLOPES,
    "bias, slopes": ADDED,
    "bias, slopes, rest": ADDED | WINDOWED | REST,
    "bias, slopes, cap": ADDED | CAP,
    "bias, slopes, segments": ADDED | SEGMENTED,
    "bias, slopes, all": ADDED | WINDOWED | CAP | SEGMENTED | REST,
}
REFUSED = {((256, 256), name) for name in list(FEATURES)[-3:]}
REFUSED.add(((192, 192), "bias, slopes, all"))


@pytest.mark.sweep
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_gradients_of_every_feature_compile(sizes, features):
    if (sizes, features) in REFUSED:
        pytest.skip("refused: see test_what_would_spill_is_refused")
    compiles(sizes, **FEATURES[features])
