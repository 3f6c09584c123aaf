"""How this step's rows get into a paged cache: scaled, saturated, and put at their slots.

`write_rows` puts rows of any shape at slots of a cache `[num_pages, page_size, *row]`: a latent
cache's, for one. `write_kv` is for the stacked cache of `paged`, and quantises.
"""

import functools

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
    """Writes this step's keys and values into a stacked cache.

    Args:
        kv_pages: [2, num_pages, page_size, num_kv_heads, head_dim], 0 = keys, 1 = values.
        k, v: [num_tokens, num_kv_heads, head_dim], true values.
        slot_mapping: int32 [num_tokens]: page * page_size + offset; outside the cache (-1) =
            written nowhere.
        k_scale, v_scale: float32 [] or [num_kv_heads]: true value = stored value * scale; None = 1.

    Returns:
        kv_pages with the rows written; in place where the argument is donated.
    """
    rows = [
        quantise(
            values, scale[:, None] if scale is not None and scale.ndim else scale, kv_pages.dtype
        )
        for values, scale in ((k, k_scale), (v, v_scale))
    ]
    return _put(kv_pages, jnp.stack(rows), slot_mapping, axis=1)


def write_rows(pages: jax.Array, rows: jax.Array, slot_mapping: jax.Array) -> jax.Array:
    """Puts one row at each named slot of a paged cache.

    Args:
        pages: [num_pages, page_size, *row].
        rows: [num_tokens, *row], in pages' dtype (see `pallas_kernels.stored_values.quantise`).
        slot_mapping: int32 [num_tokens]: page * page_size + offset; outside the cache (-1) =
            written nowhere. Where two tokens name one slot, either may win.

    Returns:
        pages with the rows written; in place where the argument is donated.
    """
    return _put(pages, rows, slot_mapping, axis=0)


def _put(pages: jax.Array, rows: jax.Array, slots: jax.Array, *, axis: int) -> jax.Array:
    """rows[..., t, :] at slots[t] of pages; axis: where num_pages, and the tokens of rows, are."""
    num_pages, page_size = pages.shape[axis : axis + 2]
    # Left alone, a negative index would wrap round to the cache's end.
    page = jnp.where(slots >= 0, slots // page_size, num_pages)
    scatter = functools.partial(_scatter, axis=axis)
    if pages.dtype.itemsize > 2 or pages.dtype in (jnp.int8, jnp.uint8, jnp.float16):
        return scatter(pages, rows, page, slots % page_size)
    return jax.lax.platform_dependent(
        pages, rows, page, slots % page_size,
        cpu=functools.partial(_put_one_by_one, axis=axis), default=scatter,
    )  # fmt: skip


def _scatter(pages, rows, page, offset, *, axis: int) -> jax.Array:
    """All rows at once."""
    return pages.at[(slice(None),) * axis + (page, offset)].set(rows, mode="drop")


def _put_one_by_one(pages, rows, page, offset, *, axis: int) -> jax.Array:
    """Row after row: XLA:CPU has no scatter of float8 (nor, before jax 0.12, of bfloat16).

    It would convert the whole cache to a wider type and back. (So it would for a select between the
    old row and the new: hence the branch.)
    """

    def put(t: jax.Array, pages: jax.Array) -> jax.Array:
        row = jnp.expand_dims(jax.lax.dynamic_slice_in_dim(rows, t, 1, axis), axis)
        zero = jnp.int32(0)
        at = (zero,) * axis + (page[t], offset[t]) + (zero,) * (pages.ndim - axis - 2)
        old = jax.lax.dynamic_slice(pages, at, row.shape)
        new = jax.lax.cond(page[t] < pages.shape[axis], lambda: row, lambda: old)
        return jax.lax.dynamic_update_slice(pages, new, at)

    return jax.lax.fori_loop(0, rows.shape[axis], put, pages)
