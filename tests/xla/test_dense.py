"""Dense attention on XLA against the oracle: out, lse and every gradient, block by block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnsel_jax import oracle
from attnsel_jax.compare import compare
from attnsel_jax.compare.comparison import PASS
from attnsel_jax.problems import Problem
from attnsel_jax.problems.dense_inputs import dense_inputs
from attnsel_jax.xla import dense, reference
from attnsel_jax.xla.dense import dense_attention

TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}
DIFFERENTIABLE = ("q", "k", "v", "bias", "alibi_slopes", "sinks")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Tiles of 16 queries, 8 keys and 1 or 2 kv heads: every edge within a few dozen positions."""
    monkeypatch.setattr(dense, "FORWARD", dense.Largest(rows=32, keys=8, elements=512))
    monkeypatch.setattr(dense, "BACKWARD", dense.Largest(rows=32, keys=8, elements=256))


def problem(
    q_len=37, kv_len=43, heads=4, kv_heads=2, size=16, size_v=16, batch=2, dtype="float32", **masks
):
    """Sharp logits, values that tell positions apart; arrays in `masks` are kept as they are."""
    rng = np.random.default_rng(7)
    q = 3 * rng.standard_normal((batch, q_len, heads, size))
    k = rng.standard_normal((batch, kv_len, kv_heads, size))
    v = (
        rng.standard_normal((batch, kv_len, kv_heads, size_v))
        + np.arange(kv_len)[:, None, None] / 9
    )
    arrays = {"q": q, "k": k, "v": v}
    arguments = {name: jnp.asarray(x, dtype) for name, x in arrays.items()} | masks
    dout = jnp.asarray(rng.standard_normal((batch, q_len, heads, size_v)), dtype)
    dlse = jnp.asarray(rng.standard_normal((batch, q_len, heads)), jnp.float32)
    return arguments, dout, dlse


def normal(*shape, seed=3):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def bits(*shape, seed=4):
    return jnp.asarray(np.random.default_rng(seed).random(shape) < 0.7)


def split(arguments):
    """Differentiable arrays, other arrays, static values."""
    floats = {n: x for n, x in arguments.items() if n in DIFFERENTIABLE}
    rest = {n: x for n, x in arguments.items() if n not in DIFFERENTIABLE}
    arrays = {n: x for n, x in rest.items() if isinstance(x, jax.Array)}
    return floats, arrays, {n: x for n, x in rest.items() if n not in arrays}


def run(arguments, dout, dlse, kernel=dense_attention):
    """out, lse and the gradients of sum(dout * out) + sum(dlse * lse), jitted, in one go."""
    floats, arrays, static = split(arguments)

    @jax.jit
    def everything(floats, arrays, dout, dlse):
        f = functools.partial(kernel, **arrays, **static)
        (out, lse), pull = jax.vjp(lambda x: f(**x), floats)
        return out, lse, pull((dout, dlse))[0]

    with jax.numpy_dtype_promotion("strict" if kernel is dense_attention else "standard"):
        return everything(floats, arrays, dout, dlse)


def close(name, actual, expected, tolerance):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, name
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(np.where(infinite, actual, 0), np.where(infinite, expected, 0))
    expected = np.where(infinite, 0, expected)
    size = max(1.0, np.abs(expected).max(initial=0))
    error = np.abs(np.where(infinite, 0, actual) - expected).max(initial=0) / size
    assert error <= tolerance, f"{name}: {error:.2e} of the largest, allowed {tolerance:.0e}"


def check(arguments, dout, dlse):
    out, lse, gradients = run(arguments, dout, dlse)
    tolerance = TOLERANCE[out.dtype.name]
    assert out.dtype == arguments["q"].dtype
    assert lse.dtype == jnp.float32
    expected = oracle.dense_attention(**arguments)
    close("out", out, expected[0], tolerance)
    close("lse", lse, expected[1], tolerance)
    wanted = oracle.dense_gradients(dout, dlse, **arguments)
    for name, gradient in gradients.items():
        assert gradient.dtype == arguments[name].dtype, name
        close(f"d{name}", gradient, wanted[name], max(tolerance, TOLERANCE[gradient.dtype.name]))


CASES = {
    "full": {},
    "causal": {"causal": True},
    "causal, bottom right": {"causal": True, "q_offset": 43 - 37},
    "more queries than keys, rows that see none": {
        "causal": True,
        "q_len": 43,
        "kv_len": 21,
        "q_offset": -5,
    },
    "offset by batch": {"causal": True, "q_offset": jnp.array([5, 30], jnp.int32)},
    "mqa, one query": {"causal": True, "q_len": 1, "kv_heads": 1, "q_offset": jnp.int32(42)},
    "mha, odd sizes": {"kv_heads": 4, "size": 9, "size_v": 5, "scale": 0.3},
    "window": {"sliding_window": 7},
    "causal window": {"causal": True, "sliding_window": 11, "q_offset": 3},
    "window, one-sided": {"sliding_window": (None, 4)},
    "window, other side": {"sliding_window": (20, None)},
    "window of one": {"sliding_window": 1, "causal": True},
    "chunk": {"attention_chunk_size": 12, "causal": True, "q_offset": 4},
    "chunk, both ways": {"attention_chunk_size": 20},
    "soft cap": {"soft_cap": 2.0, "causal": True},
    "bias": {"bias": normal(2, 4, 37, 43), "causal": True},
    "bias for all rows": {"bias": normal(1, 4, 37, 43), "soft_cap": 3.0},
    "bias by head": {"bias": normal(1, 4, 1, 1), "sinks": normal(4)},
    "bias by key": {"bias": normal(2, 1, 1, 43)},
    "bias by query, half": {"bias": normal(1, 1, 37, 1).astype(jnp.float16)},
    "alibi": {"alibi_slopes": jnp.array([0.5, 0.25, 0.1, 0.0]), "q_offset": 6},
    "mask": {"mask": bits(2, 4, 37, 43)},
    "mask by query, causal": {"mask": bits(1, 1, 37, 43), "causal": True},
    "mask by key, window": {"mask": bits(2, 1, 1, 43), "sliding_window": 9},
    "segments": {
        "q_segment_ids": jnp.arange(74, dtype=jnp.int32).reshape(2, 37) // 10,
        "kv_segment_ids": jnp.arange(86, dtype=jnp.int32).reshape(2, 43) // 11,
    },
    "lengths past the arrays": {
        "q_lens": jnp.array([38, 2**31 - 1], jnp.int32),
        "kv_lens": jnp.array([60, 1000], jnp.int32),
    },
    "lengths": {"q_lens": jnp.array([37, 5], jnp.int32), "kv_lens": jnp.array([19, 43], jnp.int32)},
    "lengths, some zero": {
        "q_lens": jnp.array([0, 20], jnp.int32),
        "kv_lens": jnp.array([9, 0], jnp.int32),
        "sinks": normal(4),
    },
    "sinks": {"sinks": normal(4), "causal": True, "q_offset": -3},
    "all at once": {
        "causal": True,
        "sliding_window": 23,
        "q_offset": jnp.array([6, -2], jnp.int32),
        "soft_cap": 4.0,
        "bias": normal(1, 4, 37, 43),
        "sinks": normal(4),
        "alibi_slopes": jnp.array([0.5, 0.25, 0.1, 0.0]),
        "mask": bits(2, 1, 37, 43),
        "q_lens": jnp.array([31, 37], jnp.int32),
        "kv_lens": jnp.array([43, 30], jnp.int32),
    },
}


# "All at once" has most of what the others have one by one: once, on the newest jax.
ON_OLD_JAX_TOO = ("full", "all at once", "lengths, some zero", "chunk, both ways")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in ON_OLD_JAX_TOO else pytest.mark.once) for n in CASES],
)
def test_agrees_with_the_oracle(name):
    check(*problem(**CASES[name]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("masks", [{}, {"causal": True, "sinks": normal(4), "soft_cap": 5.0}])
def test_agrees_in_half_precision(dtype, masks):
    check(*problem(dtype=dtype, **masks))


UNSEEN = {
    "past the lengths": {
        "q_lens": jnp.array([30, 7], jnp.int32),
        "kv_lens": jnp.array([19, 40], jnp.int32),
    },
    "past the lengths, sinks": {
        "q_lens": jnp.array([30, 7], jnp.int32),
        "kv_lens": jnp.array([19, 0], jnp.int32),
        "sinks": normal(4),
        "causal": True,
        "q_offset": 2,
        "soft_cap": 3.0,
    },
    "past the last query": {"causal": True, "q_len": 20, "q_offset": 1},
    "before the window": {"causal": True, "q_offset": 20, "q_len": 20, "sliding_window": 4},
    "after the window": {"sliding_window": (None, 3), "q_len": 20},
    "another chunk": {"attention_chunk_size": 9, "q_len": 20, "q_offset": 10},
    "masked": {"mask": bits(2, 1, 1, 43)},
    "masked by head": {"mask": bits(2, 4, 1, 43)},
    "nobody's segment": {
        "q_segment_ids": jnp.ones((2, 37), jnp.int32),
        "kv_segment_ids": jnp.asarray(bits(2, 43), jnp.int32),
    },
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_nobody_sees_may_be_nan(name):
    arguments, dout, dlse = problem(**UNSEEN[name])
    seen, exists = seen_and_existing(arguments)
    k, v = (jnp.where(seen, arguments[n], jnp.nan) for n in "kv")
    assert jnp.isnan(k).any()
    q, dout = (jnp.where(exists, a, jnp.nan) for a in (arguments["q"], dout))
    check(arguments | {"q": q, "k": k, "v": v}, dout, jnp.where(exists[..., 0], dlse, jnp.nan))


def seen_and_existing(arguments):
    """Which rows of k some query sees, [batch, kv_len, num_kv_heads, 1]; which rows of q exist."""
    heads = oracle.dense.dense_heads(
        arguments["q"].shape,
        arguments["k"].shape,
        **{n: x for n, x in arguments.items() if n not in ("q", "k", "v", "soft_cap")},
    )
    seen = np.zeros((*arguments["k"].shape[:3], 1), bool)
    exists = np.zeros((*arguments["q"].shape[:3], 1), bool)
    for head in heads:
        seen[head.b, :, head.kv, 0] |= head.see.any(axis=0)
        exists[head.b, :, head.n, 0] = head.exists
    return seen, exists


def test_keys_that_only_missing_queries_could_see_may_be_nan():
    """A row without queries, beside one whose block needs no mask; its keys are NaN."""
    options = {
        "heads": (2, 2), "head_size": 16, "q_len": 3, "kv_len": 24, "batch": 2, "q_lens": (3, 0),
        "q_offset": 30, "dtype": "float32", "causal": True,
    }  # fmt: skip
    problem = Problem("missing", "dense", "", dense_inputs, options, gradients=True)
    (row,) = compare([problem], ["XLA"]).rows
    assert row.verdict == PASS, str(row)


@pytest.mark.parametrize("hidden", [-1e9, -3e38])
def test_rows_that_a_bias_hides_whole(hidden):
    """Left padding under a causal mask: what such a row gives is even over its keys."""
    bias = jnp.zeros((2, 1, 1, 43)).at[1, ..., :9].set(hidden)
    arguments, dout, dlse = problem(causal=True, bias=bias)
    for name, ours, plain in zip(
        ("out", "lse", "gradients"),
        run(arguments, dout, dlse),
        run(arguments, dout, dlse, reference.dense_attention),
        strict=True,
    ):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name)
