"""Which blocks of queries and keys meet, and with which logits: for both passes of dense attention.

Inside, a block of queries is [batch, num_kv_heads, group, block_q, head_dim] and a block of keys
[batch, num_kv_heads, block_kv, head_dim]; a tile is what they make together, float32
[batch, num_kv_heads, group, block_q, block_kv]. Here `batch` and `num_kv_heads` are a part's: some
batch rows and some heads; the parts come one after another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import masks

NOWHERE = 2**30  # farther than any position


@dataclass(frozen=True)
class Static:
    """What is known when tracing. `block_q` and `block_kv` need not divide their axes."""

    scale: float
    causal: bool
    sliding_window: tuple[int | None, int | None]
    attention_chunk_size: int | None
    soft_cap: float | None
    group: int
    block_batch: int
    block_kv_heads: int
    block_q: int
    block_kv: int

    @property
    def band(self) -> dict:
        """The keyword arguments of `masks.seen` and `masks.seen_bounds`."""
        return {
            "causal": self.causal,
            "sliding_window": self.sliding_window,
            "attention_chunk_size": self.attention_chunk_size,
        }


class Floats(NamedTuple):
    """The differentiable arguments."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    alibi_slopes: jax.Array | None
    sinks: jax.Array | None


class Masks(NamedTuple):
    """The arguments that say who sees whom; `q_offset`, `q_lens` and `kv_lens` are [batch]."""

    mask: jax.Array | None
    q_segment_ids: jax.Array | None
    kv_segment_ids: jax.Array | None
    q_offset: jax.Array
    q_lens: jax.Array | None
    kv_lens: jax.Array | None

    @property
    def by_element(self) -> bool:
        """Whether a block can have holes that positions and lengths do not tell."""
        return self.mask is not None or self.q_segment_ids is not None


class Block(NamedTuple):
    """Where a block is read: clamped, so that it stays inside the array.

    What lies before `own` belongs to the block before it.
    """

    base: jax.Array
    own: jax.Array
    size: int

    def indices(self) -> jax.Array:
        """int32 [size]: the positions in the array."""
        return self.base + jnp.arange(self.size, dtype=jnp.int32)


class Reach(NamedTuple):
    """Indices of the blocks that a block meets; only [full_first, full_stop) needs no mask."""

    first: jax.Array
    full_first: jax.Array
    full_stop: jax.Array
    stop: jax.Array


def block_at(index: jax.Array, size: int, length: int) -> Block:
    """Block `index`; the last one begins early where `size` does not divide `length`."""
    own = index * jnp.int32(size)
    return Block(jnp.minimum(own, length - size), own, size)


def num_blocks(length: int, size: int) -> int:
    """How many blocks cover `length`."""
    return -(-length // size)


def key_bounds(static: Static, who: Masks, q_block: Block, kv_len: int):
    """Int32 [batch] twice: the half-open range of keys that some query of the block sees."""
    lens = jnp.int32(kv_len) if who.kv_lens is None else who.kv_lens
    last = q_block.base + q_block.size - 1
    if who.q_lens is not None:
        lens = jnp.where(who.q_lens > q_block.base, lens, 0)
        last = jnp.minimum(last, who.q_lens - 1)
    first, last = q_block.base + who.q_offset, last + who.q_offset
    start, stop = masks.seen_bounds(first, last, lens, **static.band)
    return jnp.broadcast_to(start, first.shape), jnp.broadcast_to(stop, first.shape)


def kv_reach(static: Static, who: Masks, q_block: Block, kv_len: int) -> Reach:
    """Blocks of keys that a block of queries meets."""
    some = key_bounds(static, who, q_block, kv_len)
    lens = jnp.int32(kv_len) if who.kv_lens is None else who.kv_lens
    first, last = q_block.base + who.q_offset, q_block.base + q_block.size - 1 + who.q_offset
    # The ends swapped: what every query of the block sees.
    every = masks.seen_bounds(last, first, lens, **static.band)
    left, right = static.sliding_window
    no_edges = (
        left is None,
        right is None and not static.causal and _whole_keys(static, who, kv_len),
    )
    return _reach(static, who, some, every, static.block_kv, no_edges)


def q_reach(static: Static, who: Masks, kv_block: Block, q_len: int, kv_len: int) -> Reach:
    """Blocks of queries that a block of keys meets."""
    first, last = kv_block.base, kv_block.base + kv_block.size - 1
    lens = jnp.int32(kv_len) if who.kv_lens is None else who.kv_lens
    some = _seeing_bounds(static, first, jnp.minimum(last, lens - 1))
    every = _seeing_bounds(static, last, first)
    exists = jnp.int32(q_len) if who.q_lens is None else who.q_lens
    some_stop = jnp.where(lens > kv_block.own, jnp.minimum(some[1] - who.q_offset, exists), 0)
    whole = (lens > last) & (kv_block.base == kv_block.own)
    every_stop = jnp.where(whole, jnp.minimum(every[1] - who.q_offset, q_len), 0)
    left, right = static.sliding_window
    no_edges = (
        right is None and not static.causal and _whole_keys(static, who, kv_len),
        left is None and who.q_lens is None and _whole_keys(static, who, kv_len),
    )
    # The last block of queries counts as whole: rows that it shares are dropped where it is read.
    every_stop = jnp.where(every_stop == q_len, NOWHERE, every_stop)
    if who.q_lens is not None:
        # Keys that only queries past q_lens could see may be NaN: no block without a real query.
        every_stop = jnp.minimum(
            every_stop, num_blocks(who.q_lens, static.block_q) * static.block_q
        )
    return _reach(
        static,
        who,
        (jnp.maximum(some[0] - who.q_offset, 0), some_stop),
        (jnp.maximum(every[0] - who.q_offset, 0), every_stop),
        static.block_q,
        no_edges,
    )


def _whole_keys(static: Static, who: Masks, kv_len: int) -> bool:
    """Whether every block of keys is whole, in every row of the batch."""
    return who.kv_lens is None and kv_len % static.block_kv == 0


def _seeing_bounds(static: Static, first: jax.Array, last: jax.Array):
    """Half-open range of query positions that see keys of [first, last]."""
    left, right = static.sliding_window
    right = 1 if static.causal else right
    start, stop = jnp.int32(-NOWHERE), jnp.int32(NOWHERE)
    if right is not None:
        start = jnp.maximum(start, first - right + 1)
    if left is not None:
        stop = jnp.minimum(stop, last + left)
    if static.attention_chunk_size is not None:
        size = static.attention_chunk_size
        start = jnp.maximum(start, first // size * size)
        stop = jnp.minimum(stop, (last // size + 1) * size)
    return start, stop


def _reach(
    static: Static, who: Masks, some, every, size: int, no_edges: tuple[bool, bool]
) -> Reach:
    """Indices of blocks, for all rows of the batch together.

    Args:
        static, who: the call.
        some, every: (start, stop), each int32 [batch] or []: what one, what each member meets.
        size: of a block.
        no_edges: whether, at the start and at the stop, what one member meets each meets, as far
            as positions go; such a loop is not even compiled.
    """
    stop = jnp.max(-(-some[1] // size))
    first = jnp.minimum(jnp.min(jnp.where(some[1] > some[0], some[0], NOWHERE)) // size, stop)
    if who.by_element:
        return Reach(first, first, first, stop)
    chunked = static.attention_chunk_size is not None
    full_first = (
        first
        if no_edges[0] and not chunked
        else (jnp.clip(-(-jnp.max(every[0]) // size), first, stop))
    )
    full_stop = (
        stop
        if no_edges[1] and not chunked
        else (jnp.clip(jnp.min(every[1]) // size, full_first, stop))
    )
    return Reach(first, full_first, full_stop, stop)


def over_blocks(reach: Reach, step: Callable, carry):
    """Runs `step(index, carry, masked=...)` over the blocks of `reach`."""

    def run(first, stop, masked, carry):
        return lax.fori_loop(first, stop, lambda i, c: step(i, c, masked=masked), carry)

    if reach.full_first is not reach.first:
        carry = run(reach.first, reach.full_first, True, carry)
    if reach.full_stop is not reach.full_first:
        carry = run(reach.full_first, reach.full_stop, False, carry)
    if reach.stop is not reach.full_stop:
        carry = run(reach.full_stop, reach.stop, True, carry)
    return carry


def take(x: jax.Array, base: jax.Array, size: int, axis: int) -> jax.Array:
    """`size` of an axis from `base` on; an axis of size 1 stands for all."""
    return x if x.shape[axis] == 1 else lax.dynamic_slice_in_dim(x, base, size, axis)


def split_heads(x: jax.Array, static: Static, axis: int) -> jax.Array:
    """Query heads as [num_kv_heads, group]; one head that stands for all as [1, 1]."""
    heads = x.shape[axis]
    pair = (1, 1) if heads == 1 else (heads // static.group, static.group)
    return x.reshape(*x.shape[:axis], *pair, *x.shape[axis + 1 :])


def q_rows(x: jax.Array, block: Block) -> jax.Array:
    """A block of [batch, num_kv_heads, group, q_len, ...]."""
    return take(x, block.base, block.size, 3)


def kv_rows(x: jax.Array, block: Block) -> jax.Array:
    """A block of [batch, num_kv_heads, kv_len, d]."""
    return take(x, block.base, block.size, 2)
