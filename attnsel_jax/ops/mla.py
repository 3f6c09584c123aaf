"""Multi-head latent attention over a paged latent cache, whole and sparse; and the cache for it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnsel_jax.config import kv_cache_dtype_name
from attnsel_jax.kv_cache import LatentCache, stored_dtype
from attnsel_jax.mesh import MeshAxes, asked_of_kernel, kernel_over_mesh, plan_call
from attnsel_jax.metadata import AttentionMetadata
from attnsel_jax.ops.calls import as_scale, asked_device, batch_arrays, head_counts
from attnsel_jax.ops.ragged_arguments import check_latent
from attnsel_jax.selector import BackendLike, DeviceLike, get_attn_backend
from attnsel_jax.static_arguments import count, flag, number
from attnsel_jax.value_checks import check_groups, check_scales, check_topk


def mla_attention(
    ql_nope: jax.Array,
    q_pe: jax.Array,
    kv_c: jax.Array | None,
    k_pe: jax.Array | None,
    cache: LatentCache,
    metadata: AttentionMetadata,
    *,
    scale: float,
    soft_cap: float | None = None,
    return_lse: bool = False,
    backend: BackendLike = None,
    device: DeviceLike = None,
    checked: bool = False,
    mesh_axes: MeshAxes | None = None,
) -> tuple[jax.Array, LatentCache] | tuple[jax.Array, jax.Array, LatentCache]:
    """Multi-head latent attention, absorbed: writes this step's latents, then attends.

    Args:
        ql_nope, q_pe: [num_tokens, num_heads, kv_lora_rank], [num_tokens, num_heads, rope_dim].
        kv_c, k_pe: [num_tokens, kv_lora_rank], [num_tokens, rope_dim]; None, both = nothing.
        cache: the latents so far.
        metadata: the batch.
        scale: factor on the logits: (qk_nope_head_dim + rope_dim) ** -0.5 of the model.
        soft_cap, return_lse, backend, device, checked, mesh_axes: as in `paged_attention`.

    Returns:
        (out, cache), or (out, lse, cache); out [num_tokens, num_heads, kv_lora_rank].

    Raises:
        TypeError: an argument that is no array, or a cache or batch of another class.
        ValueError: arguments that do not fit together.
        NoAttentionBackendError: no backend here honours them all.
    """
    return _latent(
        "mla", (ql_nope, q_pe, kv_c, k_pe), (), cache, metadata, scale, soft_cap, return_lse,
        backend, device, checked, mesh_axes,
    )  # fmt: skip


def sparse_mla_attention(
    ql_nope: jax.Array,
    q_pe: jax.Array,
    kv_c: jax.Array | None,
    k_pe: jax.Array | None,
    topk_indices: jax.Array,
    cache: LatentCache,
    metadata: AttentionMetadata,
    *,
    scale: float,
    soft_cap: float | None = None,
    return_lse: bool = False,
    backend: BackendLike = None,
    device: DeviceLike = None,
    checked: bool = False,
    mesh_axes: MeshAxes | None = None,
) -> tuple[jax.Array, LatentCache] | tuple[jax.Array, jax.Array, LatentCache]:
    """`mla_attention` over each token's own top-k positions.

    Args:
        ql_nope, q_pe, kv_c, k_pe, cache, metadata, scale: as in `mla_attention`.
        topk_indices: int32 [num_tokens, topk], positions in the token's sequence, -1 padded.
        soft_cap, return_lse, backend, device, checked, mesh_axes: as in `paged_attention`.

    Returns:
        (out, cache), or (out, lse, cache).

    Raises:
        TypeError: an argument that is no array, or a cache or batch of another class.
        ValueError: arguments that do not fit together.
        NoAttentionBackendError: no backend here honours them all.
    """
    return _latent(
        "sparse_mla", (ql_nope, q_pe, kv_c, k_pe), (topk_indices,), cache, metadata, scale,
        soft_cap, return_lse, backend, device, checked, mesh_axes,
    )  # fmt: skip


def allocate_latent_cache(
    num_pages: int,
    page_size: int | None,
    kv_lora_rank: int,
    rope_dim: int,
    dtype: Any,
    *,
    use_sparse: bool = False,
    kv_cache_dtype: Any = "auto",
    kv_scale: ArrayLike | None = None,
    backend: BackendLike = None,
    device: DeviceLike = None,
) -> LatentCache:
    """An empty latent cache for the backend that will be selected for it.

    Args:
        num_pages: pages in the cache.
        page_size: tokens in a page; None = the backend's preference.
        kv_lora_rank, rope_dim: sizes of the latent and of the rotary key (512 and 64 in DeepSeek).
        dtype: of the queries.
        use_sparse: for sparse MLA.
        kv_cache_dtype: one of `CacheDType` or a dtype; "auto" = dtype.
        kv_scale: float32 []; true value = stored value * scale. Not with fp8_ds_mla.
        backend, device: as in `dot_product_attention`.

    Raises:
        NoAttentionBackendError: no backend here takes such a cache.
        ValueError: a size or scale that cannot be.
    """
    sizes = {"num_pages": num_pages, "kv_lora_rank": kv_lora_rank, "rope_dim": rope_dim}
    num_pages, kv_lora_rank, rope_dim = (count(*size, optional=False) for size in sizes.items())
    page_size, scale = count("page_size", page_size), as_scale("kv_scale", kv_scale)
    head_size = kv_lora_rank + rope_dim
    chosen = get_attn_backend(
        head_size, dtype, kv_cache_dtype, page_size, True, use_sparse=use_sparse, backend=backend,
        device=device, head_size_v=kv_lora_rank, num_kv_heads=1,
    )  # fmt: skip
    name = kv_cache_dtype_name(kv_cache_dtype)
    if kv_scale is not None and name == "fp8_ds_mla":
        raise ValueError("kv_scale is given, must be None with fp8_ds_mla, which has its own")
    size = page_size or chosen.get_preferred_block_size()
    stored = stored_dtype(kv_cache_dtype, dtype)
    name = stored.name if name == "auto" else name
    shape = chosen.get_kv_cache_shape(num_pages, size, 1, head_size, name)
    pages = jnp.zeros(shape, stored)
    return LatentCache(pages, scale, chosen.latent_layout)


def _latent(
    op, tokens, chosen_positions, cache, metadata, scale, soft_cap, return_lse, backend, device,
    checked, mesh_axes,
):  # fmt: skip
    """What the two MLA ops share: select, call, wrap."""
    if op == "sparse_mla" and chosen_positions[0] is None:
        raise ValueError("topk_indices is None, must be int32 [num_tokens, topk] positions")
    check_latent(tokens, next(iter(chosen_positions), None), cache, metadata)
    ql_nope, q_pe = tokens[:2]
    if checked:
        _check_values(ql_nope.shape[0], chosen_positions, cache, metadata)
    static = {
        "scale": number("scale", scale),
        "soft_cap": number("soft_cap", soft_cap, positive=True),
    }
    if static["scale"] is None:
        raise ValueError(
            "scale is None, must be a number: (qk_nope_head_dim + rope_dim) ** -0.5 of the model"
        )
    arrays = _by_name(tokens, chosen_positions, cache, metadata)
    plan = plan_call(op, arrays, mesh_axes)
    chosen = get_attn_backend(
        ql_nope.shape[-1] + q_pe.shape[-1], ql_nope.dtype,
        cache.kv_cache_dtype or cache.pages.dtype, cache.page_size, True,
        use_sparse=op == "sparse_mla", backend=backend, causal=metadata.causal,
        device=asked_device(device, cache.pages, ql_nope), head_size_v=ql_nope.shape[-1],
        needs_lse=flag("return_lse", return_lse), **head_counts(plan, ql_nope.shape[1], 1),
        **asked_of_kernel(op, plan, {"has_soft_cap": soft_cap is not None}, by_position=False),
    )  # fmt: skip
    if chosen.latent_layout != cache.layout:
        raise ValueError(
            f"cache.layout is {cache.layout!r}, must be {chosen.latent_layout!r} for backend "
            f"{chosen.name}: use cache.converted({chosen.latent_layout!r}, {q_pe.shape[-1]}), or "
            f"allocate it for the backend"
        )
    if ql_nope.shape[0] == 0:
        lse = jnp.zeros(ql_nope.shape[:2], jnp.float32)
        return (ql_nope, lse, cache) if return_lse else (ql_nope, cache)
    out, lse, pages = kernel_over_mesh(chosen, op, plan)(
        **arrays, kv_cache_dtype=cache.kv_cache_dtype, **static
    )
    written = cache.with_pages(pages)
    return (out, lse, written) if return_lse else (out, written)


def _check_values(num_tokens, chosen_positions, cache, metadata) -> None:
    """What `checked=True` looks at."""
    check_groups(metadata, num_tokens, cache.num_pages, cache.page_size)
    check_scales(kv_scale=cache.kv_scale)
    for positions in chosen_positions:
        check_topk(positions, metadata.page_table.shape[1] * cache.page_size)


def _by_name(tokens, chosen_positions, cache, metadata) -> dict[str, jax.Array | None]:
    """The kernel's arrays by the contract's names."""
    return {
        **dict(zip(("ql_nope", "q_pe", "kv_c", "k_pe"), tokens, strict=True)),
        "latent_pages": cache.pages,
        **dict(zip(("topk_indices",), chosen_positions, strict=False)),
        **batch_arrays(metadata, tokens[2]),
        "kv_scale": cache.kv_scale,
    }
