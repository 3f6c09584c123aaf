"""Every byte of an 8-bit cache as the matrix unit takes it, on every generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from tpu_interpreter import tpu_interpreter

from pallas_kernels import tpu_chip
from pallas_kernels.tpu_operands import as_operand, factor_of, operand_dtype

STORED = (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8)


def every_value(stored):
    """[32, 128]: every byte 16 times, beside any others."""
    rng = np.random.default_rng(0)
    every = [rng.permutation(np.arange(256, dtype=np.uint8)) for _ in range(16)]
    return np.concatenate(every).reshape(32, 128).view(stored)


@pytest.mark.parametrize("generation", tpu_chip.CHIPS)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("beside", [jnp.bfloat16, jnp.float32])
def test_every_byte_is_its_value(generation, stored, beside):
    """NaN stays NaN; in a product with ones, none of which a 0 hides, all others are exact."""
    values = every_value(stored)
    wanted = values.astype(np.float32)

    def kernel(values, ones, whole, product):
        operand = as_operand(values[...], beside)
        whole[...] = operand.astype(jnp.float32) * factor_of(stored, beside)
        finite = as_operand(
            jnp.where(jnp.isfinite(whole[...]), values[...], jnp.zeros_like(values[...])), beside
        )
        found = jax.lax.dot_general(
            ones[...], finite, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        product[...] = found * factor_of(stored, beside)

    shape = jax.ShapeDtypeStruct(values.shape, jnp.float32)
    with tpu_interpreter(generation):
        assert (operand_dtype(stored, beside) == beside) == (
            beside == jnp.float32 or stored == jnp.int8 or generation == "v4"
        )
        whole, product = pl.pallas_call(kernel, out_shape=(shape, shape))(
            jnp.asarray(values), jnp.eye(32, dtype=beside)
        )
    np.testing.assert_array_equal(np.asarray(whole), wanted)
    np.testing.assert_array_equal(np.asarray(product), np.where(np.isfinite(wanted), wanted, 0))
