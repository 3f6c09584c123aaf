"""Attention over parts of the keys, merged: the same as over all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import dense, normal
from strict_settings import strict_settings

from attnsel_jax import (
    AttentionMetadata,
    allocate_kv_cache,
    dot_product_attention,
    merge_attention,
    paged_attention,
    write_kv_cache,
)


def attend(q, k, v, **options):
    return dot_product_attention(q, k, v, return_residual=True, **options)


def in_parts(q, k, v, cuts, **options):
    keys, values = jnp.split(k, cuts, axis=1), jnp.split(v, cuts, axis=1)
    parts = [attend(q, *kv, **options) for kv in zip(keys, values, strict=True)]
    return merge_attention(*zip(*parts, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cuts", [[], [3], [2, 3, 6]], ids=str)
def test_parts_of_the_keys_are_all_of_them(dtype, cuts):
    q, k, v = dense(dtype=dtype).values()
    out, lse = in_parts(q, k, v, cuts)
    want, want_lse = attend(q, k, v)
    assert (out.dtype, lse.dtype) == (want.dtype, jnp.float32)
    # To 4, and rounded three times: the parts, their sum, and what it is held against.
    rounding = 1e-5 if dtype == "float32" else 4 * 3 * 2**-9
    np.testing.assert_allclose(*map(np.float32, (out, want)), atol=rounding)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


def test_gradients_are_those_of_one_call():
    given = tuple(dense().values())

    def loss(how):
        def of(q, k, v):
            out, lse = how(q, k, v)
            return (out * normal(9, *out.shape)).sum() + (lse * normal(8, *lse.shape)).sum()

        return jax.grad(of, argnums=(0, 1, 2))(*given)

    pairs = zip(loss(lambda *x: in_parts(*x, [3])), loss(attend), strict=True)
    for got, want in pairs:
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_parts_without_keys_weigh_nothing_whatever_they_hold():
    out, lse = normal(1, 3, 2, 8), normal(2, 3, 2)
    empty = jnp.full_like(out, jnp.nan), jnp.full_like(lse, -jnp.inf)
    for order in (0, 1):
        parts = [(out, lse), empty][:: 1 - 2 * order]
        got, got_lse = merge_attention(*zip(*parts, strict=True))
        np.testing.assert_allclose(got, out, rtol=1e-6)
        np.testing.assert_allclose(got_lse, lse, rtol=1e-6)
    got, got_lse = merge_attention(*zip(empty, empty, strict=True))
    assert (got == 0).all()
    assert (got_lse == -jnp.inf).all()
    broken, _ = merge_attention([out.at[0].set(jnp.nan), out], [lse.at[0].set(jnp.nan), lse])
    assert np.isnan(broken).all(axis=(1, 2)).tolist() == [True, False, False]


def test_parts_that_a_bias_hides_whole_weigh_alike():
    """Of -1e9, beside which float32 has no room for the logarithm of a number of keys."""
    q, k, v = dense().values()
    bias = jnp.full((1, 1, 1, 6), -1e9)
    parts = [attend(q, k[:, i : i + 2], v[:, i : i + 2], bias=bias[..., :2]) for i in (0, 2, 4)]
    out, lse = merge_attention(*zip(*parts, strict=True))
    want, want_lse = attend(q, k[:, :6], v[:, :6], bias=bias)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(lse, want_lse)


def test_a_prefix_that_sequences_share():
    """Read once for all tokens of the batch, then each sequence's own keys."""
    prefix, own = 8, (3, 6)  # keys
    cache = allocate_kv_cache(8, 4, 2, 8, "float32")
    of_prefix = AttentionMetadata.from_lengths([prefix], [prefix], [[6, 2]], 4)
    keys, values = normal(1, prefix, 2, 8), normal(2, prefix, 2, 8)
    cache = write_kv_cache(cache, keys, values, of_prefix.slot_mapping)
    q_lens, pages = (1, 2), [[0], [5, 3]]
    q, k, v = normal(3, 3, 4, 8), normal(4, 3, 2, 8), normal(5, 3, 2, 8)

    whole = AttentionMetadata.from_lengths(
        q_lens, [n + prefix for n in own], [[6, 2, *page] for page in pages], 4
    )
    want, want_lse, _ = paged_attention(q, k, v, cache, whole, return_lse=True)

    suffix = AttentionMetadata.from_lengths(q_lens, own, pages, 4)
    shared = AttentionMetadata.from_lengths(
        [sum(q_lens)], [prefix], [[6, 2]], 4, causal=False, writes=False
    )
    out, lse, cache = paged_attention(q, k, v, cache, suffix, return_lse=True)
    of_all, of_all_lse, _ = paged_attention(q, None, None, cache, shared, return_lse=True)
    out, lse = merge_attention([out, of_all], [lse, of_all_lse])
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


def test_under_strict_settings_vmap_and_a_checked_shard_map():
    outs, lses = [normal(i, 2, 3, 8) for i in (1, 2)], [normal(i, 2, 3) for i in (3, 4)]
    want = merge_attention(outs, lses)
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
    over_mesh = jax.shard_map(
        merge_attention, mesh=mesh, in_specs=(jax.P("x"), jax.P("x")), out_specs=jax.P("x")
    )
    with strict_settings():
        for how in (jax.jit(merge_attention), jax.vmap(merge_attention), jax.jit(over_mesh)):
            for got, expected in zip(how(outs, lses), want, strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_what_does_not_fit_is_refused():
    out, lse = jnp.zeros((3, 2, 8)), jnp.zeros((3, 2))
    for outs, lses, message in (
        ([], [], "outs has 0 parts and lses 0, must have as many, at least 1"),
        ([out], [lse, lse], "outs has 1 parts and lses 2"),
        (out, lse, "outs is .*, must be a list of arrays"),
        ([out, out[:2]], [lse, lse], r"outs\[1\] has dim0 2, must be 3"),
        ([out, out], [lse, lse[:, :1]], r"lses\[1\] has dim1 1, must be 2"),
        ([out, out.astype("bfloat16")], [lse, lse], "dtypes are"),
        ([out], [lse.astype("bfloat16")], r"lses\[0\] has dtype bfloat16"),
        ([out], [None], r"lses\[0\] is None"),
        ([3.0], [lse], r"outs\[0\] is float, must be an array"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            merge_attention(outs, lses)
