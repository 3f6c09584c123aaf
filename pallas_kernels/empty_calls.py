"""What a call gives that has no query, or no key: no kernel runs, for a grid of nothing is none."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

MAY_BE_EMPTY = ("batch", "q_len", "kv_len", "num_tokens")  # every other size is at least 1


def is_empty(dims: Mapping[str, int]) -> bool:
    """Whether sizes by name are those of a call with no query, or no key."""
    return 0 in (dims.get(name) for name in MAY_BE_EMPTY)


def dense(
    q: jax.Array, v: jax.Array, sinks: jax.Array | None, q_lens: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Out and lse of dense attention where no query sees a key; arguments are the contract's."""
    out = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    lse = jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
    if sinks is None:
        return out, lse
    most = jnp.full(q.shape[:1], q.shape[1], jnp.int32) if q_lens is None else q_lens
    exists = jnp.arange(q.shape[1], dtype=jnp.int32) < most[:, None]
    return out, jnp.where(exists[..., None], sinks, lse)


def ragged(
    queries: jax.Array, pages: jax.Array, width: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Out, lse and the cache as it was, of no tokens.

    Args:
        queries: [0, num_q_heads, size].
        pages: the cache.
        width: of out; None = size.
    """
    num_heads, size = queries.shape[1:]
    out = jnp.zeros((0, num_heads, width or size), queries.dtype)
    return out, jnp.zeros((0, num_heads), jnp.float32), pages


def scores(dims: Mapping[str, int]) -> jax.Array:
    """The indexer's scores of no tokens, float32 [0, positions]."""
    return jnp.zeros((0, dims["pages_per_seq"] * dims["page_size"]), jnp.float32)
