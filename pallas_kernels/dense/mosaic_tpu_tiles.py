"""How large the tiles of the dense TPU kernels are: one table, by generation, dtype, shape class.

`major` blocks are what the grid's pipeline brings into VMEM; inside one, the kernel walks tiles of
block_q queries and block_kv keys, each in steps of step_kv keys. Sizes change speed, never numbers
beyond the order of sums. `python -m benchmarks.tpu_static tune --work dense_causal` (or
`dense_causal_grad`) finds and writes them; heads of 64 and groups have no entries of their own.
"""

import dataclasses

from pallas_kernels import tpu_chip

LANES = tpu_chip.LANES
WIDE = 128  # the largest head size that is not wide


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes in queries and keys, all multiples of 128, and how many tiles go together.

    Attributes:
        block_q: queries of a tile; they lie along lanes.
        block_kv: keys of a tile; they lie along sublanes.
        step_kv: keys that one step multiplies while the tile before is exponentiated.
        major_q: queries in VMEM at a time, a multiple of block_q.
        major_kv: keys in VMEM at a time, a multiple of block_kv.
        together: tiles that need no mask in one run of code without a branch, an even number.
        longest: the same at most, of a kernel that takes any number (the backward), where it is
            known by now how many there are: the largest number up to it that divides them; 0 =
            always `together`.
    """

    block_q: int
    block_kv: int
    step_kv: int
    major_q: int
    major_kv: int
    together: int = 2
    longest: int = 0

    def __post_init__(self) -> None:
        """Refuses sizes that are not whole.

        Raises:
            ValueError: a size is no multiple of what it must be one of.
        """
        units = {
            "block_q": LANES, "block_kv": self.step_kv, "step_kv": LANES, "major_q": self.block_q,
            "major_kv": self.block_kv, "together": 2,
        }  # fmt: skip
        for name, unit in units.items():
            size = getattr(self, name)
            if size % unit:
                raise ValueError(f"{name} is {size}, must be a multiple of {unit}")


# Measured by replaying the compiled schedule with a model of the DMAs (jax 0.12.0.1, libtpu 0.0.52,
# November 2026; nothing of it ran on a TPU), causal, 8 heads, 4096, 128, bfloat16, microseconds on
# v5e, v6e, 7x. What these tiles take is in benchmarks/results/tpu_static.
#   Forward, by a prototype that had two tiles of queries in one block of code and no work list,
# (block_q, block_kv, step_kv): (512, 512, 256) 241, 117, 93; (256, 512, 256) 239, 128, 104;
# (512, 512, 128) 252, 143, -; (512, 1024, 256) 271, 121, 94; (256, 512, 512) 262, 144, 118;
# (128, 512, 128) 369, 251, -. Without the two halves in turn (products, softmax): 292, 161, 124.
#   Backward, when these tiles took 210 on v6e, two together: (512, 512, 512) 219; (512, 256, 256)
# 225; (256, 512, 512) 232; (512, 1024, 256) 232; (1024, 512, 256) 238; (256, 512, 256) 240;
# (512, 512, 128) 271; major_q 2048 215, 1024 222.
#   Two, four together: forward 121, 112 on v6e, 93, 85 on 7x; backward 206, 199 and 164, 157. Four,
# seven later: 171, 168 on v6e.
TILES = {
    ("v4", "bfloat16", "forward"): Tiles(512, 512, 256, 1024, 1024),
    ("v4", "bfloat16", "forward_wide"): Tiles(512, 512, 256, 1024, 1024),
    ("v4", "bfloat16", "forward_bias"): Tiles(512, 512, 256, 512, 512),
    ("v4", "bfloat16", "forward_wide_bias"): Tiles(512, 512, 256, 512, 512),
    ("v4", "bfloat16", "backward"): Tiles(256, 256, 256, 512, 512),
    ("v4", "bfloat16", "backward_wide"): Tiles(256, 256, 256, 512, 512),
    ("v4", "bfloat16", "backward_bias"): Tiles(256, 256, 256, 256, 256),
    ("v4", "bfloat16", "backward_wide_bias"): Tiles(256, 256, 256, 256, 256),
    ("v4", "float32", "forward"): Tiles(512, 512, 256, 1024, 1024),
    ("v4", "float32", "forward_wide"): Tiles(512, 512, 256, 512, 512),
    ("v4", "float32", "forward_bias"): Tiles(512, 512, 256, 512, 512),
    ("v4", "float32", "forward_wide_bias"): Tiles(512, 512, 256, 512, 512),
    ("v4", "float32", "backward"): Tiles(256, 256, 256, 512, 512),
    ("v4", "float32", "backward_wide"): Tiles(256, 256, 256, 512, 512),
    ("v4", "float32", "backward_bias"): Tiles(256, 256, 256, 256, 256),
    ("v4", "float32", "backward_wide_bias"): Tiles(256, 256, 256, 256, 256),
    ("v5e", "bfloat16", "forward"): Tiles(512, 512, 256, 4096, 4096, 4),
    ("v5e", "bfloat16", "forward_wide"): Tiles(512, 512, 256, 2048, 2048),
    ("v5e", "bfloat16", "forward_bias"): Tiles(512, 512, 256, 1024, 1024),
    ("v5e", "bfloat16", "forward_wide_bias"): Tiles(512, 512, 256, 512, 512),
    ("v5e", "bfloat16", "backward"): Tiles(512, 512, 256, 4096, 4096, 4, 7),
    ("v5e", "bfloat16", "backward_wide"): Tiles(512, 512, 256, 1024, 1024),
    ("v5e", "bfloat16", "backward_bias"): Tiles(512, 512, 256, 1024, 1024),
    ("v5e", "bfloat16", "backward_wide_bias"): Tiles(512, 512, 256, 512, 512),
    ("v5e", "float32", "forward"): Tiles(512, 512, 256, 2048, 2048),
    ("v5e", "float32", "forward_wide"): Tiles(512, 512, 256, 2048, 2048),
    ("v5e", "float32", "forward_bias"): Tiles(512, 512, 256, 512, 512),
    ("v5e", "float32", "forward_wide_bias"): Tiles(512, 512, 256, 512, 512),
    ("v5e", "float32", "backward"): Tiles(512, 512, 256, 1024, 1024),
    ("v5e", "float32", "backward_wide"): Tiles(512, 512, 256, 1024, 1024),
    ("v5e", "float32", "backward_bias"): Tiles(512, 512, 256, 512, 512),
    ("v5e", "float32", "backward_wide_bias"): Tiles(512, 512, 256, 512, 512),
    ("v5p", "bfloat16", "forward"): Tiles(512, 512, 256, 4096, 4096),
    ("v5p", "bfloat16", "forward_wide"): Tiles(512, 512, 256, 2048, 2048),
    ("v5p", "bfloat16", "forward_bias"): Tiles(512, 512, 256, 1024, 1024),
    ("v5p", "bfloat16", "forward_wide_bias"): Tiles(512, 512, 256, 512, 512),
    ("v5p", "bfloat16", "backward"): Tiles(512, 512, 256, 4096, 4096),
    ("v5p", "bfloat16", "backward_wide"): Tiles(512, 512, 256, 1024, 1024),
    ("v5p", "bfloat16", "backward_bias"): Tiles(512, 512, 256, 1024, 1024),
    ("v5p", "bfloat16", "backward_wide_bias"): Tiles(512, 512, 256, 512, 512),
    ("v5p", "float32", "forward"): Tiles(512, 512, 256, 2048, 2048),
    ("v5p", "float32", "forward_wide"): Tiles(512, 512, 256, 2048, 2048),
    ("v5p", "float32", "forward_bias"): Tiles(512, 512, 256, 512, 512),
    ("v5p", "float32", "forward_wide_bias"): Tiles(512, 512, 256, 512, 512),
    ("v5p", "float32", "backward"): Tiles(512, 512, 256, 1024, 1024),
    ("v5p", "float32", "backward_wide"): Tiles(512, 512, 256, 1024, 1024),
    ("v5p", "float32", "backward_bias"): Tiles(512, 512, 256, 512, 512),
    ("v5p", "float32", "backward_wide_bias"): Tiles(512, 512, 256, 512, 512),
    ("v6e", "bfloat16", "forward"): Tiles(512, 512, 256, 4096, 4096, 4),
    ("v6e", "bfloat16", "forward_wide"): Tiles(512, 512, 256, 2048, 2048),
    ("v6e", "bfloat16", "forward_bias"): Tiles(512, 512, 256, 1024, 1024),
    ("v6e", "bfloat16", "forward_wide_bias"): Tiles(512, 512, 256, 512, 512),
    ("v6e", "bfloat16", "backward"): Tiles(512, 512, 256, 4096, 4096, 4, 7),
    ("v6e", "bfloat16", "backward_wide"): Tiles(512, 512, 256, 1024, 1024),
    ("v6e", "bfloat16", "backward_bias"): Tiles(512, 512, 256, 1024, 1024),
    ("v6e", "bfloat16", "backward_wide_bias"): Tiles(512, 512, 256, 512, 512),
    ("v6e", "float32", "forward"): Tiles(512, 512, 256, 2048, 2048),
    ("v6e", "float32", "forward_wide"): Tiles(512, 512, 256, 2048, 2048),
    ("v6e", "float32", "forward_bias"): Tiles(512, 512, 256, 512, 512),
    ("v6e", "float32", "forward_wide_bias"): Tiles(512, 512, 256, 512, 512),
    ("v6e", "float32", "backward"): Tiles(512, 512, 256, 1024, 1024),
    ("v6e", "float32", "backward_wide"): Tiles(512, 512, 256, 1024, 1024),
    ("v6e", "float32", "backward_bias"): Tiles(512, 512, 256, 512, 512),
    ("v6e", "float32", "backward_wide_bias"): Tiles(512, 512, 256, 512, 512),
    ("7x", "bfloat16", "forward"): Tiles(512, 512, 256, 4096, 4096, 4),
    ("7x", "bfloat16", "forward_wide"): Tiles(512, 512, 256, 2048, 2048),
    ("7x", "bfloat16", "forward_bias"): Tiles(512, 512, 256, 1024, 1024),
    ("7x", "bfloat16", "forward_wide_bias"): Tiles(512, 512, 256, 512, 512),
    ("7x", "bfloat16", "backward"): Tiles(512, 512, 256, 4096, 4096, 4, 7),
    ("7x", "bfloat16", "backward_wide"): Tiles(512, 512, 256, 1024, 1024),
    ("7x", "bfloat16", "backward_bias"): Tiles(512, 512, 256, 1024, 1024),
    ("7x", "bfloat16", "backward_wide_bias"): Tiles(512, 512, 256, 512, 512),
    ("7x", "float32", "forward"): Tiles(512, 512, 256, 2048, 2048),
    ("7x", "float32", "forward_wide"): Tiles(512, 512, 256, 2048, 2048),
    ("7x", "float32", "forward_bias"): Tiles(512, 512, 256, 512, 512),
    ("7x", "float32", "forward_wide_bias"): Tiles(512, 512, 256, 512, 512),
    ("7x", "float32", "backward"): Tiles(512, 512, 256, 1024, 1024),
    ("7x", "float32", "backward_wide"): Tiles(512, 512, 256, 1024, 1024),
    ("7x", "float32", "backward_bias"): Tiles(512, 512, 256, 512, 512),
    ("7x", "float32", "backward_wide_bias"): Tiles(512, 512, 256, 512, 512),
}


def forward_tiles(chip: tpu_chip.TpuChip, dtype: str, head_dim: int, has_bias: bool) -> Tiles:
    """The forward kernel's tiles.

    Args:
        chip: what is traced for.
        dtype: of q.
        head_dim: the larger of the two head sizes.
        has_bias: whether a bias is brought, a number for each query and key of a major block.
    """
    return TILES[chip.generation, dtype, shape_class("forward", head_dim, has_bias)]


def backward_tiles(chip: tpu_chip.TpuChip, dtype: str, head_dim: int, has_bias: bool) -> Tiles:
    """The backward kernel's tiles; arguments as `forward_tiles`.

    It holds five operands and three results of a major block, twice, and their float32 sums; with a
    bias the logits' gradients too.
    """
    return TILES[chip.generation, dtype, shape_class("backward", head_dim, has_bias)]


def shape_class(of: str, head_dim: int, has_bias: bool = False) -> str:
    """What a table's key says of the call: "forward", "backward_wide_bias", ..."""
    return of + ("_wide" if head_dim > WIDE else "") + ("_bias" if has_bias else "")


def fitted(tiles: Tiles, q_len: int, kv_len: int) -> Tiles:
    """The same, no longer than the lengths rounded up to whole lanes."""
    block_q = min(tiles.block_q, _up(q_len, LANES))
    block_kv = min(tiles.block_kv, _up(kv_len, LANES))
    step_kv = tiles.step_kv if block_kv % tiles.step_kv == 0 else LANES
    return dataclasses.replace(
        tiles,
        block_q=block_q,
        block_kv=block_kv,
        step_kv=step_kv,
        major_q=min(_up(tiles.major_q, block_q), _up(q_len, block_q)),
        major_kv=min(_up(tiles.major_kv, block_kv), _up(kv_len, block_kv)),
    )


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
