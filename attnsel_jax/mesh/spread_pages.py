"""Pages of one sequence spread over a mesh axis: each device attends to those that lie with it.

Page p lies where the cache's sharding puts it, and any device may hold any page of a sequence. A
device makes itself a batch of what it holds: every token as a sequence of its own, whose pages are
those of its visible positions that lie here, in their order. Partial results are merged by lse.

One token attends to all that it sees, so no mask is left but the length. (Tokens of one prompt no
longer share reads of its pages: this form is for decoding, and for short chunks.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnsel_jax.mesh.merging import Partial, merged_over, with_sinks

Arrays = dict[str, jax.Array]
QUERIES = ("q", "ql_nope", "q_index")


def spread_attention(
    kernel: Callable[..., Any],
    arrays: Arrays,
    cache: str,
    counts: tuple[int, int],
    axis: str,
    *,
    causal: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Out, lse and the cache of one group of sequences.

    Args:
        kernel: takes arrays by name.
        arrays: this device's, page ids and slots counted from the first page that lies here.
        cache: the name of the cache's array.
        counts: pages that lie here, and tokens of a page.
        axis: the mesh axis.
        causal: whether a query sees no later keys.
    """
    seen = _visible_lengths(arrays, causal)
    mine, ranks = _own_pages(arrays, seen, counts)
    if "topk_indices" in arrays:
        mine["topk_indices"] = _own_positions(arrays["topk_indices"], ranks, counts[1])
    given = {name: a for name, a in arrays.items() if name not in ("sinks", "num_seqs")}
    out, lse, pages = kernel(given | mine)
    whole = merged_over(Partial(out.astype(jnp.float32), lse), axis)
    whole = with_sinks(whole, arrays.get("sinks"), seen[0])
    return whole.out.astype(out.dtype), whole.lse, pages


def spread_scores(
    kernel: Callable[..., Any], arrays: Arrays, counts: tuple[int, int]
) -> tuple[jax.Array]:
    """The indexer's scores of one group of sequences, -inf where a position's page lies elsewhere.

    Args:
        kernel: takes arrays by name.
        arrays: this device's, page ids counted from the first page that lies here.
        counts: pages that lie here, and tokens of a page.
    """
    mine, ranks = _own_pages(arrays, _visible_lengths(arrays, causal=True), counts)
    (scores,) = kernel({n: a for n, a in arrays.items() if n != "num_seqs"} | mine)
    by_page = scores.reshape(*ranks.shape, counts[1])
    placed = jnp.take_along_axis(by_page, jnp.maximum(ranks, 0)[:, :, None], axis=1)
    return (jnp.where(ranks[:, :, None] >= 0, placed, -jnp.inf).reshape(scores.shape),)


def _visible_lengths(arrays: Arrays, causal: bool):
    """Of each token: whether it exists, its sequence, and how many positions it sees."""
    num_tokens = next(arrays[name].shape[0] for name in QUERIES if name in arrays)
    rows = arrays["kv_lens"].shape[0]
    starts = jnp.where(
        jnp.arange(rows + 1) <= arrays["num_seqs"], arrays["cu_q_lens"],
        arrays["cu_q_lens"][jnp.minimum(arrays["num_seqs"], rows)],
    )  # fmt: skip
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    seq = jnp.searchsorted(starts[1:], token, side="right").astype(jnp.int32)
    exists = token < starts[-1]
    seq = jnp.minimum(seq, rows - 1)
    kv_len = arrays["kv_lens"][seq]
    length = kv_len - (starts[seq + 1] - 1 - token) if causal else kv_len
    return exists, seq, jnp.where(exists, length, 0)


def _own_pages(arrays: Arrays, seen, counts: tuple[int, int]) -> tuple[Arrays, jax.Array]:
    """The batch of what lies here, and each column's rank among its token's pages here, or -1."""
    (_, seq, length), (num_pages, page_size) = seen, counts
    table = arrays["page_table"][seq]
    num_tokens, width = table.shape
    first = jnp.arange(width, dtype=jnp.int32) * page_size
    here = (table >= 0) & (table < num_pages) & (first < length[:, None])
    rank = jnp.where(here, jnp.cumsum(here, axis=1, dtype=jnp.int32) - 1, -1)
    row = jnp.arange(num_tokens, dtype=jnp.int32)[:, None]
    own = jnp.zeros_like(table).at[row, jnp.where(here, rank, width)].set(table, mode="drop")
    filled = jnp.where(here, jnp.clip(length[:, None] - first, 0, page_size), 0)
    batch = {
        "page_table": own,
        "kv_lens": jnp.sum(filled, axis=1, dtype=jnp.int32),
        "cu_q_lens": jnp.arange(num_tokens + 1, dtype=jnp.int32),
        "num_seqs": jnp.int32(num_tokens),
    }
    return batch, rank


def _own_positions(positions: jax.Array, ranks: jax.Array, page_size: int) -> jax.Array:
    """Positions of a sequence as positions among the pages that lie here; -1 = elsewhere."""
    column = jnp.clip(positions // page_size, 0, ranks.shape[1] - 1)
    rank = jnp.take_along_axis(ranks, column, axis=1)
    inside = (positions >= 0) & (positions // page_size < ranks.shape[1]) & (rank >= 0)
    return jnp.where(inside, rank * page_size + positions % page_size, -1)
