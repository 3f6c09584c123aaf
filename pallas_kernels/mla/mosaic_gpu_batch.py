"""Which queries a block of the grid works on: found by the block itself, in the ragged batch.

Tiles of `block_q` tokens, none across two sequences. Sequence s begins at tile
`(cu_q_lens[s] + s * (block_q - 1)) // block_q`: that leaves each at least the tiles that it needs,
so a block finds its sequence by bisection, and nothing has to be listed before the kernel. Tiles
left over are empty. The tokens after the last sequence are one more sequence, without keys.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Batch(NamedTuple):
    """A ragged batch: refs or arrays, and what is static of it."""

    kv_lens: Any  # int32 [max_num_seqs]
    cu_q_lens: Any  # int32 [max_num_seqs + 1]
    num_seqs: Any  # int32 [1]
    num_tokens: int
    most_keys: int  # positions that a row of the page table can name


class Tile(NamedTuple):
    """The queries of one tile; scalars."""

    seq: jax.Array  # row of page_table; in range for padding too
    token: jax.Array  # its first
    count: jax.Array  # tokens, 0 ... block_q
    q_pos: jax.Array  # position of the first; may be negative
    stop: jax.Array  # keys that some query of it sees: 0 ... stop - 1
    kv_len: jax.Array  # keys that exist


def num_tiles(num_tokens: int, max_num_seqs: int, block_q: int) -> int:
    """The most tiles that a batch of these sizes has."""
    return (num_tokens + (max_num_seqs + 1) * (block_q - 1)) // block_q


def first_tile(start: jax.Array, seq: jax.Array, block_q: int) -> jax.Array:
    """The first tile of a sequence whose first token is `start`."""
    return jax.lax.div(start + seq * (block_q - 1), jnp.full_like(start, block_q))


def find_tile(index: jax.Array, batch: Batch, block_q: int) -> Tile:
    """The tile of a number, 0 ... num_tiles - 1."""
    max_num_seqs = batch.kv_lens.shape[0]
    num_seqs = batch.num_seqs[0]

    def start(seq):
        return jnp.clip(batch.cu_q_lens[seq], 0, batch.num_tokens)

    def halve(_, bounds):
        low, high = bounds  # low begins at or before the tile, high + 1 after it
        middle = jax.lax.div(low + high + 1, 2)
        begins = first_tile(start(middle), middle, block_q) <= index
        return jnp.where(begins, middle, low), jnp.where(begins, high, middle - 1)

    seq, _ = jax.lax.fori_loop(0, max_num_seqs.bit_length(), halve, (jnp.int32(0), num_seqs))
    is_padding = seq >= num_seqs
    seq_or_last = jnp.minimum(seq, max_num_seqs - 1)
    first = start(seq)
    stop = jnp.where(is_padding, batch.num_tokens, start(seq_or_last + 1))
    kv_len = jnp.clip(batch.kv_lens[seq_or_last], 0, batch.most_keys)
    kv_len = jnp.where(is_padding, 0, kv_len)
    token = first + (index - first_tile(first, seq, block_q)) * block_q
    count = jnp.clip(stop - token, 0, block_q)
    q_pos = kv_len - (stop - token)
    return Tile(seq_or_last, token, count, q_pos, jnp.clip(q_pos + count, 0, kv_len), kv_len)


def tiles_of_tokens(batch: Batch, block_q: int) -> tuple[jax.Array, jax.Array]:
    """Where each token is: (tile, place in it), int32 [num_tokens]; on arrays, outside a kernel."""
    token = jnp.arange(batch.num_tokens, dtype=jnp.int32)
    if block_q == 1:
        return token, jnp.zeros_like(token)
    num_seqs = batch.num_seqs[0]
    number = jnp.arange(batch.cu_q_lens.shape[0], dtype=jnp.int32)
    starts = jnp.clip(batch.cu_q_lens, 0, batch.num_tokens)
    starts = jnp.where(number <= num_seqs, starts, batch.num_tokens)
    seq = jnp.searchsorted(starts, token, side="right", method="compare_all").astype(jnp.int32) - 1
    seq = jnp.minimum(seq, num_seqs)
    inside = token - starts[seq]
    return first_tile(starts[seq], seq, block_q) + inside // block_q, inside % block_q
