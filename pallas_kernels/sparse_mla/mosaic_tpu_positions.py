"""Which rows of the cache each token gathers: positions to rows, in XLA, before the kernel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # a logit that no query sees: finite, so that no difference of two is NaN


class Placed(NamedTuple):
    """Where each token stands: int32 or bool [num_tokens].

    Attributes:
        seq: row of the page table; of padding tokens, some row.
        first: the first token of its sequence.
        q_len: new tokens of its sequence.
        q_pos: its position; -1 of padding tokens.
        is_real: whether it is a sequence's.
    """

    seq: jax.Array
    first: jax.Array
    q_len: jax.Array
    q_pos: jax.Array
    is_real: jax.Array


class Shared(NamedTuple):
    """Which tokens go through the masked half, and which through the gathering one.

    Attributes:
        tiles: int32 [num_tiles] each: first token, tokens, position of the first, row of the page
            table; of the listed ones.
        num_tiles, num_gathered: int32 [1]: how many are listed.
        gathered: int32 [num_tokens]: the others, in order.
    """

    tiles: tuple[jax.Array, ...]
    num_tiles: jax.Array
    gathered: jax.Array
    num_gathered: jax.Array


def placed_tokens(
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    num_tokens: int,
    most_keys: int,
) -> Placed:
    """Where each token of a ragged batch stands.

    Args:
        kv_lens, cu_q_lens, num_seqs: as in the contract.
        num_tokens: of the arrays.
        most_keys: positions that a row of the page table can name; longer lengths are cut.
    """
    cu_q_lens = jnp.clip(cu_q_lens, 0, num_tokens)
    exists = jnp.arange(kv_lens.shape[0]) < num_seqs
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    ends = jnp.where(exists, cu_q_lens[1:], jnp.iinfo(jnp.int32).max)
    seq = jnp.sum(ends[None, :] <= token[:, None], axis=1, dtype=jnp.int32)
    is_real = seq < num_seqs
    seq = jnp.minimum(seq, kv_lens.shape[0] - 1)
    kv_len = jnp.minimum(kv_lens[seq], most_keys)
    q_pos = jnp.where(is_real, kv_len - cu_q_lens[seq + 1] + token, -1)
    first = cu_q_lens[seq]
    return Placed(seq, first, cu_q_lens[seq + 1] - first, q_pos, is_real)


def shared_tokens(placed: Placed, *, block_q: int, keys_per_token: int) -> Shared:
    """Shares tokens out between the two halves.

    A tile is `block_q` tokens of a sequence, or what is left of it. It is masked where it is at
    least half full, and has no more keys than that many for each token.

    Args:
        placed: the tokens.
        block_q: tokens of a tile; 0: none is masked.
        keys_per_token: of a masked tile.
    """
    num_tokens = placed.seq.shape[0]
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    if not block_q:
        none = jnp.zeros((1,), jnp.int32)
        count = jnp.sum(placed.is_real, dtype=jnp.int32).reshape(1)
        return Shared((none,) * 4, none, token, count)
    before = (token - placed.first) % block_q  # tokens of its tile
    count = jnp.minimum(placed.q_len - (token - placed.first - before), block_q)
    keys = placed.q_pos - before + count
    is_masked = placed.is_real & (2 * count >= block_q) & (keys > 0)
    is_masked &= keys <= count * keys_per_token
    begins = is_masked & (before == 0)
    tiles = jnp.sort(jnp.where(begins, token, num_tokens))[: max(1, 2 * num_tokens // block_q)]
    first = jnp.minimum(tiles, num_tokens - 1)
    is_gathered = placed.is_real & ~is_masked
    gathered = jnp.sort(jnp.where(is_gathered, token, num_tokens))
    return Shared(
        (first, count[first], placed.q_pos[first], placed.seq[first]),
        jnp.sum(begins, dtype=jnp.int32).reshape(1),
        jnp.minimum(gathered, num_tokens - 1),
        jnp.sum(is_gathered, dtype=jnp.int32).reshape(1),
    )


class Chosen(NamedTuple):
    """What the tokens gather.

    Attributes:
        rows: int32 [num_tokens, 1, keys]: slot * parts; an entry that names nothing repeats one
            that does, so that what it brings is finite, and 0 where none does.
        bias: float32 [num_tokens, 1, keys]: 0, or MASKED where an entry names nothing.
        groups: int32 [num_tokens]: groups of keys with an entry that names something; at least 1.
    """

    rows: jax.Array
    bias: jax.Array
    groups: jax.Array


def chosen_rows(
    topk_indices: jax.Array,
    page_table: jax.Array,
    placed: Placed,
    *,
    page_size: int,
    parts: int,
    group: int,
) -> Chosen:
    """Finds the rows of every entry that its token sees.

    Args:
        topk_indices: as in the contract.
        page_table: the same, of pages that exist.
        placed: the tokens.
        page_size, parts: of the cache.
        group: keys of a group; lists are padded to whole ones.
    """
    seq, q_pos = placed.seq, placed.q_pos
    pages_per_seq = page_table.shape[1]
    topk_indices = jnp.pad(
        topk_indices, ((0, 0), (0, -topk_indices.shape[1] % group)), constant_values=-1
    )
    seen = (topk_indices >= 0) & (topk_indices <= q_pos[:, None])
    column = jnp.clip(topk_indices // page_size, 0, pages_per_seq - 1)
    page = page_table[seq[:, None], column]
    rows = (page * page_size + topk_indices % page_size) * parts
    some = jnp.max(jnp.where(seen, rows, 0), axis=1, keepdims=True)
    last = jnp.max(jnp.where(seen, jnp.arange(seen.shape[1]), 0), axis=1)
    return Chosen(
        jnp.where(seen, rows, some)[:, None],
        jnp.where(seen, jnp.float32(0), jnp.float32(MASKED))[:, None],
        (last // group + 1).astype(jnp.int32),
    )
