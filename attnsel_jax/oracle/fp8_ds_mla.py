"""DeepSeek's fp8 latent cache: 656 bytes a token, and what they mean.

512 float8_e4m3fn values, 4 float32 scales (one for each 128 values), 64 bfloat16 rotary values,
little-endian, in that order.
"""

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

VALUES, TILE, ROPE = 512, 128, 64
SCALES_END = VALUES + 4 * (VALUES // TILE)
BYTES = SCALES_END + 2 * ROPE


def decode_fp8_ds_mla(latent_pages: ArrayLike) -> NDArray[np.float64]:
    """uint8 [..., 656] to float64 [..., 576], latent first."""
    raw = np.ascontiguousarray(np.asarray(latent_pages))
    values = raw[..., :VALUES].view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    scales = np.ascontiguousarray(raw[..., VALUES:SCALES_END]).view("<f4").astype(np.float64)
    rope = np.ascontiguousarray(raw[..., SCALES_END:]).view(ml_dtypes.bfloat16).astype(np.float64)
    return np.concatenate([values * np.repeat(scales, TILE, axis=-1), rope], axis=-1)


def encode_fp8_ds_mla(kv_c: ArrayLike, k_pe: ArrayLike, nudge: float = 1.0) -> NDArray[np.uint8]:
    """[..., 512] and [..., 64] to uint8 [..., 656]: scale = largest |value| of the tile / 448.

    The smallest scale is float32's smallest normal number, so that a tile of zeros divides. `nudge`
    multiplies what the values are divided by: it shows which of them lie next to a tie.
    """
    latent = np.asarray(kv_c).astype(np.float32)
    tiles = latent.reshape(*latent.shape[:-1], VALUES // TILE, TILE)
    scales = np.abs(tiles).max(axis=-1) / np.float32(448)
    scales = np.maximum(scales, np.finfo(np.float32).tiny).astype("<f4")
    values = np.clip(tiles / (scales[..., None] * np.float32(nudge)), -448, 448).astype(
        ml_dtypes.float8_e4m3fn
    )
    rope = np.ascontiguousarray(np.asarray(k_pe).astype(np.float32).astype(ml_dtypes.bfloat16))
    parts = [values.reshape(latent.shape).view(np.uint8), scales.view(np.uint8)]
    return np.concatenate([*parts, rope.view(np.uint8)], axis=-1)
