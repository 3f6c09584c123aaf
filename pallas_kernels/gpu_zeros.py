"""Zeros that a loop's products begin with, so that Hopper's tensor cores need not be given any."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def zeros(*shape: int) -> jax.Array:
    """float32 zeros as wgmma accumulates: made before a loop, put into its accumulators inside it.

    Mosaic always adds a product to something. ptxas turns a first product that is added to zeros
    into one that is added to nothing, if it sees that they are: LLVM makes zeros inside a loop as
    one register of the accumulator and copies of it, which ptxas then makes too, an instruction
    for each (64 of 540 a tile of the forward at 128). These LLVM cannot see through, and has to
    copy from outside; ptxas can (counted in SASS, jax 0.11.2 and 0.12.0.1, 2026-11-26).
    """
    return pl.run_scoped(lambda accumulator: accumulator[...], plgpu.ACC(shape, jnp.float32))
