"""Where a device's pieces of q and of k lie in their sequence, and how a kernel is told.

A kernel counts keys from 0 and has the first query at `q_offset`. Masks depend on the difference
of positions only, so a piece of queries meets a piece of keys with the difference of their starts
as its offset. Chunks do too where each piece of keys starts with a chunk.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.masks import window_bounds

Arrays = dict[str, jax.Array]


class Piece(NamedTuple):
    """A run of positions that lie next to each other: `size` of them from `start` (traced) on."""

    start: jax.Array
    size: int


def pieces(device: jax.Array, n: int, length: int, zigzag: bool) -> list[Piece]:
    """The pieces of a sequence that a device holds, `length` positions of it."""
    if not zigzag:
        return [Piece(device * length, length)]
    half = length // 2
    return [Piece(device * half, half), Piece((2 * n - 1 - device) * half, half)]


def positional(arrays: Arrays, static: dict[str, Any]) -> bool:
    """Whether what a query sees, or how, depends on where it is."""
    return bool(
        static.get("causal")
        or any(side is not None for side in window_bounds(static.get("sliding_window")))
        or static.get("attention_chunk_size") is not None
        or "alibi_slopes" in arrays
    )


def met(
    arrays: Arrays, static: dict[str, Any], q_piece: Piece, kv_piece: Piece, batch: int
) -> Arrays:
    """`q_offset`, `q_lens` and `kv_lens` for one piece of queries and one of keys."""
    told = {}
    if positional(arrays, static):
        offset = jnp.asarray(arrays.get("q_offset", 0), jnp.int32)
        told["q_offset"] = jnp.broadcast_to(offset + q_piece.start - kv_piece.start, (batch,))
    for name, piece in (("q_lens", q_piece), ("kv_lens", kv_piece)):
        if name in arrays:
            told[name] = jnp.clip(arrays[name] - piece.start, 0, piece.size)
    return told


def meet_at_all(
    arrays: Arrays, static: dict[str, Any], q_piece: Piece, kv_piece: Piece
) -> jax.Array | None:
    """Whether some query of the one can see some key of the other, by position; None = always."""
    left, right = window_bounds(static.get("sliding_window"))
    offset = jnp.asarray(arrays.get("q_offset", 0), jnp.int32)
    # From the first query to the first key.
    apart = kv_piece.start - q_piece.start
    latest, earliest = jnp.max(offset) + q_piece.size - 1, jnp.min(offset)
    terms = []
    if static.get("causal"):
        terms.append(apart <= latest)
    elif right is not None:
        terms.append(apart < latest + right)
    if left is not None:
        terms.append(apart + kv_piece.size - 1 > earliest - left)
    chunk = static.get("attention_chunk_size")
    if chunk is not None:
        terms.append((q_piece.start + latest) // chunk >= kv_piece.start // chunk)
        last_key = kv_piece.start + kv_piece.size - 1
        terms.append((q_piece.start + earliest) // chunk <= last_key // chunk)
    if not terms:
        return None
    some = terms[0]
    for term in terms[1:]:
        some = some & term
    return some
