"""DeepSeek's fp8 latent cache row: 656 bytes a token, packed and unpacked bit by bit.

512 float8_e4m3fn values, 4 float32 scales (one for each 128 values), 64 bfloat16 rotary values, in
that order, little-endian. The layout is vLLM's `fp8_ds_mla` and FlashMLA's.
"""

import jax
import jax.numpy as jnp
from jax.lax import bitcast_convert_type

from attnsel_jax.xla.cache_writes import divide

KV_LORA_RANK, ROPE_DIM, GROUP = 512, 64, 128
NUM_GROUPS = KV_LORA_RANK // GROUP
ROW_BYTES = KV_LORA_RANK + 4 * NUM_GROUPS + 2 * ROPE_DIM
LARGEST_E4M3 = 448.0
SMALLEST_SCALE = float(jnp.finfo(jnp.float32).tiny)  # so that a group of zeros divides


def pack(kv_c: jax.Array, k_pe: jax.Array) -> jax.Array:
    """Latents and rotary keys as rows of bytes.

    Args:
        kv_c: [..., 512], true values.
        k_pe: [..., 64], true values.

    Returns:
        uint8 [..., 656]. A group's scale is its largest |value| / 448, in float32, and no less than
        the smallest normal number; a value is rounded to nearest even, value / scale in float32.

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
    groups = kv_c.astype(jnp.float32).reshape(*batch, NUM_GROUPS, GROUP)
    scales = divide(jnp.max(jnp.abs(groups), axis=-1), jnp.float32(LARGEST_E4M3))
    scales = jnp.maximum(scales, jnp.float32(SMALLEST_SCALE))
    values = jnp.clip(divide(groups, scales[..., None]), -LARGEST_E4M3, LARGEST_E4M3)
    parts = (values.astype(jnp.float8_e4m3fn), scales, k_pe.astype(jnp.bfloat16))
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
    first, second = KV_LORA_RANK, KV_LORA_RANK + 4 * NUM_GROUPS
    values = bitcast_convert_type(rows[..., :first], jnp.float8_e4m3fn).astype(jnp.float32)
    scales = rows[..., first:second].reshape(*batch, NUM_GROUPS, 4)
    scales = bitcast_convert_type(scales, jnp.float32)
    rope = rows[..., second:].reshape(*batch, ROPE_DIM, 2)
    rope = bitcast_convert_type(rope, jnp.bfloat16).astype(jnp.float32)
    latent = values.reshape(*batch, NUM_GROUPS, GROUP) * scales[..., None]
    return jnp.concatenate([latent.reshape(*batch, KV_LORA_RANK), rope], axis=-1)
