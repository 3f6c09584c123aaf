"""What the latent kernels for TPU take: the contract's arguments, within limits of theirs."""

from collections.abc import Mapping

import jax

from pallas_kernels.contract_checks import check_latents
from pallas_kernels.tpu_chip import LANES

QUERY_DTYPES = ("float32", "bfloat16")
CACHE_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2")
PAGE_SIZES = (64, 128, 256)
ROPE_DIM = 64  # two of them fill a register
LARGEST_RANK = 896  # a row and its rotary keys fill a register of 8 x 128


def check_striped(
    arrays: Mapping[str, jax.Array | None], kv_cache_dtype: str | None
) -> dict[str, int]:
    """Refuses what the contract, or a kernel over a striped cache, does not take.

    Args:
        arrays: the op's array arguments by name.
        kv_cache_dtype: must be None: the rows of fp8_ds_mla are another layout.

    Returns:
        Dimension name -> size.

    Raises:
        ValueError: something is not allowed; the message says what is.
    """
    if kv_cache_dtype is not None:
        raise ValueError(
            f"kv_cache_dtype is {kv_cache_dtype!r}, must be None: this kernel takes a cache whose "
            f"dtype says all; use XLA_MLA for fp8_ds_mla"
        )
    dims = check_latents(
        arrays,
        {
            "ql_nope": ("num_tokens num_q_heads kv_lora_rank", QUERY_DTYPES),
            "q_pe": ("num_tokens num_q_heads rope_dim", QUERY_DTYPES),
        },
        dtypes=QUERY_DTYPES,
        cache=("num_pages parts half_page lanes", CACHE_DTYPES),
    )
    _check_sizes(dims)
    return dims


def _check_sizes(dims: Mapping[str, int]) -> None:
    """Refuses sizes that the layout or the kernels have no room for."""
    rank, rope, page_size = dims["kv_lora_rank"], dims["rope_dim"], 2 * dims["half_page"]
    if rope != ROPE_DIM:
        raise ValueError(f"rope_dim is {rope}, must be {ROPE_DIM}: use XLA_MLA for others")
    if rank % LANES or rank > LARGEST_RANK:
        raise ValueError(
            f"kv_lora_rank is {rank}, must be a multiple of {LANES}, at most {LARGEST_RANK}: use "
            f"XLA_MLA for others"
        )
    parts = 2 * rank // LANES + 1
    if (dims["parts"], dims["lanes"]) != (parts, LANES):
        raise ValueError(
            f"latent_pages has {dims['parts']} parts of {dims['lanes']} lanes a page, must be "
            f"{parts} of {LANES} for {rank} + {rope}: convert the cache to layout 'striped'"
        )
    if page_size not in PAGE_SIZES:
        raise ValueError(
            f"page_size is {page_size}, must be one of {', '.join(map(str, PAGE_SIZES))}"
        )
