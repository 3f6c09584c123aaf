"""The chip that is traced for, and the interpreter that the other tests here stand on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from tpu_interpreter import RACE, tpu_interpreter

from attnsel_jax.platforms import CHIPS
from pallas_kernels import tpu_chip


@pytest.mark.parametrize("generation", tpu_chip.CHIPS)
def test_the_chip_is_the_one_that_is_said(generation):
    with tpu_chip.for_generation(generation):
        chip = tpu_chip.current()
        info = pltpu.get_tpu_info()
    assert chip == tpu_chip.CHIPS[generation]
    assert chip.kind == CHIPS[generation].kind
    assert (chip.vmem_bytes, chip.mxu) == (info.vmem_capacity_bytes, info.mxu_column_size)
    has_fp8 = info.fp8_ops_per_second > 1.5 * info.bf16_ops_per_second
    assert (chip.float8 == "float8_e4m3fn") == has_fp8


def test_the_selector_and_the_kernels_name_the_same_generations():
    assert set(tpu_chip.CHIPS) == {c.generation for c in CHIPS.values() if c.platform == "tpu"}


def test_nothing_said_is_the_default():
    assert tpu_chip.current() == tpu_chip.CHIPS[tpu_chip.DEFAULT]


def test_an_unknown_generation_is_refused():
    with pytest.raises(ValueError, match=r"generation is 'v3', must be one of v4, v5e, v5p"):
        tpu_chip.for_generation("v3").__enter__()


def test_one_generation_s_trace_is_not_another_s():
    @jax.jit
    def vmem(x):
        return x + tpu_chip.current().vmem_bytes

    seen = []
    for generation in tpu_chip.CHIPS:
        with tpu_chip.for_generation(generation):
            seen.append(int(vmem(jnp.int32(0))))
    assert seen == [chip.vmem_bytes for chip in tpu_chip.CHIPS.values()]


def test_vmem_is_the_chip_s_less_what_is_reserved():
    with tpu_chip.for_generation("v4"):
        assert tpu_chip.compiler_params(["parallel"]).vmem_limit_bytes == 15 << 20
        assert (
            tpu_chip.compiler_params(["parallel"], vmem_bytes=1 << 20).vmem_limit_bytes == 1 << 20
        )


def call(kernel, *scratch_shapes):
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        scratch_shapes=scratch_shapes,
    )


def test_the_interpreter_copies_when_waited_for_and_starts_with_nan():
    def kernel(x, out, scratch, semaphore):
        copy = pltpu.make_async_copy(x, scratch, semaphore)
        out[...] = scratch[...]
        copy.start()
        copy.wait()
        out[...] = jnp.where(jnp.isnan(out[...]), scratch[...], -1)

    x = jnp.arange(8 * 128, dtype=jnp.float32).reshape(8, 128)
    with tpu_interpreter():
        out = call(kernel, pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA)(x)
        np.testing.assert_array_equal(out, x)


def test_the_interpreter_reports_a_race():
    def kernel(x, out, scratch, semaphore):
        copy = pltpu.make_async_copy(x, scratch, semaphore)
        copy.start()
        out[...] = scratch[...]  # before the copy is waited for
        copy.wait()

    x = jnp.ones((8, 128), jnp.float32)
    with pytest.raises(RACE, match="RACE DETECTED"), tpu_interpreter():
        call(kernel, pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA)(x)
