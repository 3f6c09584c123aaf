"""How many keys the GPU kernels of `paged` take at once, and how many tiles are in flight."""

from typing import NamedTuple

from pallas_kernels import gpu_chip


class Phase(NamedTuple):
    """Sizes that change speed, never numbers, of decoding or of prompts.

    Attributes:
        keys: of a tile.
        stages: tiles in shared memory; decoding with two warpgroups has an even number.
        warpgroups: that compute, 1 or 2.
        tied: whether the queries' addresses are computed in the loop (`gpu_addresses`); where
            mma.sync multiplies, whether queries are read in the loop, not kept in registers.
        overlapped: of prompts: whether a tile's products run beside the softmax of the one before;
            takes the registers of its weights.
        slots: of prompts on Hopper: for queries in shared memory, 2 where the next item's come
            beside this one's work, 1 where they come beside its results.
    """

    keys: int
    stages: int
    warpgroups: int = 2
    tied: bool = False
    overlapped: bool = False
    slots: int = 2


class Tiles(NamedTuple):
    """Sizes where few queries see the whole cache, and under prompts.

    Attributes:
        decode, prefill: of each.
        blocks: of a persistent grid that share a core.
        alignment: tokens that tiles of prompts begin at a multiple of.
    """

    decode: Phase
    prefill: Phase
    blocks: int = 1
    alignment: int = 8


# By chip, bytes of a cached number, and head sizes up to the key. Decoding waits for bytes: 1 us of
# latency x 4.8 TB/s / 132 cores want 36 KiB of keys and values in flight (2 x keys x head size x
# bytes x stages), the more the longer memory takes under load: there are 120 to 144 KiB with
# caches of 16 bits and 96 KiB with those of 8, whose converted tiles take the rest. Prompts at 256:
# tiles 128 KiB, queries of two warpgroups 64, half of their results 32, of 227; a second slot for
# queries has no room.
HOPPER = {
    2: {
        64: Tiles(Phase(64, 8), Phase(128, 3)),
        80: Tiles(Phase(64, 6), Phase(64, 4)),
        96: Tiles(Phase(64, 4), Phase(64, 4)),  # prompts with 128 keys, pages of 16: 4 + 8 bytes
        128: Tiles(Phase(64, 4), Phase(128, 2, overlapped=True)),
        192: Tiles(Phase(64, 3, 1, tied=True), Phase(64, 3, 1, tied=True)),
        256: Tiles(Phase(64, 2, 1, tied=True), Phase(64, 2, tied=True, slots=1)),
    },
    1: {
        64: Tiles(Phase(64, 12), Phase(64, 4)),
        96: Tiles(Phase(64, 8, tied=True), Phase(64, 4)),  # with descriptors kept 16 + 32 bytes
        128: Tiles(Phase(64, 6), Phase(64, 4, 1, tied=True)),
    },
}
# The same where a soft cap or slopes take registers: two warpgroups that decode spill
# from head size 96 of 8 bits on, 128 of 16.
ADDED = {
    2: {size: Tiles(Phase(64, 4, 1), Phase(64, 4)) for size in (96, 128)},
    1: {
        96: Tiles(Phase(64, 8, 1, tied=True), Phase(64, 4)),
        128: Tiles(Phase(64, 6, 1, tied=True), Phase(64, 4, 1, tied=True)),
    },
}
# The same where rows see keys from one on (a window, a chunk): one loop more has masks. At 128
# decoding spills with descriptors kept, float8 with two warpgroups; at 96 prompts with 128 keys.
BOUNDED = {
    2: {size: Tiles(Phase(64, 4, tied=True), Phase(64, 4)) for size in (96, 128)},
    1: {128: ADDED[1][128]},
}
# Prompts of bfloat16 over a float16 cache, whose queries lie in shared memory a second time, as
# they are multiplied: (head size, whether nothing caps, adds or bounds) -> phase. With the tiles
# above 128 and 192 want 30 KiB and 14 KiB too many.
SCALED = {
    (128, True): Phase(64, 3, overlapped=True),
    (128, False): Phase(64, 3),
    (192, True): Phase(64, 2, 1, tied=True),
    (192, False): Phase(64, 2, 1, tied=True),
}
# One warpgroup a block (mma takes 64 rows), and two blocks a core to hide each other's waits; no
# copy of 16 rows of queries, the least that four warps share at any head size, crosses their end.
AMPERE = {
    2: {
        64: Tiles(Phase(64, 3, 1), Phase(64, 2, 1), blocks=2, alignment=16),
        96: Tiles(Phase(64, 2, 1), Phase(64, 2, 1), blocks=2, alignment=16),
        128: Tiles(Phase(64, 2, 1), Phase(64, 2, 1), blocks=2, alignment=16),
        192: Tiles(*[Phase(64, 2, 1, tied=True)] * 2, blocks=1, alignment=16),
        256: Tiles(*[Phase(32, 2, 1, tied=True)] * 2, blocks=1, alignment=16),
    },
}
# Products and blocks as on Ampere. 1 us x 8 TB/s / 148 cores want 53 KiB in flight of a core: two
# blocks have 80 to 160 KiB on their way (2 x keys x head size x bytes x (stages - 1) each), in the
# 113 KiB of shared memory that a block of two may have.
BLACKWELL = {
    2: {
        64: Tiles(Phase(64, 5, 1), Phase(64, 3, 1), blocks=2),
        80: Tiles(Phase(64, 4, 1), Phase(64, 3, 1), blocks=2),
        96: Tiles(Phase(64, 4, 1), Phase(64, 3, 1), blocks=2),
        128: Tiles(Phase(64, 3, 1), Phase(64, 2, 1), blocks=2),
    },
    1: {
        64: Tiles(Phase(64, 7, 1), Phase(64, 3, 1), blocks=2),
        80: Tiles(Phase(64, 5, 1), Phase(64, 3, 1), blocks=2),
        96: Tiles(Phase(64, 5, 1), Phase(64, 3, 1), blocks=2),
    },
}
# Pages of 16 spill with 64 keys a tile beside a soft cap and slopes.
BLACKWELL_ADDED = {2: {128: Tiles(Phase(32, 6, 1), Phase(32, 4, 1), blocks=2)}}
TILES = {"a100": AMPERE, "b200": BLACKWELL, "h100": HOPPER, "h200": HOPPER}
EACH_SIZE = ("a100", "b200")  # whose tables have every head size that they take
ADDED_TILES = {"b200": BLACKWELL_ADDED, "h100": ADDED, "h200": ADDED}
BOUNDED_TILES = {"h100": BOUNDED, "h200": BOUNDED}
SCALED_PROMPTS = {"h100": {2: SCALED}, "h200": {2: SCALED}}


def tiles_for_chip(
    head_dim: int, itemsize: int, *, added: bool = False, bounded: bool = False,
    scaled: bool = False,
) -> Tiles:  # fmt: skip
    """The sizes for the chip that is traced for.

    Args:
        head_dim: of the cache.
        itemsize: bytes of a cached number.
        added: whether something is added to the logits or caps them.
        bounded: whether a row's keys begin where its position says.
        scaled: whether the kernels bring queries to the dtype that they multiply.

    Raises:
        ValueError: it is a chip, or a head size, that these kernels do not run with.
    """
    chip = gpu_chip.current()
    if chip.name not in TILES:
        raise ValueError(f"chip is {chip.name}, must be one of {', '.join(TILES)}")
    if itemsize not in TILES[chip.name]:
        raise ValueError(
            f"kv_pages has {itemsize} byte a number, must have 2 on {chip.name}: Ampere has no "
            f"instruction that converts float8; use a cache of bfloat16 or float16, or XLA"
        )
    by_size = TILES[chip.name][itemsize]
    if chip.name in EACH_SIZE and head_dim not in by_size:
        raise ValueError(
            f"head_dim is {head_dim}, must be one of {', '.join(map(str, by_size))} on {chip.name} "
            f"with a cache of {itemsize} byte a number: use XLA"
        )
    if head_dim > max(by_size):
        raise ValueError(
            f"head_dim is {head_dim}, must be at most {max(by_size)} with a cache of {itemsize} "
            f"byte a number: converting its tiles takes more registers than there are; use a cache "
            f"of 2 bytes a number, or XLA"
        )
    size = min(size for size in by_size if size >= head_dim)
    asked = [ADDED_TILES] * added + [BOUNDED_TILES] * bounded
    of_chip = [tables.get(chip.name, {}).get(itemsize, {}) for tables in asked]
    tiles = next((of_size[size] for of_size in of_chip if size in of_size), by_size[size])
    prompts = SCALED_PROMPTS.get(chip.name, {}).get(itemsize, {}) if scaled else {}
    return tiles._replace(prefill=prompts.get((size, not asked), tiles.prefill))
