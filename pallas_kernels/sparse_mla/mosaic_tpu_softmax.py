"""The running softmax of both halves of sparse MLA on TPU, to base 2, in VMEM."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_mla.mosaic_tpu_positions import MASKED
from pallas_kernels.tpu_chip import LANES

LOG2_E, LN_2 = math.log2(math.e), math.log(2)


class Running(NamedTuple):
    """References: what has been seen of some rows of logits."""

    m: Any  # float32 [rows, LANES]: the largest, the same in every lane
    l: Any  # float32 [rows, LANES]: the sum, the same in every lane
    acc: Any  # float32 [rows, rank]


def running_shapes(rows: int, rank: int) -> Running:
    """The scratch of so many rows."""
    shapes = ((rows, LANES), (rows, LANES), (rows, rank))
    return Running(*(pltpu.VMEM(shape, jnp.float32) for shape in shapes))


def reset(running: Running) -> None:
    """Nothing seen yet."""
    running.m[...] = jnp.full_like(running.m, MASKED)
    running.l[...] = jnp.zeros_like(running.l)
    running.acc[...] = jnp.zeros_like(running.acc)


def add_block(
    running: Running, rows: Any, logits: jax.Array, values: Any, dtype: Any, precision: Any
) -> None:
    """Adds a block of keys to some of the rows.

    Args:
        running: updated.
        rows: index of its rows.
        logits: float32 [rows, block_kv], to base 2; MASKED where a query does not see a key.
        values: reference, [block_kv, rank], operands. It is read last: before the softmax, its
            registers would be held throughout.
        dtype: of the weights in the product.
        precision: of the product.
    """
    m_old = running.m[rows]
    m_new = jnp.maximum(m_old, jnp.max(logits, axis=1, keepdims=True))
    kept = jnp.exp2(m_old - m_new)
    p = jnp.exp2(logits - widened(m_new, logits.shape[1]))
    running.m[rows] = m_new
    running.l[rows] = kept * running.l[rows] + jnp.sum(p, axis=1, keepdims=True)
    product = dot(p.astype(dtype), values[...], (1, 0), precision)
    running.acc[rows] = running.acc[rows] * widened(kept, values.shape[1]) + product


def finished(running: Running, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 out [rows, rank], 0 where nothing was seen, and lse [rows, LANES], -inf there.

    Args:
        running: every block added.
        factor: of the values.
    """
    m, l = running.m[...], running.l[...]
    seen = ~((m <= 0.5 * MASKED) & (l == l))  # NaN stays NaN
    rank = running.acc.shape[1]
    scaled = running.acc[...] * widened(jnp.where(seen, factor / l, 0.0), rank)
    out = jnp.where(widened(seen, rank), scaled, 0.0)
    return out, jnp.where(seen, (m + jnp.log2(l)) * LN_2, -jnp.inf)


def factors_of(
    kv_scale: jax.Array | None, scale: float, soft_cap: float | None, of_keys: float
) -> jax.Array:
    """float32 [2]: of products, to base 2 or to what is capped; of the output.

    Made before the kernel: there it would be a product of scalars, which the replay reads as 0.

    Args:
        kv_scale, scale, soft_cap: of the call.
        of_keys: `tpu_operands.factor_of`.
    """
    kv_scale = jnp.float32(of_keys) * (1.0 if kv_scale is None else kv_scale)
    of_products = scale * LOG2_E if soft_cap is None else scale / soft_cap
    return jnp.stack([kv_scale * of_products, kv_scale])


def scaled_logits(products: jax.Array, factor: jax.Array, soft_cap: float | None) -> jax.Array:
    """Logits to base 2.

    Args:
        products: float32.
        factor: the first of `factors_of`.
        soft_cap: of the logits.
    """
    if soft_cap is None:
        return products * factor
    return jnp.tanh(products * factor) * (soft_cap * LOG2_E)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], precision: Any) -> jax.Array:
    """The product in float32, contracted over one dimension of each."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def widened(x: jax.Array, width: int) -> jax.Array:
    """[rows, LANES] with equal lanes as [rows, width]."""
    return x[:, :width] if width <= LANES else jnp.tile(x, (1, width // LANES))
