"""This step's rows into a latent cache by a scatter of XLA's (in place)."""

import jax
import jax.numpy as jnp

from pallas_kernels import fp8_ds_mla
from pallas_kernels.stored_values import quantise


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
        rows = fp8_ds_mla.pack(kv_c, k_pe)
    else:
        rows = quantise(jnp.concatenate([kv_c, k_pe], axis=-1), kv_scale, latent_pages.dtype)
    num_pages, page_size, _ = latent_pages.shape
    # Left alone, a negative index would wrap round to the cache's end.
    page = jnp.where(slot_mapping >= 0, slot_mapping // page_size, num_pages)
    return latent_pages.at[page, slot_mapping % page_size].set(rows, mode="drop")
