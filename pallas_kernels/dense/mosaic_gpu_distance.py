"""How far apart queries and keys of a tile stand, for ALiBi: an integer and a float addition.

To convert each distance from an integer would take the unit that exponentials take, a second time
for each logit, and the compiler would do it long before the logits arrive, where 32 or 64 registers
are not to be had.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_addresses import tied_to

WGMMA = plgpu.Layout.WGMMA
BIG, BITS_OF_BIG = 2.0**23, 0x4B000000  # from 2**23 on the last bits of a float count


def distance(apart: Any, shape: tuple[int, int], count: jax.Array) -> jax.Array:
    """abs(apart + row - column), float32 of the shape, laid out as products are.

    Exact below 2**23; above, rounded to even numbers.

    Args:
        apart: int32 []: position of the first row less that of the first column.
        shape: of the tile; fewer than 2**23 columns.
        count: int32 [], what the loop counts: keeps the columns out of registers between its turns.
    """
    row = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=WGMMA.reduce(1)) + apart
    column = plgpu.broadcasted_iota(jnp.int32, shape[1:], 0, layout=WGMMA.reduce(0))
    column = column + tied_to(count, jnp.int32(BITS_OF_BIG))
    rows = lax.broadcast_in_dim(row.astype(jnp.float32) + BIG, shape, [0])
    columns = lax.bitcast_convert_type(column, jnp.float32)
    return jnp.abs(rows - lax.broadcast_in_dim(columns, shape, [1]))
