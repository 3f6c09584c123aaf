"""How many keys the GPU kernels of `paged` take at once, and how many tiles are in flight."""

from typing import NamedTuple

from pallas_kernels import gpu_chip


class Tiles(NamedTuple):
    """Sizes that change speed, never numbers.

    Attributes:
        decode_keys: keys of a tile where few queries see the whole cache.
        decode_stages: such tiles in shared memory, an even number: each of two warpgroups has half.
        prefill_keys: keys of a tile under prompts.
        prefill_stages: such tiles in shared memory.
    """

    decode_keys: int
    decode_stages: int
    prefill_keys: int
    prefill_stages: int


# By chip, bytes of a cached number, and head sizes up to the key.
HOPPER = {
    2: {64: Tiles(128, 4, 128, 3), 128: Tiles(64, 4, 128, 2), 192: Tiles(64, 2, 64, 2),
        256: Tiles(64, 2, 64, 2)},
    1: {64: Tiles(128, 4, 64, 4), 128: Tiles(64, 4, 64, 4), 192: Tiles(64, 2, 64, 2),
        256: Tiles(64, 2, 64, 2)},
}  # fmt: skip
TILES = {"h100": HOPPER, "h200": HOPPER}


def tiles_for_chip(head_dim: int, itemsize: int) -> Tiles:
    """The sizes for the chip that is traced for.

    Raises:
        ValueError: it is a chip that these kernels do not run on.
    """
    chip = gpu_chip.current()
    if chip.name not in TILES:
        raise ValueError(f"chip is {chip.name}, must be one of {', '.join(TILES)}")
    by_size = TILES[chip.name][itemsize]
    return by_size[min(size for size in by_size if size >= head_dim)]
