"""What the latent kernels for Hopper take: the contract's arguments, within limits of theirs."""

from collections.abc import Mapping

import jax

from pallas_kernels import fp8_ds_mla, gpu_chip
from pallas_kernels.contract_checks import Kind, check_latents

DTYPES = ("bfloat16", "float16")
FP8_DTYPES = ("float8_e4m3fn", "float8_e5m2")
CACHE_DTYPES = (*DTYPES, *FP8_DTYPES)
PAGE_SIZES = (16, 32, 64, 128, 256)
ROPE_DIM = 64  # columns that weights of 64 keys fill
RANKS = (128, 256, 384, 512)  # halves of whole 128-byte rows; an accumulator holds 256


def check_latent(
    arrays: Mapping[str, jax.Array | None],
    kv_cache_dtype: str | None,
    more: Mapping[str, Kind] | None = None,
    *,
    takes_bytes: bool = False,
) -> dict[str, int]:
    """Refuses what the contract, or a latent kernel on Hopper, does not take.

    Args:
        arrays: the op's array arguments by name.
        kv_cache_dtype: None, or "fp8_ds_mla" where that is taken.
        more: what only this op has.
        takes_bytes: whether the op takes fp8_ds_mla.

    Returns:
        Dimension name -> size.

    Raises:
        ValueError: something is not allowed; the message says what is.
    """
    is_bytes = kv_cache_dtype == fp8_ds_mla.NAME and takes_bytes
    if kv_cache_dtype is not None and not is_bytes:
        raise ValueError(
            f"kv_cache_dtype is {kv_cache_dtype!r}, must be "
            f"{f'{fp8_ds_mla.NAME!r} or ' if takes_bytes else ''}None: any other cache says its "
            f"dtype itself{'' if takes_bytes else '; use XLA_MLA for fp8_ds_mla'}"
        )
    if is_bytes and arrays["kv_scale"] is not None:
        raise ValueError(
            f"kv_scale is given, must be None with kv_cache_dtype {fp8_ds_mla.NAME!r}: its rows "
            f"carry their own scales"
        )
    check_chip("XLA_MLA")
    queries = {
        "ql_nope": ("num_tokens num_q_heads kv_lora_rank", DTYPES),
        "q_pe": ("num_tokens num_q_heads rope_dim", DTYPES),
    }
    cache = ("num_pages page_size row", ("uint8",) if is_bytes else CACHE_DTYPES)
    dims = check_latents(arrays, queries | dict(more or {}), dtypes=DTYPES, cache=cache)
    _check_sizes(dims, is_bytes)
    _check_cache(arrays["latent_pages"].dtype.name, arrays["ql_nope"].dtype.name)
    return dims


def check_chip(instead: str) -> None:
    """Refuses a chip that is no Hopper, and names the backend to use instead."""
    capability = gpu_chip.current().capability
    if capability != (9, 0):
        raise ValueError(
            "compute_capability is {}.{}, must be 9.0: use {}".format(*capability, instead)
        )


def _check_sizes(dims: Mapping[str, int], is_bytes: bool) -> None:
    """Refuses sizes that the kernels have no room for."""
    rank, rope, page_size = dims["kv_lora_rank"], dims["rope_dim"], dims["page_size"]
    if rope != ROPE_DIM:
        raise ValueError(f"rope_dim is {rope}, must be {ROPE_DIM}: use XLA_MLA for others")
    ranks, row = (
        ((fp8_ds_mla.KV_LORA_RANK,), fp8_ds_mla.ROW_BYTES) if is_bytes else (RANKS, rank + rope)
    )
    if rank not in ranks:
        raise ValueError(
            f"kv_lora_rank is {rank}, must be one of {', '.join(map(str, ranks))}: use XLA_MLA for "
            f"others"
        )
    if dims["row"] != row:
        raise ValueError(
            f"latent_pages has rows of {dims['row']}, must be {row}: kv_lora_rank {rank} and "
            f"rope_dim {rope}, the latent first"
        )
    if page_size not in PAGE_SIZES:
        raise ValueError(
            f"page_size is {page_size}, must be one of {', '.join(map(str, PAGE_SIZES))}"
        )


def _check_cache(cache_dtype: str, dtype: str) -> None:
    """Refuses a cache of the other 16-bit dtype: no product of the two exists."""
    if cache_dtype in DTYPES and cache_dtype != dtype:
        raise ValueError(
            f"latent_pages has dtype {cache_dtype}, must be {dtype} as the queries, or one of "
            f"{', '.join(FP8_DTYPES)}"
        )
