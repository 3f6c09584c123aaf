"""This step's rows into a latent cache by a scatter of XLA's (in place); rows of fp8_ds_mla."""

import jax
import jax.numpy as jnp
from jax.lax import bitcast_convert_type

RANK, ROPE_DIM, SCALED = 512, 64, 128  # of fp8_ds_mla: a scale for each 128 values
LARGEST_E4M3 = 448.0


def write_latents(
    latent_pages: jax.Array,
    kv_c: jax.Array | None,
    k_pe: jax.Array | None,
    slot_mapping: jax.Array | None,
    kv_scale: jax.Array | None,
) -> jax.Array:
    """The cache with this step's rows at their slots; as it was when kv_c is None."""
    if kv_c is None:
        return latent_pages
    if latent_pages.dtype == jnp.uint8:
        rows = packed(kv_c, k_pe)
    else:
        rows = quantised(jnp.concatenate([kv_c, k_pe], axis=-1), kv_scale, latent_pages.dtype)
    num_pages, page_size, _ = latent_pages.shape
    # Left alone, a negative index would wrap round to the cache's end.
    page = jnp.where(slot_mapping >= 0, slot_mapping // page_size, num_pages)
    return latent_pages.at[page, slot_mapping % page_size].set(rows, mode="drop")


def quantised(values: jax.Array, scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """True values as the cache stores them: divided, saturated, rounded; NaN stays NaN."""
    stored = values.astype(jnp.float32)
    if scale is not None:
        stored = stored / scale
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(stored, -largest, largest).astype(dtype)


def packed(kv_c: jax.Array, k_pe: jax.Array) -> jax.Array:
    """Rows of fp8_ds_mla, uint8 [..., 656]; a group's scale is its largest |value| / 448."""
    batch = kv_c.shape[:-1]
    groups = kv_c.astype(jnp.float32).reshape(*batch, -1, SCALED)
    scales = jnp.max(jnp.abs(groups), axis=-1) / jnp.float32(LARGEST_E4M3)
    scales = jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)  # a group of zeros divides too
    values = jnp.clip(groups / scales[..., None], -LARGEST_E4M3, LARGEST_E4M3)
    parts = (values.astype(jnp.float8_e4m3fn), scales, k_pe.astype(jnp.bfloat16))
    as_bytes = (bitcast_convert_type(part, jnp.uint8).reshape(*batch, -1) for part in parts)
    return jnp.concatenate(list(as_bytes), axis=-1)


def unpacked(rows: jax.Array) -> jax.Array:
    """True values of rows of fp8_ds_mla, float32 [..., 576]."""
    batch = rows.shape[:-1]
    end = RANK + 4 * (RANK // SCALED)
    values = bitcast_convert_type(rows[..., :RANK], jnp.float8_e4m3fn).astype(jnp.float32)
    scales = bitcast_convert_type(rows[..., RANK:end].reshape(*batch, -1, 4), jnp.float32)
    rope = bitcast_convert_type(rows[..., end:].reshape(*batch, -1, 2), jnp.bfloat16)
    latent = values.reshape(*batch, -1, SCALED) * scales[..., None]
    return jnp.concatenate([latent.reshape(*batch, RANK), rope.astype(jnp.float32)], axis=-1)
