"""How caches lie in memory: each layout by name, and conversion between them.

Logically keys and values are [num_pages, page_size, num_kv_heads, head_dim] each, and a latent
cache is [num_pages, page_size, row]. A backend declares the layouts that its kernels take.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a layout stores keys and values.

    Attributes:
        shape: (num_pages, page_size, num_kv_heads, head_dim) -> the shape of `pages`.
        dims: (num_pages, page_size, num_kv_heads, head_dim) of an array of this layout.
        split: pages -> (k_pages, v_pages), logical.
        join: (k_pages, v_pages) -> pages.
        stride_order: the order in which the dimensions of `shape` lie in memory.
    """

    shape: Callable[[int, int, int, int], tuple[int, ...]]
    dims: Callable[[tuple[int, ...]], tuple[int, int, int, int]]
    split: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    join: Callable[[jax.Array, jax.Array], jax.Array]
    stride_order: tuple[int, ...]


LAYOUTS: dict[str, Layout] = {
    # [2, num_pages, page_size, num_kv_heads, head_dim]: 0 = keys, 1 = values.
    "stacked": Layout(
        shape=lambda *dims: (2, *dims),
        dims=lambda shape: shape[1:],
        split=lambda pages: (pages[0], pages[1]),
        join=lambda k_pages, v_pages: jnp.stack([k_pages, v_pages]),
        stride_order=(0, 1, 2, 3, 4),
    ),
    # [2, num_pages, num_kv_heads, page_size, head_dim]: a head's part of a page lies together.
    "by_head": Layout(
        shape=lambda pages, size, heads, head_dim: (2, pages, heads, size, head_dim),
        dims=lambda shape: (shape[1], shape[3], shape[2], shape[4]),
        split=lambda pages: tuple(jnp.swapaxes(pages, 2, 3)),
        join=lambda k_pages, v_pages: jnp.swapaxes(jnp.stack([k_pages, v_pages]), 2, 3),
        stride_order=(0, 1, 2, 3, 4),
    ),
    # [num_pages, num_kv_heads, tiles, page_size, lanes]: a head's key and value side by side, 2 *
    # head_dim numbers, as tiles of 128 lanes where these divide them, as one tile elsewhere.
    "side_by_side": Layout(
        shape=lambda pages, size, heads, head_dim: (pages, heads, *_tiles(head_dim, size)),
        dims=lambda shape: (shape[0], shape[3], shape[1], shape[2] * shape[4] // 2),
        split=lambda pages: _split_tiles(pages),
        join=lambda k_pages, v_pages: _join_tiles(k_pages, v_pages),
        stride_order=(0, 1, 2, 3, 4),
    ),
}


@dataclasses.dataclass(frozen=True)
class LatentLayout:
    """How a layout stores the rows of a latent cache, logically [num_pages, page_size, row].

    Attributes:
        shape: (num_pages, page_size, row) -> the shape of `pages`.
        dims: (num_pages, page_size, row) of an array of this layout.
        to_rows: (pages, rope_dim) -> logical rows.
        from_rows: (logical rows, rope_dim) -> pages.
    """

    shape: Callable[[int, int, int], tuple[int, ...]]
    dims: Callable[[tuple[int, ...]], tuple[int, int, int]]
    to_rows: Callable[[jax.Array, int], jax.Array]
    from_rows: Callable[[jax.Array, int], jax.Array]


def _pair(rows: jax.Array, rope_dim: int) -> jax.Array:
    num_pages, page_size, width = rows.shape
    two = rows.reshape(num_pages, page_size // 2, 2, width)
    rank = width - rope_dim
    parts = [two[:, :, i, at] for at in (slice(rank), slice(rank, None)) for i in (0, 1)]
    return jnp.concatenate(parts, axis=-1)


def _unpair(pages: jax.Array, rope_dim: int) -> jax.Array:
    num_pages, half, width = pages.shape
    rank = width // 2 - rope_dim
    latents = pages[..., : 2 * rank].reshape(num_pages, 2 * half, rank)
    ropes = pages[..., 2 * rank :].reshape(num_pages, 2 * half, rope_dim)
    return jnp.concatenate([latents, ropes], axis=-1)


LATENT_LAYOUTS: dict[str, LatentLayout] = {
    # [num_pages, page_size, row]: a latent and its rotary key.
    "rows": LatentLayout(
        shape=lambda *dims: dims,
        dims=lambda shape: shape,
        to_rows=lambda pages, rope_dim: pages,
        from_rows=lambda rows, rope_dim: rows,
    ),
    # [num_pages, page_size / 2, 2 * row]: both latents of two tokens, then both rotary keys. With
    # 512 + 64, nine registers of a TPU and no padding, each part at the beginning of one.
    "paired": LatentLayout(
        shape=lambda num_pages, page_size, row: (num_pages, page_size // 2, 2 * row),
        dims=lambda shape: (shape[0], 2 * shape[1], shape[2] // 2),
        to_rows=_unpair,
        from_rows=_pair,
    ),
}


def _tiles(head_dim: int, page_size: int) -> tuple[int, int, int]:
    """(tiles, page_size, lanes) of one head in one page."""
    tiles = 2 * head_dim // 128 if head_dim % 64 == 0 else 1
    return tiles, page_size, 2 * head_dim // tiles


def _split_tiles(pages: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values, logical, of a side-by-side cache."""
    rows = jnp.transpose(pages, (0, 3, 1, 2, 4))
    keys, values = jnp.split(rows.reshape(*rows.shape[:3], -1), 2, axis=-1)
    return keys, values


def _join_tiles(k_pages: jax.Array, v_pages: jax.Array) -> jax.Array:
    """A side-by-side cache of logical keys and values."""
    num_pages, page_size, num_heads, head_dim = k_pages.shape
    tiles, _, lanes = _tiles(head_dim, page_size)
    rows = jnp.concatenate([k_pages, v_pages], axis=-1)
    rows = rows.reshape(num_pages, page_size, num_heads, tiles, lanes)
    return jnp.transpose(rows, (0, 2, 3, 1, 4))


def layout_named(layout: str) -> Layout:
    """The layout of that name.

    Raises:
        ValueError: there is none.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, must be one of {', '.join(LAYOUTS)}")
    return LAYOUTS[layout]


def latent_layout_named(layout: str) -> LatentLayout:
    """The layout of latent caches of that name.

    Raises:
        ValueError: there is none.
    """
    if layout not in LATENT_LAYOUTS:
        raise ValueError(f"layout is {layout!r}, must be one of {', '.join(LATENT_LAYOUTS)}")
    return LATENT_LAYOUTS[layout]


def in_layouts(
    arguments: Mapping[str, Any], layout: str, latent_layout: str = "rows"
) -> dict[str, Any]:
    """A kernel's arguments with the cache as a backend stores it.

    Args:
        arguments: a contract's, by name, arrays or shapes; the cache "stacked", a latent one in
            "rows".
        layout, latent_layout: names in `LAYOUTS` and `LATENT_LAYOUTS`.
    """
    changed = dict(arguments)
    kv_pages, latents = arguments.get("kv_pages"), arguments.get("latent_pages")
    if kv_pages is not None and layout != "stacked":
        join = layout_named(layout).join
        changed["kv_pages"] = _array_or_shape(lambda pages: join(pages[0], pages[1]), kv_pages)
    if latents is not None and latent_layout != "rows" and latents.dtype != jnp.uint8:
        from_rows = latent_layout_named(latent_layout).from_rows
        rope_dim = arguments["q_pe"].shape[-1]
        changed["latent_pages"] = _array_or_shape(lambda rows: from_rows(rows, rope_dim), latents)
    return changed


def _array_or_shape(change: Callable[[jax.Array], jax.Array], pages: Any) -> Any:
    is_shape = isinstance(pages, jax.ShapeDtypeStruct)
    return jax.eval_shape(change, pages) if is_shape else change(pages)
