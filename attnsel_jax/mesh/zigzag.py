"""Zig-zag order: each of n devices holds part i and part 2n - 1 - i of a sequence cut into 2n.

Under a causal mask a device that holds the first positions has little to do and the last much; a
first part with a last one makes all equal. Sequences come, and go, in their natural order: device i
holds parts 2i and 2i + 1. Either way is one exchange of halves, each half to one device.

Reference: Brandon et al., "Striped Attention", 2023, for the imbalance; zig-zag as in Llama 3's
training (Grattafiori et al., 2024, section 3.3.2).
"""

import jax
import jax.numpy as jnp


def to_zigzag(x: jax.Array, axis_name: str, n: int, axis: int = 1) -> jax.Array:
    """A device's positions in zig-zag order, from natural order: parts i and 2n - 1 - i."""
    first, second = jnp.split(x, 2, axis)
    # Even parts (each device's first half) and odd ones: one part of either kind to every device.
    even = jax.lax.ppermute(first, axis_name, [(i, _owner(2 * i, n)) for i in range(n)])
    odd = jax.lax.ppermute(second, axis_name, [(i, _owner(2 * i + 1, n)) for i in range(n)])
    # Part i is even on even devices, where 2n - 1 - i is odd.
    mine_even = jax.lax.axis_index(axis_name) % 2 == 0
    low, high = jnp.where(mine_even, even, odd), jnp.where(mine_even, odd, even)
    return jnp.concatenate([low, high], axis)


def from_zigzag(x: jax.Array, axis_name: str, n: int, axis: int = 1) -> jax.Array:
    """The way back."""
    low, high = jnp.split(x, 2, axis)
    mine_even = jax.lax.axis_index(axis_name) % 2 == 0
    even, odd = jnp.where(mine_even, low, high), jnp.where(mine_even, high, low)
    first = jax.lax.ppermute(even, axis_name, [(_owner(2 * i, n), i) for i in range(n)])
    second = jax.lax.ppermute(odd, axis_name, [(_owner(2 * i + 1, n), i) for i in range(n)])
    return jnp.concatenate([first, second], axis)


def _owner(part: int, n: int) -> int:
    return part if part < n else 2 * n - 1 - part
