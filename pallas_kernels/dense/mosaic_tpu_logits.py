"""One tile's logits in the dense TPU kernels, keys first, and who sees whom in it.

A tile is [keys, queries]: keys along sublanes, queries along lanes. Maximum and sum over keys are
then element-wise over registers, what belongs to a query (m, l, lse) is one register row, and
every matrix product of the forward and the backward pass has its operands as they lie.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import masks
from pallas_kernels.dense.mosaic_tpu_schedule import KV_LEN, Q_LEN, Q_OFFSET, Static
from pallas_kernels.dense.mosaic_tpu_tiles import Tiles
from pallas_kernels.tpu_chip import LANES

LOG2E = math.log2(math.e)


class Where(NamedTuple):
    """One step of a tile: so many keys against so many queries.

    Attributes:
        q, kv: first query and key in their major blocks, multiples of 128.
        q_index, kv_index: the same in the call.
        shape: (keys, queries).
        facts: Q_OFFSET, Q_LEN, KV_LEN of the batch row.
    """

    q: jax.Array
    kv: jax.Array
    q_index: jax.Array
    kv_index: jax.Array
    shape: tuple[int, int]
    facts: tuple[jax.Array, jax.Array, jax.Array]


class Extras(NamedTuple):
    """What else the logits depend on; None = not given.

    Attributes:
        bias: one of [major_kv, major_q], [1, major_q] (for queries), [1, major_kv] (for keys).
        bias_of: "both", "queries" or "keys": which of these.
        slope: the head's ALiBi slope.
        q_segments, kv_segments: int32 [1, major_q], [1, major_kv].
        mask: int8 [major_kv, major_q], 0 = not seen.
    """

    bias: jax.Array | None = None
    bias_of: str = ""
    slope: jax.Array | None = None
    q_segments: jax.Array | None = None
    kv_segments: jax.Array | None = None
    mask: jax.Array | None = None


def bias_block(tiles: Tiles, bias_of: str) -> tuple[int | None, ...]:
    """Of major blocks, for one head of one row of the batch."""
    sizes = {
        "both": (tiles.major_kv, tiles.major_q),
        "queries": (1, tiles.major_q),
        "keys": (1, tiles.major_kv),
        "": (),
    }
    return None, None, *sizes[bias_of]


def row_and_head(x: jax.Array, b: jax.Array, h: jax.Array) -> tuple[jax.Array | int, ...]:
    """Where a bias or a mask has those of a batch row and a head: one may stand for all."""
    return b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0


def unit(static: Static, extras: Extras) -> float:
    """What a product of q and k, or a finished logit, is worth in natural logarithms."""
    return static.scale if _is_plain(static, extras) else 1.0


def _is_plain(static: Static, extras: Extras) -> bool:
    return static.soft_cap is None and extras.bias is None and extras.slope is None


def matmul(a: jax.Array, b: jax.Array, summed: tuple[int, int] = (1, 0)) -> jax.Array:
    """Product in float32; float32 operands are multiplied in full float32."""
    return lax.dot_general(
        a,
        b,
        (((summed[0],), (summed[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def finished(
    static: Static, extras: Extras, dots: jax.Array, at: Where
) -> tuple[jax.Array, jax.Array | None]:
    """From products of k and q to logits in units of `unit`; and the soft cap's derivative."""
    if _is_plain(static, extras):
        return dots, None
    logits, slope = dots * static.scale, None
    if static.soft_cap is not None:
        share = jnp.tanh(logits * (1 / static.soft_cap))
        logits, slope = static.soft_cap * share, 1 - share * share
    if extras.slope is not None:
        logits -= extras.slope * distance(at)
    if extras.bias is not None:
        logits += _bias(extras, at)
    return logits, slope


def _bias(extras: Extras, at: Where) -> jax.Array:
    keys, queries = pl.ds(at.kv, at.shape[0]), pl.ds(at.q, at.shape[1])
    if extras.bias_of == "both":
        return extras.bias[keys, queries].astype(jnp.float32)
    if extras.bias_of == "queries":
        return extras.bias[:, queries].astype(jnp.float32)
    return _down_sublanes(extras.bias[:, keys].astype(jnp.float32), at.shape[1])


def _down_sublanes(row: jax.Array, columns: int) -> jax.Array:
    """[1, keys] -> [keys, columns], each key's value along a row."""
    square = jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))
    return jnp.concatenate([square] * (columns // LANES), axis=1)


def positions(at: Where) -> tuple[jax.Array, jax.Array]:
    """Positions of the tile's queries and keys, each of the tile's shape."""
    q_pos = lax.broadcasted_iota(jnp.int32, at.shape, 1) + (at.q_index + at.facts[Q_OFFSET])
    return q_pos, lax.broadcasted_iota(jnp.int32, at.shape, 0) + at.kv_index


def distance(at: Where) -> jax.Array:
    """float32 [keys, queries]: how far each key is from each query."""
    q_pos, kv_pos = positions(at)
    return jnp.abs(q_pos - kv_pos).astype(jnp.float32)


def seen(static: Static, extras: Extras, at: Where) -> jax.Array | None:
    """Mask [keys, queries]: which query sees which key; None where all do.

    Queries past q_lens are left as they are: their rows of the results are set at the end, and
    nothing of theirs enters another query's.
    """
    q_pos, kv_pos = positions(at)
    terms = [] if static.keys_fill_tiles else [kv_pos < at.facts[KV_LEN]]
    by_position = masks.seen(q_pos, kv_pos, **static.positions)
    if by_position is not None:
        terms.append(by_position)
    if extras.q_segments is not None:
        q_ids = extras.q_segments[:, pl.ds(at.q, at.shape[1])]
        kv_ids = extras.kv_segments[:, pl.ds(at.kv, at.shape[0])]
        terms.append(_down_sublanes(kv_ids, at.shape[1]) == q_ids)
    if extras.mask is not None:
        tile = extras.mask[pl.ds(at.kv, at.shape[0]), pl.ds(at.q, at.shape[1])]
        terms.append(tile.astype(jnp.int32) != 0)
    return functools.reduce(jnp.logical_and, terms) if terms else None


def hidden(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """Logits, -inf where the key is not seen."""
    return x if mask is None else jnp.where(mask, x, -jnp.inf)


def below_diagonal(x: jax.Array) -> jax.Array:
    """Logits [keys, queries] of the same positions, -inf where the query comes first.

    Queries past the last key see all of them.
    """
    keys = x.shape[0]
    square = x[:, :keys]
    row, column = (lax.broadcasted_iota(jnp.int32, square.shape, axis) for axis in (0, 1))
    square = hidden(row <= column, square)
    return square if x.shape[1] == keys else jnp.concatenate([square, x[:, keys:]], axis=1)


def added_from(x: jax.Array, first: int, part: jax.Array) -> jax.Array:
    """The sum of x and of what belongs to its columns from the first one on."""
    if first == 0:
        return x + part
    return jnp.concatenate([x[:, :first], x[:, first:] + part], axis=1)


def exists(at: Where) -> jax.Array:
    """Mask [keys, queries]: whether the query exists."""
    return lax.broadcasted_iota(jnp.int32, at.shape, 1) + at.q_index < at.facts[Q_LEN]


class Used(NamedTuple):
    """Which keys of a step some query of the tile that exists sees: the others may be NaN.

    What positions alone decide is an interval of keys; else who sees whom in the tile is asked.

    Attributes:
        at: the step.
        start, stop: the interval, in the call.
        some: float32 [keys, 128], with segments or a mask: each row has something above 0 if the
            key is seen.
    """

    at: Where
    start: jax.Array
    stop: jax.Array
    some: jax.Array | None

    def across(self, x: jax.Array) -> jax.Array:
        """[n, keys] with 0 for what is not used."""
        inside = self._inside((1, self.at.shape[0]), 1)
        if self.some is not None:
            inside &= jnp.max(jnp.transpose(self.some), axis=0, keepdims=True) > 0
        return jnp.where(inside, x, jnp.zeros_like(x))

    def down(self, x: jax.Array) -> jax.Array:
        """[keys, n] with 0 for what is not used."""
        inside = self._inside(x.shape, 0)
        if self.some is not None:
            inside &= jnp.max(self.some, axis=1, keepdims=True) > 0
        return jnp.where(inside, x.astype(jnp.float32), 0.0).astype(x.dtype)

    def _inside(self, shape: tuple[int, int], along: int) -> jax.Array:
        index = lax.broadcasted_iota(jnp.int32, shape, along) + self.at.kv_index
        return (index >= self.start) & (index < self.stop)


def used(static: Static, extras: Extras, at: Where, mask: jax.Array | None) -> Used:
    """Which keys of a step some query sees, given who sees whom."""
    offset, q_len, kv_len = at.facts
    first = offset + at.q_index
    last = offset + jnp.minimum(at.q_index + at.shape[1], q_len) - 1
    start, stop = masks.seen_bounds(first, last, kv_len, **static.positions)
    stop = jnp.where(first <= last, stop, start)  # else no query exists here
    if extras.q_segments is None and extras.mask is None:
        return Used(at, start, stop, None)
    ones = jnp.where(mask & exists(at), 1.0, 0.0)
    some = ones[:, :LANES]
    for lane in range(LANES, at.shape[1], LANES):
        some = jnp.maximum(some, ones[:, lane : lane + LANES])
    return Used(at, start, stop, some)
