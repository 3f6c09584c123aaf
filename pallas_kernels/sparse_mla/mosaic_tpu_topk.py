"""Top-k positions on TPU: a bitonic sort of a chunk of scores, merged into the best so far.

The contract is `topk_positions` of `pallas_kernels/sparse_mla/__init__.py`.

A chunk is as many positions as are named, rounded up to a power of two. It is sorted worst first,
then compared with the best so far, which are sorted best first, place by place: the better ones of
all places are the best of both, in an order that one bitonic merge sorts (Batcher 1968). So of n
positions only chunks are sorted, never all of them: 66 passes in place of 91 for 2048 of 8192.

Place i of a chunk lies in lane i // registers of register i % registers: passes between near
places, of which a bitonic network has most, compare whole registers, and the fewer ones between far
places shuffle lanes. The result is put in order by XLA.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip
from pallas_kernels.jax_settings import under_own_settings
from pallas_kernels.shape_checks import FLOAT32, check_arguments
from pallas_kernels.tpu_chip import LANES, SUBLANES

ROWS = 32  # tokens at once: a pass has that many registers to hide its latencies behind
MOST = 1 << 16  # entries of a chunk of so many tokens, beyond which they are fewer
NOTHING = -(2**31)  # below every score's key


class Entries(NamedTuple):
    """Keys and positions, a register each: int32 [rows, LANES]."""

    keys: list[jax.Array]
    positions: list[jax.Array]


@under_own_settings
def topk_positions(scores: jax.Array, topk: int) -> jax.Array:
    """The positions of the largest scores of each token, as the contract of `sparse_mla` has it.

    Args:
        scores: float32 [num_tokens, positions], -inf where a position is not seen.
        topk: static; how many to name.

    Returns:
        int32 [num_tokens, topk]: best first, ties to the lower position, -1 where fewer are seen.

    Raises:
        ValueError: topk is below 1, or scores are not float32 of two dimensions.
    """
    check_arguments({"scores": (scores, "num_tokens positions", FLOAT32)}, required=["scores"])
    if topk < 1:
        raise ValueError(f"topk is {topk}, must be at least 1: how many positions to name")
    if 0 in scores.shape:
        return jnp.full((scores.shape[0], topk), -1, jnp.int32)
    num_tokens, width = scores.shape
    registers = pl.cdiv(max(LANES, 1 << (topk - 1).bit_length()), LANES)
    places = registers * LANES
    rows = max(SUBLANES, min(ROWS, MOST // places))
    found = tpu_chip.pallas_call(
        functools.partial(_kernel, width=width),
        grid=(pl.cdiv(num_tokens, rows), pl.cdiv(width, places)),
        in_specs=[pl.BlockSpec((rows, places), lambda i, j: (i, j))],
        out_specs=pl.BlockSpec((rows, places), lambda i, j: (i, 0)),
        scratch_shapes=[pltpu.VMEM((rows, places), jnp.int32)] * 2,
        out_shape=jax.ShapeDtypeStruct((num_tokens, places), jnp.int32),
        compiler_params=tpu_chip.compiler_params(["parallel", "arbitrary"]),
        name="topk_positions",
    )(scores)
    in_order = jnp.swapaxes(found.reshape(num_tokens, registers, LANES), 1, 2)
    return in_order.reshape(num_tokens, -1)[:, :topk]


def _kernel(scores, out, best_keys, best_positions, *, width: int):
    """Sorts a chunk, and merges it into the best so far; after the last, names them."""
    chunk = pl.program_id(1)
    registers = scores.shape[1] // LANES

    @pl.when(chunk == 0)
    def _():
        best_keys[...] = jnp.full_like(best_keys, NOTHING)
        best_positions[...] = jnp.full_like(best_positions, -1)

    worst_first = _sorted(_entries(scores, chunk * scores.shape[1], width))
    best = _merged(_registers(best_keys, best_positions), worst_first)
    for i in range(registers):
        at = pl.ds(i * LANES, LANES)
        best_keys[:, at], best_positions[:, at] = best.keys[i], best.positions[i]

    @pl.when(chunk == pl.num_programs(1) - 1)
    def _():
        unseen = _key_of(jnp.full((1, LANES), -jnp.inf, jnp.float32))
        for i in range(registers):
            at = pl.ds(i * LANES, LANES)
            out[:, at] = jnp.where(best_keys[:, at] == unseen, -1, best_positions[:, at])


def _registers(keys, positions) -> Entries:
    """What lies in two references."""
    columns = [pl.ds(at, LANES) for at in range(0, keys.shape[1], LANES)]
    return Entries([keys[:, at] for at in columns], [positions[:, at] for at in columns])


def _entries(scores, first: jax.Array, width: int) -> Entries:
    """A chunk of scores; nothing, at position -1, past the last one."""
    keys, positions = [], []
    for at in range(0, scores.shape[1], LANES):
        lane = jax.lax.broadcasted_iota(jnp.int32, (scores.shape[0], LANES), 1)
        position = first + at + lane
        exists = position < width
        keys.append(jnp.where(exists, _key_of(scores[:, pl.ds(at, LANES)]), NOTHING))
        positions.append(jnp.where(exists, position, -1))
    return Entries(keys, positions)


def _key_of(scores: jax.Array) -> jax.Array:
    """int32 in the scores' order, both zeros alike, every NaN alike above infinity."""
    bits = pltpu.bitcast(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    ordered = bits ^ ((bits >> 31) & jnp.int32(2**31 - 1))
    return jnp.where(jnp.isnan(scores), jnp.int32(2**31 - 1), ordered)


def _sorted(entries: Entries) -> Entries:
    """Worst first."""
    places = len(entries.keys) * LANES
    size = 2
    while size <= places:
        apart = size // 2
        while apart:
            entries = _pass(entries, apart, size)
            apart //= 2
        size *= 2
    return entries


def _merged(best: Entries, other: Entries) -> Entries:
    """The best of both, best first, of entries that are best first and worst first."""
    kept = [
        _chosen(_is_before(*mine, *others), mine, others)
        for mine, others in zip(zip(*best, strict=True), zip(*other, strict=True), strict=True)
    ]
    entries = Entries([keys for keys, _ in kept], [positions for _, positions in kept])
    apart = len(entries.keys) * LANES // 2
    while apart:
        entries = _pass(entries, apart, 0)
        apart //= 2
    return entries


def _pass(entries: Entries, apart: int, size: int) -> Entries:
    """Exchanges entries that are `apart` places from each other where they are out of order.

    Args:
        entries: of a chunk.
        apart: a power of two.
        size: runs of so many places are sorted worst first and best first in turns, so that the
            last, of all places, is worst first; 0: all of them best first.
    """
    registers, rows = len(entries.keys), entries.keys[0].shape[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)

    def has(bit: int, register: int) -> jax.Array | bool:
        """Whether places have a bit set: of the register, or of its lanes."""
        in_lanes = (lane & (bit // registers)) != 0
        return bool(register & bit) if bit < registers else in_lanes

    found = Entries(list(entries.keys), list(entries.positions))
    for i in range(registers):
        best_first = has(size, i) if size else True
        mine = entries.keys[i], entries.positions[i]
        if apart >= registers:
            other = tuple(_shuffled(x, lane, apart // registers) for x in mine)
            is_second = has(apart, i)
            keeps = _same(_is_before(*mine, *other), _same(is_second, _same(best_first, False)))
            found.keys[i], found.positions[i] = _chosen(keeps, mine, other)
        elif not i & apart:
            j = i + apart
            other = entries.keys[j], entries.positions[j]
            keeps = _same(_is_before(*mine, *other), best_first)
            found.keys[i], found.positions[i] = _chosen(keeps, mine, other)
            found.keys[j], found.positions[j] = _chosen(keeps, other, mine)
    return found


def _shuffled(x: jax.Array, lane: jax.Array, apart: int) -> jax.Array:
    """What lies `apart` lanes away, up or down, so that pairs see each other."""
    return jnp.take_along_axis(x, lane ^ apart, axis=1, mode="promise_in_bounds")


def _is_before(keys, positions, other_keys, other_positions) -> jax.Array:
    """Whether entries come before others: by score, then by position."""
    is_lower = (keys == other_keys) & (positions < other_positions)
    return (keys > other_keys) | is_lower


def _chosen(keeps: jax.Array, entries, others) -> tuple[jax.Array, jax.Array]:
    """Keys and positions of entries where they are kept, of others elsewhere."""
    keys, positions = (jnp.where(keeps, a, b) for a, b in zip(entries, others, strict=True))
    return keys, positions


def _same(a: jax.Array | bool, b: jax.Array | bool) -> jax.Array | bool:
    """Whether both are set or neither is; what is known while tracing costs nothing."""
    if isinstance(a, bool):
        a, b = b, a
    if not isinstance(b, bool):
        return ~(a ^ b)
    if b:
        return a
    return not a if isinstance(a, bool) else ~a
