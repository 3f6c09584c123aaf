"""How rows get to their slots in a cache of any layout, and pages to other pages.

A cache is indexed as units in one leading dimension, so that XLA scatters where it lies: scattered
as windows of the whole array, v5e's compiler copied caches of float8 and float32. It still copies
those whose rows it pads: "stacked" below 128 lanes.
"""

import jax
import jax.numpy as jnp

from attnsel_jax.cache_layouts import (
    HALF_LANES,
    LINES_OF_A_TILE,
    latent_layout_named,
    layout_named,
)
from attnsel_jax.xla.cache_writes import write_kv, write_rows
from pallas_kernels import fp8_ds_mla
from pallas_kernels.paged.mosaic_gpu_write import write_kv as write_kv_by_head
from pallas_kernels.stored_values import quantise


def put_kv(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    layout: str,
) -> jax.Array:
    """Keys and values at slots of a cache.

    Args:
        kv_pages: the cache's array, in its layout.
        k, v: [num_tokens, num_kv_heads, head_size], true values.
        slot_mapping: int32 [num_tokens]: page * page_size + offset; outside the cache = nowhere.
        k_scale, v_scale: float32 [] or [num_kv_heads]: true value = stored * scale; None = 1.
        layout: its name. One that was registered is converted there and back, all of it.
    """
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    if layout == "stacked":
        return write_kv(kv_pages, k, v, slot_mapping, **scales)
    if layout == "by_head":
        return write_kv_by_head(kv_pages, k, v, slot_mapping, **scales)
    of = layout_named(layout)
    padding = ((0, 0), (0, 0), (0, of.dims(kv_pages.shape)[3] - k.shape[2]))
    k, v = jnp.pad(k, padding), jnp.pad(v, padding)
    if layout == "side_by_side":
        return _put_side_by_side(kv_pages, k, v, slot_mapping, **scales)
    return of.join(*write_kv(jnp.stack(of.split(kv_pages)), k, v, slot_mapping, **scales))


def put_latents(
    latent_pages: jax.Array,
    kv_c: jax.Array,
    k_pe: jax.Array,
    slot_mapping: jax.Array,
    kv_scale: jax.Array | None,
    layout: str,
) -> jax.Array:
    """Latents and their rotary keys at slots of a latent cache.

    Args:
        latent_pages: the cache's array, in its layout; uint8 = rows of fp8_ds_mla.
        kv_c, k_pe: [num_tokens, kv_lora_rank], [num_tokens, rope_dim], true values.
        slot_mapping, layout: as in `put_kv`.
        kv_scale: float32 []; None = 1.
    """
    if latent_pages.dtype == jnp.uint8:
        rows = fp8_ds_mla.pack(kv_c, k_pe)
    else:
        rows = quantise(jnp.concatenate([kv_c, k_pe], axis=-1), kv_scale, latent_pages.dtype)
    if layout == "rows":
        return write_rows(latent_pages, rows, slot_mapping)
    rope_dim, of = k_pe.shape[1], latent_layout_named(layout)
    if layout == "tiled":
        return _put_tiled(latent_pages, of.from_rows(rows[:, None], rope_dim)[:, 0], slot_mapping)
    if layout == "striped":
        return _put_striped(latent_pages, rows, slot_mapping)
    before = of.to_rows(latent_pages, rope_dim)
    return of.from_rows(write_rows(before, rows, slot_mapping), rope_dim)


def copy_kv(kv_pages: jax.Array, source: jax.Array, target: jax.Array, layout: str) -> jax.Array:
    """Pages of keys and values in place of others; arguments as of `copy_along`.

    Args:
        kv_pages, source, target: as there.
        layout: its name. One that was registered is converted there and back, all of it.
    """
    if layout in ("stacked", "by_head"):
        return copy_along(kv_pages, source, target, 1)
    if layout == "side_by_side":
        return copy_along(kv_pages, source, target, 0)
    of = layout_named(layout)
    return of.join(*copy_along(jnp.stack(of.split(kv_pages)), source, target, 1))


def copy_along(pages: jax.Array, source: jax.Array, target: jax.Array, axis: int) -> jax.Array:
    """Page source[i] as it was before, in place of page target[i].

    Args:
        pages: a cache's array.
        source, target: int32 [n]; where one of both is outside the cache, nothing is copied.
        axis: of the pages.
    """
    before, num_pages = (slice(None),) * axis, pages.shape[axis]
    exists = (source >= 0) & (source < num_pages) & (target >= 0)
    target = jnp.where(exists, target, num_pages)

    def copied(pages: jax.Array) -> jax.Array:
        taken = pages.at[(*before, source)].get(mode="clip")
        return pages.at[(*before, target)].set(taken, mode="drop")

    if pages.dtype.itemsize > 1 or pages.dtype in (jnp.int8, jnp.uint8):
        return copied(pages)
    # XLA:CPU widens all of a float8 cache to scatter in it; seen as integers H100's is copied.
    return jax.lax.platform_dependent(
        pages, cpu=lambda pages: _as_bits(copied, pages), default=copied
    )


def _put_side_by_side(pages, k, v, slots, *, k_scale, v_scale) -> jax.Array:
    """Units are the lanes of a tile: [.., tiles, page_size, lanes]."""
    _, num_heads, tiles, page_size, lanes = pages.shape
    rows = [
        quantise(x, scale[:, None] if scale is not None and scale.ndim else scale, pages.dtype)
        for x, scale in ((k, k_scale), (v, v_scale))
    ]
    units = jnp.concatenate(rows, axis=-1).reshape(-1, lanes)
    tile = jnp.arange(num_heads * tiles)
    page, offset = slots // page_size, slots % page_size
    at = (page[:, None] * num_heads * tiles + tile) * page_size + offset[:, None]
    return _put_units(pages, units, _where_it_is(at, slots, pages.shape[0] * page_size))


def _put_tiled(pages, rows, slots) -> jax.Array:
    """Units are the packed lines of a part: [.., parts, packed, 128]."""
    num_pages, page_size, parts, packed, lanes = pages.shape
    at = slots[:, None] * parts + jnp.arange(parts)
    units = rows.reshape(-1, packed, lanes)
    return _put_units(pages, units, _where_it_is(at, slots, num_pages * page_size))


def _put_striped(pages, rows, slots) -> jax.Array:
    """Units are lines of 128 lanes; the rotary key of a token is half of one."""
    num_pages, parts, half_page, lanes = pages.shape
    num_slots = num_pages * 2 * half_page
    page, offset = slots // (2 * half_page), slots % (2 * half_page)
    rank, tile = rows.shape[1] - HALF_LANES, LINES_OF_A_TILE // pages.dtype.itemsize
    half, line = offset // half_page, offset % half_page
    stripe = page * parts + half * (parts // 2)
    at = (stripe[:, None] + jnp.arange(parts // 2)) * half_page + line[:, None]
    units = rows[:, :rank].reshape(-1, lanes)
    pages = _put_units(pages, units, _where_it_is(at, slots, num_slots))
    line = offset // (2 * tile) * tile + offset % tile
    at = (page * parts + parts - 1) * half_page + line
    at = jnp.stack([_where_it_is(at, slots, num_slots), offset // tile % 2 * HALF_LANES], axis=1)
    halves = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
    )
    ropes = rows[:, rank:]

    def put(pages: jax.Array, ropes: jax.Array) -> jax.Array:
        lines = pages.reshape(-1, lanes)
        return jax.lax.scatter(lines, at, ropes, halves, mode="drop").reshape(pages.shape)

    return _as_bits_off_tpu(put, pages, ropes)


def _put_units(pages: jax.Array, units: jax.Array, at: jax.Array) -> jax.Array:
    """Units at places of a cache that is counted in them: its last dimensions are theirs."""

    def put(pages: jax.Array, units: jax.Array) -> jax.Array:
        counted = pages.reshape(-1, *units.shape[1:])
        return counted.at[at.reshape(-1)].set(units, mode="drop").reshape(pages.shape)

    return _as_bits_off_tpu(put, pages, units)


def _where_it_is(at: jax.Array, slots: jax.Array, num_slots: int) -> jax.Array:
    """The places, past every cache's end where a slot is outside this one."""
    exists = ((slots >= 0) & (slots < num_slots)).reshape(-1, *(1,) * (at.ndim - 1))
    return jnp.where(exists, at, jnp.iinfo(jnp.int32).max)


def _as_bits_off_tpu(put, *arrays: jax.Array) -> jax.Array:
    """What `put` makes of the arrays.

    XLA on CPUs and GPUs has no scatter of every narrow float (jax 0.10 to 0.12), and converts the
    cache to and fro; on a TPU it copies the cache to see it as integers.
    """
    return jax.lax.platform_dependent(
        *arrays, tpu=put, default=lambda *arrays: _as_bits(put, *arrays)
    )


def _as_bits(put, *arrays: jax.Array) -> jax.Array:
    """The same, of unsigned integers of the arrays' width."""
    dtype = arrays[0].dtype
    bits = jnp.dtype(f"uint{8 * dtype.itemsize}")
    seen = (jax.lax.bitcast_convert_type(array, bits) for array in arrays)
    return jax.lax.bitcast_convert_type(put(*seen), dtype)
