"""A compute warpgroup's part: 64 rows of queries over tiles of keys, with a running softmax.

Every mask is an interval of keys for each row, so a tile is masked by two comparisons, and the
tiles that lie within every row's interval by none.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_addresses import tied_to
from pallas_kernels.masks import window_bounds
from pallas_kernels.paged.mosaic_gpu_geometry import ROWS, Geometry, Masks, swizzled_columns
from pallas_kernels.paged.mosaic_gpu_pages import Ring, Span

F32 = jnp.float32
TILE = plgpu.Layout.WGMMA
ROW = TILE.reduce(1)
LOADED = plgpu.Layout.WGMMA_UPCAST_2X  # of float8: a thread has 4 columns, a word of 8 bits each
LOWEST = -1e30  # a running maximum before the first key: finite, so that differences are no NaN
LOG2E = math.log2(math.e)
# Head size from which on rows of a tile are counted by a vector, two registers of a thread: of an
# index for each element the compiler keeps nine, for it does not see that they are two numbers.
SPARING = 256
# Bits of a float32: its exponent; 2.0 ** -126 and 2.0 ** 126, whose sum is that of any number's
# exponent and its reciprocal's.
EXPONENT, SMALLEST, LARGEST = 0x7F800000, 0x00800000, 0x7E800000


class Rows(NamedTuple):
    """What is known of a warpgroup's 64 rows.

    Attributes:
        q_pos: int32 [64] positions.
        first_q_pos, last_q_pos: int32 scalars.
        item_q_pos: the first position of the block's rows, the other warpgroup's too: both must
            agree on which tiles have slots that hold no key.
        factor: float32, scalar or [64], above 0: of the logits, log2(e) included where no soft cap
            follows.
        slopes: float32, scalar or [64], in units of log2; or None.
    """

    q_pos: Any
    first_q_pos: Any
    last_q_pos: Any
    item_q_pos: Any
    factor: Any
    slopes: Any


class State(NamedTuple):
    """The running softmax: acc [64, head_dim], m and l [64], float32; m in units of log2."""

    acc: Any
    m: Any
    l: Any


class Tools(NamedTuple):
    """Shared memory and barriers that a warpgroup works with.

    Attributes:
        ring: the tiles.
        q: [warpgroups, 64, head_dim].
        wide: two of [keys, head_dim], where a float8 tile's keys and values are converted to; or
            None.
        patched: a barrier of both warpgroups, where they share tiles; or None.
        turn: a barrier for each warpgroup, where they take turns at the tensor cores; or None.
        warpgroup: its index.
        stride: tiles from one that it takes to the next.
        tied: whether the address of q is computed in the loop.
    """

    ring: Ring
    q: Any
    wide: Any
    patched: Any
    turn: Any
    warpgroup: Any
    stride: int
    tied: bool


def row_index() -> jax.Array:
    """int32 [64]: each row's index; Mosaic lays out no vector of indices by itself."""
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, 8), 0, layout=TILE).max(axis=1)


def fetch_queries(rows: Any, smem: Any, arrived: Any) -> None:
    """Brings 64 rows of queries to where they are multiplied."""
    plgpu.copy_gmem_to_smem(rows, smem, arrived)
    plgpu.barrier_wait(arrived)


def scaled_queries(raw: Any, smem: Any, rows: Rows, geometry: Geometry) -> Rows:
    """Brings queries to geometry.dtype, each row divided by a power of two.

    Args:
        raw: [64, head_dim], as they come, in either memory.
        smem: where they are multiplied.
        rows: of the queries.
        geometry: the call's sizes.

    Returns:
        rows, their factors times what they were divided by.
    """
    values = plgpu.load(raw, layout=TILE, optimized=False).astype(F32)
    largest = lax.bitcast_convert_type(jnp.abs(values).max(axis=1), jnp.int32)
    # Its exponent alone, so far from both ends that the reciprocal is a number too.
    power = jnp.minimum(jnp.maximum(largest & EXPONENT, SMALLEST), LARGEST)
    reciprocal = lax.bitcast_convert_type(SMALLEST + LARGEST - power, F32)
    smem[...] = (values * over_columns(reciprocal, values.shape[1])).astype(geometry.dtype)
    plgpu.commit_smem()
    return rows._replace(factor=rows.factor * lax.bitcast_convert_type(power, F32))


def over_columns(values: Any, width: int) -> Any:
    """A value for each row, to be combined with a tile of so many columns."""
    if not getattr(values, "ndim", 0):
        return values
    return lax.broadcast_in_dim(values, (ROWS, width), [0])


def bounds(q_pos: Any, kv_len: Any, masks: Masks) -> tuple[Any, Any]:
    """Keys [start, stop) that the query at a position sees; start is None where it is 0."""
    left, right = window_bounds(masks.sliding_window)
    start, stop = None, kv_len
    if masks.causal:
        stop = jnp.minimum(stop, q_pos + 1)
    elif right is not None:
        stop = jnp.minimum(stop, q_pos + right)
    if left is not None:
        start = q_pos + (1 - left)
    if masks.attention_chunk_size is not None:
        size = masks.attention_chunk_size
        # Queries before the first key have no chunk.
        chunk = jnp.where(q_pos < 0, -size, q_pos - lax.rem(q_pos, _like(size, q_pos)))
        start = chunk if start is None else jnp.maximum(start, chunk)
        stop = jnp.minimum(stop, chunk + size)
    return start, stop


def _like(value: int, of: Any) -> Any:
    if not getattr(of, "ndim", 0):
        return jnp.int32(value)
    return plgpu.layout_cast(jnp.full(of.shape, value, jnp.int32), ROW)


def initial_state(geometry: Geometry) -> State:
    """Nothing seen yet."""
    return State(
        plgpu.layout_cast(jnp.zeros((ROWS, geometry.head_dim), F32), TILE),
        plgpu.layout_cast(jnp.full((ROWS,), LOWEST, F32), ROW),
        plgpu.layout_cast(jnp.zeros((ROWS,), F32), ROW),
    )


class Seen(NamedTuple):
    """What the rows see of a span.

    Attributes:
        interval: each row's keys [start, stop), int32 [64]; start is None where it is 0.
        valid: the keys [start, stop) whose slots the block may read, int32 scalars.
        plain, late: tiles [0, plain) and [late, num_tiles) are masked, those between are not.
    """

    interval: tuple[Any, Any]
    valid: tuple[Any, Any]
    plain: Any
    late: Any


def seen_of(span: Span, rows: Rows, keys: int, masks: Masks) -> Seen:
    """What the rows see of a span in tiles of so many keys."""
    _, first_stop = bounds(rows.first_q_pos, span.kv_len, masks)
    last_start, _ = bounds(rows.last_q_pos, span.kv_len, masks)
    item_start, _ = bounds(rows.item_q_pos, span.kv_len, masks)
    plain = jnp.int32(0)
    if last_start is not None:
        above = lax.div(lax.max(last_start, jnp.int32(0)) + (keys - 1), jnp.int32(keys))
        plain = lax.min(lax.max(above - span.first_tile, plain), span.num_tiles)
    whole = lax.div(lax.max(first_stop, jnp.int32(0)), jnp.int32(keys)) - span.first_tile
    late = lax.min(lax.max(whole, plain), span.num_tiles)
    valid = (jnp.int32(0) if item_start is None else item_start, span.kv_len)
    return Seen(bounds(rows.q_pos, span.kv_len, masks), valid, plain, late)


def attend_span(
    span: Span, rows: Rows, count: Any, tools: Tools, geometry: Geometry
) -> tuple[State, Any]:
    """Attends to all tiles of a span that are this warpgroup's.

    Args:
        span: the tiles.
        rows: the queries, which lie in `tools.q`.
        count: tiles that the ring has held before.
        tools: what to work with.
        geometry: the call's sizes.

    Returns:
        the softmax, and the tiles that the ring has held now.
    """
    stages, keys, _ = tools.ring.k.shape
    interval, valid, plain, late = seen_of(span, rows, keys, geometry.masks)
    mine = lax.rem(count + tools.warpgroup, jnp.int32(tools.stride))

    def over(begin, end, state, masked):
        def step(turn, state):
            i = mine + turn * tools.stride
            first_key = (span.first_tile + i) * keys
            slot = lax.rem(count + i, jnp.int32(stages))
            seen = (interval, valid) if masked else None
            return attend_tile(state, rows, slot, first_key, seen, tools, geometry)

        turns = [
            lax.div(x - mine + (tools.stride - 1), jnp.int32(tools.stride)) for x in (begin, end)
        ]
        return lax.fori_loop(*turns, step, state)

    state = initial_state(geometry)
    if interval[0] is not None:
        state = over(jnp.int32(0), plain, state, True)
    state = over(plain, late, state, False)
    state = over(late, span.num_tiles, state, True)
    return state, count + span.num_tiles


def attend_tile(
    state: State, rows: Rows, slot: Any, first_key: Any, seen: Any, tools: Tools,
    geometry: Geometry,
) -> State:  # fmt: skip
    """One tile: logits, running softmax, product with the values."""
    ring = tools.ring
    interval, valid = (None, None) if seen is None else seen
    plgpu.barrier_wait(ring.k_full.at[slot])
    if geometry.converts:
        products, values = _converted(slot, first_key, valid, tools, geometry)
    else:
        products, values = _products(ring.k.at[slot], first_key, tools), ring.v.at[slot]
        plgpu.barrier_arrive(ring.k_empty.at[slot])
    p, fade, m, l = weigh(products, rows, state.m, state.l, first_key, interval, geometry)
    acc = state.acc * over_columns(fade, state.acc.shape[1])
    if not geometry.converts:
        plgpu.barrier_wait(ring.v_full.at[slot])
        if valid is not None:
            clear_values(values, first_key, valid, tools)
    weights = p.astype(geometry.dtype)
    acc = pl.run_state(lambda a: plgpu.wgmma(a, weights, values))(plgpu.ACC.init(acc))
    if not geometry.converts:
        plgpu.barrier_arrive(ring.v_empty.at[slot])
    return State(acc, m, l)


def weigh(
    products: jax.Array, rows: Rows, m: Any, l: Any, first_key: Any, interval: Any,
    geometry: Geometry,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """A tile's weights [64, keys]; what sums before it are multiplied by; m and l after it.

    Args:
        products: [64, keys], of queries and keys.
        rows: the queries.
        m, l: the running softmax before the tile.
        first_key: of the tile.
        interval: each row's keys, as `Seen` has them; None = every row sees the whole tile.
        geometry: the call's sizes.
    """
    logits, factor = products, rows.factor
    if geometry.soft_cap is not None or rows.slopes is not None:
        logits, factor = in_log2(products, rows, first_key, geometry), None
    return _weights(_masked(logits, first_key, interval), factor, m, l)


def softmax_step(
    state: State, logits: jax.Array, first_key: Any, interval: Any
) -> tuple[jax.Array, State]:
    """Weights [64, keys] of a tile, and the softmax before the tile's values are added.

    Args:
        state: before the tile.
        logits: [64, keys] in units of log2.
        first_key: of the tile.
        interval: each row's keys, as `Seen` has them; None = every row sees the whole tile.
    """
    if interval is not None:
        interval = tuple(None if end is None else end - first_key for end in interval)
    p, fade, m, l = _weights(_masked(logits, 0, interval), None, state.m, state.l)
    return p, State(state.acc * over_columns(fade, state.acc.shape[1]), m, l)


def _masked(logits: jax.Array, first_key: Any, interval: Any) -> jax.Array:
    if interval is None:
        return logits
    return jnp.where(_mask(interval, first_key, logits.shape), logits, -jnp.inf)


def _weights(
    logits: jax.Array, factor: Any, m: jax.Array, l: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `weigh`, of logits times a factor, which joins the difference to m: one instruction."""
    top = logits.max(axis=1)
    higher = jnp.maximum(m, top if factor is None else top * factor)
    fade = jnp.exp2(m - higher)
    if factor is not None:
        logits = logits * over_columns(factor, logits.shape[1])
    p = jnp.exp2(logits - over_columns(higher, logits.shape[1]))
    return p, fade, higher, l * fade + p.sum(axis=1)


def _products(
    k: Any, first_key: Any, tools: Tools, beside: Callable[[], None] = lambda: None
) -> jax.Array:
    """[64, keys], of queries and keys; `beside` is done while they are multiplied."""
    q = tools.q.at[tied_to(first_key, tools.warpgroup, tied=tools.tied)]

    def product(acc):
        plgpu.wgmma(acc, q, k.transpose((1, 0)))
        beside()
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((ROWS, k.shape[0]), F32))


def _converted(
    slot: Any, first_key: Any, valid: Any, tools: Tools, geometry: Geometry
) -> tuple[jax.Array, Any]:
    """(products of queries and keys, values) of a float8 tile, whose slot becomes free.

    The values are converted while the keys are multiplied.
    """
    ring, (k, v) = tools.ring, tools.wide
    widen(ring.k.at[slot], k, None, first_key, geometry)
    plgpu.barrier_arrive(ring.k_empty.at[slot])

    def values():
        plgpu.barrier_wait(ring.v_full.at[slot])
        widen(ring.v.at[slot], v, valid, first_key, geometry)
        plgpu.barrier_arrive(ring.v_empty.at[slot])

    return _products(k, first_key, tools, values), v


def in_log2(products: jax.Array, rows: Rows, first_key: Any, geometry: Geometry) -> jax.Array:
    """Logits in units of log2 of products [64, keys]: factor, soft cap, slopes."""
    keys = products.shape[1]
    logits = products * over_columns(rows.factor, keys)
    if geometry.soft_cap is not None:
        # The hardware's tanh is good to 11 bits only.
        logits = jnp.exp2(logits * (2 * LOG2E))
        logits = geometry.soft_cap - (2 * geometry.soft_cap) / (logits + 1)
    if rows.slopes is not None:
        columns = plgpu.broadcasted_iota(jnp.int32, (ROWS, keys), 1, layout=TILE) + first_key
        distance = jnp.abs(over_columns(rows.q_pos, keys) - columns).astype(F32)
        logits = logits - over_columns(rows.slopes, keys) * distance
    return logits


def _mask(interval: tuple[Any, Any], first_key: Any, shape: tuple[int, int]) -> jax.Array:
    """Which keys each row sees."""
    start, stop = interval
    # Positions are no invariants of a loop, which the compiler would keep, 32 registers of them.
    columns = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE) + first_key
    sees = columns < over_columns(stop, shape[1])
    if start is not None:
        sees = sees & (columns >= over_columns(start, shape[1]))
    return sees


def clear_values(v: Any, first_key: Any, valid: tuple[Any, Any], tools: Tools) -> None:
    """Puts 0 in slots of a tile that hold no key, where there are any."""
    keys = v.shape[0]
    start, stop = valid

    @pl.when((first_key < start) | (first_key + keys > stop))
    def _():
        for part in range(keys // ROWS):
            if tools.patched is None:
                _patch(v, part, first_key, valid)
            else:
                pl.when(tools.warpgroup == part % 2)(
                    lambda part=part: _patch(v, part, first_key, valid)
                )
        plgpu.commit_smem()
        if tools.patched is not None:
            plgpu.barrier_arrive(tools.patched)
            plgpu.barrier_wait(tools.patched)


def _patch(v: Any, part: int, first_key: Any, valid: tuple[Any, Any]) -> None:
    """Puts 0 in 64 rows of a tile where there is no key, few columns at a time: registers are."""
    width = swizzled_columns(v.dtype, v.shape[-1])

    def put(i, _):
        columns = pl.ds(pl.multiple_of(i * width, width), width)
        place = v.at[pl.ds(part * ROWS, ROWS), columns]
        values = plgpu.load(place, layout=TILE)
        if v.shape[-1] < SPARING:
            row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=TILE)
        else:
            row = over_columns(row_index(), width)
        place[...] = jnp.where(_exists(row, first_key + part * ROWS, valid), values, 0)

    lax.fori_loop(0, v.shape[-1] // width, put, None)


def _exists(row: jax.Array, first_key: Any, valid: tuple[Any, Any]) -> jax.Array:
    return (row >= valid[0] - first_key) & (row < valid[1] - first_key)


def widen(narrow: Any, wide: Any, valid: Any, first_key: Any, geometry: Geometry) -> None:
    """Converts a float8 tile to what is multiplied, few columns at a time."""
    keys, head_dim = narrow.shape
    width = swizzled_columns(geometry.cache_dtype, head_dim)
    for begin in range(0, head_dim, width):
        columns = pl.ds(0, keys), pl.ds(begin, width)
        values = plgpu.load(narrow.at[columns], layout=LOADED).astype(geometry.dtype)
        if valid is not None:
            row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=LOADED)
            values = jnp.where(_exists(row, first_key, valid), values, 0)
        wide.at[columns][...] = values
    plgpu.commit_smem()
