"""How this step's rows get into a "paired" latent cache on TPU, by the attending kernel itself.

A register packs rows of narrow dtypes into words, so what can be copied alone is a *bundle* of rows
(16 of bfloat16), each of two tokens. A run of tokens that go to one bundle is one read, merge and
write of it. Runs are taken in groups: all bundles of a group are on their way at once, and no
bundle is twice in a group.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_chip import LANES, SUBLANES

GROUP = 16  # bundles under way at once


class Writes(NamedTuple):
    """What is written, and where: slot_mapping in SMEM, the others in HBM."""

    slot_mapping: Any  # int32 [num_tokens]
    rows: Any  # float32 [num_tokens, SUBLANES, LANES]: see `stored_rows`
    pages: Any  # [num_pages, page_size / 2, 2 * (rank + rope_dim)]


class _Scratch(NamedTuple):
    bundle: Any  # [GROUP, packed, 2 * (rank + rope_dim)]
    rows: Any  # float32 [GROUP, 2 * packed, SUBLANES, LANES]
    at: Any  # SMEM [GROUP]: the bundle, counted through all pages
    first: Any  # SMEM [GROUP]: its first token
    count: Any  # SMEM [GROUP]: its tokens, consecutive ones
    arrived: Any
    left: Any


def stored_rows(latents: jax.Array, ropes: jax.Array) -> jax.Array:
    """Each token's row as one register: the latent, then its rotary key twice.

    Args:
        latents, ropes: [num_tokens, rank], [num_tokens, rope_dim], as the cache stores them.
    """
    rows = jnp.concatenate([latents, ropes, ropes], axis=-1).astype(jnp.float32)
    missing = SUBLANES * LANES - rows.shape[1]
    return jnp.pad(rows, ((0, 0), (0, missing))).reshape(-1, SUBLANES, LANES)


def write_rows(writes: Writes, *, rank: int, rope_dim: int) -> None:
    """Puts every token's row at its slot; returns when all of them are there."""
    packed = 32 // writes.pages.dtype.itemsize

    def scoped(*scratch):
        _write_groups(writes, _Scratch(*scratch), packed, rank, rope_dim)

    pl.run_scoped(
        scoped,
        pltpu.VMEM((GROUP, packed, 2 * (rank + rope_dim)), writes.pages.dtype),
        pltpu.VMEM((GROUP, 2 * packed, SUBLANES, LANES), jnp.float32),
        *[pltpu.SMEM((GROUP,), jnp.int32)] * 3,
        *[pltpu.SemaphoreType.DMA(())] * 2,
    )


def _write_groups(writes, scratch, packed, rank, rope_dim) -> None:
    """Group after group until no token is left."""
    num_tokens = writes.rows.shape[0]

    def one_group(token):
        token, runs = _gather_runs(writes, scratch, token, 2 * packed)
        _each_copy(writes, scratch, runs, packed, lambda copy: copy.start(), into=True)
        _each_copy(writes, scratch, runs, packed, lambda copy: copy.wait(), into=True)

        def one_run(j, _):
            _merge(writes, scratch, j, packed, rank, rope_dim)
            return _

        jax.lax.fori_loop(0, runs, one_run, 0)
        _each_copy(writes, scratch, runs, packed, lambda copy: copy.start(), into=False)
        _each_copy(writes, scratch, runs, packed, lambda copy: copy.wait(), into=False)
        return token

    jax.lax.while_loop(lambda token: token < num_tokens, one_group, jnp.int32(0))


def _gather_runs(writes, scratch, token, size) -> tuple[jax.Array, jax.Array]:
    """Lists the runs of the next group from a token on; returns the token after them, and runs."""
    num_tokens = writes.rows.shape[0]
    num_slots = 2 * writes.pages.shape[0] * writes.pages.shape[1]

    def is_open(state):
        token, _, ended, _ = state
        return (token < num_tokens) & ~ended

    def one_token(state):
        token, runs, _, seen = state
        slot = writes.slot_mapping[token]
        exists = (slot >= 0) & (slot < num_slots)
        bundle = slot // size
        last = jnp.maximum(runs - 1, 0)
        joins = (runs > 0) & (scratch.at[last] == bundle)
        joins &= scratch.first[last] + scratch.count[last] == token
        joins &= scratch.count[last] < size
        # A set of the group's bundles, by their last five bits: most are found to be new at once.
        bit = jnp.left_shift(1, bundle & 31)
        searched = jnp.where(joins | (seen & bit == 0), 0, runs)
        taken = jax.lax.fori_loop(
            0, searched, lambda j, found: found | (scratch.at[j] == bundle), jnp.bool_(False)
        )
        ends = exists & ~joins & (taken | (runs == GROUP))
        begins = exists & ~joins & ~ends

        @pl.when(exists & joins)
        def _():
            scratch.count[last] += 1

        @pl.when(begins)
        def _():
            scratch.at[runs] = bundle
            scratch.first[runs] = token
            scratch.count[runs] = 1

        seen |= jnp.where(begins, bit, 0)
        return token + (~ends).astype(jnp.int32), runs + begins.astype(jnp.int32), ends, seen

    none = jnp.int32(0)
    start = token, none, jnp.bool_(False), none
    token, runs, _, _ = jax.lax.while_loop(is_open, one_token, start)
    return token, runs


def _each_copy(writes, scratch, runs, packed, act, *, into: bool) -> None:
    """Starts or awaits the copies of a group: bundles and rows into VMEM, or bundles back."""
    bundles_of_page = writes.pages.shape[1] // packed

    def one_run(j, _):
        bundle = scratch.at[j]
        at = pl.ds(pl.multiple_of(bundle % bundles_of_page * packed, packed), packed)
        in_hbm = writes.pages.at[bundle // bundles_of_page, at]
        if not into:
            act(pltpu.make_async_copy(scratch.bundle.at[j], in_hbm, scratch.left))
            return _
        act(pltpu.make_async_copy(in_hbm, scratch.bundle.at[j], scratch.arrived))

        def one_row(i, _):
            row = writes.rows.at[scratch.first[j] + i]
            act(pltpu.make_async_copy(row, scratch.rows.at[j, i], scratch.arrived))
            return _

        jax.lax.fori_loop(0, scratch.count[j], one_row, 0)
        return _

    jax.lax.fori_loop(0, runs, one_run, 0)


def _merge(writes, scratch, j, packed, rank, rope_dim) -> None:
    """Puts a run's rows into its bundle."""
    old = scratch.bundle[j].astype(jnp.float32)
    # No boolean vector is widened here: the Mosaic of libtpu 0.0.50 gives those no layout.
    lane = jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)
    evens, odds, ropes = (1 + ((lane - at) >> 31) for at in (rank, 2 * rank, 2 * rank + rope_dim))
    token_at = 2 * jax.lax.broadcasted_iota(jnp.int32, old.shape, 0) + evens - odds + ropes

    def one_row(i, values):
        latents = [scratch.rows[j, i, pl.ds(c, 1)] for c in range(rank // LANES)]
        ropes = scratch.rows[j, i, pl.ds(rank // LANES, 1)]
        row = jnp.concatenate([*latents, *latents, ropes], axis=1)
        offset = writes.slot_mapping[scratch.first[j] + i] % (2 * packed)
        return jnp.where(token_at == offset, row, values)

    new = jax.lax.fori_loop(0, scratch.count[j], one_row, old)
    scratch.bundle[j] = new.astype(scratch.bundle.dtype)
