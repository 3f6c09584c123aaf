"""Partial results over parts of the keys, made one: weighed by what lse says each part holds.

    lse = log(sum over parts of exp(lse_i))        out = sum over parts of exp(lse_i - lse) * out_i

Everything is float32; a part that saw no key has lse -inf and weighs nothing. Weights are divided
by their sum, not by exp(lse): where all keys have a bias of -1e9, float32 has no room beside it for
the logarithm of their number. Of such parts exp(lse_i) says what they hold when it is divided by
their correction.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Partial(NamedTuple):
    """Attention over some of the keys, float32.

    Attributes:
        out: [..., d].
        lse: [...].
        correction: as lse: what exp(logit - lse) is multiplied by to be a weight; None = 1.
    """

    out: jax.Array
    lse: jax.Array
    correction: jax.Array | None = None


def nothing(shape: tuple[int, ...], width: int, *, corrected: bool = False) -> Partial:
    """Over no keys: rows of `shape`, values of `width`."""
    lse = jnp.full(shape, -jnp.inf, jnp.float32)
    return Partial(
        jnp.zeros((*shape, width), jnp.float32), lse, jnp.ones_like(lse) if corrected else None
    )


def merged(*parts: Partial) -> Partial:
    """Over the keys of all."""
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [part.lse for part in parts]))
    weights = [_held(part, top) for part in parts]
    outs = [w[..., None] * part.out for w, part in zip(weights, parts, strict=True)]
    corrected = any(part.correction is not None for part in parts)
    return _divided(sum(outs), sum(weights), top, corrected=corrected)


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
    weights = _held(part, jnp.expand_dims(top, dim))
    out, total = jnp.sum(weights[..., None] * part.out, axis=dim), weights.sum(dim)
    return _divided(out, total, top, corrected=part.correction is not None)


def merged_over(part: Partial, axis: str) -> Partial:
    """Over the keys of all devices along a mesh axis; each gets the whole result."""
    top = jax.lax.pmax(part.lse, axis)
    mine = _held(part, top)
    # Where nothing was seen there may be anything: kernels leave NaN for queries that are NaN.
    held = jnp.where(mine[..., None] == 0, 0, mine[..., None] * part.out)
    total, out = jax.lax.psum((mine, held), axis)
    return _divided(out, total, top, corrected=part.correction is not None)


def _held(part: Partial, top: jax.Array) -> jax.Array:
    """The sum of a part's exp(logit - top)."""
    share = weight(part.lse, top)
    return share if part.correction is None else share / part.correction


def _divided(out: jax.Array, total: jax.Array, top: jax.Array, *, corrected: bool) -> Partial:
    """Of sums of weighted outs and of weights, exp(lse - top)."""
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    correction = None
    if corrected:
        correction = jnp.where(jnp.abs(lse) < jnp.inf, jnp.exp(lse - top) / total, 1.0)
    return Partial(out / total[..., None], lse, correction)


def share_of(part: Partial, whole: Partial) -> jax.Array:
    """What a part of a whole is weighed by in it; 0 where either is empty."""
    share = _held(part, jnp.where(whole.lse == -jnp.inf, jnp.inf, whole.lse))
    return share if whole.correction is None else share * whole.correction


def weight(lse: jax.Array, of: jax.Array) -> jax.Array:
    """exp(lse - of): the share of a part in a whole; 0 where the part, or the whole, is empty."""
    empty = lse == -jnp.inf
    return jnp.where(empty, 0.0, jnp.exp(jnp.where(empty, 0.0, lse - jnp.where(empty, 0.0, of))))
