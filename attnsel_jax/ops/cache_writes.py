"""Caches filled without attention: keys made elsewhere, an encoder's, an indexer's; pages copied.

The attention ops write what their own step made. These are for the rest: keys of cross attention,
which every later call only reads; a prefix that another machine computed; index keys; a prompt
whose attention ran over keys and values of every head. Inside `jit`, donate the cache: in the
layout of a backend of this chip it is then updated in place. Over a mesh each device fills its own
share.
"""

import functools
from typing import Any

import jax

from attnsel_jax.kv_cache import KVCache, LatentCache
from attnsel_jax.mesh import MeshAxes, Plan, fill_over_mesh, plan_call
from attnsel_jax.mesh.dimensions import CACHES
from attnsel_jax.ops.written_arguments import (
    check_cache,
    check_index_rows,
    check_kv_rows,
    check_latent_rows,
)
from pallas_kernels.jax_settings import under_own_settings
from pallas_kernels.shape_checks import INT32, check_arguments
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
            outside the cache (-1) = written nowhere. What two tokens that name one slot leave there
            is not defined.
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
    return cache.with_pages(_planned("write_kv", arrays, mesh_axes, cache.layout))


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
    return cache.with_pages(_planned("write_latents", arrays, mesh_axes, cache.layout))


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
    check_index_rows(index_pages, k_index, slot_mapping)
    arrays = {"k_index": k_index, "index_pages": index_pages, "slot_mapping": slot_mapping}
    return _planned("write_index_keys", arrays, mesh_axes, "rows")


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
        cache: any, but a latent one of a registered layout; or an indexer's pages [num_pages,
            page_size, index_head_dim].
        source, target: int32 [n]. Where one of both is outside the cache (-1), nothing is copied.
            What two copies that name one target leave there is not defined.
        mesh_axes: as in `paged_attention`; heads may be cut, pages not.

    Raises:
        TypeError: an argument that is no array.
        ValueError: ids of another shape or dtype, or pages that lie on several devices.
    """
    ids = {"source": (source, "n", INT32), "target": (target, "n", INT32)}
    check_arguments(ids, required=tuple(ids))
    check_cache(cache)
    arrays = {"source": source, "target": target}
    if isinstance(cache, KVCache):
        pages = _planned("copy_kv", arrays | {"kv_pages": cache.pages}, mesh_axes, cache.layout)
        return cache.with_pages(pages)
    if isinstance(cache, LatentCache):
        arrays |= {"latent_pages": cache.pages}
        return cache.with_pages(_planned("copy_latents", arrays, mesh_axes, cache.layout))
    return _planned("copy_index_keys", arrays | {"index_pages": cache}, mesh_axes, "rows")


def _planned(op: str, arrays: dict[str, Any], mesh_axes: MeshAxes | None, layout: str) -> jax.Array:
    """The cache of a call of `FILLING`, shared out as its arrays are, or as the caller says."""
    given = {name: array for name, array in arrays.items() if array is not None}
    plan = plan_call(op, given, mesh_axes, layout)
    places = given["source" if "source" in given else "slot_mapping"]
    if places.shape[0] == 0:
        return given[CACHES[op]]
    guarded = jax.custom_jvp(functools.partial(_jitted, op=op, layout=layout, plan=plan))
    guarded.defjvp(_refuse_gradient)
    return guarded(given)


def _refuse_gradient(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        "needs_grad is True (grad or jvp reaches a cache), must be False: what reads a cache "
        "declares no gradient; put jax.lax.stop_gradient around what is written, or attend with "
        "dot_product_attention"
    )


@functools.partial(jax.jit, static_argnames=("op", "layout", "plan"))
@under_own_settings
def _jitted(arrays, *, op: str, layout: str, plan: Plan | None) -> jax.Array:
    fill = functools.partial(_ON_ONE_DEVICE[op], layout=layout)
    return fill_over_mesh(fill, op, arrays, plan, layout)


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


def _copy_kv(arrays, layout: str) -> jax.Array:
    from attnsel_jax.xla.layout_writes import copy_kv

    return copy_kv(arrays["kv_pages"], arrays["source"], arrays["target"], layout)


def _copy_first(arrays, layout: str) -> jax.Array:
    from attnsel_jax.xla.layout_writes import copy_along

    (pages,) = (a for name, a in arrays.items() if name not in ("source", "target"))
    return copy_along(pages, arrays["source"], arrays["target"], 0)


_ON_ONE_DEVICE = {
    "write_kv": _write_kv,
    "write_latents": _write_latents,
    "write_index_keys": _write_index_keys,
    "copy_kv": _copy_kv,
    "copy_latents": _copy_first,
    "copy_index_keys": _copy_first,
}
