"""How large the tiles of the dense TPU kernels are: one table, by generation, dtype and shape.

`major` blocks are what the grid's pipeline brings into VMEM; inside one, the kernel walks tiles of
block_q queries and block_kv keys, each in steps of step_kv keys. Sizes change speed, never numbers
beyond the order of sums.
"""

import dataclasses

from pallas_kernels import tpu_chip

LANES = tpu_chip.LANES


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes in queries and keys, all multiples of 128.

    Attributes:
        block_q: queries of a tile; they lie along lanes.
        block_kv: keys of a tile; they lie along sublanes.
        step_kv: keys that one step multiplies while the tile before is exponentiated.
        major_q: queries in VMEM at a time, a multiple of block_q.
        major_kv: keys in VMEM at a time, a multiple of block_kv.
    """

    block_q: int
    block_kv: int
    step_kv: int
    major_q: int
    major_kv: int


# Measured by replaying the compiled schedule with a model of the DMAs (jax 0.12.0.1, libtpu 0.0.52,
# November 2026; nothing of it ran on a TPU), causal, 8 heads, 4096, 128, bfloat16, microseconds on
# v5e, v6e, 7x. The floors are 175, 38, 30 (matrix unit, all of it in use) and 41, 21, 9 (bytes); on
# v6e and 7x a product over 128 features fills half of the unit's 256 rows.
#   forward: these tiles 243, 127, 98; major_q 2048 247, 131, 101; 1024 249, 138, 107.
#   backward: these tiles 555, 249, 201.
# By a prototype that had two tiles of queries in one block of code and no work list, (block_q,
# block_kv, step_kv): (512, 512, 256) 241, 117, 93; (256, 512, 256) 239, 128, 104; (512, 512, 128)
# 252, 143, -; (512, 1024, 256) 271, 121, 94; (256, 512, 512) 262, 144, 118; (128, 512, 128) 369,
# 251, -. Without the two halves in turn (products, then softmax): 292, 161, 124.
_BLOCK = Tiles(512, 512, 256, 4096, 4096)
_BLOCK_WIDE = Tiles(512, 512, 256, 2048, 2048)  # float32, or heads above 128: twice the bytes
_BLOCK_SMALL = Tiles(512, 512, 256, 1024, 1024)  # v4's 16 MiB, or a bias tile beside the others


def forward_tiles(
    chip: tpu_chip.TpuChip, itemsize: int, head_dim: int, q_len: int, kv_len: int, has_bias: bool
) -> Tiles:
    """The forward kernel's tiles.

    Args:
        chip: what is traced for.
        itemsize: bytes of an element of q.
        head_dim: the larger of the two head sizes.
        q_len, kv_len: of the call; tiles are no longer than these need.
        has_bias: whether a bias is brought tile by tile.
    """
    if has_bias or chip.generation == "v4":
        tiles = _BLOCK_SMALL
    elif itemsize * head_dim > 256:
        tiles = _BLOCK_WIDE
    else:
        tiles = _BLOCK
    return fitted(tiles, q_len, kv_len)


def backward_tiles(
    chip: tpu_chip.TpuChip, itemsize: int, head_dim: int, q_len: int, kv_len: int, has_bias: bool
) -> Tiles:
    """The backward kernel's tiles; arguments as `forward_tiles`.

    It holds five operands and three results of a major block, twice, and their float32 sums.
    """
    wide = itemsize * head_dim > 256
    if chip.generation == "v4":
        tiles = Tiles(256, 256, 256, 512, 512)
    elif has_bias:
        tiles = Tiles(512, 512, 256, 512, 512) if wide else _BLOCK_SMALL
    else:
        tiles = _BLOCK_SMALL if wide else _BLOCK
    return fitted(tiles, q_len, kv_len)


def fitted(tiles: Tiles, q_len: int, kv_len: int) -> Tiles:
    """The same, no longer than the lengths rounded up to whole lanes."""
    block_q = min(tiles.block_q, _up(q_len, LANES))
    block_kv = min(tiles.block_kv, _up(kv_len, LANES))
    step_kv = tiles.step_kv if block_kv % tiles.step_kv == 0 else LANES
    return Tiles(
        block_q=block_q,
        block_kv=block_kv,
        step_kv=step_kv,
        major_q=min(tiles.major_q // block_q * block_q, _up(q_len, block_q)),
        major_kv=min(tiles.major_kv // block_kv * block_kv, _up(kv_len, block_kv)),
    )


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
