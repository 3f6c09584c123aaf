"""What the rows of a paged latent cache mean: how they are written, and read back as true values.

A row is a token's latent and rotary key, in a float dtype (true value = stored * kv_scale) or as
the 656 bytes of `fp8_ds_mla`. Everything that attends to latents reads and writes through this.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnsel_jax.xla.cache_writes import write_rows
from attnsel_jax.xla.page_reads import read_pages
from pallas_kernels import fp8_ds_mla
from pallas_kernels.contract_checks import Arrays, Kind, check_latents
from pallas_kernels.shape_checks import FLOATS
from pallas_kernels.stored_values import quantise

LATENT_DTYPES = (*FLOATS, "float8_e4m3fn", "float8_e5m2")


def write_latents(
    latent_pages: jax.Array,
    kv_c: jax.Array | None,
    k_pe: jax.Array | None,
    slot_mapping: jax.Array | None,
    *,
    kv_scale: jax.Array | None,
    kv_cache_dtype: str | None,
) -> jax.Array:
    """The cache with this step's rows in their slots; as it was when kv_c is None."""
    if kv_c is None:
        return latent_pages
    if kv_cache_dtype == "fp8_ds_mla":
        rows = fp8_ds_mla.pack(kv_c, k_pe)
    else:
        rows = quantise(jnp.concatenate([kv_c, k_pe], axis=-1), kv_scale, latent_pages.dtype)
    return write_rows(latent_pages, rows, slot_mapping)


def read_latents(
    latent_pages: jax.Array,
    pages: jax.Array,
    positions: jax.Array,
    exists: jax.Array,
    step: jax.Array,
    *,
    kv_scale: jax.Array | None,
    kv_cache_dtype: str | None,
) -> jax.Array:
    """True values at positions of sequences.

    Args:
        latent_pages: the cache.
        pages: int32 [...]: the page that holds each position.
        positions: int32 [...]: only `position % page_size` is used.
        exists: bool [...]: where it is False, the page may be any number and the row is 0.
        step: the index of the loop that this is called in; once in its body (see `page_reads`).
        kv_scale: float32 []; None = 1.
        kv_cache_dtype: "fp8_ds_mla" or None.

    Returns:
        float32 [..., kv_lora_rank + rope_dim].
    """
    num_pages, page_size, width = latent_pages.shape
    pages = jnp.clip(pages, 0, num_pages - 1)
    slots = pages * page_size + positions % page_size
    rows = read_pages(latent_pages.reshape(-1, width), slots, step)
    if kv_cache_dtype == "fp8_ds_mla":
        rows = fp8_ds_mla.unpack(rows)
    else:
        rows = rows.astype(jnp.float32)
        rows = rows if kv_scale is None else rows * kv_scale
    return jnp.where(exists[..., None], rows, 0)


def check_rows(
    arrays: Arrays, queries: Mapping[str, Kind], kv_cache_dtype: str | None
) -> dict[str, int]:
    """Refuses what the contracts of ops on a latent cache do not allow, whatever its rows hold.

    Args:
        arrays, queries: as in `contract_checks.check_latents`.
        kv_cache_dtype: "fp8_ds_mla" or None.

    Returns:
        Dimension name -> size.

    Raises:
        ValueError: something is not what the contract says.
    """
    if kv_cache_dtype not in (None, "fp8_ds_mla"):
        raise ValueError(
            f"kv_cache_dtype is {kv_cache_dtype!r}, must be 'fp8_ds_mla' or None: any other cache "
            f"says its dtype itself, as latent_pages.dtype"
        )
    is_bytes = kv_cache_dtype == "fp8_ds_mla"
    cache = ("num_pages page_size row", ("uint8",) if is_bytes else LATENT_DTYPES)
    dims = check_latents(arrays, queries, dtypes=FLOATS, cache=cache)
    if is_bytes:
        _check_fp8_ds_mla(dims, arrays["kv_scale"])
    else:
        _check_width(dims)
    return dims


def _check_fp8_ds_mla(dims: dict[str, int], kv_scale: jax.Array | None) -> None:
    """Refuses sizes that the 656 bytes have no room for, and a second scale."""
    wanted = {
        "kv_lora_rank": fp8_ds_mla.KV_LORA_RANK,
        "rope_dim": fp8_ds_mla.ROPE_DIM,
        "row": fp8_ds_mla.ROW_BYTES,
    }
    for name, size in wanted.items():
        if dims[name] != size:
            raise ValueError(
                f"{'latent_pages row size' if name == 'row' else name} is {dims[name]}, must be "
                f"{size} with kv_cache_dtype 'fp8_ds_mla': use a float8_e4m3fn cache and kv_scale "
                f"for other sizes"
            )
    if kv_scale is not None:
        raise ValueError(
            "kv_scale is given, must be None with kv_cache_dtype 'fp8_ds_mla': its rows carry "
            "their own scales"
        )


def _check_width(dims: dict[str, int]) -> None:
    """Refuses rows that are not a latent and a rotary key."""
    rank, rope = dims["kv_lora_rank"], dims["rope_dim"]
    if dims["row"] != rank + rope:
        raise ValueError(
            f"latent_pages has rows of {dims['row']}, must be {rank + rope}: kv_lora_rank {rank} "
            f"and rope_dim {rope}, the latent first"
        )
