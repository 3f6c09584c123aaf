"""How logits become weights in the TPU kernels of `paged`: cap, ALiBi, masks, running softmax.

Logits are in base 2. An unseen key's logit is UNSEEN, far below where a running maximum starts, so
that its weight is 0 whatever the row has seen so far.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

START, UNSEEN = -1e30, -1e38
LN2 = 0.6931471805599453


def join(logits, q_pos, kv_pos, *, soft_cap: float | None, slope=None):
    """Soft cap and ALiBi, as far as they are asked for."""
    if soft_cap is not None:
        logits = jnp.tanh(logits) * soft_cap
    if slope is not None:
        logits = logits - slope * jnp.abs(q_pos - kv_pos).astype(jnp.float32)
    return logits


def mask(logits, kv_pos, limits):
    """UNSEEN for keys outside the query's limits, (first or None, last)."""
    first, last = limits
    may = kv_pos <= last
    return jnp.where(may if first is None else may & (kv_pos >= first), logits, UNSEEN)


def update(logits: jax.Array, m: jax.Array, l: jax.Array, *, by_lane: bool = False):
    """One step of the running softmax.

    Args:
        logits: [rows, keys].
        m, l: [rows, 128], the same along lanes; or l by lane.
        by_lane: whether l is summed by lane, and all lanes of it are to be added at the end.

    Returns:
        weights [rows, keys], the factor [rows, 128] on what was summed before, m, l.
    """
    m_next = jnp.maximum(m, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.exp2(logits - m_next[:, :1])
    shrink = jnp.exp2(m - m_next)
    lanes = m.shape[1]
    if by_lane and weights.shape[1] % lanes == 0:
        every = range(0, weights.shape[1], lanes)
        total = functools.reduce(jnp.add, [weights[:, i : i + lanes] for i in every])
    else:
        total = jnp.sum(weights, axis=1, keepdims=True)
        if by_lane:
            total = jnp.where(lax.broadcasted_iota(jnp.int32, m.shape, 1) == 0, total, 0.0)
    return weights, shrink, m_next, l * shrink + total


def finish(m: jax.Array, l: jax.Array, sink, v_factor):
    """The factor on the accumulated output, and the lse: [rows, 128] each."""
    m_last = jnp.maximum(m, sink)
    shrink = jnp.exp2(m - m_last)
    total = l * shrink + jnp.exp2(sink - m_last)
    some = total != 0  # NaN stays NaN
    safe = jnp.where(some, total, 1.0)
    lse = jnp.where(some, (m_last + jnp.log2(safe)) * LN2, -jnp.inf)
    return jnp.where(some, shrink * v_factor / safe, 0.0), lse


def widened(x: jax.Array, lanes: int) -> jax.Array:
    """[rows, 128], the same along lanes, as [rows, lanes]."""
    if lanes % x.shape[1]:
        return jnp.broadcast_to(x[:, :1], (x.shape[0], lanes))
    return jnp.concatenate([x] * (lanes // x.shape[1]), axis=1)
