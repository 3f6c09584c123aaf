"""Pages of one sequence spread over a mesh axis: each device attends to those that lie with it.

Page p lies where the cache's sharding puts it, and any device may hold any page of a sequence. A
device makes itself a batch of what it holds: every token as a sequence of its own, whose pages are
those of its visible positions that lie here, in their order. Partial results are merged by lse.

One token attends to all that it sees, so no mask is left but the length. (Tokens of one prompt no
longer share reads of its pages: this form is for decoding, and for short chunks.) Three things need
more than that, and no kernel need know of them:

- A window or a chunk begins within a page. That page is attended to by itself, as a copy of one
  page a token, turned so that what is seen stands first; the whole pages after it as ever.
- ALiBi depends on the distance, and between pages that lie here others are missing. Each page is a
  sequence of its own: within it distances are right but for a number, and that goes into its lse.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnsel_jax.cache_layouts import layout_named
from attnsel_jax.mesh.dimensions import dimensions
from attnsel_jax.mesh.merging import Partial, merged, merged_along, merged_over, with_sinks
from pallas_kernels.masks import seen_bounds, window_bounds

Arrays = dict[str, jax.Array]
QUERIES = ("q", "ql_nope", "q_index")
WRITTEN = ("k", "v", "slot_mapping")
MASKS = ("sliding_window", "attention_chunk_size")


class Seen(NamedTuple):
    """What the tokens see, each an array [num_tokens].

    Attributes:
        exists: whether it is a sequence's token.
        seq: its sequence.
        position: where it is there.
        start, stop: the half-open range of positions that it sees.
    """

    exists: jax.Array
    seq: jax.Array
    position: jax.Array
    start: jax.Array
    stop: jax.Array


def spread_attention(
    kernel: Callable[..., Any],
    arrays: Arrays,
    cache: str,
    counts: tuple[int, int],
    axis: str,
    *,
    static: dict[str, Any],
    layout: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Out, lse and the cache of one group of sequences.

    Args:
        kernel: takes arrays by name, and static arguments that are not the call's.
        arrays: this device's, page ids and slots counted from the first page that lies here.
        cache: the name of the cache's array.
        counts: pages that lie here, and tokens of a page.
        axis: the mesh axis.
        static: the call's static arguments.
        layout: of the cache.
    """
    pattern = {name: static.get(name) for name in MASKS}
    seen = _seen(arrays, causal=static.get("causal", True), **pattern)
    unmasked = dict.fromkeys(set(MASKS) & set(static))
    given = {name: a for name, a in arrays.items() if name not in ("sinks", "num_seqs")}
    attend = _page_by_page if "alibi_slopes" in arrays else _pages_together
    part, dtype, pages = attend(kernel, given, seen, counts, unmasked)
    if window_bounds(pattern["sliding_window"])[0] or pattern["attention_chunk_size"]:
        edge = _edge_pages(kernel, given | {cache: pages}, seen, counts, unmasked, layout)
        part = merged(part, edge)
    whole = with_sinks(merged_over(part, axis), arrays.get("sinks"), seen.exists)
    return whole.out.astype(dtype), whole.lse, pages


def spread_scores(
    kernel: Callable[..., Any], arrays: Arrays, counts: tuple[int, int]
) -> tuple[jax.Array]:
    """The indexer's scores of one group of sequences, -inf where a position's page lies elsewhere.

    Args:
        kernel: takes arrays by name.
        arrays: this device's, page ids counted from the first page that lies here.
        counts: pages that lie here, and tokens of a page.
    """
    mine, ranks = _own_pages(arrays, _seen(arrays, causal=True), counts)
    (scores,) = kernel({n: a for n, a in arrays.items() if n != "num_seqs"} | mine)
    by_page = scores.reshape(*ranks.shape, counts[1])
    placed = jnp.take_along_axis(by_page, jnp.maximum(ranks, 0)[:, :, None], axis=1)
    return (jnp.where(ranks[:, :, None] >= 0, placed, -jnp.inf).reshape(scores.shape),)


def _pages_together(kernel, arrays: Arrays, seen: Seen, counts: tuple[int, int], unmasked):
    """Over the whole pages that lie here, those of a token in one sequence.

    Returns:
        The partial results, the dtype in which the kernel gave out, and the cache as written.
    """
    mine, ranks = _own_pages(arrays, seen, counts)
    if "topk_indices" in arrays:
        mine["topk_indices"] = _own_positions(arrays["topk_indices"], ranks, counts[1])
    out, lse, pages = kernel(arrays | mine, **unmasked)
    return Partial(out.astype(jnp.float32), lse), out.dtype, pages


def _page_by_page(kernel, arrays: Arrays, seen: Seen, counts: tuple[int, int], unmasked):
    """The same, each page a sequence of its own: ALiBi's distances are from its last key."""
    table, first, filled = _whole_pages(arrays, seen, counts)
    num_tokens, width = table.shape
    rows = num_tokens * width
    mine = {
        "q": jnp.repeat(arrays["q"], width, axis=0),
        **_batch_of(table.reshape(rows, 1), filled.reshape(rows)),
    }
    for name in WRITTEN:  # as many rows as queries; those that are added are written nowhere
        if name in arrays:
            further = [(0, rows - num_tokens)] + [(0, 0)] * (arrays[name].ndim - 1)
            mine[name] = jnp.pad(arrays[name], further, constant_values=-1)
    out, lse, pages = kernel(arrays | mine, **unmasked)
    lse = lse.reshape(num_tokens, width, -1)
    lse = _from_afar(lse, arrays["alibi_slopes"], seen.position[:, None] - (first + filled - 1))
    part = Partial(out.reshape(*lse.shape, -1).astype(jnp.float32), lse)
    return merged_along(part, 1), out.dtype, pages


def _edge_pages(
    kernel, arrays: Arrays, seen: Seen, counts: tuple[int, int], unmasked, layout: str
) -> Partial:
    """Over the pages within which what a token sees begins, where they lie here."""
    num_pages, page_size = counts
    width = arrays["page_table"].shape[1]
    column, hidden = seen.start // page_size, seen.start % page_size
    page = arrays["page_table"][seen.seq, jnp.minimum(column, width - 1)]
    here = (page >= 0) & (page < num_pages) & (column < width) & (hidden > 0)
    count = jnp.minimum(seen.stop, (column + 1) * page_size) - seen.start
    count = jnp.where(seen.exists & here, jnp.maximum(count, 0), 0)
    mine = {name: a for name, a in arrays.items() if name not in WRITTEN}
    mine |= _batch_of(jnp.arange(len(page), dtype=jnp.int32)[:, None], count)
    at = dimensions("paged", {"kv_pages": arrays["kv_pages"]}, layout)["kv_pages"].index("pages")
    copies = jnp.take(arrays["kv_pages"], jnp.where(here, page, 0), axis=at)
    slots = (hidden[:, None] + jnp.arange(page_size, dtype=jnp.int32)) % page_size
    turned = (
        jnp.take_along_axis(x, slots[:, :, None, None], axis=1)
        for x in layout_named(layout).split(copies)
    )
    mine["kv_pages"] = layout_named(layout).join(*turned)
    out, lse, _ = kernel(mine, **unmasked)
    if "alibi_slopes" in arrays:
        apart = seen.position - (seen.start + count - 1)
        lse = _from_afar(lse, arrays["alibi_slopes"], apart)
    return Partial(out.astype(jnp.float32), lse)


def _from_afar(lse: jax.Array, slopes: jax.Array, apart: jax.Array) -> jax.Array:
    """The lse of keys whose query stands so much further off than the kernel was told."""
    return lse - slopes * apart[..., None].astype(jnp.float32)


def _seen(arrays: Arrays, **pattern: Any) -> Seen:
    """What each token sees: `pattern` are the keyword arguments of `masks.seen_bounds`."""
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
    position = kv_len - (starts[seq + 1] - token)
    start, stop = seen_bounds(position, position, kv_len, **pattern)
    none = jnp.zeros_like(token)
    return Seen(exists, seq, position, none + start, jnp.where(exists, stop, none))


def _whole_pages(arrays: Arrays, seen: Seen, counts: tuple[int, int]):
    """By token and column of its page table: the page, its first position, how much of it is seen.

    Of a page that is not whole, because what is seen begins within it, nothing; nor of one that
    lies elsewhere.
    """
    num_pages, page_size = counts
    table = arrays["page_table"][seen.seq]
    first = jnp.arange(table.shape[1], dtype=jnp.int32) * page_size
    start, stop = seen.start[:, None], seen.stop[:, None]
    here = (table >= 0) & (table < num_pages) & (first >= start)
    return table, first, jnp.where(here, jnp.clip(stop - first, 0, page_size), 0)


def _own_pages(arrays: Arrays, seen: Seen, counts: tuple[int, int]) -> tuple[Arrays, jax.Array]:
    """The batch of what lies here, and each column's rank among its token's pages here, or -1."""
    table, _, filled = _whole_pages(arrays, seen, counts)
    num_tokens, width = table.shape
    here = filled > 0
    rank = jnp.where(here, jnp.cumsum(here, axis=1, dtype=jnp.int32) - 1, -1)
    row = jnp.arange(num_tokens, dtype=jnp.int32)[:, None]
    own = jnp.zeros_like(table).at[row, jnp.where(here, rank, width)].set(table, mode="drop")
    return _batch_of(own, jnp.sum(filled, axis=1, dtype=jnp.int32)), rank


def _batch_of(page_table: jax.Array, kv_lens: jax.Array) -> Arrays:
    """The batch of so many sequences of one token each."""
    rows = kv_lens.shape[0]
    return {
        "page_table": page_table,
        "kv_lens": kv_lens,
        "cu_q_lens": jnp.arange(rows + 1, dtype=jnp.int32),
        "num_seqs": jnp.int32(rows),
    }


def _own_positions(positions: jax.Array, ranks: jax.Array, page_size: int) -> jax.Array:
    """Positions of a sequence as positions among the pages that lie here; -1 = elsewhere."""
    column = jnp.clip(positions // page_size, 0, ranks.shape[1] - 1)
    rank = jnp.take_along_axis(ranks, column, axis=1)
    inside = (positions >= 0) & (positions // page_size < ranks.shape[1]) & (rank >= 0)
    return jnp.where(inside, rank * page_size + positions % page_size, -1)
