"""The two products of a tile: by wgmma on Hopper, by mma on Blackwell.

A warpgroup has 64 rows either way, and its results lie in its registers alike, so that everything
between the products is one code. mma.sync is Ampere's instruction, which Blackwell keeps and which
its tensor cores outrun by far; decoding waits for bytes there, not for products.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_mma
from pallas_kernels.paged.mosaic_gpu_geometry import ROWS, Geometry, swizzled_columns


def products(q: Any, k: Any, geometry: Geometry) -> jax.Array:
    """float32 [64, keys]: queries [64, head_dim] times keys [keys, head_dim], both in memory."""
    if geometry.uses_mma:
        swizzle = swizzled_columns(q.dtype, q.shape[-1]) * jnp.dtype(q.dtype).itemsize
        return gpu_mma.products(gpu_mma.left_strips(q, q.shape[-1], swizzle), k)

    def product(acc):
        plgpu.wgmma(acc, q, k.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((ROWS, k.shape[0]), jnp.float32))


def weighed(acc: jax.Array, p: jax.Array, v: Any, geometry: Geometry) -> jax.Array:
    """acc, float32 [64, head_dim], and weights, float32 [64, keys], times values in memory."""
    if geometry.uses_mma:
        return gpu_mma.weighted_sum(acc, p, v, None)
    weights = p.astype(geometry.dtype)
    return pl.run_state(lambda a: plgpu.wgmma(a, weights, v))(plgpu.ACC.init(acc))
