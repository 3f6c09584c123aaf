"""What sparse MLA on TPU takes: the contract's arguments, within limits of its cache's layout."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels import fp8_ds_mla
from pallas_kernels.contract_checks import check_latents
from pallas_kernels.mla.mosaic_tpu_arguments import CACHE_DTYPES, QUERY_DTYPES, ROPE_DIM
from pallas_kernels.shape_checks import INT32
from pallas_kernels.tpu_chip import LANES


def check_tiled(
    arrays: Mapping[str, jax.Array | None], kv_cache_dtype: str | None
) -> dict[str, int]:
    """Refuses what the contract, or a kernel over a tiled cache, does not take.

    Args:
        arrays: the op's array arguments by name.
        kv_cache_dtype: None, or "fp8_ds_mla".

    Returns:
        Dimension name -> size.

    Raises:
        ValueError: something is not allowed; the message says what is.
    """
    if kv_cache_dtype not in (None, fp8_ds_mla.NAME):
        raise ValueError(
            f"kv_cache_dtype is {kv_cache_dtype!r}, must be {fp8_ds_mla.NAME!r} or None: any other "
            f"cache says its dtype itself"
        )
    is_bytes = kv_cache_dtype == fp8_ds_mla.NAME
    dims = check_latents(
        arrays,
        {
            "ql_nope": ("num_tokens num_q_heads kv_lora_rank", QUERY_DTYPES),
            "q_pe": ("num_tokens num_q_heads rope_dim", QUERY_DTYPES),
            "topk_indices": ("num_tokens topk", INT32),
        },
        dtypes=QUERY_DTYPES,
        cache=("num_pages page_size parts packed lanes", ("uint8",) if is_bytes else CACHE_DTYPES),
    )
    if is_bytes:
        _check_bytes(dims, arrays["kv_scale"])
    _check_sizes(dims, arrays["latent_pages"])
    return dims


def _check_sizes(dims: Mapping[str, int], pages: jax.Array) -> None:
    """Refuses sizes that the layout has no room for."""
    rank, rope = dims["kv_lora_rank"], dims["rope_dim"]
    packed = 4 // jnp.dtype(pages.dtype).itemsize
    part = packed * LANES
    if rope != ROPE_DIM:
        raise ValueError(f"rope_dim is {rope}, must be {ROPE_DIM}: use XLA_MLA_SPARSE for others")
    if rank % part:
        raise ValueError(
            f"kv_lora_rank is {rank}, must be a multiple of {part} with a {pages.dtype} cache: use "
            f"XLA_MLA_SPARSE for others"
        )
    wanted = (rank // part + 1, packed, LANES)
    if (dims["parts"], dims["packed"], dims["lanes"]) != wanted:
        raise ValueError(
            f"latent_pages has rows of {pages.shape[2:]}, must be {wanted}, a token of {rank} + "
            f"{rope}: convert the cache to layout 'tiled'"
        )


def _check_bytes(dims: Mapping[str, int], kv_scale: jax.Array | None) -> None:
    """Refuses what rows of fp8_ds_mla have no room for."""
    if dims["kv_lora_rank"] != fp8_ds_mla.KV_LORA_RANK:
        raise ValueError(
            f"kv_lora_rank is {dims['kv_lora_rank']}, must be {fp8_ds_mla.KV_LORA_RANK} with "
            f"kv_cache_dtype {fp8_ds_mla.NAME!r}: use a float8_e4m3fn cache and kv_scale for others"
        )
    if kv_scale is not None:
        raise ValueError(
            f"kv_scale is given, must be None with kv_cache_dtype {fp8_ds_mla.NAME!r}: its rows "
            f"carry their scales"
        )
