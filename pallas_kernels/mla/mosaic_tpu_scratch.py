"""What a pass of MLA on TPU is given, and has on the chip: arrays, tiles, sizes, scratch."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_chip import LANES

OUTPUTS = 4  # tiles' outputs on their way
AHEAD = 2  # steps whose blocks are on their way


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is static of a pass.

    Attributes:
        block_q: queries of a tile.
        block_kv: keys of a block; whole pages.
        blocks: blocks of a step.
        lead: blocks that products with the keys are ahead of the softmax; from 1 to `blocks`.
        lag: blocks that products with the values are behind it; at most `blocks`.
        finishes: tiles that a step divides among its products; others wait till between the steps.
        starts_within: whether copies are started among a step's products, or before them.
        num_heads, rank, rope_dim, page_size: of the arrays.
        columns: of a row of the page table, with those that make it whole blocks.
        q_dtype: of queries and output.
        cache_dtype: of the latents as they are stored.
        scale, soft_cap: of the logits.
        rolls_ropes: how the rotary keys of two tokens come apart; the products are the same.
    """

    block_q: int
    block_kv: int
    blocks: int
    lead: int
    lag: int
    finishes: int
    starts_within: bool
    num_heads: int
    rank: int
    rope_dim: int
    page_size: int
    columns: int
    q_dtype: jnp.dtype
    cache_dtype: jnp.dtype
    scale: float
    soft_cap: float | None
    rolls_ropes: bool

    @property
    def rows(self) -> int:
        """Rows of the matrix products: queries times heads."""
        return self.block_q * self.num_heads

    @property
    def pages_of_block(self) -> int:
        """Pages of a block."""
        return self.block_kv // self.page_size

    @property
    def stripes(self) -> int:
        """Stripes of LANES numbers that a latent has."""
        return self.rank // LANES

    @property
    def ring(self) -> int:
        """Blocks of latents in VMEM: a step's, lead and lag, and those of AHEAD steps to come."""
        return (AHEAD + 1) * self.blocks + self.lead + self.lag

    @property
    def states(self) -> int:
        """Tiles that may be under way: as many as a step has blocks, with those that lag."""
        return self.blocks + self.lag

    @property
    def spare(self) -> int:
        """States and outputs that are nobody's: what a step's run writes to where no tile ended."""
        return int(self.lag > 0 or self.finishes > 0)

    @property
    def queries(self) -> int:
        """Tiles' queries in VMEM: as many tiles as a step may begin, and as many on their way."""
        return 2 * (self.blocks + self.lead)

    @property
    def precision(self) -> jax.lax.Precision | None:
        """Of both products."""
        return jax.lax.Precision.HIGHEST if self.q_dtype == jnp.float32 else None


class Arrays(NamedTuple):
    """The arrays in HBM, and the cache's scale and page table in SMEM."""

    ql_nope: Any
    q_pe: Any
    pages: Any
    out: Any
    lse: Any
    page_table: Any  # row after row, `Sizes.columns` each
    kv_scale: Any  # times that of `tpu_operands.factor_of`


class Tiles(NamedTuple):
    """What is known of each tile, in SMEM: int32 [num_tiles]."""

    seq: Any  # row of page_table
    token: Any  # its first query's row in the arrays
    count: Any  # queries in it, at most block_q
    q_pos: Any  # position of its first query; negative where the sequence is too short for it
    blocks: Any  # blocks that it takes, at least one
    end: Any  # blocks of this tile and of those before it


class Scratch(NamedTuple):
    """What a pass has in VMEM, and its semaphores; rings by tile are [tiles, ...]."""

    ql_nope: Any  # [queries, block_q, num_heads, rank]
    q_pe: Any  # [queries, block_q, num_heads, rope_dim]
    latents: Any  # [ring, pages_of_block, parts, page_size / 2, LANES]: as the cache has them
    nothing: Any  # [parts, page_size / 2, LANES]: zeros, a page's; None where starts_within
    logits: Any  # float32 [lead, rows, block_kv]: unscaled, of the blocks that are ahead
    weights: Any  # [lag, rows, block_kv]: of the blocks whose values come late
    kept: Any  # float32 [lag, rows, LANES]: what they leave of those before them
    m: Any  # float32 [states + spare, rows, LANES]: the same in every lane
    l: Any
    acc: Any  # float32 [states + spare, rows, rank]
    out: Any  # [OUTPUTS + spare, block_q, num_heads, rank]
    lse: Any  # float32 [OUTPUTS + spare, block_q, 1, num_heads]
    tile_of: Any  # SMEM [ring]: which tile, and which of its blocks, a buffer has
    block_of: Any
    q_arrived: Any
    latents_arrived: Any  # [AHEAD + 1]: of step k, k + AHEAD + 1, ...
    out_left: Any


def scratch_shapes(sizes: Sizes) -> Scratch:
    """The shapes of a pass's scratch."""
    s = sizes
    page = (2 * s.stripes + 1, s.page_size // 2, LANES)
    return Scratch(
        ql_nope=pltpu.VMEM((s.queries, s.block_q, s.num_heads, s.rank), s.q_dtype),
        q_pe=pltpu.VMEM((s.queries, s.block_q, s.num_heads, s.rope_dim), s.q_dtype),
        latents=pltpu.VMEM((s.ring, s.pages_of_block, *page), s.cache_dtype),
        nothing=None if s.starts_within else pltpu.VMEM(page, s.cache_dtype),
        logits=pltpu.VMEM((s.lead, s.rows, s.block_kv), jnp.float32),
        weights=pltpu.VMEM((max(s.lag, 1), s.rows, s.block_kv), s.q_dtype),
        kept=pltpu.VMEM((max(s.lag, 1), s.rows, LANES), jnp.float32),
        m=pltpu.VMEM((s.states + s.spare, s.rows, LANES), jnp.float32),
        l=pltpu.VMEM((s.states + s.spare, s.rows, LANES), jnp.float32),
        acc=pltpu.VMEM((s.states + s.spare, s.rows, s.rank), jnp.float32),
        out=pltpu.VMEM((OUTPUTS + s.spare, s.block_q, s.num_heads, s.rank), s.q_dtype),
        lse=pltpu.VMEM((OUTPUTS + s.spare, s.block_q, 1, s.num_heads), jnp.float32),
        tile_of=pltpu.SMEM((s.ring,), jnp.int32),
        block_of=pltpu.SMEM((s.ring,), jnp.int32),
        q_arrived=pltpu.SemaphoreType.DMA((s.queries,)),
        latents_arrived=pltpu.SemaphoreType.DMA((AHEAD + 1,)),
        out_left=pltpu.SemaphoreType.DMA((OUTPUTS,)),
    )
