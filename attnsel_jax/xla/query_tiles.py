"""Which tokens of a ragged batch are computed together: tiles of queries, each of one sequence.

Sequences of any length, zero included, are cut into tiles of `block_q` queries; the last tile of a
sequence may be partly empty. How many tiles a batch needs is known at run time only, but it is at
most `(num_tokens + max_num_seqs * (block_q - 1)) // block_q`: shapes are static, and the tiles left
over are empty.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tiles(NamedTuple):
    """What is known of each tile: int32 [num_tiles]. An empty tile has q_len 0 and kv_len 0."""

    seq: jax.Array  # row of page_table; in range for empty tiles too
    first_token: jax.Array  # row of q of the tile's first query
    q_len: jax.Array  # queries in the tile, 0 ... block_q
    first_q_pos: jax.Array  # position of the tile's first query
    kv_len: jax.Array  # keys of the sequence


class Tokens(NamedTuple):
    """Where each token's result is: [num_tokens]. Padding exists nowhere; its tile is junk."""

    tile: jax.Array
    row: jax.Array
    exists: jax.Array


def query_tiles(
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    num_tokens: int,
    block_q: int,
    pages_per_seq: int,
    page_size: int,
) -> tuple[Tiles, Tokens]:
    """Cuts a ragged batch into tiles of `block_q` queries.

    Args:
        kv_lens: int32 [max_num_seqs].
        cu_q_lens: int32 [max_num_seqs + 1]; junk past num_seqs is not looked at.
        num_seqs: int32 [].
        num_tokens: rows of q, padding included.
        block_q: queries in a tile.
        pages_per_seq, page_size: the cache's; kv_lens are held to what a page table can name.
    """
    max_num_seqs = kv_lens.shape[0]
    exists = jnp.arange(max_num_seqs, dtype=jnp.int32) < num_seqs
    q_start = jnp.where(exists, jnp.clip(cu_q_lens[:-1], 0, num_tokens), num_tokens)
    q_stop = jnp.where(exists, jnp.clip(cu_q_lens[1:], 0, num_tokens), num_tokens)
    q_lens = jnp.maximum(q_stop - q_start, 0)
    kv_lens = jnp.where(exists, jnp.clip(kv_lens, 0, pages_per_seq * page_size), 0)

    tiles_of_seq = -(-q_lens // block_q)
    last_tile = jnp.cumsum(tiles_of_seq, dtype=jnp.int32)  # one past each sequence's last
    num_tiles = min(num_tokens, (num_tokens + max_num_seqs * (block_q - 1)) // block_q)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    used = tile < last_tile[-1]
    seq = jnp.minimum(_position_in(last_tile, tile), max_num_seqs - 1)
    first = (tile - (last_tile - tiles_of_seq)[seq]) * block_q  # query in its sequence

    token = jnp.arange(num_tokens, dtype=jnp.int32)
    seq_of_token = jnp.minimum(_position_in(q_stop, token), max_num_seqs - 1)
    q_in_seq = token - q_start[seq_of_token]
    return (
        Tiles(
            seq=seq,
            first_token=jnp.where(used, q_start[seq] + first, 0),
            q_len=jnp.where(used, jnp.minimum(q_lens[seq] - first, block_q), 0),
            first_q_pos=kv_lens[seq] - q_lens[seq] + first,
            kv_len=jnp.where(used, kv_lens[seq], 0),
        ),
        Tokens(
            tile=(last_tile - tiles_of_seq)[seq_of_token] + q_in_seq // block_q,
            row=q_in_seq % block_q,
            exists=(q_in_seq >= 0) & (q_in_seq < q_lens[seq_of_token]),
        ),
    )


def _position_in(stops: jax.Array, index: jax.Array) -> jax.Array:
    """First entry of ascending `stops` that is above each index: whose range it falls in."""
    return jnp.searchsorted(stops, index, side="right").astype(jnp.int32)
