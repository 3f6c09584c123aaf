"""Tile sizes of the dense kernels of Mosaic GPU, by chip, dtype, head sizes and shape class."""

import dataclasses

from pallas_kernels.gpu_chip import GpuChip


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the forward pipeline.

    Attributes:
        block_kv: keys of a tile.
        stages: key tiles, and value tiles, in shared memory.
        consumers: warpgroups that multiply, 64 queries each.
        turns: whether consumers issue their products in turn.
    """

    block_kv: int
    stages: int
    consumers: int = 2
    turns: bool = True


# (head_dim, head_dim_v) -> tiles, capability 9.0; the first that is large enough.
TILES = {
    (64, 64): Tiles(128, 4),
    (80, 80): Tiles(128, 4),
    (96, 96): Tiles(128, 4),
    (128, 128): Tiles(128, 3),
    (192, 128): Tiles(128, 2),
    (192, 192): Tiles(64, 3),
    (256, 256): Tiles(64, 2),
}


def forward_tiles(chip: GpuChip, dtype: str, head_dim: int, head_dim_v: int) -> Tiles:
    """The tiles of a shape class on a chip."""
    return TILES[head_dim, head_dim_v]
