"""Partial results over parts of the keys, made one: weighed by what lse says each part holds.

    lse = log(sum over parts of exp(lse_i))        out = sum over parts of exp(lse_i - lse) * out_i

Everything is float32; a part that saw no key has lse -inf and weighs nothing. Weights are divided
by their sum, not by exp(lse): where all keys have a bias of -1e9, float32 has no room beside it for
the logarithm of their number.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Partial(NamedTuple):
    """Attention over some of the keys: out [..., d] and lse [...], float32."""

    out: jax.Array
    lse: jax.Array


def nothing(shape: tuple[int, ...], width: int) -> Partial:
    """Over no keys: rows of `shape`, values of `width`."""
    return Partial(jnp.zeros((*shape, width), jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32))


def merged(*parts: Partial) -> Partial:
    """Over the keys of all."""
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [part.lse for part in parts]))
    weights = [weight(part.lse, top) for part in parts]
    outs = [w[..., None] * part.out for w, part in zip(weights, parts, strict=True)]
    return _divided(sum(outs), sum(weights), top)


def with_sinks(part: Partial, sinks: jax.Array | None, exists: jax.Array | None) -> Partial:
    """With one more logit per head in the denominator.

    Args:
        part: rows [..., num_q_heads].
        sinks: float32 [num_q_heads], or None.
        exists: bool [...], which rows exist; None = all. The others have no sink.
    """
    if sinks is None:
        return part
    logits = jnp.broadcast_to(sinks, part.lse.shape)
    if exists is not None:
        logits = jnp.where(exists[..., None], logits, -jnp.inf)
    return merged(part, Partial(jnp.zeros_like(part.out), logits))


def merged_along(part: Partial, dim: int) -> Partial:
    """Over the keys of all parts that stand along a dimension."""
    top = jax.lax.stop_gradient(jnp.max(part.lse, axis=dim))
    weights = weight(part.lse, jnp.expand_dims(top, dim))
    return _divided(jnp.sum(weights[..., None] * part.out, axis=dim), weights.sum(dim), top)


def merged_over(part: Partial, axis: str) -> Partial:
    """Over the keys of all devices along a mesh axis; each gets the whole result."""
    top = jax.lax.pmax(part.lse, axis)
    mine = weight(part.lse, top)
    # Where nothing was seen there may be anything: kernels leave NaN for queries that are NaN.
    held = jnp.where(mine[..., None] == 0, 0, mine[..., None] * part.out)
    total, out = jax.lax.psum((mine, held), axis)
    return _divided(out, total, top)


def _divided(out: jax.Array, total: jax.Array, top: jax.Array) -> Partial:
    """Of sums of weighted outs and of weights, exp(lse - top)."""
    empty = total == 0
    total = jnp.where(empty, 1, total)
    return Partial(out / total[..., None], jnp.where(empty, -jnp.inf, top + jnp.log(total)))


def weight(lse: jax.Array, of: jax.Array) -> jax.Array:
    """exp(lse - of): the share of a part in a whole; 0 where the part, or the whole, is empty."""
    empty = lse == -jnp.inf
    return jnp.where(empty, 0.0, jnp.exp(jnp.where(empty, 0.0, lse - jnp.where(empty, 0.0, of))))
