"""How much the TPU kernels of `paged` compute at once, and how deep they prefetch."""

from typing import NamedTuple

from pallas_kernels import tpu_chip


class Tiles(NamedTuple):
    """Sizes that change speed, never numbers.

    Attributes:
        tile_tokens: queries of a grid step.
        block_tokens: keys that one buffer holds; decode computes them at once.
        chunk_tokens: keys that prefill computes at once.
        num_buffers: blocks in flight and in use.
    """

    tile_tokens: int
    block_tokens: int
    chunk_tokens: int
    num_buffers: int


TILES = {
    "v4": Tiles(tile_tokens=64, block_tokens=256, chunk_tokens=256, num_buffers=2),
    "v5e": Tiles(tile_tokens=128, block_tokens=512, chunk_tokens=512, num_buffers=3),
    "v5p": Tiles(tile_tokens=128, block_tokens=512, chunk_tokens=512, num_buffers=3),
    "v6e": Tiles(tile_tokens=128, block_tokens=512, chunk_tokens=512, num_buffers=3),
    "7x": Tiles(tile_tokens=128, block_tokens=1024, chunk_tokens=512, num_buffers=3),
}


def tiles_for_chip() -> Tiles:
    """The sizes for the chip that is traced for."""
    return TILES[tpu_chip.current().generation]
