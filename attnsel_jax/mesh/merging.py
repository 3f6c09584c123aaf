"""Partial results over parts of the keys, made one: weighed by what lse says each part holds.

    lse = log(sum over parts of exp(lse_i))        out = sum over parts of exp(lse_i - lse) * out_i

Everything is float32; a part that saw no key has lse -inf and weighs nothing.
"""

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


def merged(a: Partial, b: Partial) -> Partial:
    """Over the keys of both."""
    lse = jnp.logaddexp(a.lse, b.lse)
    return Partial(sum(weight(x.lse, lse)[..., None] * x.out for x in (a, b)), lse)


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
    lse = jax.nn.logsumexp(part.lse, axis=dim)
    shares = weight(part.lse, jnp.expand_dims(lse, dim))
    return Partial(jnp.sum(shares[..., None] * part.out, axis=dim), lse)


def merged_over(part: Partial, axis: str) -> Partial:
    """Over the keys of all devices along a mesh axis; each gets the whole result."""
    top = jax.lax.pmax(part.lse, axis)
    mine = weight(part.lse, top)
    # Where nothing was seen there may be anything: kernels leave NaN for queries that are NaN.
    held = jnp.where(mine[..., None] == 0, 0, mine[..., None] * part.out)
    total, out = jax.lax.psum((mine, held), axis)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    return Partial(out / total[..., None], jnp.where(empty, -jnp.inf, top + jnp.log(total)))


def weight(lse: jax.Array, of: jax.Array) -> jax.Array:
    """exp(lse - of): the share of a part in a whole; 0 where the part, or the whole, is empty."""
    empty = lse == -jnp.inf
    return jnp.where(empty, 0.0, jnp.exp(jnp.where(empty, 0.0, lse - jnp.where(empty, 0.0, of))))
