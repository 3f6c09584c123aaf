"""Arguments of the calls that fill caches without attention, held against what they say."""

from typing import Any

import jax

from attnsel_jax.cache_layouts import HALF_LANES
from attnsel_jax.kv_cache import KVCache, LatentCache
from attnsel_jax.ops.ragged_arguments import (
    INDEX_DTYPES,
    check_given,
    check_kind,
    check_new_heads,
    check_not_empty,
    check_said,
    kv_cache_table,
    latent_table,
)
from attnsel_jax.registered_layouts import BUILT_IN
from pallas_kernels import fp8_ds_mla
from pallas_kernels.shape_checks import FLOATS, INT32, Spec, check_arguments, check_same_dtype


def check_kv_rows(k: jax.Array, v: jax.Array, cache: KVCache, slot_mapping: jax.Array) -> None:
    """Refuses what does not fit together; arguments as of `write_kv_cache`.

    Raises:
        TypeError: an argument is no array, or the cache of another class.
        ValueError: a rank, a dtype or a size that cannot be.
    """
    check_kind("cache", cache, KVCache, "allocate it with allocate_kv_cache, or wrap its array")
    check_given({"cache.pages": cache.pages, "k": k, "v": v, "slot_mapping": slot_mapping})
    check_said(cache, "k", k)
    dims = check_arguments(
        {
            **kv_cache_table(cache),
            "k": (k, "num_tokens k_heads head_size", FLOATS),
            "v": (v, "num_tokens v_heads head_size", FLOATS),
            "slot_mapping": (slot_mapping, "num_tokens", INT32),
        }
    )
    check_not_empty(dims, "num_kv_heads", "head_size", "num_pages", "page_size")
    check_new_heads(dims)
    check_same_dtype(k=k, v=v)


def check_latent_rows(
    kv_c: jax.Array, k_pe: jax.Array, cache: LatentCache, slot_mapping: jax.Array
) -> None:
    """Refuses what does not fit together; arguments as of `write_latent_cache`.

    Raises:
        TypeError: an argument is no array, or the cache of another class.
        ValueError: a rank, a dtype or a size that cannot be.
    """
    check_kind("cache", cache, LatentCache, "wrap its array: LatentCache(pages, kv_scale)")
    given = {"kv_c": kv_c, "k_pe": k_pe, "slot_mapping": slot_mapping}
    check_given({"cache.pages": cache.pages, **given})
    rows: dict[str, Spec] = {
        "kv_c": (kv_c, "num_tokens kv_lora_rank", FLOATS),
        "k_pe": (k_pe, "num_tokens rope_dim", FLOATS),
    }
    dims = check_arguments(rows)
    sizes = dims["kv_lora_rank"], dims["rope_dim"]
    wanted = fp8_ds_mla.KV_LORA_RANK, fp8_ds_mla.ROPE_DIM
    if cache.kv_cache_dtype == fp8_ds_mla.NAME and sizes != wanted:
        raise ValueError(
            f"kv_lora_rank and rope_dim are {sizes}, must be {wanted} in a cache of fp8_ds_mla: "
            f"use a float8_e4m3fn cache and kv_scale for other sizes"
        )
    if cache.layout in ("striped", "tiled") and sizes[1] != HALF_LANES:
        raise ValueError(
            f"rope_dim is {sizes[1]}, must be {HALF_LANES} in layout {cache.layout!r}: use layout "
            f"'rows'"
        )
    table = latent_table(cache, sum(sizes))
    slots = {"slot_mapping": (slot_mapping, "num_tokens", INT32)}
    dims = check_arguments({**rows, **table, **slots})
    check_same_dtype(kv_c=kv_c, k_pe=k_pe)
    check_not_empty(dims, "kv_lora_rank", "rope_dim", "num_pages", "page_size")


def check_index_rows(index_pages: jax.Array, k_index: jax.Array, slot_mapping: jax.Array) -> None:
    """Refuses what does not fit together; arguments as of `write_index_keys`.

    Raises:
        TypeError: an argument is no array.
        ValueError: a rank, a dtype or a size that cannot be.
    """
    table = {
        "index_pages": (index_pages, "num_pages page_size index_head_dim", INDEX_DTYPES),
        "k_index": (k_index, "num_tokens index_head_dim", FLOATS),
        "slot_mapping": (slot_mapping, "num_tokens", INT32),
    }
    dims = check_arguments(table, required=tuple(table))
    check_not_empty(dims, "num_pages", "page_size", "index_head_dim")


def check_cache(cache: Any) -> None:
    """Refuses what is neither a whole cache nor an indexer's pages.

    Raises:
        TypeError: it is no array.
        ValueError: a rank, a dtype or a size that cannot be, or pages that nobody can find.
    """
    if isinstance(cache, KVCache):
        check_given({"cache.pages": cache.pages})
        table = kv_cache_table(cache)
    elif isinstance(cache, LatentCache):
        check_given({"cache.pages": cache.pages})
        if cache.layout not in BUILT_IN:
            raise ValueError(
                f"cache.layout is {cache.layout!r}, must be one of rows, striped, tiled: use "
                f"cache.converted"
            )
        pages, _, dtypes = latent_table(cache, 0)["cache.pages"]
        table = {"cache.pages": (pages, "num_pages page_size row", dtypes)}
    else:
        table = {"cache": (cache, "num_pages page_size index_head_dim", INDEX_DTYPES)}
    dims = check_arguments(table, required=("cache",))
    check_not_empty(dims, *dims)
