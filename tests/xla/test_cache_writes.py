"""Writing rows into paged caches: which slots change, to which bits, and in place."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from attnsel_jax import oracle
from attnsel_jax.xla.cache_writes import write_kv, write_rows
from pallas_kernels.stored_values import quantise

CACHE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")
QUANTISE = jax.jit(quantise, static_argnames="dtype")


def largest(dtype):
    return 127.0 if dtype == "int8" else float(ml_dtypes.finfo(dtype).max)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_quantise_rounds_and_saturates_as_the_oracle(dtype):
    rng = np.random.default_rng(0)
    top = min(largest(dtype), 1e30)
    values = np.concatenate([
        rng.standard_normal(2000) * np.exp(rng.uniform(-12, 6, 2000)),
        np.arange(-130, 130, 0.5),  # int8's ties, and past its ends
        np.array([top, top * 1.04, top * 1.06, top * 2, -top, -top * 1.1, 3e38, -3e38]),
        np.array([np.inf, -np.inf, 0.0]),
    ]).astype(np.float32)  # fmt: skip
    for scale in (None, np.float32(0.37)):
        got = np.asarray(
            QUANTISE(values, None if scale is None else jnp.asarray(scale), dtype=dtype)
        )
        want = oracle.quantise(
            values, scale, ml_dtypes.finfo(dtype).dtype if "f" in dtype else dtype
        )
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_nan_stays_nan(dtype):
    stored = np.asarray(QUANTISE(np.array([np.nan, 1.0], np.float32), None, dtype=dtype))
    assert stored.astype(np.float32)[1] == 1
    assert stored[0] == 0 if dtype == "int8" else np.isnan(stored.astype(np.float32)[0])


@pytest.mark.parametrize("source", ["bfloat16", "float16"])
def test_quantise_from_half_precision(source):
    values = np.array([1.5, -3.25, 60000, 0.1], source)
    for dtype in ("bfloat16", "float8_e4m3fn"):
        got = QUANTISE(values, None, dtype=dtype)
        want = oracle.quantise(values, None, ml_dtypes.finfo(dtype).dtype)
        np.testing.assert_array_equal(np.asarray(got).astype(np.float32), want.astype(np.float32))


def rows_and_slots(*row, num_tokens=9):
    """Tokens for a cache [5, 4, *row]: shuffled slots, the first and the last, and nowhere."""
    rng = np.random.default_rng(1)
    slots = np.array([7, -1, 0, 19, 3, -1, 12, 20, 2**31 - 1], np.int32)[:num_tokens]
    return rng.standard_normal((num_tokens, *row)).astype(np.float32), slots


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("row", [(6,), (2, 3)], ids=["latent", "heads"])
def test_write_rows_changes_the_named_slots_only(dtype, row):
    rows, slots = rows_and_slots(*row)
    rows = np.asarray(quantise(jnp.asarray(rows * 20), None, dtype))
    garbage = 99 if dtype == "int8" else np.nan
    pages = np.full((5, 4, *row), garbage, np.float32).astype(rows.dtype)
    want = pages.copy().reshape(20, *row)
    for token, slot in enumerate(slots):
        if 0 <= slot < 20:
            want[slot] = rows[token]
    got = jax.jit(write_rows)(pages, rows, slots)
    assert got.dtype == dtype
    np.testing.assert_array_equal(
        np.asarray(got).astype(np.float32), want.reshape(pages.shape).astype(np.float32)
    )


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize(
    ("k_scale", "v_scale"), [(None, 0.5), (0.25, None), ([0.1, 0.7], [2.0, 0.3])]
)
def test_write_kv_scales_each_side_and_head(dtype, k_scale, v_scale):
    k, slots = rows_and_slots(2, 3)
    v = k[::-1] * 3
    scales = {
        name: None if scale is None else np.float32(scale)
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale))
    }
    pages = np.asarray(jnp.zeros((2, 5, 4, 2, 3), dtype))
    in_range = np.where(slots < 20, slots, -1)  # the oracle knows -1 only
    want = oracle.write_kv(k, v, pages, in_range, **scales)
    got = jax.jit(write_kv)(pages, k, v, slots, **scales)
    np.testing.assert_array_equal(np.asarray(got).astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("row", [(576,), (8, 64)], ids=["latent", "heads"])
def test_a_donated_cache_is_written_in_place(dtype, row):
    """No second cache, neither of the cache's dtype nor of a wider one."""
    cache = jax.ShapeDtypeStruct((512, 16, *row), dtype)
    rows = jax.ShapeDtypeStruct((8, *row), dtype)
    slots = jax.ShapeDtypeStruct((8,), "int32")
    memory = (
        jax.jit(write_rows, donate_argnums=0).lower(cache, rows, slots).compile().memory_analysis()
    )
    cache_bytes = cache.size * cache.dtype.itemsize
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 50
