"""How many keys the GPU kernels of `paged` take at once, and how many tiles are in flight."""

from typing import NamedTuple

from pallas_kernels import gpu_chip


class Phase(NamedTuple):
    """Sizes that change speed, never numbers, of decoding or of prompts.

    Attributes:
        keys: of a tile.
        stages: tiles in shared memory; decoding with two warpgroups has an even number.
        warpgroups: that compute, 1 or 2.
    """

    keys: int
    stages: int
    warpgroups: int = 2


class Tiles(NamedTuple):
    """Sizes where few queries see the whole cache, and under prompts."""

    decode: Phase
    prefill: Phase


# By chip, bytes of a cached number, and head sizes up to the key.
HOPPER = {
    2: {
        64: Tiles(Phase(64, 8), Phase(128, 3)),
        80: Tiles(Phase(64, 6), Phase(64, 4)),
        128: Tiles(Phase(64, 4), Phase(128, 2)),
        192: Tiles(Phase(64, 3, 1), Phase(64, 3, 1)),
        256: Tiles(Phase(64, 2, 1), Phase(64, 2, 1)),
    },
    1: {
        64: Tiles(Phase(64, 8), Phase(64, 4)),
        96: Tiles(Phase(64, 6), Phase(64, 4)),
        128: Tiles(Phase(64, 4), Phase(64, 4, 1)),
    },
}
TILES = {"h100": HOPPER, "h200": HOPPER}


def tiles_for_chip(head_dim: int, itemsize: int) -> Tiles:
    """The sizes for the chip that is traced for.

    Raises:
        ValueError: it is a chip, or a head size, that these kernels do not run with.
    """
    chip = gpu_chip.current()
    if chip.name not in TILES:
        raise ValueError(f"chip is {chip.name}, must be one of {', '.join(TILES)}")
    by_size = TILES[chip.name][itemsize]
    if head_dim > max(by_size):
        raise ValueError(
            f"head_dim is {head_dim}, must be at most {max(by_size)} with a cache of {itemsize} "
            f"byte a number: converting its tiles takes more registers than there are"
        )
    return by_size[min(size for size in by_size if size >= head_dim)]
