"""How much the TPU kernels of `paged` compute at once, and how deep they prefetch.

One table, by generation, dtype of the cache and shape class, made by `python -m
benchmarks.tpu_static tune`. Sizes change speed, never numbers beyond the order of sums.
"""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import tpu_chip


class Tiles(NamedTuple):
    """Sizes that change speed.

    Attributes:
        tile_tokens: queries of a grid step.
        block_tokens: keys that one buffer holds; a step of decodes. In the table with 8 kv heads.
        chunk_tokens: keys that are computed at once; each chunk of a step is of one decode.
        num_buffers: blocks in flight and in use; three at least.
    """

    tile_tokens: int
    block_tokens: int
    chunk_tokens: int
    num_buffers: int


MOST_TOKENS, MOST_ROWS = 8, 256  # of a decode, and of its query heads
TABLE_KV_HEADS = 8  # of the works that the table was made for
MOST_TIMES = 4  # as many keys in a block, with fewer

# Microseconds by the replayed schedule (jax 0.12.0.1, libtpu 0.0.52, November 2026; nothing of it
# ran on a TPU) on v5e, v6e, 7x; pages of 64, bfloat16, the works of benchmarks/tpu_static:
#   prefill, (tile, chunk): (128, 512) 1164, 599, 469; (256, 512) 1159, 583, 446; (128, 256) 1207,
#     -, 599; (256, 256) 1170, -, 458; chunks of 1024 1247, -, 477.
#   prefill_64, (tile, chunk): (128, 512) 1596, 903, 705; (128, 256) -, 898, -; (256, 256) 1588,
#     905, -; (256, 512) 1620, 895, -.
# Decodes before they went by steps, which want a buffer more; by block:
#   decode: 512 758, 413, -; 1024 -, 413, 166; 2048 -, -, 166 (VMEM holds no more).
#   decode_64: 512 397, 240, 196; 1024 392, 214, 149; 2048 -, 214, 129.
#   decode, float8: 512 397, 221, -; 1024 392, 217, -; 2048 -, 216, 110; 1024, 4 buffers 387, 216,
#     -; 2048, 2 and 4 buffers -, -, 124 and 110.
# By steps, decode_64 of 7x, (block, chunk): (2048, 1024) 95; (2048, 512) 116; (2048, 256) 154. Keys
# a step ahead: (2048, 1024) 90; (2048, 512) 97. decode then, 4 and 5 buffers: 760, 413, 155;
# 753, 409, 154.
# The other entries follow these: v5p as v5e, float32 with half of bfloat16's keys in a block, but
# no fewer than in a chunk; v4 has 16 MiB of VMEM.
TILES = {
    ("v4", "bfloat16", "decode"): Tiles(64, 256, 256, 3),
    ("v4", "bfloat16", "decode_64"): Tiles(64, 256, 256, 3),
    ("v4", "bfloat16", "prefill"): Tiles(64, 256, 256, 3),
    ("v4", "bfloat16", "prefill_64"): Tiles(64, 256, 256, 3),
    ("v4", "float32", "decode"): Tiles(64, 256, 256, 3),
    ("v4", "float32", "decode_64"): Tiles(64, 256, 256, 3),
    ("v4", "float32", "prefill"): Tiles(64, 256, 256, 3),
    ("v4", "float32", "prefill_64"): Tiles(64, 256, 256, 3),
    ("v4", "float8_e4m3fn", "decode"): Tiles(64, 256, 256, 3),
    ("v4", "float8_e4m3fn", "decode_64"): Tiles(64, 256, 256, 3),
    ("v4", "float8_e4m3fn", "prefill"): Tiles(64, 256, 256, 3),
    ("v4", "float8_e4m3fn", "prefill_64"): Tiles(64, 256, 256, 3),
    ("v5e", "bfloat16", "decode"): Tiles(128, 512, 512, 5),
    ("v5e", "bfloat16", "decode_64"): Tiles(128, 1024, 512, 4),
    ("v5e", "bfloat16", "prefill"): Tiles(256, 512, 512, 3),
    ("v5e", "bfloat16", "prefill_64"): Tiles(256, 512, 256, 3),
    ("v5e", "float32", "decode"): Tiles(128, 256, 512, 4),
    ("v5e", "float32", "decode_64"): Tiles(128, 512, 512, 4),
    ("v5e", "float32", "prefill"): Tiles(256, 512, 512, 3),
    ("v5e", "float32", "prefill_64"): Tiles(128, 512, 512, 3),
    ("v5e", "float8_e4m3fn", "decode"): Tiles(128, 1024, 512, 4),
    ("v5e", "float8_e4m3fn", "decode_64"): Tiles(128, 2048, 512, 4),
    ("v5e", "float8_e4m3fn", "prefill"): Tiles(256, 512, 512, 3),
    ("v5e", "float8_e4m3fn", "prefill_64"): Tiles(128, 512, 512, 3),
    ("v5p", "bfloat16", "decode"): Tiles(128, 512, 512, 5),
    ("v5p", "bfloat16", "decode_64"): Tiles(128, 1024, 512, 4),
    ("v5p", "bfloat16", "prefill"): Tiles(256, 512, 512, 3),
    ("v5p", "bfloat16", "prefill_64"): Tiles(128, 512, 512, 3),
    ("v5p", "float32", "decode"): Tiles(128, 256, 512, 4),
    ("v5p", "float32", "decode_64"): Tiles(128, 512, 512, 4),
    ("v5p", "float32", "prefill"): Tiles(256, 512, 512, 3),
    ("v5p", "float32", "prefill_64"): Tiles(128, 512, 512, 3),
    ("v5p", "float8_e4m3fn", "decode"): Tiles(128, 1024, 512, 4),
    ("v5p", "float8_e4m3fn", "decode_64"): Tiles(128, 2048, 512, 4),
    ("v5p", "float8_e4m3fn", "prefill"): Tiles(256, 512, 512, 3),
    ("v5p", "float8_e4m3fn", "prefill_64"): Tiles(128, 512, 512, 3),
    ("v6e", "bfloat16", "decode"): Tiles(128, 512, 512, 5),
    ("v6e", "bfloat16", "decode_64"): Tiles(128, 1024, 512, 4),
    ("v6e", "bfloat16", "prefill"): Tiles(256, 512, 512, 3),
    ("v6e", "bfloat16", "prefill_64"): Tiles(128, 512, 256, 3),
    ("v6e", "float32", "decode"): Tiles(128, 256, 512, 4),
    ("v6e", "float32", "decode_64"): Tiles(128, 512, 512, 4),
    ("v6e", "float32", "prefill"): Tiles(256, 512, 512, 3),
    ("v6e", "float32", "prefill_64"): Tiles(128, 512, 512, 3),
    ("v6e", "float8_e4m3fn", "decode"): Tiles(128, 1024, 512, 4),
    ("v6e", "float8_e4m3fn", "decode_64"): Tiles(128, 2048, 512, 4),
    ("v6e", "float8_e4m3fn", "prefill"): Tiles(256, 512, 512, 3),
    ("v6e", "float8_e4m3fn", "prefill_64"): Tiles(128, 512, 512, 3),
    ("7x", "bfloat16", "decode"): Tiles(128, 1024, 512, 5),
    ("7x", "bfloat16", "decode_64"): Tiles(128, 2048, 1024, 4),
    ("7x", "bfloat16", "prefill"): Tiles(256, 512, 512, 3),
    ("7x", "bfloat16", "prefill_64"): Tiles(128, 512, 256, 3),
    ("7x", "float32", "decode"): Tiles(128, 512, 512, 4),
    ("7x", "float32", "decode_64"): Tiles(128, 1024, 512, 4),
    ("7x", "float32", "prefill"): Tiles(256, 512, 512, 3),
    ("7x", "float32", "prefill_64"): Tiles(128, 512, 512, 3),
    ("7x", "float8_e4m3fn", "decode"): Tiles(128, 2048, 512, 4),
    ("7x", "float8_e4m3fn", "decode_64"): Tiles(128, 2048, 512, 4),
    ("7x", "float8_e4m3fn", "prefill"): Tiles(256, 512, 512, 3),
    ("7x", "float8_e4m3fn", "prefill_64"): Tiles(128, 512, 512, 3),
}


def decode_tokens(num_tokens: int, max_num_seqs: int, num_q_heads: int) -> int:
    """How many tokens of a sequence are computed as a decode: as many as come, if these are few.

    So speculative decodes are; rows are computed for as many in every decode of the batch.
    """
    tokens = 1 << (-(-num_tokens // max_num_seqs) - 1).bit_length()
    return tokens if tokens <= MOST_TOKENS and tokens * num_q_heads <= MOST_ROWS else 1


def shape_class(num_tokens: int, most_of_decodes: int, head_dim: int) -> str:
    """What the table is keyed by: decode or prefill, and whether heads fill a register's lanes.

    "decode" where no more tokens come than as many decodes as there are sequences may have; other
    batches may hold decodes, too.
    """
    kind = "decode" if num_tokens <= most_of_decodes else "prefill"
    return kind if head_dim > tpu_chip.LANES // 2 else f"{kind}_64"


def tiles_for(cache_dtype: jnp.dtype, of_class: str, num_kv_heads: int) -> Tiles:
    """The sizes for the chip that is traced for: those of the cache's dtype, or its width.

    What a block costs beside its bytes is the same with few kv heads, so it has more keys then.
    """
    names = {1: "float8_e4m3fn", 2: "bfloat16", 4: "float32"}
    name = names[jnp.dtype(cache_dtype).itemsize]
    tiles = TILES[tpu_chip.current().generation, name, of_class]
    times = min(MOST_TIMES, max(1, TABLE_KV_HEADS // num_kv_heads))
    times = 1 << (times.bit_length() - 1)
    return tiles._replace(block_tokens=times * tiles.block_tokens)
