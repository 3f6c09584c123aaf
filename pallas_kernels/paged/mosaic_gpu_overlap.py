"""A compute warpgroup's part under prompts: a tile's products beside the one before's softmax.

Two warpgroups take turns at the tensor cores, so that one multiplies while the other weighs. What a
tile is and who sees what is `mosaic_gpu_attend`'s.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_addresses import tied_to
from pallas_kernels.gpu_zeros import zeros
from pallas_kernels.paged.mosaic_gpu_attend import (
    Rows,
    Seen,
    State,
    Tools,
    clear_values,
    initial_state,
    over_columns,
    seen_of,
    weigh,
)
from pallas_kernels.paged.mosaic_gpu_geometry import ROWS, Geometry
from pallas_kernels.paged.mosaic_gpu_pages import Span

F32 = jnp.float32


def attend_overlapped(
    span: Span, rows: Rows, count: Any, tools: Tools, geometry: Geometry
) -> tuple[State, Any]:
    """Attends to all tiles of a span; as `attend_span`, where nothing is converted.

    Args:
        span: the tiles.
        rows: the queries, which lie in `tools.q`.
        count: tiles that the ring has held before.
        tools: what to work with; `turn` is there where two warpgroups share a core.
        geometry: the call's sizes.

    Returns:
        the softmax, and the tiles that the ring has held now.
    """
    seen = seen_of(span, rows, tools.ring.k.shape[1], geometry.masks)
    state = lax.cond(
        span.num_tiles > 0,
        lambda: _some_tiles(span, rows, seen, count, tools, geometry),
        lambda: initial_state(geometry),
    )
    return state, count + span.num_tiles


def _some_tiles(
    span: Span, rows: Rows, seen: Seen, count: Any, tools: Tools, geometry: Geometry
) -> State:
    ring = tools.ring
    stages, keys, _ = ring.k.shape

    def weights(products, i, m, l, masked):
        interval = seen.interval if masked else None
        first_key = (span.first_tile + i) * keys
        return weigh(products, rows, m, l, first_key, interval, geometry)

    def clear(slot, i):
        clear_values(ring.v.at[slot], (span.first_tile + i) * keys, seen.valid, tools)

    def step(i, carry, *, masked):
        """Logits of tile i beside the weighted values of the one before."""
        acc, p, m, l, before = carry
        slot = _slot_after(before, stages)
        plgpu.barrier_wait(ring.k_full.at[slot])
        if tools.turn is not None:
            plgpu.barrier_wait(tools.turn.at[tools.warpgroup])

        def products(sums, scores):
            q = tools.q.at[tied_to(i, tools.warpgroup, tied=tools.tied)]
            plgpu.wgmma(scores, q, ring.k.at[slot].transpose((1, 0)))
            plgpu.wgmma(sums, p, ring.v.at[before])
            if tools.turn is not None:
                plgpu.barrier_arrive(tools.turn.at[1 - tools.warpgroup])
            # Waiting for the values is a branch: it keeps the compiler from moving the softmax past
            # the wait for the products that it is to run beside. A mask takes registers: those of
            # the weights before become free first.
            if masked:
                weighted = plgpu.wgmma_accumulator_load(sums, wait_n=0)
                plgpu.barrier_wait(ring.v_full.at[slot])
            s = plgpu.wgmma_accumulator_load(scores, wait_n=0 if masked else 1)
            next_p, fade, next_m, next_l = weights(s, i, m, l, masked)
            plgpu.barrier_arrive(ring.k_empty.at[slot])
            if not masked:
                plgpu.barrier_wait(ring.v_full.at[slot])
                weighted = plgpu.wgmma_accumulator_load(sums, wait_n=0)
            plgpu.barrier_arrive(ring.v_empty.at[before])
            weighted = weighted * over_columns(fade, weighted.shape[1])
            return weighted, next_p.astype(p.dtype), next_m, next_l

        acc, p, m, l = _with_accumulators(acc, no_scores, products)
        if masked:
            clear(slot, i)
        return acc, p, m, l, slot

    def first_scores(scores):
        plgpu.wgmma(scores, tools.q.at[tools.warpgroup], ring.k.at[slot].transpose((1, 0)))
        return scores[...]

    slot = lax.rem(count, jnp.int32(stages))
    plgpu.barrier_wait(ring.k_full.at[slot])
    s = pl.run_scoped(first_scores, plgpu.ACC((ROWS, keys), F32))
    plgpu.barrier_arrive(ring.k_empty.at[slot])
    plgpu.barrier_wait(ring.v_full.at[slot])
    no_scores = zeros(ROWS, keys)
    state = initial_state(geometry)
    p, _, m, l = weights(s, jnp.int32(0), state.m, state.l, True)
    clear(slot, jnp.int32(0))
    carry = state.acc, p.astype(geometry.dtype), m, l, slot
    begin = jnp.int32(1)
    plain, late = lax.max(seen.plain, begin), lax.max(seen.late, begin)
    if seen.interval[0] is not None:
        carry = lax.fori_loop(begin, plain, lambda i, c: step(i, c, masked=True), carry)
    carry = lax.fori_loop(plain, late, lambda i, c: step(i, c, masked=False), carry)
    carry = lax.fori_loop(late, span.num_tiles, lambda i, c: step(i, c, masked=True), carry)
    acc, p, m, l, last = carry
    acc = pl.run_state(lambda sums: plgpu.wgmma(sums, p, ring.v.at[last]))(plgpu.ACC.init(acc))
    plgpu.barrier_arrive(ring.v_empty.at[last])
    return State(acc, m, l)


def _with_accumulators(acc: jax.Array, no_scores: jax.Array, products: Callable) -> Any:
    """What `products` returns of sums that begin as acc, and of scores that begin as zeros."""

    def filled(sums, scores):
        sums[...] = acc
        scores[...] = no_scores
        return products(sums, scores)

    return pl.run_scoped(filled, *(plgpu.ACC(of.shape, F32) for of in (acc, no_scores)))


def _slot_after(slot: Any, stages: int) -> Any:
    """The next slot of the ring: carried, for a remainder costs registers."""
    if stages & (stages - 1):
        return jnp.where(slot == stages - 1, 0, slot + 1)
    return (slot + 1) & (stages - 1)
