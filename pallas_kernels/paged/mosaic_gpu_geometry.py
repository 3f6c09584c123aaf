"""The sizes of one call on a GPU, and how its rows and tiles lie in shared memory."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.masks import Window, seen_bounds, window_bounds
from pallas_kernels.paged.mosaic_gpu_tiles import Tiles

ROWS = 64  # of a wgmma, and so of a warpgroup
LANES = 128  # threads of a warpgroup: a plain vector has a multiple of them
SWIZZLES = (128, 64, 32)  # bytes
CHUNK = 8  # rows of partial results that are stored at once
TMA_BYTES = 128  # what a copy in shared memory begins at a multiple of


def compute_registers(head_dim: int, warpgroups: int) -> int:
    """Of a thread that computes, where so many warpgroups do."""
    return {1: 248, 2: 240 if head_dim == 256 else 232}[warpgroups]


def producer_registers(head_dim: int) -> int:
    """Of a thread that brings tiles; with 24 some calls spill, from head size 192 those with 40."""
    return 24 if head_dim >= 192 else 40


@dataclasses.dataclass(frozen=True)
class Masks:
    """Which keys a query sees, as the contract has it."""

    causal: bool
    sliding_window: Window
    attention_chunk_size: int | None

    @property
    def bound_first_keys(self) -> bool:
        """Whether the first key that a query sees depends on its position."""
        left, _ = window_bounds(self.sliding_window)
        return left is not None or self.attention_chunk_size is not None

    def bounds(
        self, first_q_pos: jax.Array, last_q_pos: jax.Array, kv_len: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Keys [start, stop) that queries of a range may see."""
        return seen_bounds(first_q_pos, last_q_pos, kv_len, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What is known of a call when it is traced.

    Attributes:
        num_q_heads, num_kv_heads, head_dim, page_size, pages_per_seq, num_tokens, max_num_seqs:
            the contract's.
        cache_dtype: of the pages.
        dtype: of the operands of both products: the cache's, or float16 over a float8 cache.
        out_dtype: of the queries and the output.
        tiles: what shared memory holds.
        masks: which keys a query sees.
        soft_cap: in units of log2, or None.
        has_slopes: whether there are ALiBi slopes.
        has_row_factors: whether each row of queries comes with a factor of its own.
        scales_rows: whether kernels bring each row of queries to dtype, and find its factor.
        num_blocks: of a persistent grid.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    pages_per_seq: int
    num_tokens: int
    max_num_seqs: int
    cache_dtype: jnp.dtype
    dtype: jnp.dtype
    out_dtype: jnp.dtype
    tiles: Tiles
    masks: Masks
    soft_cap: float | None
    has_slopes: bool
    has_row_factors: bool
    scales_rows: bool
    num_blocks: int

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def converts(self) -> bool:
        """Whether tiles are converted before they are multiplied."""
        return self.cache_dtype != self.dtype

    # Decode: the rows of a tile are some tokens times some heads of one group.

    @property
    def parts(self) -> int:
        """Tiles that a group of heads needs: 1 up to 64 heads."""
        return -(-self.group // ROWS)

    @property
    def part_heads(self) -> int:
        """Heads of a tile."""
        return -(-self.group // self.parts)

    @property
    def units(self) -> int:
        """Tiles that one token's heads need."""
        return self.num_kv_heads * self.parts

    @property
    def decode_q_len(self) -> int:
        """New tokens that a sequence may have to be decoded, all in one tile."""
        return ROWS // self.part_heads

    @property
    def decode_tokens(self) -> int:
        """Tokens that may belong to such sequences."""
        return min(self.num_tokens, self.max_num_seqs * self.decode_q_len)

    @property
    def partial_width(self) -> int:
        """Columns of a partial result in memory."""
        return round_up(self.head_dim, LANES)

    @property
    def decode_rows(self) -> int:
        """Rows of queries of a unit: each sequence's in chunks."""
        rows = self.decode_tokens * self.part_heads + (CHUNK - 1) * self.max_num_seqs
        return round_up(rows, CHUNK)

    @property
    def partial_rows(self) -> int:
        """Rows of partial results: those of the queries, and a tile for each block's start."""
        return self.decode_rows * self.units + (self.num_blocks + 1) * ROWS

    # Prefill: the rows of a tile are tokens of one head; a block has two tiles.

    @property
    def out_width(self) -> int:
        """Columns of a result in memory: a copy of rows may begin at any of them."""
        return round_up(self.head_dim, TMA_BYTES // self.out_dtype.itemsize)

    @property
    def staged_columns(self) -> int:
        """Columns of a result that lie in shared memory at once, to leave it.

        A warp stores 8 rows at a time, each shifted by bits of its address. Rows of 512 bytes meet
        in two of eight groups of banks, which Mosaic refuses: its search for a layout does not end.
        """
        return self.out_width if self.head_dim < 256 else 128

    @property
    def pairs_heads(self) -> bool:
        """Whether two warpgroups have two heads of a group; otherwise twice as many tokens."""
        return self.group % self.tiles.prefill.warpgroups == 0

    @property
    def prefill_tokens(self) -> int:
        """Tokens of a work item."""
        return ROWS if self.pairs_heads else self.tiles.prefill.warpgroups * ROWS

    @property
    def prefill_heads(self) -> int:
        """Query heads of a work item."""
        return self.tiles.prefill.warpgroups if self.pairs_heads else 1

    @property
    def prefill_tiles(self) -> int:
        """Work items of one head, or pair of heads, at most."""
        # Of prompts, which have more tokens than what is decoded, and of the padding.
        most = min(self.max_num_seqs, self.num_tokens // (self.decode_q_len + 1)) + 1
        begins = most * (1 + (self.tiles.alignment - 1) / self.prefill_tokens)
        return int(self.num_tokens / self.prefill_tokens + begins) + 1


def round_up(n: int, multiple: int) -> int:
    """The next multiple, or n itself."""
    return -(-n // multiple) * multiple


def swizzled(dtype: jnp.dtype, width: int) -> Sequence[object]:
    """How rows of so many numbers lie in shared memory: in the widest swizzle that divides them."""
    columns = swizzled_columns(dtype, width)
    swizzle = columns * jnp.dtype(dtype).itemsize
    if swizzle not in SWIZZLES:
        return ()
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)


def swizzled_columns(dtype: jnp.dtype, width: int) -> int:
    """Columns of a swizzled tile: the smallest part of rows that can be worked on by itself."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = next((s for s in SWIZZLES if width * itemsize % s == 0), width * itemsize)
    return swizzle // itemsize
