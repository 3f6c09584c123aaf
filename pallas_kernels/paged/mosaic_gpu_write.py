"""This step's keys and values go into a cache of pages by head, in place where it is donated."""

import jax
import jax.numpy as jnp

from pallas_kernels.stored_values import quantise


def write_kv(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
    """Writes one row for each token, kv head and side, by a scatter over the cache as plain rows.

    The cache's rows are indexed by one leading dimension: XLA then scatters where the cache lies,
    and neither transposes nor copies it.

    Args:
        kv_pages: [2, num_pages, num_kv_heads, page_size, head_dim], 0 = keys, 1 = values.
        k, v, slot_mapping, k_scale, v_scale: the contract's.

    Returns:
        kv_pages with the rows written.
    """
    _, num_pages, num_heads, page_size, head_dim = kv_pages.shape
    page, offset = slot_mapping // page_size, slot_mapping % page_size
    side = jnp.arange(2)[:, None, None]
    head = jnp.arange(num_heads)
    row = ((side * num_pages + page[:, None]) * num_heads + head) * page_size + offset[:, None]
    is_written = (slot_mapping >= 0) & (page < num_pages)
    row = jnp.where(is_written[:, None], row, 2 * num_pages * num_heads * page_size)
    values = jnp.stack(
        [
            quantise(
                x, scale[:, None] if scale is not None and scale.ndim else scale, kv_pages.dtype
            )
            for x, scale in ((k, k_scale), (v, v_scale))
        ]
    )
    bits = jnp.dtype(f"uint{8 * kv_pages.dtype.itemsize}")
    rows = jax.lax.bitcast_convert_type(kv_pages, bits).reshape(-1, head_dim)
    new = jax.lax.bitcast_convert_type(values, bits).reshape(-1, head_dim)
    rows = rows.at[row.reshape(-1)].set(new, mode="drop")
    return jax.lax.bitcast_convert_type(rows, kv_pages.dtype).reshape(kv_pages.shape)
