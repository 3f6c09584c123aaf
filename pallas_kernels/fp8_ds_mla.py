"""DeepSeek's fp8 latent cache row: what its 656 bytes mean, and these bytes from true values.

512 float8_e4m3fn values, 4 float32 scales (one for each 128 values), 64 bfloat16 rotary values, in
that order, little-endian: vLLM's `fp8_ds_mla`, and FlashMLA's. A cache that lays out a row
otherwise (on TPU: `sparse_mla.mosaic_tpu_rows`) holds the same values and scales.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import bitcast_convert_type

from pallas_kernels.stored_values import divide

NAME = "fp8_ds_mla"
KV_LORA_RANK, ROPE_DIM, GROUP = 512, 64, 128
NUM_GROUPS = KV_LORA_RANK // GROUP
SCALES_AT, ROPE_AT = KV_LORA_RANK, KV_LORA_RANK + 4 * NUM_GROUPS  # bytes before them
ROW_BYTES = ROPE_AT + 2 * ROPE_DIM
LARGEST_E4M3 = 448.0
SMALLEST_SCALE = float(jnp.finfo(jnp.float32).tiny)  # so that a group of zeros divides


class Scaled(NamedTuple):
    """A latent as it is stored."""

    values: jax.Array  # float8_e4m3fn [..., 4, 128]
    scales: jax.Array  # float32 [..., 4]: true value = stored value * its group's scale


def scaled(kv_c: jax.Array) -> Scaled:
    """Latents [..., 512], true values, as they are stored.

    A group's scale is its largest |value| / 448, in float32, and no less than the smallest normal
    number; a value is rounded to nearest even, value / scale in float32.
    """
    groups = kv_c.astype(jnp.float32).reshape(*kv_c.shape[:-1], NUM_GROUPS, GROUP)
    scales = divide(jnp.max(jnp.abs(groups), axis=-1), jnp.float32(LARGEST_E4M3))
    scales = jnp.maximum(scales, jnp.float32(SMALLEST_SCALE))
    values = jnp.clip(divide(groups, scales[..., None]), -LARGEST_E4M3, LARGEST_E4M3)
    return Scaled(values.astype(jnp.float8_e4m3fn), scales)


def pack(kv_c: jax.Array, k_pe: jax.Array) -> jax.Array:
    """Latents and rotary keys as rows of bytes.

    Args:
        kv_c: [..., 512], true values.
        k_pe: [..., 64], true values.

    Returns:
        uint8 [..., 656].

    Raises:
        ValueError: a last dimension is not 512 or 64.
    """
    for name, x, size in (("kv_c", kv_c, KV_LORA_RANK), ("k_pe", k_pe, ROPE_DIM)):
        if x.shape[-1] != size:
            raise ValueError(
                f"{name}'s last dimension is {x.shape[-1]}, must be {size}: fp8_ds_mla rows have "
                f"one layout; other sizes go into a float8_e4m3fn cache with kv_scale"
            )
    batch = kv_c.shape[:-1]
    parts = (*scaled(kv_c), k_pe.astype(jnp.bfloat16))
    as_bytes = (bitcast_convert_type(part, jnp.uint8).reshape(*batch, -1) for part in parts)
    return jnp.concatenate(list(as_bytes), axis=-1)


def unpack(rows: jax.Array) -> jax.Array:
    """Rows of bytes as true values, the latent first.

    Args:
        rows: uint8 [..., 656].

    Returns:
        float32 [..., 576]; bytes that spell a NaN give NaN.

    Raises:
        ValueError: the dtype is not uint8 or the last dimension is not 656.
    """
    if rows.dtype != jnp.uint8 or rows.shape[-1] != ROW_BYTES:
        raise ValueError(
            f"rows is {rows.dtype} with last dimension {rows.shape[-1]}, must be uint8 with "
            f"{ROW_BYTES}: pack makes such rows"
        )
    batch = rows.shape[:-1]
    values, scales, rope = jnp.split(rows, (SCALES_AT, ROPE_AT), axis=-1)
    values = bitcast_convert_type(values, jnp.float8_e4m3fn).astype(jnp.float32)
    scales = bitcast_convert_type(scales.reshape(*batch, NUM_GROUPS, 4), jnp.float32)
    rope = bitcast_convert_type(rope.reshape(*batch, ROPE_DIM, 2), jnp.bfloat16)
    latent = values.reshape(*batch, NUM_GROUPS, GROUP) * scales[..., None]
    latent = latent.reshape(*batch, KV_LORA_RANK)
    return jnp.concatenate([latent, rope.astype(jnp.float32)], axis=-1)
