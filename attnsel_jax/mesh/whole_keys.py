"""The two forms in which each device meets all keys at once: all-gather, and all-to-all (Ulysses).

All-gather: every device gets all keys and values, and keeps its queries. All-to-all: heads are
exchanged for positions, so that a device has whole sequences of some heads, and back after.
Collectives are JAX's own, so gradients go through them, and kernels need no lse.

Reference: Jacobs et al., "DeepSpeed Ulysses", 2023, for the latter.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnsel_jax.mesh.positions import met, pieces
from attnsel_jax.mesh.ring import BY_KEY, LOGITS

Arrays = dict[str, jax.Array]
Kernel = Callable[..., tuple[jax.Array, jax.Array]]


def all_gather_attention(
    kernel: Kernel, arrays: Arrays, static: dict[str, Any], axis: str, n: int
) -> tuple[jax.Array, jax.Array]:
    """Out and lse of this device's queries over all keys; arguments as of `ring_attention`."""
    whole = {name: _gathered(arrays[name], axis) for name in BY_KEY if name in arrays}
    (mine,) = pieces(jax.lax.axis_index(axis), n, arrays["q"].shape[1], zigzag=False)
    (every,) = pieces(jnp.int32(0), n, whole["k"].shape[1], zigzag=False)
    return kernel(arrays | whole | met(arrays, static, mine, every, arrays["q"].shape[0]))


def _gathered(x: jax.Array, axis: str) -> jax.Array:
    """All positions, the second dimension, of what each device has some of.

    They are gathered as rows of a matrix: of more dimensions, TPU compilers make the gradient's
    reduce-scatter an all-reduce, which sends twice as much (of a matrix too on 16 v6e).
    """
    first = jnp.moveaxis(x, 1, 0)
    rows = jax.lax.all_gather(first.reshape(first.shape[0], -1), axis, axis=0, tiled=True)
    return jnp.moveaxis(rows.reshape(-1, *first.shape[1:]), 0, 1)


def all_to_all_attention(
    kernel: Kernel, arrays: Arrays, axis: str, n: int
) -> tuple[jax.Array, jax.Array]:
    """Out and lse of this device's queries; between, whole sequences of an n-th of the heads."""

    def of_heads(x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)

    def of_positions(x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)

    given = dict(arrays)
    copies = copies_of_kv_heads(arrays["k"].shape[2], n)
    for name in ("k", "v"):
        given[name] = of_heads(jnp.repeat(arrays[name], copies, axis=2))
    given["q"] = of_heads(arrays["q"])
    for name in ("q_segment_ids", "kv_segment_ids"):
        if name in arrays:
            given[name] = jax.lax.all_gather(arrays[name], axis, axis=1, tiled=True)

    def own_heads(x: jax.Array, dim: int) -> jax.Array:
        size = x.shape[dim] // n
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * size, size, dim)

    for name in ("alibi_slopes", "sinks"):
        if name in arrays:
            given[name] = own_heads(arrays[name], 0)
    for name in LOGITS:
        if name in arrays:  # [batch, heads, q_len, kv_len]; a size of 1 stands for all
            x, (_, q_len, heads, _) = arrays[name], arrays["q"].shape
            each_head, each_query = x.shape[1] == heads, x.shape[2] == q_len
            if each_head and each_query:
                x = jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)
            elif each_query:
                x = jax.lax.all_gather(x, axis, axis=2, tiled=True)
            elif each_head:
                x = own_heads(x, 1)
            given[name] = x
    out, lse = kernel(given)
    return of_positions(out), of_positions(lse)


def copies_of_kv_heads(num_kv_heads: int, n: int) -> int:
    """How often each kv head is repeated so that n devices can have some each."""
    return 1 if num_kv_heads % n == 0 else n // num_kv_heads
