"""Which blocks of queries each core computes, where their lengths are known: Hopper's forward.

A grid with a block for each fills and drains its pipeline for every one, and nothing runs beside
it, for a block takes all of a core's shared memory. A core that walks over several brings the next
one's queries and keys while it still computes, and stores results beside the next one's products.
"""

import functools
import heapq
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.dense.mosaic_gpu_geometry import Row, Static, head_of_grid, row_of, tiles_of

COST = 0.5  # of beginning a block of queries, in key tiles
MOST = 1 << 16  # blocks of a planned call: more are long, or many, and the plan would take seconds


@functools.lru_cache(maxsize=64)
def plan(static: Static, together: int, cores: int) -> np.ndarray | None:
    """int32 [cores, n]: in each row how many blocks a core computes, and their numbers; 0 after it.

    As a GPU shares out the blocks of a grid: each goes to the core that is done first. Blocks are
    numbered in the grid's order, [batch, heads / together, block, together], longest first.

    Returns:
        None where lengths or positions are known only when it runs, and where no core has two.
    """
    blocks = tiles_of(static.q_len, static.block_q)
    count = static.batch * static.num_q_heads * blocks
    if static.lengths or static.offset is None or not cores < count <= MOST:
        return None
    cost = [COST + _tiles(static, place_in_order(static, i)) for i in range(blocks)]
    free = [(0.0, core) for core in range(cores)]
    walks: list[list[int]] = [[] for _ in free]
    for number in range(count):
        done, core = free[0]
        walks[core].append(number)
        heapq.heapreplace(free, (done + cost[number // together % blocks], core))
    table = np.zeros((cores, 1 + max(map(len, walks))), np.int32)
    for row, walk in zip(table, walks, strict=True):
        row[: len(walk) + 1] = len(walk), *walk
    return table


def place_in_order(static: Static, i):
    """The block of queries that is the i-th to be begun: causal, the longest first."""
    return tiles_of(static.q_len, static.block_q) - 1 - i if static.causal else i


def _tiles(static: Static, block: int) -> int:
    """How many tiles of keys a block of queries sees, by its first and its last position."""
    first = block * static.block_q + static.offset
    last = min(first + static.block_q, static.q_len + static.offset) - 1
    low, high = 0, static.kv_len
    left, right = static.sliding_window
    if static.causal:
        high = min(high, last + 1)
    if left is not None:
        low = max(low, first - left + 1)
    if right is not None:
        high = min(high, last + right)
    if (size := static.attention_chunk_size) is not None:
        low, high = max(low, first // size * size), min(high, (last // size + 1) * size)
    return max(1, tiles_of(high, static.tiles.block_kv) - low // static.tiles.block_kv)


class Place(NamedTuple):
    """What a block of the grid computes: block_q queries of a head, and the keys that they see."""

    row: Row
    b: Any
    head: Any
    index: Any

    @classmethod
    def here(cls, static: Static, rows: Any, head: jax.Array) -> "Place":
        """Where this block is; each role asks for itself, for what both hold would be spilled."""
        b = lax.axis_index("batch")
        index = place_in_order(static, lax.axis_index("block"))
        return cls(row_of(static, rows, b), b, head, index)

    @classmethod
    def numbered(cls, static: Static, rows: Any, number: jax.Array, together: int) -> "Place":
        """The block of a number in the order of `plan`."""
        sizes = together, tiles_of(static.q_len, static.block_q), static.num_q_heads // together
        parts = []
        for size in sizes:
            parts.append(lax.rem(number, jnp.int32(size)))
            number = lax.div(number, jnp.int32(size))
        head, i, heads = parts
        index = place_in_order(static, i)
        return cls(row_of(static, rows, number), number, heads * together + head, index)


def walk(x: Any, compute, carry: Any) -> Any:
    """What `compute(n, carry)` makes of a carry, for the n-th block of queries of this core.

    Where there is no plan, that is the one of the grid.
    """
    if x.plan is None:
        return compute(jnp.int32(0), carry)
    return lax.fori_loop(0, x.plan[lax.axis_index("core"), 0], compute, carry)


def place_of(static: Static, x: Any, together: int, n: jax.Array) -> Place:
    """Where the n-th block of queries of this core is.

    It is asked for where it is needed, twice rather than kept: the cache has it, and registers are
    what kernels are short of.
    """
    if x.plan is None:
        return Place.here(static, x.rows, head_of_grid())
    return Place.numbered(static, x.rows, x.plan[lax.axis_index("core"), n + 1], together)
