"""Paged caches as pytrees: arrays in a backend's physical layout, with their scales.

Logically keys and values are `[num_pages, page_size, num_kv_heads, head_dim]` each. The physical
layout is the backend's to declare; the cache carries its name, so a cache that one backend filled
can be converted and read by another.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnsel_jax.config import STORED_AS, dtype_name, kv_cache_dtype_name

FP8_DS_MLA_BYTES = 656  # 512 e4m3 values, 4 float32 scales, 64 bfloat16 rope values


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A paged cache of keys and values.

    Attributes:
        pages: the cache's array, in the shape of its layout.
        k_scale, v_scale: float32 [] or [num_kv_heads]: true value = stored value * scale; None = 1.
        layout: a name in `LAYOUTS`.
    """

    pages: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    layout: str = dataclasses.field(default="stacked", metadata={"static": True})

    @property
    def num_pages(self) -> int:
        """Pages in the cache."""
        return LAYOUTS[self.layout].dims(self.pages.shape)[0]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return LAYOUTS[self.layout].dims(self.pages.shape)[1]

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return LAYOUTS[self.layout].dims(self.pages.shape)[2]

    def split(self) -> tuple[jax.Array, jax.Array]:
        """Stored keys and values, each [num_pages, page_size, num_kv_heads, head_dim]."""
        return LAYOUTS[self.layout].split(self.pages)

    def with_pages(self, pages: jax.Array) -> "KVCache":
        """The same cache with other contents."""
        return dataclasses.replace(self, pages=pages)

    def converted(self, layout: str) -> "KVCache":
        """The same contents in another layout."""
        if layout == self.layout:
            return self
        pages = layout_named(layout).join(*self.split())
        return dataclasses.replace(self, pages=pages, layout=layout)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """A paged MLA cache: one latent and one rotary key for each token, shared by all heads.

    Attributes:
        pages: the cache's array, in the shape of its layout: in "rows", [num_pages, page_size,
            kv_lora_rank + rope_dim], or uint8 [..., 656] (fp8_ds_mla).
        kv_scale: float32 []; true value = stored value * scale; None = 1, and with fp8_ds_mla.
        layout: a name in `LATENT_LAYOUTS`.
    """

    pages: jax.Array
    kv_scale: jax.Array | None = None
    layout: str = dataclasses.field(default="rows", metadata={"static": True})

    @property
    def num_pages(self) -> int:
        """Pages in the cache."""
        return LATENT_LAYOUTS[self.layout].dims(self.pages.shape)[0]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return LATENT_LAYOUTS[self.layout].dims(self.pages.shape)[1]

    @property
    def kv_cache_dtype(self) -> str | None:
        """What the array's dtype does not say: "fp8_ds_mla" for byte rows, else None."""
        return "fp8_ds_mla" if self.pages.dtype == jnp.uint8 else None

    def with_pages(self, pages: jax.Array) -> "LatentCache":
        """The same cache with other contents."""
        return dataclasses.replace(self, pages=pages)

    def converted(self, layout: str, rope_dim: int = 64) -> "LatentCache":
        """The same contents in another layout; rope_dim: size of the rotary key.

        Raises:
            ValueError: there is no such layout, or it has no room for fp8_ds_mla.
        """
        target = latent_layout_named(layout)
        if layout == self.layout:
            return self
        if self.kv_cache_dtype is not None:
            raise ValueError(f"layout is {layout!r}, must be 'rows' with {self.kv_cache_dtype}")
        rows = LATENT_LAYOUTS[self.layout].to_rows(self.pages, rope_dim)
        return dataclasses.replace(self, pages=target.from_rows(rows, rope_dim), layout=layout)


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


def check_stored(pages: jax.Array, kv_cache_dtype: Any, dtype: Any) -> None:
    """Refuses a cache of another dtype than was said.

    Raises:
        ValueError: it is of another.
    """
    wanted = stored_dtype(kv_cache_dtype, dtype)
    if jnp.dtype(pages.dtype) != wanted:
        raise ValueError(
            f"kv_cache has dtype {jnp.dtype(pages.dtype).name}, must be {wanted.name}, as "
            f"kv_cache_dtype {kv_cache_dtype_name(kv_cache_dtype)} says"
        )


def stored_dtype(kv_cache_dtype: Any, dtype: Any) -> jnp.dtype:
    """The array dtype of a cache: "auto" is the model's `dtype`, "fp8" is float8_e4m3fn, ..."""
    name = kv_cache_dtype_name(kv_cache_dtype)
    return jnp.dtype(dtype_name(dtype) if name == "auto" else STORED_AS[name])
