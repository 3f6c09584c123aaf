"""Caches filled without attention: keys made elsewhere, an encoder's, an indexer's; pages copied.

The attention ops write what their own step made. These are for the rest: keys of cross attention,
which every later call only reads; a prefix that another machine computed; index keys; a prompt
whose attention ran over keys and values of every head. Inside `jit`, donate the cache, and it is
updated in place. Over a mesh each device fills its own share.
"""

import functools
from typing import Any

import jax

from attnsel_jax.kv_cache import KVCache, LatentCache
from attnsel_jax.mesh import MeshAxes, Plan, filled, plan_call
from attnsel_jax.mesh.dimensions import page_axis
from attnsel_jax.ops.calls import as_array
from attnsel_jax.ops.ragged_arguments import INDEX_DTYPES, check_kv_rows, check_latent_rows
from pallas_kernels.jax_settings import under_own_settings
from pallas_kernels.shape_checks import FLOATS, INT32, check_arguments
from pallas_kernels.stored_values import quantise


def write_kv_cache(
    cache: KVCache,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array,
    *,
    mesh_axes: MeshAxes | None = None,
) -> KVCache:
    """The cache with keys and values put at slots, stored as `paged_attention` stores them.

    Args:
        cache: in any layout; one that a third party registered is converted there and back.
        k, v: [num_tokens, num_kv_heads, head_size], true values; heads as many as the cache's, or a
            divisor of it, each then repeated.
        slot_mapping: int32 [num_tokens]: page * page_size + offset, as in `AttentionMetadata`;
            outside the cache (-1) = written nowhere. Where two tokens name one slot, either wins.
        mesh_axes: as in `paged_attention`.

    Raises:
        TypeError: an argument that is no array, or a cache of another class.
        ValueError: arguments that do not fit together.
    """
    check_kv_rows(k, v, cache, slot_mapping)
    arrays = {
        "k": k, "v": v, "kv_pages": cache.pages, "slot_mapping": slot_mapping,
        "k_scale": cache.k_scale, "v_scale": cache.v_scale,
    }  # fmt: skip
    return cache.with_pages(_fill("write_kv", arrays, mesh_axes, cache.layout))


def write_latent_cache(
    cache: LatentCache,
    kv_c: jax.Array,
    k_pe: jax.Array,
    slot_mapping: jax.Array,
    *,
    mesh_axes: MeshAxes | None = None,
) -> LatentCache:
    """The cache with latents put at slots, stored as `mla_attention` stores them.

    Args:
        cache: in any layout, `fp8_ds_mla` too.
        kv_c, k_pe: [num_tokens, kv_lora_rank], [num_tokens, rope_dim], true values.
        slot_mapping, mesh_axes: as in `write_kv_cache`.

    Raises:
        TypeError, ValueError: as `write_kv_cache`.
    """
    check_latent_rows(kv_c, k_pe, cache, slot_mapping)
    arrays = {
        "kv_c": kv_c, "k_pe": k_pe, "latent_pages": cache.pages, "slot_mapping": slot_mapping,
        "kv_scale": cache.kv_scale,
    }  # fmt: skip
    return cache.with_pages(_fill("write_latents", arrays, mesh_axes, cache.layout))


def write_index_keys(
    index_pages: jax.Array,
    k_index: jax.Array,
    slot_mapping: jax.Array,
    *,
    mesh_axes: MeshAxes | None = None,
) -> jax.Array:
    """The keys that `indexer_scores` reads, put at slots.

    Args:
        index_pages: [num_pages, page_size, index_head_dim].
        k_index: [num_tokens, index_head_dim]; saturated and rounded to index_pages' dtype.
        slot_mapping, mesh_axes: as in `write_kv_cache`.

    Raises:
        TypeError, ValueError: as `write_kv_cache`.
    """
    check_arguments(
        {
            "index_pages": (index_pages, "num_pages page_size index_head_dim", INDEX_DTYPES),
            "k_index": (k_index, "num_tokens index_head_dim", FLOATS),
            "slot_mapping": (slot_mapping, "num_tokens", INT32),
        },
        required=("index_pages", "k_index", "slot_mapping"),
    )
    arrays = {"k_index": k_index, "index_pages": index_pages, "slot_mapping": slot_mapping}
    return _fill("write_index_keys", arrays, mesh_axes, "rows")


def copy_pages(
    cache: KVCache | LatentCache | jax.Array,
    source: jax.Array,
    target: jax.Array,
    *,
    mesh_axes: MeshAxes | None = None,
) -> KVCache | LatentCache | jax.Array:
    """The cache with page source[i], as it was before the call, in place of page target[i].

    For beam search, and for a shared page that one of its sequences is about to write.

    Args:
        cache: any; or an indexer's pages [num_pages, page_size, index_head_dim].
        source, target: int32 [n]. Where one of both is outside the cache (-1), nothing is copied.
            Where two copies name one target, either wins.
        mesh_axes: as in `paged_attention`; heads may be cut, pages not.

    Raises:
        TypeError: an argument that is no array.
        ValueError: ids of another shape or dtype, or pages that lie on several devices.
    """
    is_cache = isinstance(cache, KVCache | LatentCache)
    pages = cache.pages if is_cache else as_array("cache", cache)
    ids = {"source": (source, "n", INT32), "target": (target, "n", INT32)}
    check_arguments(ids, required=tuple(ids))
    op, name = ("copy_kv", "kv_pages") if isinstance(cache, KVCache) else LATENTS
    arrays = {name: pages, "source": source, "target": target}
    copied = _fill(op, arrays, mesh_axes, cache.layout if is_cache else "rows")
    return cache.with_pages(copied) if is_cache else copied


LATENTS = ("copy_latents", "latent_pages")  # an indexer's pages are cut as a latent cache's


def _fill(op: str, arrays: dict[str, Any], mesh_axes: MeshAxes | None, layout: str) -> jax.Array:
    """The cache of a call of `FILLING`, shared out as its arrays are, or as the caller says."""
    given = {name: array for name, array in arrays.items() if array is not None}
    plan = plan_call(op, given, mesh_axes, layout)
    return _filled(given, op=op, layout=layout, plan=plan)


@functools.partial(jax.jit, static_argnames=("op", "layout", "plan"))
@under_own_settings
def _filled(arrays, *, op: str, layout: str, plan: Plan | None) -> jax.Array:
    return filled(functools.partial(_ON_ONE_DEVICE[op], layout=layout), op, arrays, plan, layout)


# What fills the cache of one device. Lowerings are imported when they are traced: importing the
# package brings none.


def _write_kv(arrays, layout: str) -> jax.Array:
    from attnsel_jax.xla.layout_writes import put_kv

    return put_kv(**{"k_scale": None, "v_scale": None, **arrays}, layout=layout)


def _write_latents(arrays, layout: str) -> jax.Array:
    from attnsel_jax.xla.layout_writes import put_latents

    return put_latents(**{"kv_scale": None, **arrays}, layout=layout)


def _write_index_keys(arrays, layout: str) -> jax.Array:
    from attnsel_jax.xla.cache_writes import write_rows

    pages = arrays["index_pages"]
    return write_rows(pages, quantise(arrays["k_index"], None, pages.dtype), arrays["slot_mapping"])


def _copy(arrays, layout: str) -> jax.Array:
    from attnsel_jax.xla.layout_writes import copy_along

    ((name, pages),) = ((n, a) for n, a in arrays.items() if n.endswith("_pages"))
    axis = page_axis(pages.shape, layout) if name == "kv_pages" else 0
    return copy_along(pages, arrays["source"], arrays["target"], axis)


_ON_ONE_DEVICE = {
    "write_kv": _write_kv,
    "write_latents": _write_latents,
    "write_index_keys": _write_index_keys,
    "copy_kv": _copy,
    "copy_latents": _copy,
}
