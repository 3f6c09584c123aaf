"""Tile sizes of MLA on TPU, by generation, cache dtype and shape class.

`python -m benchmarks.tpu_static tune` ranks others, and writes them here.
"""

from typing import NamedTuple


class Tiles(NamedTuple):
    """What a pass of the kernel may choose without changing a result.

    Attributes:
        rows: most queries times heads of a tile. A decode's is one query; its sizes are those of a
            few tokens, too, that are no more rows.
        block_kv: keys of a block, where pages are no larger.
        blocks: blocks of a step, which the compiler schedules as one.
        lead: blocks that the products with the keys are ahead of the softmax; at least one.
        lag: blocks that the products with the values are behind it; where any, these come first in
            the text of a run.
        finishes: tiles that a step divides among its products; what more ended waits till after.
        starts_within: whether copies are started among a step's products, or before them: v6e's
            compiler lets no load of latents pass one (a decode's 3241 bundles with, 2164 without).
    """

    rows: int
    block_kv: int
    blocks: int
    lead: int
    lag: int = 1
    finishes: int = 1
    starts_within: bool = True


MOST_TOKENS = 8  # of a sequence, that are few

TILES = {
    ("v4", "bfloat16", "decode"): Tiles(rows=128, block_kv=256, blocks=4, lead=1),
    ("v4", "bfloat16", "few"): Tiles(256, 256, blocks=2, lead=1, lag=0, finishes=0),
    ("v4", "bfloat16", "prefill"): Tiles(512, 256, blocks=2, lead=1, lag=0, finishes=0),
    ("v5e", "bfloat16", "decode"): Tiles(128, 256, blocks=8, lead=1),
    ("v5e", "bfloat16", "few"): Tiles(384, 256, blocks=8, lead=1, finishes=0),
    ("v5e", "bfloat16", "prefill"): Tiles(512, 256, blocks=4, lead=1, lag=0, finishes=0),
    ("v5p", "bfloat16", "decode"): Tiles(rows=128, block_kv=256, blocks=8, lead=1),
    ("v5p", "bfloat16", "few"): Tiles(384, 256, blocks=8, lead=1, finishes=0),
    ("v5p", "bfloat16", "prefill"): Tiles(512, 256, blocks=4, lead=1, lag=0, finishes=0),
    ("v6e", "bfloat16", "decode"): Tiles(128, 256, 8, 4, lag=0, starts_within=False),
    ("v6e", "bfloat16", "few"): Tiles(384, 256, blocks=8, lead=1, lag=0, finishes=0),
    ("v6e", "bfloat16", "prefill"): Tiles(512, 256, blocks=4, lead=1, lag=0, finishes=0),
    ("7x", "bfloat16", "decode"): Tiles(rows=128, block_kv=512, blocks=8, lead=1),
    ("7x", "bfloat16", "few"): Tiles(384, 512, blocks=8, lead=1, lag=0, finishes=0),
    ("7x", "bfloat16", "prefill"): Tiles(512, 256, blocks=4, lead=1, lag=0, finishes=0),
    ("v5e", "float8_e4m3fn", "decode"): Tiles(128, 256, blocks=8, lead=1),
    ("v5e", "float8_e4m3fn", "few"): Tiles(384, 256, blocks=8, lead=1, finishes=0),
    ("v5e", "float8_e4m3fn", "prefill"): Tiles(512, 256, blocks=4, lead=1, lag=0, finishes=0),
    ("v6e", "float8_e4m3fn", "decode"): Tiles(rows=128, block_kv=512, blocks=8, lead=1, lag=0),
    ("v6e", "float8_e4m3fn", "few"): Tiles(384, 256, blocks=8, lead=1, lag=0, finishes=0),
    ("v6e", "float8_e4m3fn", "prefill"): Tiles(512, 256, blocks=4, lead=1, lag=0, finishes=0),
    ("7x", "float8_e4m3fn", "decode"): Tiles(rows=128, block_kv=512, blocks=8, lead=1, lag=0),
    ("7x", "float8_e4m3fn", "few"): Tiles(384, 512, blocks=8, lead=1, lag=0, finishes=0),
    ("7x", "float8_e4m3fn", "prefill"): Tiles(512, 256, blocks=4, lead=1, lag=0, finishes=0),
}
# Of a cache dtype without entries of its own.
OTHERS = {
    "decode": Tiles(rows=128, block_kv=256, blocks=8, lead=4),
    "few": Tiles(rows=384, block_kv=256, blocks=4, lead=1, lag=0, finishes=0),
    "prefill": Tiles(rows=512, block_kv=256, blocks=4, lead=1, lag=0, finishes=0),
}


# The same where VMEM is 16 MiB (v4).
SMALL = {
    "decode": Tiles(rows=128, block_kv=256, blocks=1, lead=1, lag=0, finishes=0),
    "few": Tiles(rows=128, block_kv=256, blocks=1, lead=1, lag=0, finishes=0),
    "prefill": Tiles(rows=256, block_kv=256, blocks=1, lead=1, lag=0, finishes=0),
}


def few_tokens(num_tokens: int, max_num_seqs: int, num_heads: int, rows: int) -> int:
    """How many new tokens of a sequence are one tile, in a pass of their own; 1: there is none.

    As many as come for each sequence that there is room for, if these are few: no more than `rows`.
    """
    tokens = -(-num_tokens // max_num_seqs)
    return tokens if tokens <= MOST_TOKENS and tokens * num_heads <= rows else 1


def tiles_for(generation: str, dtype: str, kind: str) -> Tiles:
    """The tile sizes for a chip, a dtype (the cache's, or float32 queries') and a kind of tile.

    float8_e5m2 has float8_e4m3fn's.
    """
    others = SMALL if generation == "v4" else OTHERS
    dtype = {"float8_e5m2": "float8_e4m3fn"}.get(dtype, dtype)
    return TILES.get((generation, dtype, kind), others[kind])
