"""Softmax over keys that come block by block: the running maximum, sum and unnormalised output.

Rows are whatever dimensions come first; logits are [..., rows, keys], values [..., keys, width].
Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Running(NamedTuple):
    """What the keys so far have come to; float32.

    Attributes:
        m: [..., rows]: largest logit seen; -inf while none is.
        l: [..., rows]: sum of exp(logit - m).
        acc: [..., rows, width]: sum of exp(logit - m) * value.
    """

    m: jax.Array
    l: jax.Array
    acc: jax.Array


def start(shape: tuple[int, ...], width: int) -> Running:
    """Before the first key: rows of `shape`, values of `width`."""
    return Running(
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, width), jnp.float32),
    )


def add_block(
    running: Running,
    logits: jax.Array,
    seen: jax.Array,
    values: jax.Array,
    precision: jax.lax.Precision,
) -> Running:
    """After one more block of keys.

    Args:
        running: before it.
        logits: float32 [..., rows, keys].
        seen: bool, broadcastable to logits.
        values: float32 [..., keys, width]; finite, also where nothing sees them.
        precision: of the dot with the values.
    """
    logits = jnp.where(seen, logits, -jnp.inf)
    m = jnp.maximum(running.m, logits.max(axis=-1))
    finite_m = jnp.where(m == -jnp.inf, 0, m)
    weights = jnp.exp(logits - finite_m[..., None])
    decay = jnp.exp(running.m - finite_m)
    added = jnp.matmul(weights, values, precision=precision)
    return Running(
        m,
        running.l * decay + weights.sum(axis=-1),
        running.acc * decay[..., None] + added,
    )


def finish(running: Running) -> tuple[jax.Array, jax.Array]:
    """After the last key: out [..., rows, width] and lse [..., rows]; 0 and -inf for empty rows."""
    empty = running.l == 0
    total = jnp.where(empty, 1, running.l)
    lse = jnp.where(empty, -jnp.inf, running.m + jnp.log(total))
    return running.acc / total[..., None], lse


def dot_precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision:
    """Float32 queries are multiplied in float32 on every chip, others at the chip's default."""
    highest = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if highest else jax.lax.Precision.DEFAULT
