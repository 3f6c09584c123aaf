"""How caches lie in memory: each layout by name, and conversion between them.

Logically keys and values are [num_pages, page_size, num_kv_heads, head_dim] each, and a latent
cache is [num_pages, page_size, row]. A backend declares the layouts that its kernels take.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import fp8_ds_mla

TPU_LANES = 128  # numbers of 32 bits in a row of a TPU's register
LINES_OF_A_TILE = 32  # over the bytes of a number: of such a register, see `LATENT_LAYOUTS`
HALF_LANES = 64  # what heads are padded to; a latent cache's rotary key, laid out for TPUs


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a layout stores keys and values.

    Attributes:
        shape: (num_pages, page_size, num_kv_heads, head_dim) -> the shape of `pages`.
        dims: (num_pages, page_size, num_kv_heads, head_dim) of an array of this layout, which may
            store heads padded: head_dim is then what is stored.
        split: pages -> (k_pages, v_pages), logical, padding included.
        join: (k_pages, v_pages) -> pages, padded with 0.
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
    # [num_pages, num_kv_heads, tiles, page_size, 128]: a head's key and value side by side, each
    # padded to a multiple of 64 numbers, as tiles of 128 lanes. XLA lays an array of other rows
    # out with pages along lanes, and would copy all of it for each kernel that takes it.
    "side_by_side": Layout(
        shape=lambda pages, size, heads, dim: (pages, heads, _tiles(dim), size, TPU_LANES),
        dims=lambda shape: (shape[0], shape[3], shape[1], shape[2] * shape[4] // 2),
        split=lambda pages: _split_tiles(pages),
        join=lambda k_pages, v_pages: _join_tiles(k_pages, v_pages),
        stride_order=(0, 1, 2, 3, 4),
    ),
}


@dataclasses.dataclass(frozen=True)
class LatentLayout:
    """How a layout stores the rows of a latent cache, logically [num_pages, page_size, row].

    Rows of fp8_ds_mla are uint8 [num_pages, page_size, 656]; a layout may have no room for them.

    Attributes:
        ndim: dimensions of `pages`.
        shape: (num_pages, page_size, row, bytes of a number) -> the shape of `pages`.
        dims: (num_pages, page_size, row) of an array of this layout.
        to_rows: (pages, rope_dim) -> logical rows.
        from_rows: (logical rows, rope_dim) -> pages.
    """

    ndim: int
    shape: Callable[[int, int, int, int], tuple[int, ...]]
    dims: Callable[[tuple[int, ...]], tuple[int, int, int]]
    to_rows: Callable[[jax.Array, int], jax.Array]
    from_rows: Callable[[jax.Array, int], jax.Array]


def _striped_shape(num_pages: int, page_size: int, row: int, itemsize: int) -> tuple[int, ...]:
    """The shape of a striped cache."""
    rank, pair = row - HALF_LANES, 2 * LINES_OF_A_TILE // itemsize
    if rank % TPU_LANES or page_size % pair:
        raise ValueError(
            f"row is {row} and page_size {page_size}, must be a multiple of {TPU_LANES} and "
            f"{HALF_LANES} more, and a multiple of {pair}, in layout 'striped' with numbers of "
            f"{itemsize} bytes: use layout 'rows'"
        )
    return num_pages, 2 * rank // TPU_LANES + 1, page_size // 2, TPU_LANES


def _stripe(rows: jax.Array, rope_dim: int) -> jax.Array:
    if rows.dtype == jnp.uint8:
        raise ValueError(
            "layout is 'striped', must be 'rows' or 'tiled' with fp8_ds_mla, for whose scales a "
            "striped page has no room: use a backend of another layout, or cache fp8_e4m3"
        )
    _check_rope_dim(rope_dim, "striped")
    num_pages, page_size, row = rows.shape
    shape = _striped_shape(*rows.shape, rows.dtype.itemsize)
    tile, rank = LINES_OF_A_TILE // rows.dtype.itemsize, row - rope_dim
    latents = rows[..., :rank].reshape(num_pages, 2, page_size // 2, -1, TPU_LANES)
    latents = jnp.swapaxes(latents, 2, 3).reshape(num_pages, -1, *shape[2:])
    ropes = rows[..., rank:].reshape(num_pages, -1, 2, tile, rope_dim)
    ropes = jnp.swapaxes(ropes, 2, 3).reshape(num_pages, 1, *shape[2:])
    return jnp.concatenate([latents, ropes], axis=1)


def _unstripe(pages: jax.Array, rope_dim: int) -> jax.Array:
    num_pages, parts, half, lanes = pages.shape
    tile = LINES_OF_A_TILE // pages.dtype.itemsize
    latents = pages[:, :-1].reshape(num_pages, 2, parts // 2, half, lanes)
    latents = jnp.swapaxes(latents, 2, 3).reshape(num_pages, 2 * half, -1)
    ropes = pages[:, -1].reshape(num_pages, -1, tile, 2, rope_dim)
    ropes = jnp.swapaxes(ropes, 2, 3).reshape(num_pages, 2 * half, rope_dim)
    return jnp.concatenate([latents, ropes], axis=-1)


def _check_rope_dim(rope_dim: int, layout: str) -> None:
    if rope_dim != HALF_LANES:
        raise ValueError(
            f"rope_dim is {rope_dim}, must be {HALF_LANES} in layout {layout!r}: use layout 'rows'"
        )


def _parts(rank: int, itemsize: int) -> tuple[int, int]:
    """(parts, packed) of a tiled row."""
    if itemsize > 4:
        raise ValueError(
            f"numbers of {itemsize} bytes, must be of at most 4 in layout 'tiled': convert the "
            f"cache with .astype, or use layout 'rows'"
        )
    packed = 4 // itemsize
    if rank % (packed * TPU_LANES):
        raise ValueError(
            f"kv_lora_rank is {rank}, must be a multiple of {packed * TPU_LANES} in layout 'tiled' "
            f"with numbers of {itemsize} bytes: use layout 'rows'"
        )
    return rank // (packed * TPU_LANES) + 1, packed


def _tile(rows: jax.Array, rope_dim: int) -> jax.Array:
    _check_rope_dim(rope_dim, "tiled")
    if rows.dtype == jnp.uint8:
        return _tile_bytes(rows)
    parts, packed = _parts(rows.shape[2] - rope_dim, rows.dtype.itemsize)
    whole = jnp.pad(rows, ((0, 0), (0, 0), (0, packed * TPU_LANES - rope_dim)))
    return whole.reshape(*rows.shape[:2], parts, packed, TPU_LANES)


def _untile(pages: jax.Array, rope_dim: int) -> jax.Array:
    if pages.dtype == jnp.uint8:
        return _untile_bytes(pages)
    *where, parts, packed, lanes = pages.shape
    rank = (parts - 1) * packed * lanes
    return pages.reshape(*where, -1)[..., : rank + rope_dim]


def _tile_bytes(rows: jax.Array) -> jax.Array:
    """Of fp8_ds_mla: the four bytes of a word are one below another in its lane."""
    where = rows.shape[:2]
    values, scales, ropes = jnp.split(rows, (fp8_ds_mla.SCALES_AT, fp8_ds_mla.ROPE_AT), axis=-1)
    upper = ((0, 0), (0, 0), (0, 0), (2, 0))
    words = [jnp.pad(ropes.reshape(*where, -1, 2), upper), scales.reshape(*where, -1, 4)]
    words = jnp.concatenate(words, axis=2)
    words = jnp.pad(words, ((0, 0), (0, 0), (0, TPU_LANES - words.shape[2]), (0, 0)))
    parts = [values.reshape(*where, -1, TPU_LANES), jnp.swapaxes(words, 2, 3)]
    return jnp.stack(parts, axis=2)


def _untile_bytes(pages: jax.Array) -> jax.Array:
    where = pages.shape[:2]
    words = jnp.swapaxes(pages[:, :, 1], 2, 3)
    scales = words[:, :, HALF_LANES : HALF_LANES + pages.shape[3]]
    parts = (pages[:, :, 0], scales, words[:, :, :HALF_LANES, 2:])
    return jnp.concatenate([part.reshape(*where, -1) for part in parts], axis=-1)


LATENT_LAYOUTS: dict[str, LatentLayout] = {
    # [num_pages, page_size, row]: a latent and its rotary key.
    "rows": LatentLayout(
        ndim=3,
        shape=lambda num_pages, page_size, row, itemsize: (num_pages, page_size, row),
        dims=lambda shape: shape,
        to_rows=lambda pages, rope_dim: pages,
        from_rows=lambda rows, rope_dim: rows,
    ),
    # [num_pages, parts, page_size / 2, 128]: a page lies as a TPU's registers have it, so that it
    # is copied as it lies, without a stride. With 512 + 64 it has nine parts: four stripes of 128
    # numbers of the latents of the page's first half, four of its second half, and one of rotary
    # keys. A register's tile is t = 32 / itemsize lines of 128 numbers; line i of rotary tile n
    # has the keys, of 64 numbers, of token 2 * t * n + i and of the token t after it.
    "striped": LatentLayout(
        ndim=4,
        shape=_striped_shape,
        dims=lambda shape: (shape[0], 2 * shape[2], HALF_LANES * shape[1]),
        to_rows=_unstripe,
        from_rows=_stripe,
    ),
    # [num_pages, page_size, parts, packed, 128], packed = 4 / itemsize: a token has tiles of its
    # own, of one sublane in which a TPU packs `packed` lines of 128 numbers. The latent, of a
    # multiple of packed * 128 numbers, fills all parts but the last, where the rotary key of 64
    # begins. A token's row can be copied alone: 1536 bytes of bfloat16 for 512 + 64, of which 1152
    # mean something. A row of fp8_ds_mla is [2, 4, 128] bytes: its values, 128 of a scale in a
    # line; then words, one a lane: rotary values in the upper halves of 64, and four scales.
    "tiled": LatentLayout(
        ndim=5,
        shape=lambda num_pages, page_size, row, itemsize: (
            num_pages,
            page_size,
            *_parts(row - HALF_LANES, itemsize),
            TPU_LANES,
        ),
        dims=lambda shape: (*shape[:2], (shape[2] - 1) * shape[3] * shape[4] + HALF_LANES),
        to_rows=_untile,
        from_rows=_tile,
    ),
}


def _tiles(head_dim: int) -> int:
    """Tiles of one head's row."""
    return -(-head_dim // HALF_LANES)


def _split_tiles(pages: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values, logical, of a side-by-side cache."""
    rows = jnp.transpose(pages, (0, 3, 1, 2, 4))
    keys, values = jnp.split(rows.reshape(*rows.shape[:3], -1), 2, axis=-1)
    return keys, values


def _join_tiles(k_pages: jax.Array, v_pages: jax.Array) -> jax.Array:
    """A side-by-side cache of logical keys and values."""
    padding = ((0, 0), (0, 0), (0, 0), (0, -k_pages.shape[3] % HALF_LANES))
    rows = jnp.concatenate([jnp.pad(x, padding) for x in (k_pages, v_pages)], axis=-1)
    rows = rows.reshape(*rows.shape[:3], -1, TPU_LANES)
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
    if latents is not None and latent_layout != "rows":
        from_rows = latent_layout_named(latent_layout).from_rows
        rope_dim = arguments["q_pe"].shape[-1]
        changed["latent_pages"] = _array_or_shape(lambda rows: from_rows(rows, rope_dim), latents)
    return changed


def _array_or_shape(change: Callable[[jax.Array], jax.Array], pages: Any) -> Any:
    is_shape = isinstance(pages, jax.ShapeDtypeStruct)
    return jax.eval_shape(change, pages) if is_shape else change(pages)
