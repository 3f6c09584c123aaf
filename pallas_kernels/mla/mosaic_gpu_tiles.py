"""How often the latent kernels on Hopper split a sequence, by chip, cache dtype and shape class.

What a block holds is no choice: 64 rows of queries and two slots of 64 keys of 576 numbers fill
shared memory (216 of 227 KiB), and half of 64 x 512 sums fills a warpgroup's registers. What is
left to choose changes when parts are merged, and so their rounding, and nothing else.
"""

from typing import NamedTuple

PAIR = 128  # keys that a block takes at a time


class Tiles(NamedTuple):
    """What may be chosen for a shape class.

    Attributes:
        waves: blocks of the grid for each core that splitting may make.
        least_pairs: pairs of key blocks that are worth a block of the grid of their own. A part
            writes and reads 64 x 512 float32 once more, 256 KiB: as many bytes as 1.8 pairs of a
            16-bit cache have, 3.6 of an 8-bit one.
    """

    waves: int
    least_pairs: int


# (chip, cache's bits, shape class). No entry was measured on a GPU: bytes are counted.
TILES = {
    ("h100", 16, "decode"): Tiles(1, 4),
    ("h100", 8, "decode"): Tiles(1, 8),
    ("h200", 16, "decode"): Tiles(1, 4),
    ("h200", 8, "decode"): Tiles(1, 8),
    ("h100", 16, "sparse"): Tiles(1, 4),
    ("h200", 16, "sparse"): Tiles(1, 4),
}


def splits(tiles: Tiles, *, cores: int, blocks: int, most_keys: int) -> int:
    """Parts of a sequence.

    Args:
        tiles: the entry.
        cores: of the chip.
        blocks: of the grid, where nothing is split.
        most_keys: of a sequence.
    """
    worth = most_keys // (tiles.least_pairs * PAIR)
    return max(1, min(tiles.waves * cores // blocks, worth))
