"""What sparse MLA on TPU takes: the contract's arguments, within limits of its cache's layout."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.mla.mosaic_tpu_arguments import CACHE_DTYPES, QUERY_DTYPES, ROPE_DIM
from pallas_kernels.mla.mosaic_tpu_arguments import quantised as quantised
from pallas_kernels.shape_checks import FLOAT32, INT32, Spec, check_arguments, check_same_dtype
from pallas_kernels.tpu_chip import LANES


def check_tiled(
    arrays: Mapping[str, jax.Array | None], kv_cache_dtype: str | None
) -> dict[str, int]:
    """Refuses what the contract, or a kernel over a tiled cache, does not take.

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
            f"dtype says all; use XLA_MLA_SPARSE for fp8_ds_mla"
        )
    missing = [name for name in ("kv_c", "k_pe", "slot_mapping") if arrays[name] is None]
    if len(missing) in (1, 2):
        raise ValueError(
            f"{' and '.join(missing)} is None, must be given with the rest of kv_c, k_pe and "
            f"slot_mapping: all are given to write this step's rows, or none"
        )
    dims = check_arguments(_table(arrays))
    check_arguments({"cu_q_lens": (arrays["cu_q_lens"], str(dims["max_num_seqs"] + 1), INT32)})
    check_same_dtype(**{name: arrays[name] for name in ("ql_nope", "q_pe", "kv_c", "k_pe")})
    _check_sizes(dims, arrays["latent_pages"])
    return dims


def _table(arrays) -> dict[str, Spec]:
    """Every argument with its dimensions and dtypes."""
    specs = {
        "ql_nope": ("num_tokens num_q_heads kv_lora_rank", QUERY_DTYPES),
        "q_pe": ("num_tokens num_q_heads rope_dim", QUERY_DTYPES),
        "kv_c": ("num_tokens kv_lora_rank", QUERY_DTYPES),
        "k_pe": ("num_tokens rope_dim", QUERY_DTYPES),
        "latent_pages": ("num_pages page_size parts packed lanes", CACHE_DTYPES),
        "topk_indices": ("num_tokens topk", INT32),
        "page_table": ("max_num_seqs pages_per_seq", INT32),
        "kv_lens": ("max_num_seqs", INT32),
        "num_seqs": ("", INT32),
        "slot_mapping": ("num_tokens", INT32),
        "kv_scale": ("", FLOAT32),
    }
    return {name: (arrays[name], *spec) for name, spec in specs.items()}


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
