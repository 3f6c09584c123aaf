"""Which rows of the cache each token attends to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Chosen(NamedTuple):
    """The rows of every token, in the order in which it named them."""

    rows: jax.Array  # int32 [num_tokens, whole pairs of blocks]; past the last row: none
    used: jax.Array  # int32 [num_tokens]: entries up to the last that is a row


def chosen_rows(
    topk_indices: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    num_pages: int,
    page_size: int,
    multiple: int,
) -> Chosen:
    """Positions as rows of the cache; what a token does not see is none.

    Args:
        topk_indices, page_table, kv_lens, cu_q_lens, num_seqs: as in the contract.
        num_pages, page_size: the cache's.
        multiple: lists are padded to a multiple of it.
    """
    num_tokens, topk = topk_indices.shape
    max_num_seqs, pages_per_seq = page_table.shape
    exists = jnp.arange(max_num_seqs, dtype=jnp.int32) < num_seqs
    stops = jnp.where(exists, jnp.clip(cu_q_lens[1:], 0, num_tokens), num_tokens)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    seq = jnp.searchsorted(stops, token, side="right", method="compare_all").astype(jnp.int32)
    is_real = (seq < num_seqs) & (seq < max_num_seqs)
    seq = jnp.minimum(seq, max_num_seqs - 1)
    kv_len = jnp.clip(kv_lens[seq], 0, pages_per_seq * page_size)
    q_pos = jnp.where(is_real, kv_len - stops[seq] + token, -1)
    sees = (topk_indices >= 0) & (topk_indices <= q_pos[:, None])
    column = jnp.clip(topk_indices // page_size, 0, pages_per_seq - 1)
    rows = page_table[seq[:, None], column] * page_size + topk_indices % page_size
    none = num_pages * page_size
    rows = jnp.where(sees, rows, none).astype(jnp.int32)
    number = jnp.arange(1, topk + 1, dtype=jnp.int32)
    used = jnp.max(jnp.where(sees, number, 0), axis=1, initial=0)
    rows = jnp.pad(rows, ((0, 0), (0, -topk % multiple)), constant_values=none)
    return Chosen(rows, used)
