"""Tile sizes of MLA on TPU, by generation, cache dtype and shape class.

`python -m benchmarks.tpu_static tune` ranks others, and writes them here.
"""

from typing import NamedTuple


class Tiles(NamedTuple):
    """What a pass of the kernel may choose without changing a result.

    Attributes:
        rows: queries times heads of a tile, where queries are many; a decode's tile is one query.
        block_kv: keys of a step, where pages are no larger.
        buffers: blocks of latents in VMEM.
    """

    rows: int
    block_kv: int
    buffers: int


TILES = {
    ("v4", "bfloat16", "decode"): Tiles(rows=128, block_kv=256, buffers=4),
    ("v4", "bfloat16", "prefill"): Tiles(rows=512, block_kv=256, buffers=4),
    ("v5e", "bfloat16", "decode"): Tiles(rows=128, block_kv=512, buffers=4),
    ("v5e", "bfloat16", "prefill"): Tiles(rows=512, block_kv=256, buffers=4),
    ("v5p", "bfloat16", "decode"): Tiles(rows=128, block_kv=512, buffers=4),
    ("v5p", "bfloat16", "prefill"): Tiles(rows=512, block_kv=256, buffers=4),
    ("v6e", "bfloat16", "decode"): Tiles(rows=128, block_kv=1024, buffers=3),
    ("v6e", "bfloat16", "prefill"): Tiles(rows=512, block_kv=256, buffers=4),
    ("7x", "bfloat16", "decode"): Tiles(rows=128, block_kv=1024, buffers=3),
    ("7x", "bfloat16", "prefill"): Tiles(rows=512, block_kv=256, buffers=4),
}
# Of a cache dtype without entries of its own.
OTHERS = {
    "decode": Tiles(rows=128, block_kv=256, buffers=4),
    "prefill": Tiles(rows=512, block_kv=256, buffers=4),
}


def tiles_for(generation: str, cache_dtype: str, *, is_decode: bool) -> Tiles:
    """The tile sizes for a chip, a cache dtype and a kind of tile."""
    shape_class = "decode" if is_decode else "prefill"
    return TILES.get((generation, cache_dtype, shape_class), OTHERS[shape_class])
