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

from attnsel_jax.cache_layouts import latent_layout_named, layout_named
from attnsel_jax.config import STORED_AS, dtype_name, kv_cache_dtype_name
from attnsel_jax.pytrees import exportable_pytree
from attnsel_jax.static_arguments import count
from pallas_kernels import fp8_ds_mla


@exportable_pytree
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A paged cache of keys and values.

    Attributes:
        pages: the cache's array, in the shape of its layout.
        k_scale, v_scale: float32 [] or [num_kv_heads]: true value = stored value * scale; None = 1.
        layout: a name in `LAYOUTS`.
        head_size: numbers of a head that mean something, where its layout stores more; None = all.
    """

    pages: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    layout: str = dataclasses.field(default="stacked", metadata={"static": True})
    head_size: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def num_pages(self) -> int:
        """Pages in the cache."""
        return self.dims[0]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.dims[1]

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.dims[2]

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """(num_pages, page_size, num_kv_heads, head size), padding not counted."""
        layout = layout_named(self.layout)
        *dims, stored = _of_one(self, len(layout.stride_order), layout.dims)
        return *dims, stored if self.head_size is None else self.head_size

    def split(self) -> tuple[jax.Array, jax.Array]:
        """Stored keys and values, each [num_pages, page_size, num_kv_heads, head_dim]."""
        size = self.dims[3]
        k_pages, v_pages = layout_named(self.layout).split(self.pages)
        return k_pages[..., :size], v_pages[..., :size]

    def with_pages(self, pages: jax.Array) -> "KVCache":
        """The same cache with other contents."""
        return dataclasses.replace(self, pages=pages)

    def converted(self, layout: str) -> "KVCache":
        """The same contents in another layout."""
        if layout == self.layout:
            return self
        pages = layout_named(layout).join(*self.split())
        size = said_head_size(layout, pages.shape, self.dims[3])
        return dataclasses.replace(self, pages=pages, layout=layout, head_size=size)


@exportable_pytree
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """A paged MLA cache: one latent and one rotary key for each token, shared by all heads.

    Attributes:
        pages: the cache's array, in the shape of its layout: in "rows", [num_pages, page_size,
            kv_lora_rank + rope_dim], or uint8 [num_pages, page_size, 656] (fp8_ds_mla; in "tiled"
            uint8 [num_pages, page_size, 2, 4, 128]).
        kv_scale: float32 []; true value = stored value * scale; None = 1, and with fp8_ds_mla.
        layout: a name in `LATENT_LAYOUTS`.
    """

    pages: jax.Array
    kv_scale: jax.Array | None = None
    layout: str = dataclasses.field(default="rows", metadata={"static": True})

    @property
    def num_pages(self) -> int:
        """Pages in the cache."""
        return self._dims()[0]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self._dims()[1]

    @property
    def kv_cache_dtype(self) -> str | None:
        """What the array's dtype does not say: "fp8_ds_mla" for byte rows, else None."""
        return fp8_ds_mla.NAME if self.pages.dtype == jnp.uint8 else None

    def _dims(self) -> tuple[int, ...]:
        layout = latent_layout_named(self.layout)
        return _of_one(self, layout.ndim, layout.dims)

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
        self._dims()
        rows = latent_layout_named(self.layout).to_rows(self.pages, rope_dim)
        return dataclasses.replace(self, pages=target.from_rows(rows, rope_dim), layout=layout)


def said_head_size(layout: str, shape: tuple[int, ...], head_size: int) -> int | None:
    """What a cache says of its head size: None where its array, of this shape, says it."""
    return None if layout_named(layout).dims(shape)[3] == head_size else head_size


def _of_one(cache: Any, ndim: int, dims: Callable[..., tuple[int, ...]]) -> tuple[int, ...]:
    """The sizes of a cache's array; refuses several caches as one, as a scan over layers has them.

    Raises:
        ValueError: it has not as many dimensions as its layout.
    """
    shape = cache.pages.shape
    if len(shape) != ndim:
        raise ValueError(
            f"pages has {len(shape)} dimensions {shape}, must have {ndim} in layout "
            f"{cache.layout!r}: of caches in a stack take one, or jax.vmap what is asked of each"
        )
    return dims(shape)


def check_stored(pages: jax.Array, kv_cache_dtype: Any, dtype: Any) -> None:
    """Refuses a cache of another dtype than was said.

    Raises:
        TypeError: it is no array.
        ValueError: it is of another.
    """
    if not hasattr(pages, "shape") or not hasattr(pages, "dtype"):
        raise TypeError(f"kv_cache is {type(pages).__name__}, must be a cache, or its array")
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


def checked_sizes(*sizes: Any) -> list[int]:
    """Blocks, tokens in one, kv heads and head size, as vLLM names and orders them.

    Raises:
        ValueError: one is no integer of at least 1.
    """
    names = ("num_blocks", "block_size", "num_kv_heads", "head_size")
    return [count(*size, optional=False) for size in zip(names, sizes, strict=True)]


def latent_shape(
    layout: str,
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_size: int,
    kv_cache_dtype: Any,
) -> tuple[int, ...]:
    """The shape of a latent cache's array; "auto" is bfloat16 where the bytes of a number matter.

    Raises:
        ValueError: more than one kv head, fp8_ds_mla rows of another size than 576, or a layout
            that there is not, or that has no room for fp8_ds_mla or for such a page or head.
    """
    if num_kv_heads != 1:
        raise ValueError(
            f"num_kv_heads is {num_kv_heads}, must be 1: MLA's latent is shared by all heads"
        )
    name = kv_cache_dtype_name(kv_cache_dtype)
    if name != fp8_ds_mla.NAME:
        itemsize = jnp.dtype(STORED_AS.get(name, "bfloat16")).itemsize
        return latent_layout_named(layout).shape(num_pages, page_size, head_size, itemsize)
    if head_size != 576:
        raise ValueError(f"head_size is {head_size}, must be 576 (512 + 64) with fp8_ds_mla")
    rows = jax.ShapeDtypeStruct((num_pages, page_size, fp8_ds_mla.ROW_BYTES), jnp.uint8)
    from_rows = latent_layout_named(layout).from_rows
    return jax.eval_shape(lambda rows: from_rows(rows, fp8_ds_mla.ROPE_DIM), rows).shape
