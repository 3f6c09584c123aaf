"""The warpgroups of MLA on Hopper: one brings keys, two attend, and what they hand each other.

A block has 64 rows of queries (tokens x heads) and takes keys two blocks of 64 at a time, one in
each of two slots. A slot's block is *owned* by one of the attending warpgroups: the owner alone
computes its scores and weights. Each warpgroup keeps half of the output's columns, and adds both
blocks' weighted values to it::

    slot 0 (even blocks)                    slot 1 (odd blocks)
    scores, weights: warpgroup 0            scores, weights: warpgroup 1
    values 0 ... rank/2:  warpgroup 0       values 0 ... rank/2:  warpgroup 0
    values rank/2 ... :   warpgroup 1       values rank/2 ... :   warpgroup 1

So no score is computed twice, and an accumulator of 64 x 256 fits registers. The owner puts its
weights where the block's rotary keys were, which nobody reads any more, and the running maximum
beside them. Blocks go into every accumulator in their order, so the maximum passes from owner to
owner, and while one warpgroup computes weights the other one multiplies.

The division of the work (two warpgroups, two blocks of keys, halves of V, weights exchanged through
shared memory) is that of FlashMLA's decode kernel for Hopper as its authors describe it
("A Deep Dive Into The Flash MLA FP8 Decoding Kernel on Hopper" and "New kernel deep dive", DeepSeek
2025).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of queries in a block of the grid: wgmma's M
KEYS = 64  # in a slot
PAIR = 2 * KEYS
ATTENDING = 2  # warpgroups
NOTHING = -1e30  # a running maximum before any key: finite, so that differences are numbers
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is static of a call."""

    block_q: int  # tokens of a tile
    num_heads: int  # rows of a token, padded
    rank: int
    rope_dim: int
    page_size: int
    scale: float
    soft_cap: float | None
    splits: int

    @property
    def width(self) -> int:
        """Columns of a key."""
        return self.rank + self.rope_dim

    @property
    def half(self) -> int:
        """Columns of the output that one warpgroup keeps."""
        return self.rank // 2

    @property
    def rope(self) -> Any:
        """A slot's columns of the rotary part, and of the weights later."""
        return pl.ds(self.rank, self.rope_dim)

    def columns(self, half: int) -> Any:
        """The columns of a half of the values."""
        return pl.ds(half * self.half, self.half)


class Shared(NamedTuple):
    """Shared memory and barriers of a block; `own` and `other` are the halves of a slot's values.

    A slot's own half is read as values by its owner, the other half by the other warpgroup, and
    so are the rotary columns, as weights. Each is filled and emptied by itself.
    """

    q: Any  # [ROWS, width], then the output's
    kv: Any  # [2, KEYS, width]
    maxima: Any  # float32 [2, ROWS]: the running maximum that a slot's weights are relative to
    sums: Any  # float32 [2, ROWS]
    lse: Any  # float32 [ROWS]
    q_full: Any
    full: tuple[Any, Any]  # own, other; of 2 slots
    empty: tuple[Any, Any]
    weighed: Any  # of 2 slots: weights and maximum are there
    done: Any


class Walk(NamedTuple):
    """What a block of the grid goes through; scalars."""

    pairs: Any  # of key blocks
    first_pair: Any
    q_pos: Any  # position of the tile's first query
    kv_len: Any
    factor: Any  # what scores are multiplied by


class Running(NamedTuple):
    """The state of one warpgroup's softmax: registers."""

    acc: jax.Array  # float32 [ROWS, half]
    m: jax.Array  # float32 [ROWS], base 2
    l: jax.Array  # float32 [ROWS]: of the blocks that it owns


def row_layout() -> Any:
    """Of one number for each row of an accumulator."""
    return plgpu.Layout.WGMMA.reduce(1)


def across(x: jax.Array, columns: int) -> jax.Array:
    """A number for each row, as wide as a matrix."""
    return jax.lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def start(sizes: Sizes) -> Running:
    """Before any key."""
    row = row_layout()
    return Running(
        plgpu.layout_cast(jnp.zeros((ROWS, sizes.half), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((ROWS,), NOTHING, jnp.float32), row),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row),
    )


def attend(me: int, sizes: Sizes, shared: Shared, walk: Walk) -> Running:
    """The part of warpgroup `me` (0 or 1) in every pair of blocks."""
    plgpu.barrier_wait(shared.q_full)

    def one_pair(i, running):
        first_key = (walk.first_pair + i) * PAIR + me * KEYS
        scores = own_scores(me, sizes, shared)
        if me == 1:
            running = other_block(me, sizes, shared, running)
        running = own_block(me, sizes, shared, running, scores, first_key, walk)
        if me == 0:
            running = other_block(me, sizes, shared, running)
        return running

    return jax.lax.fori_loop(0, walk.pairs, one_pair, start(sizes))


def own_scores(me: int, sizes: Sizes, shared: Shared) -> jax.Array:
    """Dot products of all rows and the keys of one's slot, float32 [ROWS, KEYS]."""
    own, other = sizes.columns(me), sizes.columns(1 - me)

    def dots(acc):
        def add(columns):
            plgpu.wgmma(
                acc, shared.q.at[:, columns], shared.kv.at[me, :, columns].transpose((1, 0))
            )

        plgpu.barrier_wait(shared.full[0].at[me])
        add(own)
        plgpu.barrier_wait(shared.full[1].at[me])
        add(other)
        add(sizes.rope)
        return acc[...]

    return pl.run_scoped(dots, plgpu.ACC((ROWS, KEYS), jnp.float32))


def own_block(me, sizes, shared, running, scores, first_key, walk: Walk) -> Running:
    """Weights of one's own block, handed to the other warpgroup; and their values added."""
    logits = scores * walk.factor
    if sizes.soft_cap is not None:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)), the hardware's own tanh is good to 11 bits only.
        cap = sizes.soft_cap * LOG2_E
        logits = cap - 2 * cap / (1 + jnp.exp2(logits))
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 0, layout=plgpu.Layout.WGMMA)
    column = plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=plgpu.Layout.WGMMA)
    token = row // sizes.num_heads if sizes.block_q > 1 else 0
    logits = jnp.where(column <= walk.q_pos - first_key + token, logits, -jnp.inf)
    m = jnp.maximum(running.m, logits.max(axis=1))
    weights = jnp.exp2(logits - across(m, KEYS))
    rounded = weights.astype(shared.kv.dtype)
    shared.kv[me, :, sizes.rope] = rounded
    shared.maxima[me] = m
    blank_unused(me, sizes, shared, walk.kv_len - first_key)
    plgpu.commit_smem()
    plgpu.barrier_arrive(shared.weighed.at[me])
    shrink = jnp.exp2(running.m - m)
    acc = add_values(
        running.acc * across(shrink, sizes.half), rounded, shared.kv.at[me, :, sizes.columns(me)]
    )
    plgpu.barrier_arrive(shared.empty[0].at[me])
    return Running(acc, m, running.l * shrink + weights.sum(axis=1))


def blank_unused(me: int, sizes: Sizes, shared: Shared, keys) -> None:
    """Zeros for the values of a slot after the sequence's last key: 0 * NaN is NaN."""

    @pl.when(keys < KEYS)
    def _():
        for first in range(0, sizes.rank, KEYS):
            values = shared.kv.at[me, :, pl.ds(first, KEYS)]
            row = plgpu.broadcasted_iota(jnp.int32, (KEYS, KEYS), 0, layout=plgpu.Layout.WGMMA)
            kept = plgpu.load(values, layout=plgpu.Layout.WGMMA)
            values[...] = jnp.where(row < keys, kept, jnp.zeros_like(kept))


def other_block(me: int, sizes: Sizes, shared: Shared, running: Running) -> Running:
    """Values of the block that the other warpgroup owns, with the weights that it left."""
    slot = 1 - me
    for full in shared.full:
        plgpu.barrier_wait(full.at[slot])
    plgpu.barrier_wait(shared.weighed.at[slot])
    m = plgpu.load(shared.maxima.at[slot], layout=row_layout())
    shrink = jnp.exp2(running.m - m)
    acc = add_values(
        running.acc * across(shrink, sizes.half),
        shared.kv.at[slot, :, sizes.rope],
        shared.kv.at[slot, :, sizes.columns(me)],
    )
    plgpu.barrier_arrive(shared.empty[1].at[slot])
    return Running(acc, m, running.l * shrink)


def add_values(acc: jax.Array, weights: Any, values: Any) -> jax.Array:
    """acc + weights @ values; weights in registers or in shared memory."""
    return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))(plgpu.ACC.init(acc))


def finish(me: int, shared: Shared, running: Running, kv_scale) -> tuple[jax.Array, jax.Array]:
    """Output (one's half of the columns) and lse, natural; 0 and -inf for a row that saw nothing.

    Both warpgroups have read the queries for the last time when it returns.
    """
    shared.sums[me] = running.l
    plgpu.barrier_arrive(shared.done)
    plgpu.barrier_wait(shared.done)
    total = running.l + plgpu.load(shared.sums.at[1 - me], layout=row_layout())
    is_empty = total == 0
    total = jnp.where(is_empty, 1.0, total)
    out = running.acc * across(kv_scale / total, running.acc.shape[1])
    lse = jnp.where(is_empty, -jnp.inf, running.m / LOG2_E + jnp.log(total))
    return out, lse
