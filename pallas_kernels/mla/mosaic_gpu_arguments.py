"""What the latent kernels for Hopper take: the contract's arguments, within limits of theirs."""

from collections.abc import Mapping

import jax

from pallas_kernels import gpu_chip
from pallas_kernels.shape_checks import FLOAT32, INT32, Spec, check_arguments, check_same_dtype

FP8_DS_MLA, FP8_DS_MLA_BYTES = "fp8_ds_mla", 656
DTYPES = ("bfloat16", "float16")
FP8_DTYPES = ("float8_e4m3fn", "float8_e5m2")
CACHE_DTYPES = (*DTYPES, *FP8_DTYPES)
PAGE_SIZES = (16, 32, 64, 128, 256)
ROPE_DIM = 64  # columns that weights of 64 keys fill
RANKS = (128, 256, 384, 512)  # halves of whole 128-byte rows; an accumulator holds 256


def check_latent(
    arrays: Mapping[str, jax.Array | None],
    kv_cache_dtype: str | None,
    more: Mapping[str, Spec] | None = None,
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
    is_bytes = kv_cache_dtype == FP8_DS_MLA and takes_bytes
    if kv_cache_dtype is not None and not is_bytes:
        raise ValueError(
            f"kv_cache_dtype is {kv_cache_dtype!r}, must be "
            f"{f'{FP8_DS_MLA!r} or ' if takes_bytes else ''}None: any other cache says its dtype "
            f"itself{'' if takes_bytes else '; use XLA_MLA for fp8_ds_mla'}"
        )
    if is_bytes and arrays["kv_scale"] is not None:
        raise ValueError(
            f"kv_scale is given, must be None with kv_cache_dtype {FP8_DS_MLA!r}: its rows carry "
            f"their own scales"
        )
    check_chip("XLA_MLA")
    missing = [name for name in ("kv_c", "k_pe", "slot_mapping") if arrays[name] is None]
    if len(missing) in (1, 2):
        raise ValueError(
            f"{' and '.join(missing)} is None, must be given with the rest of kv_c, k_pe and "
            f"slot_mapping: all are given to write this step's rows, or none"
        )
    dims = check_arguments(_table(arrays, is_bytes) | dict(more or {}))
    check_arguments({"cu_q_lens": (arrays["cu_q_lens"], str(dims["max_num_seqs"] + 1), INT32)})
    check_same_dtype(**{name: arrays[name] for name in ("ql_nope", "q_pe", "kv_c", "k_pe")})
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


def _table(arrays, is_bytes: bool) -> dict[str, Spec]:
    """Every argument that the ops share, with its dimensions and dtypes."""
    specs = {
        "ql_nope": ("num_tokens num_q_heads kv_lora_rank", DTYPES),
        "q_pe": ("num_tokens num_q_heads rope_dim", DTYPES),
        "kv_c": ("num_tokens kv_lora_rank", DTYPES),
        "k_pe": ("num_tokens rope_dim", DTYPES),
        "latent_pages": ("num_pages page_size row", ("uint8",) if is_bytes else CACHE_DTYPES),
        "page_table": ("max_num_seqs pages_per_seq", INT32),
        "kv_lens": ("max_num_seqs", INT32),
        "num_seqs": ("", INT32),
        "slot_mapping": ("num_tokens", INT32),
        "kv_scale": ("", FLOAT32),
    }
    return {name: (arrays[name], *spec) for name, spec in specs.items()}


def _check_sizes(dims: Mapping[str, int], is_bytes: bool) -> None:
    """Refuses sizes that the kernels have no room for."""
    rank, rope, page_size = dims["kv_lora_rank"], dims["rope_dim"], dims["page_size"]
    if rope != ROPE_DIM:
        raise ValueError(f"rope_dim is {rope}, must be {ROPE_DIM}: use XLA_MLA for others")
    ranks, row = ((512,), FP8_DS_MLA_BYTES) if is_bytes else (RANKS, rank + rope)
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
