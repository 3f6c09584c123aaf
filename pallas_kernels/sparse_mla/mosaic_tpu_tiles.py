"""Tile sizes of sparse MLA on TPU, by generation, dtype of the cache and shape class."""

from typing import NamedTuple

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2")
GENERATIONS = ("v4", "v5e", "v5p", "v6e", "7x")
SHAPE_CLASSES = ("decode", "prefill")


class Tiles(NamedTuple):
    """What the kernel may choose without changing a result.

    Attributes:
        block_kv: rows that are gathered and multiplied at once; a multiple of 128.
        buffers: blocks in VMEM, at least 2: one is multiplied, the others are on their way.
        reach: keys that a masked tile may have for every 100 entries of its tokens' lists; 0: none
            is masked.
        rows: tokens times heads of a masked tile.
        step_rows: of those, that are multiplied at once.
        masked_kv: keys of a masked tile's block, where pages are no larger; a multiple of 128.
    """

    block_kv: int
    buffers: int
    reach: int = 0
    rows: int = 1024
    step_rows: int = 256
    masked_kv: int = 512


TILES: dict[tuple[str, str, str], Tiles] = {
    ("v4", "float32", "decode"): Tiles(block_kv=256, buffers=4),  # twice that does not fit
    ("v4", "float32", "prefill"): Tiles(block_kv=256, buffers=4),
    ("v4", "bfloat16", "decode"): Tiles(block_kv=512, buffers=4),
    ("v4", "bfloat16", "prefill"): Tiles(block_kv=512, buffers=4),
    ("v5e", "bfloat16", "decode"): Tiles(block_kv=512, buffers=4),
    ("v5e", "bfloat16", "prefill"): Tiles(block_kv=512, buffers=4, reach=17),
    ("v5p", "bfloat16", "decode"): Tiles(block_kv=512, buffers=4),
    ("v5p", "bfloat16", "prefill"): Tiles(block_kv=512, buffers=4, reach=17),
    ("v6e", "bfloat16", "decode"): Tiles(block_kv=512, buffers=4),
    ("v6e", "bfloat16", "prefill"): Tiles(block_kv=512, buffers=4, reach=49),
    ("7x", "bfloat16", "decode"): Tiles(block_kv=512, buffers=4),
    ("7x", "bfloat16", "prefill"): Tiles(block_kv=512, buffers=4, reach=49),
}


def tiles(generation: str, cache_dtype: str, *, is_decode: bool, topk: int) -> Tiles:
    """The sizes for a chip, a cache dtype and a kind of batch; less where lists are short.

    A dtype that has no entry of its own takes bfloat16's: what is scarce is descriptors, and those
    are one a row whatever the row holds. Only v4's VMEM, of 16 MiB, is scarce, too.
    """
    shape_class = "decode" if is_decode else "prefill"
    key = (generation, cache_dtype, shape_class)
    chosen = TILES[key if key in TILES else (generation, "bfloat16", shape_class)]
    block_kv = chosen.block_kv
    while block_kv > 128 and block_kv * (chosen.buffers - 1) >= topk:
        block_kv //= 2
    return chosen._replace(block_kv=block_kv)
