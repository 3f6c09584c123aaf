"""What one tile of queries gets from its sequence's pages: the inner loop of `paged`.

In here a tile's queries of one kv head, `block_q` of each of its query heads, are rows of one
matrix: q is [num_kv_heads, rows, head_dim], logits [num_kv_heads, rows, keys], rows ordered
(query head in the group, query).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnsel_jax.xla.page_reads import read_pages
from attnsel_jax.xla.query_tiles import Tiles
from pallas_kernels.masks import Window, seen, seen_bounds


@dataclass(frozen=True)
class Static:
    """What is known when tracing; the fields are the contract's."""

    scale: float
    causal: bool
    sliding_window: Window
    attention_chunk_size: int | None
    soft_cap: float | None

    @property
    def pattern(self) -> dict:
        """The keyword arguments of `masks.seen` and `masks.seen_bounds`."""
        return {
            "causal": self.causal,
            "sliding_window": self.sliding_window,
            "attention_chunk_size": self.attention_chunk_size,
        }


class PerHead(NamedTuple):
    """Numbers of each head, float32, each [num_kv_heads, group, 1], or None for none of it."""

    alibi_slopes: jax.Array | None
    sinks: jax.Array | None
    k_scale: jax.Array | None
    v_scale: jax.Array | None


class Keys(NamedTuple):
    """One block of keys."""

    k: jax.Array  # [num_kv_heads, keys, head_dim]
    v: jax.Array  # [num_kv_heads, keys, head_dim]; 0 where no query looks
    pos: jax.Array  # int32 [keys]
    looked_at: jax.Array  # bool [keys]: whether the tile's queries look at this stretch at all


def attend_tile(
    tile: Tiles,
    q_tile: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    per_head: PerHead,
    static: Static,
    *,
    block_kv: int,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one tile of queries to the keys that they see.

    Args:
        tile: one of `query_tiles`, each field int32 [].
        q_tile: [block_q, num_q_heads, head_dim], in the dtype of the products; rows past
            tile.q_len hold anything.
        kv_pages: the stacked cache.
        page_table: int32 [max_num_seqs, pages_per_seq].
        per_head: slopes, sinks and scales.
        static: scale, masks and soft cap.
        block_kv: keys in a block, rounded to whole pages.

    Returns:
        out float32 [block_q, num_q_heads, head_dim], lse float32 [block_q, num_q_heads]; rows past
        tile.q_len hold anything.
    """
    block_q, num_q_heads, head_dim = q_tile.shape
    num_kv_heads, page_size = kv_pages.shape[3], kv_pages.shape[2]
    group = num_q_heads // num_kv_heads
    q = q_tile.reshape(block_q, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
    q = q.reshape(num_kv_heads, group * block_q, head_dim)
    q_pos = jnp.tile(tile.first_q_pos + jnp.arange(block_q, dtype=jnp.int32), group)
    start, stop = seen_bounds(
        tile.first_q_pos, tile.first_q_pos + tile.q_len - 1, tile.kv_len, **static.pattern
    )
    pages_per_block = max(1, block_kv // page_size)
    first_page = start // page_size
    num_pages = jnp.maximum(0, -(-stop // page_size) - first_page)

    def step(i: jax.Array, state: tuple) -> tuple:
        columns = first_page + i * pages_per_block + jnp.arange(pages_per_block, dtype=jnp.int32)
        keys = _load_keys(kv_pages, page_table, tile.seq, i, columns, start, stop, q.dtype)
        return _softmax_step(_logits(q, q_pos, keys, per_head, static), keys.v, state)

    # A sink is a key whose value is 0.
    sinks = jnp.float32(-jnp.inf) if per_head.sinks is None else per_head.sinks
    m = jnp.broadcast_to(sinks, (num_kv_heads, group, block_q)).reshape(q.shape[:2])
    state = (m, (m > -jnp.inf).astype(jnp.float32), jnp.zeros(q.shape, jnp.float32))
    state = jax.lax.fori_loop(0, -(-num_pages // pages_per_block), step, state)
    out, lse = _finish(
        *(x.reshape(num_kv_heads, group, block_q, *x.shape[2:]) for x in state), per_head
    )
    return (
        out.transpose(2, 0, 1, 3).reshape(q_tile.shape),
        lse.transpose(2, 0, 1).reshape(block_q, num_q_heads),
    )


def _load_keys(kv_pages, page_table, seq, step, columns, start, stop, dtype) -> Keys:
    """The pages in some columns of a sequence's page table, one head after another."""
    _, num_pages, page_size, num_kv_heads, head_dim = kv_pages.shape
    # A column past the table, or an entry that is junk, must not be followed.
    ids = jnp.clip(page_table[seq, jnp.minimum(columns, page_table.shape[1] - 1)], 0, num_pages - 1)
    pos = columns[:, None] * page_size + jnp.arange(page_size, dtype=jnp.int32)
    pos = pos.reshape(-1)
    looked_at = (pos >= start) & (pos < stop)
    kv = read_pages(kv_pages, ids, step, axis=1).reshape(2, -1, num_kv_heads, head_dim)
    k, v = kv.swapaxes(1, 2).astype(dtype)
    # Its weight is 0, but 0 * NaN would be NaN.
    v = jnp.where(looked_at[:, None], v, 0)
    return Keys(k, v, pos, looked_at)


def _logits(q, q_pos, keys: Keys, per_head: PerHead, static: Static) -> jax.Array:
    """float32 [num_kv_heads, rows, keys], -inf where a row does not see a key."""
    # Keys first: the order in which XLA:CPU multiplies few rows fastest.
    s = _product("hsd,hrd->hsr", keys.k, q).swapaxes(1, 2) * static.scale
    if per_head.k_scale is not None:
        s = s * per_head.k_scale
    if static.soft_cap is not None:
        s = static.soft_cap * jnp.tanh(s / static.soft_cap)
    if per_head.alibi_slopes is not None:
        group = per_head.alibi_slopes.shape[1]
        slopes = jnp.repeat(per_head.alibi_slopes[..., 0], q_pos.shape[0] // group, axis=1)
        s = s - slopes[..., None] * jnp.abs(q_pos[:, None] - keys.pos).astype(jnp.float32)
    visible = keys.looked_at
    pattern = seen(q_pos[:, None], keys.pos, **static.pattern)
    if pattern is not None:
        visible = visible & pattern
    return jnp.where(visible, s, -jnp.inf)


def _softmax_step(s: jax.Array, v: jax.Array, state: tuple) -> tuple:
    """One block into the running maximum, the running sum and the unnormalised output."""
    m, l, acc = state
    m_next = jnp.maximum(m, s.max(-1))
    shift = jnp.where(m_next == -jnp.inf, 0, m_next)  # a row that has seen no key: not inf - inf
    p = jnp.exp(s - shift[..., None])
    fade = jnp.exp(m - shift)
    l = l * fade + p.sum(-1)
    acc = acc * fade[..., None] + _product("hrs,hsd->hrd", p.astype(v.dtype), v)
    return m_next, l, acc


def _finish(m, l, acc, per_head: PerHead) -> tuple[jax.Array, jax.Array]:
    """Normalisation and v's scale: out and lse."""
    out = acc / jnp.where(l == 0, 1, l)[..., None]
    if per_head.v_scale is not None:
        out = out * per_head.v_scale[..., None]
    return out, m + jnp.log(l)


def _product(dims: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product summed in float32; float32 operands are multiplied in float32 on every chip."""
    return jnp.einsum(dims, x, y, precision="highest", preferred_element_type=jnp.float32)
