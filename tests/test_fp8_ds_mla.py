"""The 656 bytes of an fp8_ds_mla row against NumPy's own reading of them, whoever writes them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from attnsel_jax import LatentCache, oracle
from attnsel_jax.xla import latent_cache
from pallas_kernels import fp8_ds_mla
from pallas_kernels.fp8_ds_mla import pack, unpack
from pallas_kernels.mla import mosaic_gpu_writes
from pallas_kernels.sparse_mla.mosaic_tpu_rows import scaled_rows
from pallas_kernels.stored_values import quantise

packed, unpacked = jax.jit(pack), jax.jit(unpack)


def rows(dtype=np.float32, count=300):
    """Latents of all sizes, one group of zeros, one tiny, and rotary keys."""
    rng = np.random.default_rng(0)
    kv_c = rng.standard_normal((count, 512)) * np.exp(3 * rng.standard_normal((count, 1)))
    kv_c[0, :128], kv_c[1, 128:256], kv_c[2, 256:384] = 0, 1e-42, 3e38
    k_pe = rng.standard_normal((count, 64)) * 1e3
    return kv_c.astype(dtype), k_pe.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_every_byte_is_the_oracles(dtype):
    kv_c, k_pe = rows(dtype)
    got = packed(kv_c, k_pe)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, oracle.encode_fp8_ds_mla(kv_c, k_pe))


def of_xla(kv_c, k_pe):
    """The rows that it writes into a cache of one page."""
    pages = jnp.zeros((1, len(kv_c), fp8_ds_mla.ROW_BYTES), jnp.uint8)
    scaling = {"kv_scale": None, "kv_cache_dtype": fp8_ds_mla.NAME}
    return latent_cache.write_latents(pages, kv_c, k_pe, jnp.arange(len(kv_c)), **scaling)[0]


def of_gpu(kv_c, k_pe):
    pages = jnp.zeros((1, len(kv_c), fp8_ds_mla.ROW_BYTES), jnp.uint8)
    return mosaic_gpu_writes.write_latents(pages, kv_c, k_pe, jnp.arange(len(kv_c)), None)[0]


def of_tpu(kv_c, k_pe):
    pages = scaled_rows(kv_c, k_pe).reshape(1, len(kv_c), 2, 4, 128)
    return LatentCache(pages, layout="tiled").converted("rows").pages[0]


def ties():
    """A row whose values, but the largest of each group, lie between two e4m3 numbers."""
    scales = np.array([1, 3, 5, 7])
    kv_c = np.tile(np.arange(8.5, 16), 16) * scales[:, None]  # e4m3 has whole numbers there
    kv_c[:, 0] = 448 * scales
    exact = ml_dtypes.bfloat16
    return kv_c.reshape(1, 512).astype(exact), np.zeros((1, 64), exact)


@pytest.mark.parametrize("write", [of_xla, of_gpu, of_tpu])
def test_whoever_writes_a_row_its_bytes_are_the_oracles_at_ties_too(write):
    for kv_c, k_pe in (ties(), rows(ml_dtypes.bfloat16)):
        np.testing.assert_array_equal(
            jax.jit(write)(kv_c, k_pe), oracle.encode_fp8_ds_mla(kv_c, k_pe)
        )


def test_values_of_one_scale_are_quotients_too():
    values = np.arange(-32, 32, 0.5, np.float32) * np.float32(41)  # ties among them
    want = (values / np.float32(41)).astype(ml_dtypes.float8_e4m3fn)
    got = jax.jit(quantise, static_argnums=2)(values, np.float32(41), jnp.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))


def test_a_row_read_byte_by_byte():
    kv_c, k_pe = np.zeros((1, 512), np.float32), np.zeros((1, 64), np.float32)
    kv_c[0, 129], kv_c[0, 130], k_pe[0, 1] = -896, 448, 1.5
    row = bytes(np.asarray(packed(kv_c, k_pe))[0])
    assert row[129] == 0xFE  # -448, the largest e4m3
    assert row[130] == 0x76  # 224
    assert row[512 + 4 : 512 + 8] == np.float32(2).tobytes()  # group 1's scale, 896 / 448
    assert row[528 + 2 : 528 + 4] == bytes([0xC0, 0x3F])  # bfloat16 1.5
    assert np.frombuffer(row[512:528], "<f4").min() > 0  # a group of zeros still divides


def test_there_and_back():
    kv_c, k_pe = rows()
    back = np.asarray(unpacked(packed(kv_c, k_pe)))
    assert back.dtype == np.float32
    largest = np.abs(kv_c.reshape(-1, 4, 128)).max(-1).repeat(128, axis=1)
    error = np.abs(back[:, :512] - kv_c)
    normal = largest > 1e-30  # below, the scale cannot follow
    # e4m3 keeps 4 bits: half of 1/8 of a value, or of its subnormals' step, 2**-9 of 448
    budget = np.maximum(np.abs(kv_c) / 16, largest * 2**-10 / 448) * (1 + 1e-6)
    assert np.all(error[normal] <= budget[normal])
    assert np.all(back[0, :128] == 0)
    np.testing.assert_array_equal(back[:, 512:], k_pe.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_any_bytes_mean_what_numpy_says():
    raw = np.random.default_rng(1).integers(0, 256, (200, 656), dtype=np.uint8)
    raw[:, 515:528:4] |= 1  # no scale is below the smallest normal number: a CPU may take it for 0
    with np.errstate(all="ignore"):
        want = oracle.decode_fp8_ds_mla(raw).astype(np.float32)
    tiny = np.finfo(np.float32).tiny
    np.testing.assert_allclose(unpacked(raw), want, rtol=1e-6, atol=tiny)
    assert np.isnan(want).any()


def test_leading_dimensions_and_vmap():
    kv_c, k_pe = (x[:6].reshape(2, 3, -1) for x in rows())
    want = oracle.encode_fp8_ds_mla(kv_c, k_pe)
    np.testing.assert_array_equal(jax.vmap(pack)(jnp.asarray(kv_c), jnp.asarray(k_pe)), want)
    assert unpack(jnp.asarray(want)).shape == (2, 3, 576)


def test_refusals():
    kv_c, k_pe = (jnp.asarray(x) for x in rows(count=3))
    with pytest.raises(ValueError, match=r"kv_c's last dimension is 256, must be 512"):
        pack(kv_c[:, :256], k_pe)
    with pytest.raises(ValueError, match=r"k_pe's last dimension is 32, must be 64"):
        pack(kv_c, k_pe[:, :32])
    with pytest.raises(ValueError, match=r"rows is float32 .* 576, must be uint8 with 656"):
        unpack(jnp.zeros((3, 576), jnp.float32))
