"""Arguments of each op against its contract: what every lowering refuses alike.

    dims = check_paged(arrays, dtypes=("bfloat16",), cache=("pages heads rows lanes", CACHES))

A lowering says which dtypes it takes and how its cache lies; what only it cannot do, it refuses
itself, by the sizes that come back. `shape_checks` does the comparing.
"""

from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp

from pallas_kernels import masks
from pallas_kernels.empty_calls import MAY_BE_EMPTY
from pallas_kernels.shape_checks import (
    BOOL,
    FLOAT32,
    FLOATS,
    INT32,
    check_arguments,
    check_groups,
    check_positive,
    check_same_dtype,
)

Arrays = Mapping[str, jax.Array | None]
Kind = tuple[str, Collection[str]]  # dimension names, allowed dtype names

BATCH: dict[str, Kind] = {  # of a ragged batch, beside cu_q_lens
    "page_table": ("max_num_seqs pages_per_seq", INT32),
    "kv_lens": ("max_num_seqs", INT32),
    "num_seqs": ("", INT32),
}
OF_DENSE: dict[str, Kind] = {
    "bias": ("~batch ~num_q_heads ~q_len ~kv_len", FLOATS),
    "mask": ("~batch ~num_q_heads ~q_len ~kv_len", BOOL),
    "alibi_slopes": ("num_q_heads", FLOAT32),
    "sinks": ("num_q_heads", FLOAT32),
    "q_segment_ids": ("batch q_len", INT32),
    "kv_segment_ids": ("batch kv_len", INT32),
    "q_lens": ("batch", INT32),
    "kv_lens": ("batch", INT32),
}


def check_dense(arrays: Arrays, dtypes: Collection[str]) -> dict[str, int]:
    """Refuses what the contract of dense attention does not allow.

    Args:
        arrays: q, k, v and any of the contract's other arrays, q_offset left out; None = not given.
        dtypes: of q, k and v.

    Returns:
        Dimension name -> size: batch, q_len, kv_len, num_q_heads, num_kv_heads, head_dim,
        head_dim_v.

    Raises:
        TypeError: an argument is no array.
        ValueError: a shape or dtype is not the contract's, or q, k or v is None.
    """
    segments = [arrays.get(name) for name in ("q_segment_ids", "kv_segment_ids")]
    if sum(ids is None for ids in segments) == 1:
        raise ValueError(
            "q_segment_ids and kv_segment_ids: one is given and one is None, must be both or "
            "neither: give each token of q and of k the id of its segment"
        )
    kinds = {
        "q": ("batch q_len num_q_heads head_dim", dtypes),
        "k": ("batch kv_len num_kv_heads head_dim", dtypes),
        "v": ("batch kv_len num_kv_heads head_dim_v", dtypes),
    }
    dims = _checked(arrays, kinds | OF_DENSE, required=kinds)
    check_same_dtype(**{name: arrays[name] for name in kinds})
    check_groups(dims["num_q_heads"], dims["num_kv_heads"])
    return dims


def check_offset(q_offset: int | jax.Array, batch: int) -> jax.Array:
    """q_offset of dense attention as an array; refuses what is no integer, or not one a row."""
    if isinstance(q_offset, int) and abs(q_offset) > masks.FARTHEST:
        raise ValueError(
            f"q_offset is {q_offset}, must be {-masks.FARTHEST} to {masks.FARTHEST}: positions are "
            f"int32, and are added to it"
        )
    offset = jnp.asarray(q_offset)
    if not jnp.issubdtype(offset.dtype, jnp.integer) or offset.shape not in ((), (1,), (batch,)):
        raise ValueError(
            f"q_offset is {offset.dtype.name}{list(offset.shape)}, must be an integer, or int32 [] "
            f"or [{batch}] (batch): the position of query 0"
        )
    return offset


def existing(lens: jax.Array | None, length: int) -> jax.Array | None:
    """Lengths of dense attention held to the array that they count in; None stays.

    Kernels derive from them which tiles to visit: past the array, these would be read again.
    """
    return None if lens is None else jnp.clip(lens, 0, length)


def check_sizes(dims: Mapping[str, int]) -> None:
    """Refuses nothing where there must be something; a call may lack queries, or keys."""
    for name, size in dims.items():
        if size < 1 and name not in MAY_BE_EMPTY:
            raise ValueError(
                f"{name} is {size}, must be at least 1: only {', '.join(MAY_BE_EMPTY)} may be 0"
            )


def check_logit_numbers(
    soft_cap: float | None,
    attention_chunk_size: int | None = None,
    sliding_window: masks.Window = None,
) -> None:
    """Refuses static numbers that are given and not above zero, or farther than positions go."""
    check_positive("soft_cap", soft_cap)
    sizes = [("sliding_window", side) for side in masks.window_bounds(sliding_window)]
    for name, size in (("attention_chunk_size", attention_chunk_size), *sizes):
        check_positive(name, size)
        if size is not None and size > masks.FARTHEST:
            raise ValueError(f"{name} is {size}, must be at most {masks.FARTHEST}, or None for all")


def check_paged(arrays: Arrays, *, dtypes: Collection[str], cache: Kind) -> dict[str, int]:
    """Refuses what the contract of paged attention does not allow.

    Args:
        arrays: every array of the contract; None = not given.
        dtypes: of q, k and v.
        cache: dimensions and dtypes of kv_pages; they name num_pages, num_kv_heads and page_size.

    Returns:
        Dimension name -> size.

    Raises:
        TypeError: an argument is no array.
        ValueError: a shape or dtype is not the contract's, a required argument is None, or some of
            k, v and slot_mapping are given and some are not.
    """
    _check_all_or_none(arrays, ("k", "v", "slot_mapping"))
    kinds = {
        "q": ("num_tokens num_q_heads head_dim", dtypes),
        "kv_pages": cache,
        "k": ("num_tokens num_kv_heads head_dim", dtypes),
        "v": ("num_tokens num_kv_heads head_dim", dtypes),
        "slot_mapping": ("num_tokens", INT32),
        "alibi_slopes": ("num_q_heads", FLOAT32),
        "sinks": ("num_q_heads", FLOAT32),
    }
    for name in ("k_scale", "v_scale"):
        kinds[name] = ("num_kv_heads" if getattr(arrays[name], "ndim", 0) else "", FLOAT32)
    dims = _of_batch(arrays, kinds, required=("q", "kv_pages"))
    check_groups(dims["num_q_heads"], dims["num_kv_heads"])
    check_same_dtype(**{name: arrays[name] for name in "qkv"})
    return dims


def check_latents(
    arrays: Arrays, queries: Mapping[str, Kind], *, dtypes: Collection[str], cache: Kind
) -> dict[str, int]:
    """Refuses what the contracts of ops on a latent cache do not allow.

    Args:
        arrays: the op's arrays: those that every such op has, and those in queries.
        queries: dimensions and dtypes of what only this op has; they name kv_lora_rank, rope_dim.
        dtypes: of kv_c and k_pe, and of those of the queries that have the same in their kind.
        cache: dimensions and dtypes of latent_pages.

    Returns:
        Dimension name -> size.

    Raises:
        TypeError: an argument is no array.
        ValueError: a shape or dtype is not the contract's, a required argument is None, or some of
            kv_c, k_pe and slot_mapping are given and some are not.
    """
    _check_all_or_none(arrays, ("kv_c", "k_pe", "slot_mapping"))
    kinds = {
        **queries,
        "kv_c": ("num_tokens kv_lora_rank", dtypes),
        "k_pe": ("num_tokens rope_dim", dtypes),
        "latent_pages": cache,
        "slot_mapping": ("num_tokens", INT32),
        "kv_scale": ("", FLOAT32),
    }
    dims = _of_batch(arrays, kinds, required=(*queries, "latent_pages"))
    alike = (name for name, (_, of_this) in kinds.items() if of_this == dtypes)
    check_same_dtype(**{name: arrays[name] for name in alike if name != "latent_pages"})
    return dims


def check_indexer(
    arrays: Arrays, *, dtypes: Collection[str], key_dtypes: Collection[str]
) -> dict[str, int]:
    """Refuses what the contract of the indexer's scores does not allow; sizes by name.

    Raises:
        TypeError: an argument is no array.
        ValueError: a shape or dtype is not the contract's, or an argument is None.
    """
    kinds = {
        "q_index": ("num_tokens num_index_heads index_head_dim", dtypes),
        "weights": ("num_tokens num_index_heads", FLOAT32),
        "index_pages": ("num_pages page_size index_head_dim", key_dtypes),
    }
    return _of_batch(arrays, kinds, required=kinds)


def _check_all_or_none(arrays: Arrays, names: Collection[str]) -> None:
    """Refuses some of what this step writes without the rest."""
    missing = [name for name in names if arrays[name] is None]
    if missing and len(missing) < len(names):
        given = [name for name in names if name not in missing]
        raise ValueError(
            f"{' and '.join(missing)} is None, must be given with {' and '.join(given)}: give all "
            f"of {', '.join(names)} to have them written, or none"
        )


def _of_batch(arrays, kinds: Mapping[str, Kind], required: Collection[str]) -> dict[str, int]:
    """Sizes of an op on a ragged batch over pages."""
    dims = _checked(arrays, {**kinds, **BATCH}, required=(*required, *BATCH))
    starts = {"cu_q_lens": (arrays["cu_q_lens"], "one_more", INT32)}
    found = check_arguments(starts, required=starts)["one_more"]
    if found != dims["max_num_seqs"] + 1:
        raise ValueError(
            f"cu_q_lens has {found} entries, must have {dims['max_num_seqs'] + 1}, one more than "
            f"kv_lens: it starts with 0 and ends with the number of tokens"
        )
    return dims


def _checked(arrays, kinds: Mapping[str, Kind], required: Collection[str]) -> dict[str, int]:
    table = {name: (arrays.get(name), *kind) for name, kind in kinds.items()}
    dims = check_arguments(table, required=required)
    check_sizes(dims)
    return dims
