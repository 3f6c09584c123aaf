"""Arguments of the ops over a paged cache: held against their contracts, in the caller's words."""

from typing import Any

import jax
import jax.numpy as jnp

from attnsel_jax.cache_layouts import latent_layout_named, layout_named
from attnsel_jax.kv_cache import KVCache, LatentCache
from attnsel_jax.metadata import AttentionMetadata, check_is_batch
from pallas_kernels import fp8_ds_mla
from pallas_kernels.shape_checks import (
    CACHE_DTYPES,
    FLOAT32,
    FLOATS,
    INT32,
    Spec,
    check_arguments,
    check_groups,
    check_same_dtype,
)

_CACHE_AND_BATCH = ("num_pages", "page_size", "max_num_seqs", "pages_per_seq")
INDEX_DTYPES = (*FLOATS, "float8_e4m3fn", "float8_e5m2")
LATENT_DTYPES = (*INDEX_DTYPES, "uint8")


def check_paged(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    cache: KVCache,
    metadata: AttentionMetadata,
    per_head: dict[str, jax.Array | None],
) -> None:
    """Refuses what does not fit together.

    Args:
        q, k, v, cache, metadata: the call's.
        per_head: name -> float32 [num_heads], or None.

    Raises:
        TypeError: an argument is no array, or the cache or the batch of another class.
        ValueError: a rank, a dtype or a size that cannot be.
    """
    check_kind("cache", cache, KVCache, "allocate it with allocate_kv_cache, or wrap its array")
    check_given({"q": q, "cache.pages": cache.pages})
    _check_pair("k", k, "v", v)
    check_said(cache, "q", q)
    dims = check_arguments(
        {
            "q": (q, "num_tokens num_heads head_size", FLOATS),
            **kv_cache_table(cache),
            "k": (k, "num_tokens k_heads head_size", FLOATS),
            "v": (v, "num_tokens v_heads head_size", FLOATS),
            **_batch_table(metadata),
            **{name: (values, "num_heads", FLOAT32) for name, values in per_head.items()},
        }
    )
    check_groups(dims["num_heads"], dims["num_kv_heads"])
    check_new_heads(dims)
    check_same_dtype(q=q, k=k, v=v)
    check_not_empty(dims, "num_heads", "head_size", *_CACHE_AND_BATCH)
    _check_groups_divide(dims)


def check_latent(
    tokens: tuple[jax.Array | None, ...],
    topk_indices: jax.Array | None,
    cache: LatentCache,
    metadata: AttentionMetadata,
) -> None:
    """Refuses what does not fit together.

    Args:
        tokens: ql_nope, q_pe, kv_c, k_pe.
        topk_indices: of sparse MLA, else None.
        cache, metadata: the call's.

    Raises:
        TypeError: an argument is no array, or the cache or the batch of another class.
        ValueError: a rank, a dtype or a size that cannot be.
    """
    ql_nope, q_pe, kv_c, k_pe = tokens
    check_kind("cache", cache, LatentCache, "wrap its array: LatentCache(pages, kv_scale)")
    check_given({"ql_nope": ql_nope, "q_pe": q_pe, "cache.pages": cache.pages})
    _check_pair("kv_c", kv_c, "k_pe", k_pe)
    queries = {
        "ql_nope": (ql_nope, "num_tokens num_heads kv_lora_rank", FLOATS),
        "q_pe": (q_pe, "num_tokens num_heads rope_dim", FLOATS),
    }
    width = sum(check_arguments(queries)[name] for name in ("kv_lora_rank", "rope_dim"))
    dims = check_arguments(
        {
            **queries,
            "kv_c": (kv_c, "num_tokens kv_lora_rank", FLOATS),
            "k_pe": (k_pe, "num_tokens rope_dim", FLOATS),
            "topk_indices": (topk_indices, "num_tokens topk", INT32),
            **latent_table(cache, width),
            **_batch_table(metadata),
        }
    )
    check_same_dtype(ql_nope=ql_nope, q_pe=q_pe, kv_c=kv_c, k_pe=k_pe)
    check_not_empty(dims, "num_heads", "kv_lora_rank", "rope_dim", *_CACHE_AND_BATCH)
    _check_groups_divide(dims)


def check_indexer(
    q_index: jax.Array, weights: jax.Array, index_pages: jax.Array, metadata: AttentionMetadata
) -> None:
    """Refuses what does not fit together; arguments as of `indexer_scores`.

    Raises:
        TypeError: an argument is no array, or the batch of another class.
        ValueError: a rank, a dtype or a size that cannot be, or a batch that is not causal.
    """
    check_given({"q_index": q_index, "weights": weights, "index_pages": index_pages})
    dims = check_arguments(
        {
            "q_index": (q_index, "num_tokens num_index_heads index_head_dim", FLOATS),
            "weights": (weights, "num_tokens num_index_heads", FLOAT32),
            "index_pages": (index_pages, "num_pages page_size index_head_dim", INDEX_DTYPES),
            **_batch_table(metadata),
        }
    )
    if not metadata.causal:
        raise ValueError(
            "metadata.causal is False, must be True: the indexer scores what a query may see, "
            "which is nothing after it; build the batch with causal=True"
        )
    check_not_empty(dims, "num_index_heads", "index_head_dim", *_CACHE_AND_BATCH)
    _check_groups_divide(dims)


def kv_cache_table(cache: KVCache) -> dict[str, Spec]:
    """A cache's rows of the table, in the caller's words."""
    layout, shape = layout_named(cache.layout), cache.pages.shape
    _check_ndim(shape, len(layout.stride_order), cache.layout)
    *dims, stored = layout.dims(shape)
    head_size = stored if cache.head_size is None else cache.head_size
    if (wanted := layout.shape(*dims, head_size)) != shape:
        raise ValueError(
            f"cache.pages has shape {shape}, must be {wanted} in layout {cache.layout!r} with "
            f"head_size {head_size}: allocate it with allocate_kv_cache"
        )
    pages = jax.ShapeDtypeStruct((*dims, head_size), cache.pages.dtype)
    scales = {
        f"cache.{name}": (scale, "num_kv_heads" if getattr(scale, "ndim", 0) else "", FLOAT32)
        for name in ("k_scale", "v_scale")
        if (scale := getattr(cache, name)) is not None
    }
    return {"cache": (pages, "num_pages page_size num_kv_heads head_size", CACHE_DTYPES), **scales}


def check_said(cache: KVCache, name: str, array: jax.Array) -> None:
    """Refuses a cache that does not say that its heads are padded, where the array's fit it so.

    Args:
        cache: the call's.
        name, array: of q, k or v.
    """
    layout, shape, head_size = layout_named(cache.layout), cache.pages.shape, array.shape[-1:]
    if cache.head_size is not None or len(shape) != len(layout.stride_order) or not head_size:
        return
    *dims, stored = layout.dims(shape)
    if stored != head_size[0] and layout.shape(*dims, *head_size) == shape:
        raise ValueError(
            f"cache.head_size is None and its array has heads of {stored}, must be {head_size[0]} "
            f"(as in {name}): wrap it as KVCache(pages, ..., head_size={head_size[0]}), for layout "
            f"{cache.layout!r} pads heads"
        )


def latent_table(cache: LatentCache, width: int) -> dict[str, Spec]:
    """A latent cache's rows of the table; width: numbers of a latent and its rotary key."""
    is_bytes = cache.layout == "rows" and jnp.dtype(cache.pages.dtype) == jnp.uint8
    row = fp8_ds_mla.ROW_BYTES if is_bytes else width
    return {
        "cache.pages": (_logical(cache), f"num_pages page_size {row}", LATENT_DTYPES),
        "cache.kv_scale": (cache.kv_scale, "", FLOAT32),
    }


def _logical(cache: LatentCache) -> jax.Array | jax.ShapeDtypeStruct:
    """What stands for the cache's array in the table: rows of one token each."""
    layout, shape = latent_layout_named(cache.layout), cache.pages.shape
    if cache.layout == "rows":
        return cache.pages
    _check_ndim(shape, layout.ndim, cache.layout)
    dims, dtype = layout.dims(shape), jnp.dtype(cache.pages.dtype)
    if dtype == jnp.uint8 and cache.layout == "striped":
        raise ValueError("cache.layout is 'striped', must be 'rows' or 'tiled' with fp8_ds_mla")
    if cache.layout in ("striped", "tiled") and layout.shape(*dims, dtype.itemsize) != shape:
        raise ValueError(
            f"cache.pages has shape {shape}, must be {layout.shape(*dims, dtype.itemsize)} in "
            f"layout {cache.layout!r} with {dtype.name}: allocate it with allocate_latent_cache"
        )
    return jax.ShapeDtypeStruct(dims, dtype)


def _check_ndim(shape: tuple[int, ...], ndim: int, layout: str) -> None:
    """Refuses a cache's array that has not as many dimensions as its layout."""
    if len(shape) != ndim:
        raise ValueError(
            f"cache.pages has {len(shape)} dimensions {shape}, must have {ndim} in layout "
            f"{layout!r}"
        )


def _batch_table(metadata: AttentionMetadata) -> dict[str, Spec]:
    """The batch's rows of the table, in its own words."""
    check_is_batch(metadata)
    names = ("page_table", "kv_lens", "cu_q_lens", "num_seqs")
    check_given({f"metadata.{name}": getattr(metadata, name) for name in names})
    rows = metadata.kv_lens.shape
    groups = metadata.num_seqs.shape[0] if metadata.num_seqs.ndim == 1 else None
    starts = str(sum(rows[:1]) + (groups or 1)).replace(" ", "")  # a symbolic one is "n + 1"
    return {
        "metadata.page_table": (metadata.page_table, "max_num_seqs pages_per_seq", INT32),
        "metadata.kv_lens": (metadata.kv_lens, "max_num_seqs", INT32),
        "metadata.cu_q_lens": (metadata.cu_q_lens, starts, INT32),
        "metadata.num_seqs": (metadata.num_seqs, "groups" if groups else "", INT32),
        "metadata.slot_mapping": (metadata.slot_mapping, "num_tokens", INT32),
    }


def check_new_heads(dims: dict[str, int]) -> None:
    """Refuses keys and values of this step that cannot be repeated to the cache's heads."""
    cached, k_heads = dims["num_kv_heads"], dims.get("k_heads")
    if k_heads is not None and (k_heads < 1 or cached % k_heads):
        raise ValueError(
            f"k has num_kv_heads {k_heads}, must be {cached} (as in cache), or a divisor of it: "
            f"each of k's heads is then repeated in the cache"
        )
    if k_heads != dims.get("v_heads"):
        raise ValueError(f"v has num_kv_heads {dims.get('v_heads')}, must be {k_heads} (as in k)")


def _check_groups_divide(dims: dict[str, int]) -> None:
    """Refuses a batch of groups whose sizes are not theirs times a number."""
    for name in ("num_tokens", "max_num_seqs"):
        if dims[name] % dims.get("groups", 1):
            raise ValueError(
                f"{name} is {dims[name]}, must be a multiple of {dims['groups']}, the groups of "
                f"the batch: each has as many"
            )


def check_kind(name: str, value: Any, kind: type, hint: str) -> None:
    """Refuses another class; hint: the way out."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {type(value).__name__}, must be {kind.__name__}: {hint}")


def check_given(arrays: dict[str, Any]) -> None:
    """Refuses what is no array, by name."""
    for name, array in arrays.items():
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise TypeError(
                f"{name} is {type(array).__name__}, must be an array: convert it with jnp.asarray"
            )


def _check_pair(first: str, a: Any, second: str, b: Any) -> None:
    if (a is None) != (b is None):
        missing, given = (first, second) if a is None else (second, first)
        raise ValueError(
            f"{missing} is None and {given} is given, must be both or neither: both are written to "
            f"the cache, or nothing is"
        )


def check_not_empty(dims: dict[str, int], *names: str) -> None:
    """Refuses sizes of 0."""
    for name in names:
        if dims[name] < 1:
            raise ValueError(f"{name} is {dims[name]}, must be at least 1")
