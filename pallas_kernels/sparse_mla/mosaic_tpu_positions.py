"""Which rows of the cache each token gathers: positions to rows, in XLA, before the kernel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # a logit that no query sees: finite, so that no difference of two is NaN


class Chosen(NamedTuple):
    """What the tokens gather.

    Attributes:
        rows: int32 [num_tokens, 1, keys]: slot * parts; an entry that names nothing repeats one
            that does, so that what it brings is finite, and 0 where none does.
        bias: float32 [num_tokens, 1, keys]: 0, or MASKED where an entry names nothing.
        groups: int32 [num_tokens]: groups of keys with an entry that names something; at least 1.
        tokens: int32 [1]: tokens of sequences that exist.
    """

    rows: jax.Array
    bias: jax.Array
    groups: jax.Array
    tokens: jax.Array


def chosen_rows(
    topk_indices: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    page_size: int,
    num_pages: int,
    parts: int,
    group: int,
) -> Chosen:
    """Finds the rows of every entry that its token sees.

    Args:
        topk_indices, page_table, kv_lens, cu_q_lens, num_seqs: as in the contract.
        page_size, num_pages, parts: of the cache.
        group: keys of a group; lists are padded to whole ones.
    """
    num_tokens, topk = topk_indices.shape
    cu_q_lens = jnp.clip(cu_q_lens, 0, num_tokens)
    pages_per_seq = page_table.shape[1]
    exists = jnp.arange(kv_lens.shape[0]) < num_seqs
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    ends = jnp.where(exists, cu_q_lens[1:], jnp.iinfo(jnp.int32).max)
    seq = jnp.sum(ends[None, :] <= token[:, None], axis=1, dtype=jnp.int32)
    is_real = seq < num_seqs
    seq = jnp.minimum(seq, kv_lens.shape[0] - 1)
    kv_len = jnp.minimum(kv_lens[seq], pages_per_seq * page_size)
    q_pos = jnp.where(is_real, kv_len - cu_q_lens[seq + 1] + token, -1)
    topk_indices = jnp.pad(topk_indices, ((0, 0), (0, -topk % group)), constant_values=-1)
    seen = (topk_indices >= 0) & (topk_indices <= q_pos[:, None])
    column = jnp.clip(topk_indices // page_size, 0, pages_per_seq - 1)
    page = jnp.clip(page_table[seq[:, None], column], 0, num_pages - 1)
    rows = (page * page_size + topk_indices % page_size) * parts
    some = jnp.max(jnp.where(seen, rows, 0), axis=1, keepdims=True)
    last = jnp.max(jnp.where(seen, jnp.arange(seen.shape[1]), 0), axis=1)
    return Chosen(
        jnp.where(seen, rows, some)[:, None],
        jnp.where(seen, jnp.float32(0), jnp.float32(MASKED))[:, None],
        (last // group + 1).astype(jnp.int32),
        cu_q_lens[num_seqs].reshape(1),
    )
