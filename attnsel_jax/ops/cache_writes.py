"""Caches filled without attention: keys made elsewhere, an encoder's, an indexer's; pages copied.

The attention ops write what their own step made. These are for the rest: keys of cross attention,
which every later call only reads; a prefix that another machine computed; index keys; a prompt
whose attention ran over keys and values of every head. Inside `jit`, donate the cache, and it is
updated in place.
"""

import functools

import jax
import jax.numpy as jnp

from attnsel_jax.kv_cache import KVCache, LatentCache
from attnsel_jax.mesh.dimensions import page_axis
from attnsel_jax.ops.calls import as_array
from attnsel_jax.ops.ragged_arguments import INDEX_DTYPES, check_kv_rows, check_latent_rows
from pallas_kernels.jax_settings import under_own_settings
from pallas_kernels.shape_checks import FLOATS, INT32, check_arguments
from pallas_kernels.stored_values import quantise


def write_kv_cache(cache: KVCache, k: jax.Array, v: jax.Array, slot_mapping: jax.Array) -> KVCache:
    """The cache with keys and values put at slots, stored as `paged_attention` stores them.

    Args:
        cache: in any layout; one that a third party registered is converted there and back.
        k, v: [num_tokens, num_kv_heads, head_size], true values; heads as many as the cache's, or a
            divisor of it, each then repeated.
        slot_mapping: int32 [num_tokens]: page * page_size + offset, as in `AttentionMetadata`;
            outside the cache (-1) = written nowhere. Where two tokens name one slot, either wins.

    Raises:
        TypeError: an argument that is no array, or a cache of another class.
        ValueError: arguments that do not fit together, or a cache that a mesh's devices share.
    """
    check_kv_rows(k, v, cache, slot_mapping)
    _check_is_whole(cache.pages)
    pages = _put_kv(
        cache.pages, k, v, slot_mapping, cache.k_scale, cache.v_scale,
        layout=cache.layout, copies=cache.num_kv_heads // max(k.shape[1], 1),
    )  # fmt: skip
    return cache.with_pages(pages)


def write_latent_cache(
    cache: LatentCache, kv_c: jax.Array, k_pe: jax.Array, slot_mapping: jax.Array
) -> LatentCache:
    """The cache with latents put at slots, stored as `mla_attention` stores them.

    Args:
        cache: in any layout, `fp8_ds_mla` too.
        kv_c, k_pe: [num_tokens, kv_lora_rank], [num_tokens, rope_dim], true values.
        slot_mapping: as in `write_kv_cache`.

    Raises:
        TypeError, ValueError: as `write_kv_cache`.
    """
    check_latent_rows(kv_c, k_pe, cache, slot_mapping)
    _check_is_whole(cache.pages)
    pages = _put_latents(cache.pages, kv_c, k_pe, slot_mapping, cache.kv_scale, layout=cache.layout)
    return cache.with_pages(pages)


def write_index_keys(
    index_pages: jax.Array, k_index: jax.Array, slot_mapping: jax.Array
) -> jax.Array:
    """The keys that `indexer_scores` reads, put at slots.

    Args:
        index_pages: [num_pages, page_size, index_head_dim].
        k_index: [num_tokens, index_head_dim]; saturated and rounded to index_pages' dtype.
        slot_mapping: as in `write_kv_cache`.

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
    _check_is_whole(index_pages)
    return _put_rows(index_pages, k_index, slot_mapping)


def copy_pages(
    cache: KVCache | LatentCache | jax.Array, source: jax.Array, target: jax.Array
) -> KVCache | LatentCache | jax.Array:
    """The cache with page source[i], as it was before the call, in place of page target[i].

    For beam search, and for a shared page that one of its sequences is about to write.

    Args:
        cache: any; or an indexer's pages [num_pages, page_size, index_head_dim].
        source, target: int32 [n]. Where one of both is outside the cache (-1), nothing is copied.
            Where two copies name one target, either wins.

    Raises:
        TypeError: an argument that is no array.
        ValueError: ids of another shape or dtype, or a cache that a mesh's devices share.
    """
    is_cache = isinstance(cache, KVCache | LatentCache)
    pages = cache.pages if is_cache else as_array("cache", cache)
    check_arguments(
        {"source": (source, "n", INT32), "target": (target, "n", INT32)}, ("source", "target")
    )
    _check_is_whole(pages)
    axis = page_axis(pages.shape, cache.layout) if isinstance(cache, KVCache) else 0
    copied = _copied(pages, source, target, axis=axis)
    return cache.with_pages(copied) if is_cache else copied


def _check_is_whole(pages: jax.Array) -> None:
    """Refuses a cache of which a mesh's devices hold parts: a slot says nothing of whose it is."""
    shown = pages if not isinstance(pages, jax.core.Tracer) else jax.typeof(pages)
    spec = getattr(getattr(shown, "sharding", None), "spec", ())
    axes = [axis for axis in spec if axis is not None]
    if axes:
        raise ValueError(
            f"cache.pages is sharded over mesh axis {axes[0]!r}, must lie whole on a device: call "
            f"this inside jax.shard_map, with each device's part of the cache and slots counted "
            f"from its first page"
        )


# Lowerings are imported when they are traced: importing the package brings none.


@functools.partial(jax.jit, static_argnames=("layout", "copies"))
@under_own_settings
def _put_kv(pages, k, v, slots, k_scale, v_scale, *, layout: str, copies: int) -> jax.Array:
    from attnsel_jax.xla.layout_writes import put_kv

    if copies > 1:
        k, v = (jnp.repeat(x, copies, axis=1) for x in (k, v))
    return put_kv(pages, k, v, slots, k_scale, v_scale, layout)


@functools.partial(jax.jit, static_argnames="layout")
@under_own_settings
def _put_latents(pages, kv_c, k_pe, slots, kv_scale, *, layout: str) -> jax.Array:
    from attnsel_jax.xla.layout_writes import put_latents

    return put_latents(pages, kv_c, k_pe, slots, kv_scale, layout)


@jax.jit
@under_own_settings
def _put_rows(pages, rows, slots) -> jax.Array:
    from attnsel_jax.xla.cache_writes import write_rows

    return write_rows(pages, quantise(rows, None, pages.dtype), slots)


@functools.partial(jax.jit, static_argnames="axis")
@under_own_settings
def _copied(pages, source, target, *, axis: int) -> jax.Array:
    from attnsel_jax.xla.layout_writes import copy_along

    return copy_along(pages, source, target, axis)
