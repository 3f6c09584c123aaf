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

The division of the work (two blocks of keys a step, one for each of two warpgroups; halves of V
and of the sums; both weights meet both halves) is what Li and Liu call "seesaw" scheduling ("A
Deep-Dive Into the New Flash MLA Kernel", FlashMLA, docs/20250422-new-kernel-deep-dive.md, 2025).
How weights and maxima pass between the warpgroups, it does not say; this is ours.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_zeros import zeros

ROWS = 64  # of queries in a block of the grid: wgmma's M
KEYS = 64  # in a slot
PAIR = 2 * KEYS
ATTENDING = 2  # warpgroups
NOTHING = -1e30  # a running maximum before any key: finite, so that differences are numbers
LOG2_E = math.log2(math.e)
OWN, OTHER = 0, 1  # parts of a slot: the half that its owner reads as values, and the rest

Sees = Callable[..., jax.Array]  # as `sees_causally`


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
    def half(self) -> int:
        """Columns of the output that one warpgroup keeps."""
        return self.rank // 2

    @property
    def rope(self) -> Any:
        """A row's columns of the rotary part."""
        return pl.ds(self.rank, self.rope_dim)

    def columns(self, half: int) -> Any:
        """A row's columns of a half of the latent."""
        return pl.ds(half * self.half, self.half)


class Shared(NamedTuple):
    """Shared memory and barriers of a block of the grid."""

    q: Any  # [2 halves, ROWS, half]
    q_rope: Any  # [ROWS, rope_dim]
    out: Any  # as q, when the queries have been read for the last time
    slots: Any  # of keys: see `mosaic_gpu_slots`
    maxima: Any  # float32 [2, ROWS]: the running maximum that a slot's weights are relative to
    sums: Any  # float32 [2, ROWS]
    lse: Any  # float32 [ROWS]
    q_full: Any
    peaked: Any  # of 2 slots: the maximum is there
    weighed: Any  # of 2 slots: weights are there
    done: Any


class Walk(NamedTuple):
    """What a block of the grid goes through; scalars."""

    pairs: Any  # of key blocks
    seen: Any  # pairs, the first, whose keys all rows see; None: no such are told apart
    first_pair: Any
    q_pos: Any  # position of the tile's first query
    kv_len: Any
    zero: Any  # that the compiler does not know to be 0, see `attend`
    factor: Any  # what scores are multiplied by


class Running(NamedTuple):
    """The state of one warpgroup's softmax: registers."""

    acc: jax.Array  # float32 [ROWS, half]
    m: jax.Array  # float32 [ROWS], base 2
    l: jax.Array  # float32 [ROWS]: of the blocks that it owns


class Weighed(NamedTuple):
    """What a warpgroup keeps of the weights of its own block."""

    rounded: jax.Array  # [ROWS, KEYS], as they are multiplied
    m: jax.Array  # float32 [ROWS]: what they are relative to
    l: jax.Array
    shrink: jax.Array  # float32 [ROWS]: for sums relative to the maximum before


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


def attend(me: int, sizes: Sizes, shared: Shared, walk: Walk, sees: Sees) -> Running:
    """The part of warpgroup `me` (0 or 1) in every pair of blocks; `sees` masks.

    Each wgmma takes its operands by descriptors of 64 bits, 84 of them in a step. Known to be the
    same in each step they are computed before the loop and kept, many of them spilled (436 bytes
    stored, 480 loaded by ptxas's count, jax 0.12.0.1, 2026-11-25; none like this). So the slots'
    numbers depend on the step, as far as the compiler can see.
    """
    plgpu.barrier_wait(shared.q_full)
    no_scores = zeros(ROWS, KEYS)

    def one_pair(i, running, sees):
        zero = i & walk.zero
        first_key = (walk.first_pair + i) * PAIR + me * KEYS
        scores = own_scores(me, shared, no_scores, zero)

        def weigh_own(m, l):
            return weigh(me, sizes, shared, m, l, scores, first_key, walk, zero, sees)

        if me == 0:
            weighed = weigh_own(running.m, running.l)
            running = own_block(me, shared, running.acc, weighed, zero)
            return other_block(me, shared, running, zero)
        acc, weighed = other_block(me, shared, running, zero, weigh_own)
        return own_block(me, shared, acc, weighed, zero)

    running = start(sizes)
    if walk.seen is not None:
        bare = functools.partial(one_pair, sees=None)
        running = jax.lax.fori_loop(0, walk.seen, bare, running)
    masked = functools.partial(one_pair, sees=sees)
    return jax.lax.fori_loop(0 if walk.seen is None else walk.seen, walk.pairs, masked, running)


def own_scores(me: int, shared: Shared, no_scores: jax.Array, zero) -> jax.Array:
    """Dot products of all rows and the keys of one's slot, float32 [ROWS, KEYS]."""
    shared.slots.wait(me, OWN)

    def dots(acc):
        acc[...] = no_scores
        for part, half in enumerate((me, 1 - me)):
            if part == OTHER:
                shared.slots.wait(me, OTHER)
            keys = shared.slots.values(me, half, zero).transpose((1, 0))
            plgpu.wgmma(acc, shared.q.at[half + zero], keys)
        plgpu.wgmma(acc, shared.q_rope, shared.slots.rope(me, zero).transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(dots, plgpu.ACC((ROWS, KEYS), jnp.float32))


def weigh(me, sizes, shared, m, l, scores, first_key, walk, zero, sees) -> Weighed:
    """Weights of one's own block, handed to the other warpgroup; m and l are of those before."""
    logits = scores * walk.factor
    if sizes.soft_cap is not None:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)), the hardware's own tanh is good to 11 bits only.
        cap = sizes.soft_cap * LOG2_E
        logits = cap - 2 * cap / (1 + jnp.exp2(logits))
    if sees is not None:
        logits = jnp.where(sees(me, sizes, shared, first_key, walk), logits, -jnp.inf)
    new = jnp.maximum(m, logits.max(axis=1))
    shared.maxima[me] = new
    plgpu.barrier_arrive(shared.peaked.at[me])
    weights = jnp.exp2(logits - across(new, KEYS))
    shrink = shrink_to(m, new)
    l = l * shrink + weights.sum(axis=1)
    rounded = weights.astype(shared.q.dtype)
    shared.slots.rope(me, zero)[...] = rounded
    if sees is not None:
        shared.slots.blank(me, sizes, walk.kv_len - first_key)
    plgpu.commit_smem()
    plgpu.barrier_arrive(shared.weighed.at[me])
    return Weighed(rounded, new, l, shrink)


def own_block(me: int, shared: Shared, acc: jax.Array, weighed: Weighed, zero) -> Running:
    """Adds the values of one's own block."""
    acc = add_product(
        acc * across(weighed.shrink, acc.shape[1]),
        lambda: (weighed.rounded, shared.slots.values(me, me, zero)),
    )
    shared.slots.release(me, OWN)
    return Running(acc, weighed.m, weighed.l)


def other_block(me: int, shared: Shared, running: Running, zero, meanwhile=None) -> Any:
    """Values of the block that the other warpgroup owns, with the weights that it left.

    Its maximum comes before its weights: sums are made relative to it while it weighs.

    meanwhile: (m, l) -> anything, done while the values are multiplied.

    Returns:
        Running, or with `meanwhile` acc and what it returned.
    """
    slot = 1 - me
    plgpu.barrier_wait(shared.peaked.at[slot])
    m = plgpu.load(shared.maxima.at[slot], layout=row_layout())
    shrink = shrink_to(running.m, m)
    l = running.l * shrink

    def product(ref):
        ref[...] = running.acc * across(shrink, running.acc.shape[1])
        shared.slots.wait_for_values(slot)
        plgpu.barrier_wait(shared.weighed.at[slot])
        plgpu.wgmma(ref, shared.slots.rope(slot, zero), shared.slots.values(slot, me, zero))
        done = None if meanwhile is None else meanwhile(m, l)
        return ref[...], done

    acc, done = pl.run_scoped(product, plgpu.ACC(running.acc.shape, jnp.float32))
    shared.slots.release(slot, OTHER)
    return Running(acc, m, l) if meanwhile is None else (acc, done)


def seen_pairs(walk: Walk) -> jax.Array:
    """How many of the first pairs even a tile's first query sees whole."""
    whole = jax.lax.div(jnp.maximum(walk.q_pos + 1, 0), PAIR)
    return jnp.clip(whole - walk.first_pair, 0, walk.pairs)


def sees_causally(me: int, sizes: Sizes, shared: Shared, first_key, walk: Walk) -> jax.Array:
    """Whether each row's query comes no earlier than each key of a block."""
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 0, layout=plgpu.Layout.WGMMA)
    column = plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=plgpu.Layout.WGMMA)
    token = jax.lax.div(row, jnp.full_like(row, sizes.num_heads))
    return column <= walk.q_pos - first_key + token


def shrink_to(old: jax.Array, new: jax.Array) -> jax.Array:
    """What sums relative to an old maximum are multiplied by, to be relative to the new one."""
    return jnp.exp2(old - new)


def add_product(acc: jax.Array, factors: Callable[[], tuple[Any, Any]]) -> jax.Array:
    """Adds weights @ values, which `factors` gives: weights in registers or in shared memory.

    It is called where the product is: an index of a ref may be no constant from outside.
    """
    return pl.run_state(lambda ref: plgpu.wgmma(ref, *factors()))(plgpu.ACC.init(acc))


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
