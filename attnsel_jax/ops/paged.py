"""Attention over a paged cache: `paged_attention`, and the cache for it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnsel_jax.kv_cache import KVCache, said_head_size, stored_dtype
from attnsel_jax.mesh import MeshAxes, asked_of_kernel, kernel_over_mesh, plan_call
from attnsel_jax.metadata import AttentionMetadata
from attnsel_jax.ops.calls import (
    as_float32,
    as_scale,
    asked_device,
    batch_arrays,
    features,
    head_counts,
)
from attnsel_jax.ops.ragged_arguments import check_paged
from attnsel_jax.selector import BackendLike, DeviceLike, get_attn_backend
from attnsel_jax.static_arguments import count, distance, flag, number, window
from attnsel_jax.value_checks import check_groups, check_scales
from pallas_kernels.masks import Window


def paged_attention(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    cache: KVCache,
    metadata: AttentionMetadata,
    *,
    scale: float | None = None,
    sliding_window: Window = None,
    attention_chunk_size: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    return_lse: bool = False,
    backend: BackendLike = None,
    device: DeviceLike = None,
    checked: bool = False,
    mesh_axes: MeshAxes | None = None,
) -> tuple[jax.Array, KVCache] | tuple[jax.Array, jax.Array, KVCache]:
    """Writes this step's keys and values into the cache, then attends over it.

    One call serves prefill, chunked prefill, decode and speculative decode, mixed. Inside `jit`,
    donate the cache, and it is updated in place. The maths are in `pallas_kernels.paged`.

    Args:
        q: [num_tokens, num_heads, head_size], sequences one after another.
        k, v: [num_tokens, num_kv_heads, head_size]; None, both = nothing to write.
        cache: keys and values so far, in the layout of the backend.
        metadata: the batch; its `causal` says whether a query sees later keys.
        scale, sliding_window, attention_chunk_size, soft_cap, alibi_slopes, sinks: as the contract.
        return_lse: also return the lse, float32 [num_tokens, num_heads].
        backend, device, checked, mesh_axes: as in `dot_product_attention`.

    Returns:
        (out, cache), or (out, lse, cache).

    Raises:
        TypeError: an argument that is no array, or a cache or batch of another class.
        ValueError: arguments that do not fit together, or a cache in another backend's layout.
        NoAttentionBackendError: no backend here honours them all.
    """
    per_head = {
        "alibi_slopes": as_float32("alibi_slopes", alibi_slopes),
        "sinks": as_float32("sinks", sinks),
    }
    check_paged(q, k, v, cache, metadata, per_head)
    if checked:
        check_groups(metadata, q.shape[0], cache.num_pages, cache.page_size)
        check_scales(k_scale=cache.k_scale, v_scale=cache.v_scale)
    static = {
        "scale": number("scale", scale), "causal": flag("metadata.causal", metadata.causal),
        "sliding_window": window("sliding_window", sliding_window),
        "attention_chunk_size": distance("attention_chunk_size", attention_chunk_size),
        "soft_cap": number("soft_cap", soft_cap, positive=True),
    }  # fmt: skip
    arrays = {
        "q": q, "k": k, "v": v, "kv_pages": cache.pages, **batch_arrays(metadata, k), **per_head,
        "k_scale": cache.k_scale, "v_scale": cache.v_scale,
    }  # fmt: skip
    asked = features(static) | {name: x is not None for name, x in
                                (("has_sink", sinks), ("has_alibi", alibi_slopes))}  # fmt: skip
    plan = plan_call("paged", arrays, mesh_axes, cache.layout)
    chosen = get_attn_backend(
        q.shape[-1], q.dtype, cache.pages.dtype, cache.page_size, op="paged",
        backend=backend, device=asked_device(device, cache.pages, q), causal=metadata.causal,
        needs_lse=flag("return_lse", return_lse),
        **head_counts(plan, q.shape[1], cache.num_kv_heads),
        **asked_of_kernel("paged", plan, asked, by_position=False),
    )  # fmt: skip
    if chosen.layout != cache.layout:
        raise ValueError(
            f"cache.layout is {cache.layout!r}, must be {chosen.layout!r} for backend "
            f"{chosen.name}: use cache.converted({chosen.layout!r}), or allocate it for the backend"
        )
    if q.shape[0] == 0:
        lse = jnp.zeros(q.shape[:2], jnp.float32)
        return (q, lse, cache) if return_lse else (q, cache)
    out, lse, pages = kernel_over_mesh(chosen, "paged", plan)(**arrays, **static)
    written = cache.with_pages(pages)
    return (out, lse, written) if return_lse else (out, written)


def allocate_kv_cache(
    num_pages: int,
    page_size: int | None,
    num_kv_heads: int,
    head_size: int,
    dtype: Any,
    *,
    kv_cache_dtype: Any = "auto",
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    backend: BackendLike = None,
    device: DeviceLike = None,
) -> KVCache:
    """An empty cache in the layout of the backend that will be selected for it.

    Args:
        num_pages: pages in the cache.
        page_size: tokens in a page; None = the backend's preference.
        num_kv_heads, head_size: of the model.
        dtype: of q, k and v.
        kv_cache_dtype: one of `CacheDType` or a dtype; "auto" = dtype.
        k_scale, v_scale: float32 [] or [num_kv_heads]; true value = stored value * scale.
        backend, device: as in `dot_product_attention`.

    Raises:
        ValueError: a count below 1, or scales of another shape, or not above 0.
        NoAttentionBackendError: no backend here takes such a cache.
    """
    num_pages = count("num_pages", num_pages, optional=False)
    page_size = count("page_size", page_size)
    num_kv_heads = count("num_kv_heads", num_kv_heads, optional=False)
    scales = [
        as_scale("k_scale", k_scale, num_kv_heads), as_scale("v_scale", v_scale, num_kv_heads)
    ]  # fmt: skip
    chosen = get_attn_backend(
        head_size, dtype, kv_cache_dtype, page_size, backend=backend, device=device,
        num_kv_heads=num_kv_heads,
    )  # fmt: skip
    size = page_size or chosen.get_preferred_block_size()
    shape = chosen.get_kv_cache_shape(num_pages, size, num_kv_heads, head_size)
    pages = jnp.zeros(shape, stored_dtype(kv_cache_dtype, dtype))
    said = said_head_size(chosen.layout, shape, head_size)
    return KVCache(pages, *scales, layout=chosen.layout, head_size=said)
