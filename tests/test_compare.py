"""The comparison: planted faults turn it red, honest kernels leave it green, refusals are told."""

import dataclasses
import json

import faulty_kernels
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnsel_jax import oracle
from attnsel_jax.backend import AttentionBackend
from attnsel_jax.capabilities import Capabilities
from attnsel_jax.compare import budgets, compare, compare_arrays
from attnsel_jax.compare.comparison import Comparison
from attnsel_jax.compare.deviations import deviation
from attnsel_jax.compare.expected import Expected, expected
from attnsel_jax.compare.picture import edges, plot
from attnsel_jax.constraints import EITHER, OneOf
from attnsel_jax.problems import DEFAULT, QUICK, named
from attnsel_jax.problems.dense_inputs import dense_inputs
from attnsel_jax.problems.paged_inputs import paged_inputs
from attnsel_jax.problems.problem import Problem

DTYPES = ["float32", "bfloat16"]
DENSE_FEATURES = {
    "window": {"causal": True, "sliding_window": 8},
    "offset": {"causal": True, "q_len": 9, "kv_len": 30, "q_offset": 21},
    "sinks": {"causal": True, "sinks": True},
    "soft cap": {"causal": True, "soft_cap": 50.0},
    "plain": {"causal": True},
    "segments": {"causal": True, "segments": 3},
    "lens": {"batch": 2, "kv_lens": (25, 17)},
}
PAGED_FEATURES = {
    "window": {"sliding_window": 8},
    "sinks": {"sinks": True},
    "soft cap": {"soft_cap": 50.0},
    "plain": {},
    "fp8": {"cache_dtype": "float8_e4m3fn", "scales": "head"},
    "cross": {"causal": False, "writes": False},
}


def dense_problem(feature, dtype, **more):
    shape = {"heads": (4, 2), "head_size": 32, "q_len": 25, "dtype": dtype}
    options = shape | DENSE_FEATURES[feature] | more.pop("options", {})
    return Problem(feature, "dense", "a test's", dense_inputs, options, **more)


def paged_problem(feature, dtype):
    options = {"heads": (4, 2), "head_size": 32, "q_lens": (1, 7, 4), "kv_lens": (35, 22, 4),
               "page_size": 8, "dtype": dtype, "pad_tokens": 2}  # fmt: skip
    return Problem(feature, "paged", "a test's", paged_inputs, options | PAGED_FEATURES[feature])


def red(problem, kernel):
    """The quantities outside their budgets."""
    with jax.disable_jit():  # one compilation for each operation, not for each fault
        (row,) = compare([problem], {"faulty": kernel}).rows
    assert row.error is None, row.error
    failed = {d.quantity for d in row.deviations if not d.passed}
    assert (row.verdict == "fail") == bool(failed)
    return failed


@pytest.mark.once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("fault", "feature", "expected"),
    [
        ("window one too wide", "window", {"out", "lse"}),
        ("window one too narrow", "window", {"out", "lse"}),
        ("top-left", "offset", {"out", "lse"}),
        ("sink dropped", "sinks", {"out", "lse"}),
        ("soft cap dropped", "soft cap", {"out", "lse"}),
        ("scale 2 % too large", "plain", {"out", "lse"}),
        ("scale 2 % too small", "plain", {"out", "lse"}),
        ("grouped by remainder", "plain", {"out", "lse"}),
        ("base-2 lse", "plain", {"lse"}),
        ("segment leak", "segments", {"out", "lse"}),
        ("causal one too far", "plain", {"out", "lse"}),
        ("kv_lens ignored", "lens", {"out", "lse"}),
    ],
)
def test_a_fault_in_dense_attention_is_red(fault, feature, expected, dtype):
    assert red(dense_problem(feature, dtype), faulty_kernels.dense(fault)) == expected


@pytest.mark.once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("fault", "feature", "expected"),
    [
        ("window one too wide", "window", {"out", "lse"}),
        ("top-left", "plain", {"out", "lse"}),
        ("sink dropped", "sinks", {"out", "lse"}),
        ("soft cap dropped", "soft cap", {"out", "lse"}),
        ("scale 2 % too large", "plain", {"out", "lse"}),
        ("grouped by remainder", "plain", {"out", "lse"}),
        ("page skipped", "plain", {"out", "lse"}),
        ("base-2 lse", "plain", {"lse"}),
        ("v unscaled", "fp8", {"out"}),
        ("k unscaled", "fp8", {"out", "lse"}),
        ("last page whole", "cross", {"out", "lse"}),
        ("cache not written", "plain", {"out", "lse", "kv_pages"}),
    ],
)
def test_a_fault_in_paged_attention_is_red(fault, feature, expected, dtype):
    assert red(paged_problem(feature, dtype), faulty_kernels.paged(fault)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("fault", "options", "expected"),
    [
        ("gradient of q 3 % too large", {}, {"grad q"}),
        ("gradient of k 3 % too large", {}, {"grad k"}),
        ("gradient of v 3 % too large", {}, {"grad v"}),
        ("gradient of bias 3 % too large", {"bias": (False, True, True, True)}, {"grad bias"}),
        ("gradient of sinks dropped", {"sinks": True}, {"grad sinks"}),
    ],
)
def test_a_fault_in_a_gradient_is_red(fault, options, expected, dtype):
    problem = dense_problem("plain", dtype, options=options, gradients=True)
    assert red(problem, faulty_kernels.dense(fault)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits_in_caps", [8, 12])
def test_gradients_of_a_saturated_soft_cap_have_a_budget(logits_in_caps, dtype):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 24, heads, 64), np.float32) for heads in (4, 2, 2))
    q *= 5 * logits_in_caps
    arguments = {"q": q.astype(dtype), "k": k.astype(dtype), "v": v.astype(dtype)}
    kernels = {f: faulty_kernels.dense(f) for f in (None, "gradient of q 3 % too large")}
    with jax.disable_jit():
        found = compare_arrays(
            "dense", arguments | {"soft_cap": 5.0, "causal": True}, kernels, gradients=True
        )
    assert [row.verdict for row in found] == ["pass", "fail"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_honest_kernels_are_green(dtype):
    problems = [dense_problem(feature, dtype, gradients=feature == "sinks") for feature in
                DENSE_FEATURES]  # fmt: skip
    with jax.disable_jit():
        dense = compare(problems, {"honest": faulty_kernels.dense(None)})
        paged = compare([paged_problem(f, dtype) for f in PAGED_FEATURES],
                        {"honest": faulty_kernels.paged(None)})  # fmt: skip
    for row in (*dense, *paged):
        assert row.verdict == "pass", str(row)
    assert dense.passed


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("quick.mla.mixed", "XLA_MLA"),
        ("quick.sparse_mla.fp8-ds-mla", "XLA_MLA_SPARSE"),
        ("quick.mla.materialized", "XLA_MLA"),
        ("quick.mla.materialized-bfloat16", "XLA_MLA"),
        ("quick.indexer", "XLA_MLA_SPARSE"),
        ("quick.topk", "XLA_MLA_SPARSE"),
    ],
)
def test_latent_ops_and_the_indexer_are_compared(name, backend):
    (row,) = compare([name], [backend]).rows
    assert row.verdict == "pass", str(row)


def test_an_indexer_is_refused_what_its_op_would_refuse():
    (row,) = compare(["quick.indexer"], ["MOSAIC_GPU_MLA_SPARSE"]).rows
    assert row.verdict == "refused"
    refused = {reason.argument: str(reason.asked) for reason in row.reasons}
    assert (refused["dtype"], refused["kv_cache_dtype"]) == ("float32", "float32")


def test_a_refusal_is_a_row_with_the_backends_own_reasons():
    comparison = compare(["quick.paged.sinks"], ["MOSAIC_TPU", "XLA_MLA"])
    tpu, mla = comparison.rows
    assert [row.verdict for row in comparison] == ["refused", "refused"]
    assert tpu.reasons
    assert str(mla.reasons[0]) == "use_mla is False, must be True"
    assert not comparison.passed  # nothing ran
    assert "use_mla is False, must be True" in str(comparison)
    assert "NOTHING RAN" in str(comparison)


class Partial(AttentionBackend):
    """Dense attention without lse and without gradients."""

    name = "PARTIAL"
    capabilities = {
        "dense": Capabilities(
            dtype=OneOf("float32"), head_size=OneOf(32), causal=EITHER, has_sink=EITHER
        )
    }
    kernels = {"dense": "attnsel_jax.xla.reference:dense_attention"}


def without_lse(**arguments):
    """A right kernel for `WithoutLse`."""
    return faulty_kernels.dense(None)(**arguments)[0], None


class WithoutLse(Partial):
    """Its gradients are compared, those of out alone: as CUDNN's are."""

    name = "WITHOUT_LSE"
    capabilities = {"dense": dataclasses.replace(Partial.capabilities["dense"], needs_grad=EITHER)}
    kernels = {"dense": "test_compare:without_lse"}


class Missing(Partial):
    """Its kernel needs what is not installed."""

    name = "MISSING"
    kernels = {"dense": "no_such_package.kernels:dense_attention"}


def test_what_a_backend_does_not_declare_is_left_out_by_reason():
    (row,) = compare([dense_problem("sinks", "float32", gradients=True)], [Partial])
    assert row.verdict == "pass"
    assert [d.quantity for d in row.deviations] == ["out"]
    assert str(row.left_out["lse"][0]) == "needs_lse is True, must be False"
    assert str(row.left_out["gradients"][0]) == (
        "needs_grad is True, must be False: pass needs_grad=False where no gradient is taken"
    )
    assert "no lse, no gradients" in str(Comparison("cpu", (row,)))


def test_gradients_of_a_backend_without_lse_are_those_of_out_alone():
    honest = {"WITHOUT_LSE": WithoutLse, "XLA": "XLA"}
    rows = compare([dense_problem("plain", "float32", gradients=True)], honest).rows
    assert [row.verdict for row in rows] == ["pass", "pass"], [row.error for row in rows]
    assert [d.quantity for d in rows[0].deviations] == ["out", "grad q", "grad k", "grad v"]


def test_a_kernel_that_cannot_be_imported_is_refused_with_the_cause():
    (row,) = compare([dense_problem("plain", "float32")], [Missing])
    assert row.verdict == "refused"
    assert "no_such_package" in str(row.reasons[0])


class LoweringError(Exception):
    """As Mosaic's, which is no RuntimeError."""


@pytest.mark.parametrize("kind", [NotImplementedError, LoweringError])
def test_a_kernel_that_raises_is_an_error_and_the_others_still_run(kind):
    def broken(**arguments):
        raise kind("not written yet")

    problem = dense_problem("plain", "float32")
    comparison = compare([problem], {"broken": broken, "XLA_REFERENCE": "XLA_REFERENCE"})
    assert [row.verdict for row in comparison] == ["error", "pass"]
    assert comparison.rows[0].error == f"{kind.__name__}: not written yet"
    assert not comparison.passed


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (lambda out, lse: out, r"the kernel returns no tuple, must return (out, lse)"),
        (lambda out, lse: (out,), r"the kernel returns a tuple of 1, must return (out, lse)"),
        (lambda out, lse: (out, None), "lse is NoneType, must be an array"),
    ],
)
def test_results_that_are_not_the_contracts_are_an_error(results, said):
    def kernel(**arguments):
        return results(*faulty_kernels.dense(None)(**arguments))

    (row,) = compare([dense_problem("plain", "float32")], {"mine": kernel}).rows
    assert row.error == f"ValueError: {said}"


def test_a_result_of_the_wrong_dtype_or_shape_is_an_error():
    def widened(**arguments):
        out, lse = faulty_kernels.dense(None)(**arguments)
        return out.astype(jnp.float32), lse

    def cut(**arguments):
        out, lse = faulty_kernels.dense(None)(**arguments)
        return out[:, 1:], lse

    problem = dense_problem("plain", "bfloat16")
    rows = compare([problem], {"widened": widened, "cut": cut}).rows
    assert rows[0].error == "ValueError: out has dtype float32, must be bfloat16"
    assert rows[1].error == "ValueError: out has shape (1, 24, 4, 32), must be (1, 25, 4, 32)"


def test_a_callers_own_arrays():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 9, 4, 16)).astype(np.float32)
    arguments = {"q": jnp.asarray(q), "k": k[:, :, :2], "v": k[:, :, :2], "causal": True}
    comparison = compare_arrays("dense", arguments, ["XLA", "XLA_REFERENCE"], gradients=True)
    assert comparison.passed, str(comparison)
    assert comparison.row("given", "XLA").deviation("grad v").share_outside == 0
    wrong = compare_arrays("dense", arguments, {"mine": faulty_kernels.dense("base-2 lse")})
    assert not wrong.passed
    worst = wrong.rows[0].worst
    assert worst.quantity == "lse"
    np.testing.assert_allclose(worst.worst.got, worst.worst.expected * np.log2(np.e), rtol=1e-5)
    assert set(worst.worst.at) == {"batch", "query", "head"}


@pytest.mark.parametrize(
    ("dtype", "of_bias"),
    [("float32", "bfloat16"), ("bfloat16", "float16")],
)
def test_the_gradient_of_a_bias_may_be_rounded_to_a_dtype_of_its_own(dtype, of_bias):
    rng = np.random.default_rng(0)
    q, k, v = 2 * rng.standard_normal((3, 1, 9, 2, 16))
    bias = rng.standard_normal((1, 2, 9, 9)).astype(of_bias)
    arguments = {"q": q.astype(dtype), "k": k.astype(dtype), "v": v.astype(dtype), "bias": bias}
    found = compare_arrays("dense", arguments, ["XLA_REFERENCE"], gradients=True)
    assert found.passed, found


OWN = {"q": np.ones((1, 4, 2, 8), np.float32), "k": np.ones((1, 4, 2, 8), np.float32)}
OWN["v"] = OWN["k"]
OWN_BATCH = {
    "q": OWN["q"][0],
    "k": None,
    "v": None,
    "kv_pages": np.ones((2, 3, 4, 2, 8), np.float32),
    "page_table": np.array([[1], [2]], np.int32),
    "kv_lens": np.array([4, 2], np.int32),
    "cu_q_lens": np.array([0, 3, 4], np.int32),
    "num_seqs": np.array(2, np.int32),
    "slot_mapping": None,
}


@pytest.mark.parametrize(
    ("op", "arguments", "options", "message"),
    [
        ("dense", {"query": OWN["q"]}, {}, "arguments has query, must have names of op dense's"),
        ("dense", {"q": OWN["q"], "k": OWN["k"]}, {}, "arguments lacks v, must have it"),
        ("dense", OWN | {"q": OWN["q"].tolist()}, {}, "q is list, must be an array"),
        ("topk_positions", {}, {"gradients": True}, "gradients is True, must be False for op topk"),
        ("paged", OWN_BATCH | {"page_table": np.array([[1], [3]])}, {}, r"page_table\[1, 0\] is 3"),
        ("paged", OWN_BATCH | {"num_seqs": np.array(3)}, {}, "num_seqs is 3, must be 0 to 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_callers_mistakes_are_no_backends_errors(op, arguments, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        compare_arrays(op, arguments, ["XLA_REFERENCE"], **options)


def test_arrays_as_numpy_load_gives_them(tmp_path):
    given = OWN | {"causal": True, "scale": 0.3, "sliding_window": (2, 2)}
    np.savez(tmp_path / "arrays.npz", **given)
    with np.load(tmp_path / "arrays.npz") as loaded:
        assert compare_arrays("dense", loaded, ["XLA_REFERENCE"]).passed


def test_unknown_names_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match=r"problem is 'llama33', must be a set \(default, quick\)"):
        compare(["llama33"])
    with pytest.raises(ValueError, match="NOPE"):
        compare(["quick.topk"], ["NOPE"])
    with pytest.raises(ValueError, match="op is 'denes', must be one of dense, paged"):
        compare_arrays("denes", {})
    comparison = compare(["quick.topk"], ["XLA"])
    with pytest.raises(ValueError, match="must be a problem and a backend compared"):
        comparison.row("quick.topk", "CUDNN")


def test_the_deviation_names_the_worst_element():
    values = np.zeros((2, 3))
    values[1, 2] = 1.0
    got = values.copy()
    got[0, 1] = 0.5
    got[1, 2] = 1.1
    budget = np.full((2, 3), 0.2)
    found = deviation("lse", got, Expected(values, budget, ("token", "head")))
    assert found.worst.at == {"token": 0, "head": 1}
    assert (found.worst.got, found.worst.expected) == (0.5, 0)
    assert found.share_outside == pytest.approx(1 / 6)
    assert found.in_budgets == pytest.approx(2.5)
    assert found.relative_error == pytest.approx(np.hypot(0.5, 0.1))
    assert not found.passed
    assert found.map.shape == (2, 3)


@pytest.mark.parametrize(("got", "outside"), [(-np.inf, 0), (np.nan, 1), (0.0, 1), (np.inf, 1)])
def test_an_empty_rows_lse_must_be_minus_infinity(got, outside):
    wanted = Expected(np.array([-np.inf]), np.array([0.0]), ("token",))
    found = deviation("lse", np.array([got]), wanted)
    assert found.share_outside == outside
    json.dumps(found.to_json(), allow_nan=False)


def test_a_budget_that_is_no_number_allows_nothing_but_the_expected():
    wanted = Expected(np.zeros(3), np.array([np.nan, np.nan, 1.0]), ("token",))
    found = deviation("lse", np.array([0.0, 1e-9, 0.5]), wanted)
    assert found.share_outside == 1 / 3
    assert found.worst.at == {"token": 1}
    assert not found.passed


def test_a_sink_of_minus_infinity_hides_no_fault():
    arguments = paged_inputs(
        np.random.default_rng(0), heads=(2, 1), head_size=64, q_lens=(1, 3), kv_lens=(20, 9),
        dtype="float32",
    ) | {"sinks": np.array([-np.inf, 0.5], np.float32)}  # fmt: skip
    answers = expected("paged", arguments)
    for name in ("out", "lse"):
        wrong = answers[name].values.copy()
        assert deviation(name, wrong, answers[name]).passed
        wrong[:, 0] += 1e-3
        assert not deviation(name, wrong, answers[name]).passed


def test_json_has_every_row_and_only_plain_types():
    kernels = {"good": faulty_kernels.dense(None), "bad": faulty_kernels.dense("segment leak"),
               "MOSAIC_GPU": "MOSAIC_GPU"}  # fmt: skip
    seen = []
    comparison = compare([dense_problem("segments", "float32")], kernels,
                         progress=lambda *step: seen.append(step))  # fmt: skip
    found = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert found["counts"] == {"pass": 1, "fail": 1, "refused": 1, "error": 0}
    assert [row["verdict"] for row in found["rows"]] == ["pass", "fail", "refused"]
    worst = found["rows"][1]["deviations"][0]["worst"]
    assert set(worst["at"]) == {"batch", "query", "head", "feature"}
    assert found["rows"][2]["reasons"][0]["argument"]
    assert seen[0] == (0, 3, "segments on good")
    assert seen[-1] == (3, 3, "")
    assert "FAILED: 1 of 2 runs deviate: bad on segments" in str(comparison)


def test_the_picture_shows_where(tmp_path):
    pytest.importorskip("matplotlib")
    kernels = {"good": faulty_kernels.paged(None), "bad": faulty_kernels.paged("page skipped")}
    comparison = compare([paged_problem("window", "float32")], kernels)
    path = plot(comparison, tmp_path / "picture.png", "out")
    assert path.stat().st_size > 10_000
    bad = comparison.row("window", "bad").deviation("out")
    assert bad.map.shape == (14, 4)
    # pages of 8, window 8: page 1 is seen from positions 8 to 22; token 0 is at position 34
    assert (bad.map[0] < 1).all()
    assert (bad.map[1:8].max(axis=1) > 1).all()
    with pytest.raises(
        ValueError, match="quantity is 'grad q', must be one that some row compared"
    ):
        plot(comparison, path, "grad q")


def test_edges_are_where_things_begin():
    found = edges(paged_problem("window", "float32").make())
    # sequences of 1, 7 and 4 tokens from positions 34, 15 and 0; pages and window of 8
    assert found == {"sequence": [1, 8, 12], "page": [2]}
    found = edges(dense_problem("window", "float32", options={"batch": 2, "q_len": 10}).make())
    assert found == {"sequence": [10, 20], "window": [8, 18]}


def test_problems_have_names_of_their_own_and_questions():
    problems = [*DEFAULT, *QUICK]
    assert len({problem.name for problem in problems}) == len(problems)
    configs = {problem.name: problem.config for problem in QUICK}
    assert configs["quick.paged.e5m2"].kv_cache_dtype == "fp8_e5m2"
    assert configs["quick.mla.fp8-ds-mla"].kv_cache_dtype == "fp8_ds_mla"
    assert configs["quick.dense.head-sizes"].head_size_v == 128
    assert configs["quick.dense.everything"].has_attention_chunk
    assert not configs["quick.paged.cross"].causal
    assert [p.name for p in named(["gpt-oss"])] == ["gpt-oss.mixed", "gpt-oss.train"]


@pytest.mark.parametrize("problem", [p for p in QUICK if p.op == "dense"], ids=lambda p: p.name)
def test_dense_problems_bite(problem):
    """One key (or the sink) carries more than half of the weight of at least half of the rows."""
    arguments = problem.make()
    batch, kv_len, heads, _ = arguments["k"].shape
    which = np.broadcast_to(np.eye(kv_len)[None, :, None], (batch, kv_len, heads, kv_len))
    weights, lse = oracle.dense_attention(**(arguments | {"v": which}))
    rows = np.isfinite(lse)
    sink = np.zeros(lse.shape)
    if "sinks" in arguments:
        sink = np.exp(arguments["sinks"] - np.where(rows, lse, np.inf))
    assert (np.maximum(weights.max(axis=-1), sink)[rows] > 0.5).mean() >= 0.5


def test_a_seed_makes_the_same_problem_again():
    for problem in (QUICK[0], named(["quick.paged.int8"])[0], named(["quick.sparse_mla.mixed"])[0]):
        first, again, other = problem.make(3), problem.make(3), problem.make(4)
        for name, value in first.items():
            np.testing.assert_array_equal(np.asarray(value, np.float64) if value is not None else 0,
                                          np.asarray(again[name], np.float64) if value is not None
                                          else 0)  # fmt: skip
        assert any(np.any(np.asarray(first[n]) != np.asarray(other[n])) for n in first)


def test_budgets_follow_the_dtype():
    one = np.ones((1, 1))
    attended = oracle.Attended(one, one[0], one, one[0])
    widths = [float(budgets.out_budget(attended, 64, 64, np.dtype(d))[0, 0])
              for d in ("float32", "float16", "bfloat16")]  # fmt: skip
    assert widths[0] < 1e-5
    assert 2 * 2**-11 < widths[1] < 2.2 * 2**-11
    assert 2 * 2**-8 < widths[2] < 2.1 * 2**-8
    assert budgets.rounds_on_load("uint8", "bfloat16")
    assert not budgets.rounds_on_load("int8", "bfloat16")


def test_a_problem_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QUICK[0].name = "other"
