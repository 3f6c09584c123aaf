"""The interpreter that the other tests here stand on: what fills its gaps, and what it sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import RACE, gpu_interpreter, needs_gpu_interpreter
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

needs_gpu_interpreter()

TILE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
BF16 = jnp.bfloat16


def normal(seed, *shape, dtype=BF16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def run(kernel, *arrays, out, scratch, **options):
    called = plgpu.kernel(kernel, out_type=out, scratch_types=scratch, **options)
    with gpu_interpreter():
        return np.asarray(jax.jit(called)(*arrays), np.float32)


def test_wgmma_takes_its_left_operand_from_registers_into_a_given_accumulator():
    def kernel(a, b, out, a_smem, b_smem, out_smem, arrived):
        plgpu.copy_gmem_to_smem(a, a_smem, arrived)
        plgpu.copy_gmem_to_smem(b, b_smem, arrived)
        plgpu.barrier_wait(arrived)
        left = plgpu.load(a_smem, layout=plgpu.Layout.WGMMA)
        ones = plgpu.layout_cast(jnp.ones((64, 64), jnp.float32), plgpu.Layout.WGMMA)
        sums = pl.run_state(lambda acc: plgpu.wgmma(acc, left, b_smem))(plgpu.ACC.init(ones))
        out_smem[...] = sums
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out)
        plgpu.wait_smem_to_gmem(0)

    a, b = normal(0, 64, 64), normal(1, 64, 64)
    smem = [plgpu.SMEM((64, 64), BF16, transforms=TILE)] * 2
    out = run(
        kernel, a, b, out=jax.ShapeDtypeStruct((64, 64), jnp.float32),
        scratch=[*smem, plgpu.SMEM((64, 64), jnp.float32), plgpu.Barrier(num_arrivals=2)],
    )  # fmt: skip
    wanted = 1 + np.asarray(a, np.float32) @ np.asarray(b, np.float32)
    np.testing.assert_allclose(out, wanted, atol=1e-4)


@pytest.mark.parametrize("taken", [True, False])
def test_a_copy_under_a_predicate(taken):
    def kernel(given, out, smem):
        smem[...] = jnp.full_like(smem, 7)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, out)
        smem_is_read = plgpu.wait_smem_to_gmem
        smem_is_read(0)
        smem[...] = jnp.full_like(smem, 8)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, out, predicate=given[0] > 0)
        smem_is_read(0)

    out = run(
        kernel, jnp.asarray([int(taken)], jnp.int32),
        out=jax.ShapeDtypeStruct((128,), jnp.float32), scratch=[plgpu.SMEM((128,), jnp.float32)],
    )  # fmt: skip
    assert set(out) == {8.0 if taken else 7.0}


def test_memory_that_nothing_wrote_is_nan():
    def kernel(x, out, smem):
        plgpu.copy_smem_to_gmem(smem, out)
        plgpu.wait_smem_to_gmem(0)

    out = run(
        kernel, jnp.zeros((8,), jnp.float32), out=jax.ShapeDtypeStruct((128,), jnp.float32),
        scratch=[plgpu.SMEM((128,), jnp.float32)],
    )  # fmt: skip
    assert np.isnan(out).all()


def test_the_interpreter_reports_a_race():
    def kernel(x, out, smem, arrived):
        plgpu.copy_gmem_to_smem(x, smem, arrived)
        out[...] = smem[...]  # before the copy has arrived
        plgpu.barrier_wait(arrived)

    with pytest.raises(RACE, match="RACE DETECTED"):
        run(
            kernel, jnp.ones((128,), jnp.float32),
            out=jax.ShapeDtypeStruct((128,), jnp.float32),
            scratch=[plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()],
        )  # fmt: skip
