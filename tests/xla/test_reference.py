"""XLA_REFERENCE against the float64 oracle: all that the contracts of dense and paged say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ragged_batch import MIXED, as_jax, batch, check

from attnsel_jax import oracle
from attnsel_jax.xla import reference

PAGED_STATIC = ("scale", "causal", "sliding_window", "attention_chunk_size", "soft_cap")
paged = functools.partial(jax.jit, static_argnames=PAGED_STATIC)(reference.paged_attention)
FLOATS = ("q", "k", "v", "bias", "sinks", "alibi_slopes")
B, T, S, N, K, D, V = 2, 11, 13, 4, 2, 8, 6
NAN = np.float32(np.nan)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def problem(dtype=np.float32):
    """q, k, v whose logits are sharp: most queries give one key more than half of the weight."""
    return {
        "q": (3 * normal(0, B, T, N, D)).astype(dtype),
        "k": normal(1, B, S, K, D).astype(dtype),
        "v": (normal(2, B, S, K, V) + np.arange(S)[:, None, None]).astype(dtype),
    }


def lens():
    """Lengths, and NaN in q, k and v past them."""
    given = problem() | {"q_lens": np.int32([7, 0]), "kv_lens": np.int32([9, 4])}
    given["q"][0, 7:], given["q"][1] = NAN, NAN
    for name in "kv":
        given[name][0, 9:], given[name][1, 4:] = NAN, NAN
    return given


def masked():
    """A mask by head, segments, and keys that nothing sees, full of NaN; some rows see nothing."""
    mask = np.random.default_rng(5).random((1, N, T, S)) < 0.6
    mask[:, :, 3] = False
    mask[:, :2, :, 8] = False  # kv head 0's key 8; kv head 1's is seen
    given = problem() | {"mask": mask}
    given["q_segment_ids"] = np.repeat(np.int32([[0, 1, 2], [1, 1, 5]]), [4, 4, 3], axis=1)
    given["kv_segment_ids"] = np.repeat(np.int32([[0, 1, 3], [0, 1, 1]]), [4, 5, 4], axis=1)
    for name in "kv":
        given[name][0, 9:], given[name][1, :4], given[name][:, 8, 0] = NAN, NAN, NAN
    given["bias"] = normal(6, 1, N, T, S)
    given["bias"][:, :, :, 5] = -np.inf  # hides a key as a mask does
    return given


PROBLEMS = {
    "plain": problem,
    "causal": lambda: problem() | {"causal": True},
    "bottom-right": lambda: problem() | {"causal": True, "q_offset": S - T, "scale": 0.7},
    "offsets by row": lambda: (
        problem() | {"causal": True, "q_offset": np.int32([-3, 5]), "sliding_window": 3}
    ),
    "two-sided window": lambda: problem() | {"sliding_window": (4, 2)},
    "right window": lambda: problem() | {"sliding_window": (None, 1), "q_offset": 2},
    "chunks": lambda: problem() | {"attention_chunk_size": 4, "causal": True},
    "cap, bias, ALiBi": lambda: (
        problem()
        | {"soft_cap": 2.0, "bias": normal(3, B, 1, 1, S), "alibi_slopes": normal(4, N) ** 2}
    ),
    "sinks": lambda: problem() | {"sinks": 4 + normal(7, N), "causal": True, "q_offset": -2},
    "lengths": lens,
    "lengths and sinks": lambda: lens() | {"sinks": normal(7, N)},
    "masks": masked,
    "masks and sinks": lambda: masked() | {"sinks": normal(7, N)},
}


def everything(given, dout, dlse):
    """out, lse and the gradients of sum(dout * out) + sum(dlse * lse over rows not empty)."""
    floats = {n: jnp.asarray(given[n]) for n in FLOATS if n in given}
    rest = {n: x for n, x in given.items() if n not in FLOATS}
    rest = {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in rest.items()}

    def loss(floats):
        out, lse = reference.dense_attention(**floats, **rest)
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(out.astype(jnp.float32) * dout) + jnp.sum(finite * dlse), (out, lse)

    with jax.numpy_dtype_promotion("strict"):
        return jax.jit(jax.grad(loss, has_aux=True))(floats)


@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_dense_and_its_gradients(make):
    given = make()
    dout, dlse = normal(8, B, T, N, V), normal(9, B, T, N)
    gradients, (out, lse) = everything(given, jnp.asarray(dout), jnp.asarray(dlse))
    want, want_lse = oracle.dense_attention(**given)
    np.testing.assert_allclose(out, want, atol=1e-4)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)
    wanted = oracle.dense_gradients(dout, dlse, **given)
    for name, gradient in gradients.items():
        size = np.abs(wanted[name]).max() + 1
        np.testing.assert_allclose(gradient / size, wanted[name] / size, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dense_in_other_dtypes(dtype):
    given = {n: jnp.asarray(x, dtype) for n, x in problem().items()}
    out, lse = jax.jit(functools.partial(reference.dense_attention, causal=True))(**given)
    want, want_lse = oracle.dense_attention(**given, causal=True)
    assert (out.dtype, lse.dtype) == (jnp.dtype(dtype), np.float32)
    np.testing.assert_allclose(
        np.asarray(out, np.float64), want, rtol=float(jnp.finfo(dtype).eps), atol=1e-4
    )
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


def test_no_keys_at_all():
    q, empty = jnp.ones((1, 2, 1, 4), jnp.float32), jnp.ones((1, 0, 1, 4), jnp.float32)
    out, lse = reference.dense_attention(q, empty, empty)
    assert np.all(np.asarray(out) == 0)
    assert np.isneginf(lse).all()


PAGED = {
    "plain": ({}, {}, ()),
    "bfloat16, e4m3, a scale by head": (
        {"dtype": "bfloat16", "cache": "float8_e4m3fn", "k_scale": [0.5, 2], "v_scale": 0.25},
        {"sliding_window": 5},
        ("sinks",),
    ),
    "int8 and ALiBi": (
        {"cache": "int8", "k_scale": 0.03, "v_scale": [0.02, 0.04]}, {}, ("alibi_slopes",)
    ),
    "not causal": (
        {"write": False}, {"causal": False, "sliding_window": (3, 6), "soft_cap": 2.0}, ("sinks",)
    ),
    "chunks": ({}, {"attention_chunk_size": 6, "scale": 0.5}, ()),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "static", "extra"), PAGED.values(), ids=PAGED.keys())
def test_paged(facts, static, extra):
    dtypes = {n: np.dtype(getattr(jnp, facts[n])) for n in ("dtype", "cache") if n in facts}
    given = batch(*MIXED, **(facts | dtypes))
    given |= {name: np.abs(normal(3, 4)) for name in extra}
    with jax.numpy_dtype_promotion("strict"):
        check(given, attend=paged, **static)


def test_x64_changes_nothing():
    with jax.enable_x64(True):
        gradients, (out, lse) = everything(
            masked() | {"q_offset": 1, "causal": True},
            jnp.asarray(normal(8, B, T, N, V)),
            jnp.asarray(normal(9, B, T, N)),
        )
        results = paged(**as_jax(batch(*MIXED)))
    assert {x.dtype.name for x in [*gradients.values(), out, lse, *results]} == {"float32"}


def test_refusals():
    given = {n: jnp.asarray(x) for n, x in problem().items()}

    def refused(match, **changes):
        with pytest.raises(ValueError, match=match):
            reference.dense_attention(**(given | changes))

    refused(r"num_q_heads is 4, must be a multiple of num_kv_heads, 3", **{
        n: jnp.zeros((B, S, 3, D), jnp.float32) for n in "kv"
    })  # fmt: skip
    refused(
        r"q_segment_ids and kv_segment_ids: one is given and one is None",
        q_segment_ids=jnp.zeros((B, T), jnp.int32),
    )
    refused(r"sliding_window is 0, must be above 0", sliding_window=0)
    refused(r"soft_cap is -1, must be above 0", soft_cap=-1)
    refused(r"q_offset is 2147483647, must be -1073741824 to 1073741824", q_offset=2**31 - 1)
    refused(r"dtypes are .*, must all be the same", v=given["v"].astype(jnp.bfloat16))
    paged_given = as_jax(batch([1, 2], [3, 4]))
    with pytest.raises(ValueError, match=r"slot_mapping is None, must be given"):
        reference.paged_attention(**(paged_given | {"slot_mapping": None}))
