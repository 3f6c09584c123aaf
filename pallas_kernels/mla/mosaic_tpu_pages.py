"""Where a striped page's tokens lie in its registers, and how what follows the last is zeroed."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_chip import LANES, SUBLANES


def clean_page(page: Any, num_keys: jax.Array, rope_dim: int) -> None:
    """Zeroes what a page in VMEM has after its first num_keys tokens.

    Args:
        page: reference, [parts, page_size / 2, LANES] of any dtype of a cache.
        num_keys: tokens to keep; none where it is negative.
        rope_dim: lanes of a token's rotary key.
    """
    parts, half, _ = page.shape
    packed = 4 // page.dtype.itemsize
    tile = SUBLANES * packed
    word = jax.lax.broadcasted_iota(jnp.int32, (half // packed, LANES), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (half // packed, LANES), 1)

    def kept(key):
        """Bits of words: `packed` tokens share one, the first of them is `key`."""
        words = jnp.zeros_like(word)
        for i in range(packed):
            bits = ((1 << 32 // packed) - 1) << (i * 32 // packed)
            words |= ((key + i - num_keys) >> 31) & jnp.int32(bits - (bits >> 31 << 32))
        return words

    line = packed * word
    second = tile * (1 + ((lane - rope_dim) >> 31))
    masks = [kept(line), kept(half + line), kept(line // tile * tile + line + second)]
    for part in range(parts):
        words = pltpu.bitcast(page[part], jnp.int32) & masks[part // (parts // 2)]
        page[part] = pltpu.bitcast(words, page.dtype)
