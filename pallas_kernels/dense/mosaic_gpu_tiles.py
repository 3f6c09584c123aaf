"""Tile sizes of the dense kernels of Mosaic GPU, by chip, dtype, head sizes and shape class.

Chosen by compiling: no spills, no serialised wgmma, and the largest static bound on the tensor
cores' share. Hopper's forward was timed too, on an H100 (jax 0.11.2, 2026-11-26): at 128 two
consumers are 1 to 3 % faster without turns than with FlashAttention-3's, at 64 three of them 15 %
faster than two. Tuning changes speed, never numbers.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from pallas_kernels.gpu_chip import GpuChip


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the forward pipeline.

    Attributes:
        block_kv: keys of a tile, a multiple of 64.
        stages: key tiles, and value tiles, in shared memory; at least 2.
        consumers: warpgroups of `rows` queries each.
        turns: whether consumers issue their products in turn (Hopper).
        tied: whether the queries' addresses are computed in the loop (Hopper, `gpu_addresses`).
        by_square: how it is tied where the compiler knows how far that loop counts, as where
            segments leave no tile without masks; nothing is tied there without this.
        registers: of a thread of a consumer, and of the producer; None = those that so many
            consumers have (Hopper).
        rows: queries of a consumer: wgmma's M, tcgen05's.
        walking: (stages, slots of queries) where a core walks over blocks of queries; None = a
            block of the grid for each (Hopper, `mosaic_gpu_plan`).
    """

    block_kv: int
    stages: int
    consumers: int = 2
    turns: bool = False
    tied: bool = False
    by_square: bool = False
    registers: tuple[int, int] | None = None
    rows: int = 64
    walking: tuple[int, int] | None = None


# Shape classes: a soft cap takes registers for its tanh, segment ids take shared memory, a bias and
# slopes take registers beside either; `CROWDED` is these and one of those, `MARKED` these and
# segment ids, `SLOPED` segment ids and slopes without a cap or a bias, `BOUNDED` a window or chunks
# beside lengths or offsets that are read: with three consumers at 64 up to 188 + 188 bytes spilled.
PLAIN, CAPPED, SEGMENTED, ADDED, CROWDED = "plain", "capped", "segmented", "added", "crowded"
MARKED, SLOPED, BOUNDED = "marked", "sloped", "bounded"
# Capability -> (head_dim, head_dim_v) -> shape class -> tiles; bfloat16 and float16 are alike.
TILES = {
    (8, 0): {
        (64, 64): {PLAIN: Tiles(64, 2, 1)},
        (80, 80): {PLAIN: Tiles(64, 2, 1)},
        (96, 96): {PLAIN: Tiles(64, 2, 1)},
        (128, 128): {PLAIN: Tiles(64, 2, 1)},
        (192, 128): {PLAIN: Tiles(64, 2, 1)},
        (192, 192): {PLAIN: Tiles(64, 2, 1)},
        (256, 256): {PLAIN: Tiles(32, 2, 1)},
    },
    (9, 0): {
        (64, 64): {
            PLAIN: Tiles(128, 4, consumers=3, turns=True, walking=(4, 2)),
            CAPPED: Tiles(128, 4, walking=(4, 2)),
            SEGMENTED: Tiles(128, 4, walking=(4, 2)),
            ADDED: Tiles(128, 4),
            SLOPED: Tiles(64, 6),
            BOUNDED: Tiles(128, 4),
        },
        (80, 80): {
            PLAIN: Tiles(128, 4, walking=(3, 2)),
            ADDED: Tiles(128, 4),
            MARKED: Tiles(64, 6),
        },
        (96, 96): {
            PLAIN: Tiles(128, 4, walking=(3, 2)),
            ADDED: Tiles(128, 4),
            CROWDED: Tiles(64, 6),
        },
        (128, 128): {
            PLAIN: Tiles(128, 3, walking=(2, 2)),
            CAPPED: Tiles(128, 3),
            SEGMENTED: Tiles(128, 2, tied=True),
            ADDED: Tiles(64, 4),
        },
        (192, 128): {
            PLAIN: Tiles(128, 2, walking=(2, 1)),
            CAPPED: Tiles(64, 2),
            SEGMENTED: Tiles(64, 4),
            ADDED: Tiles(64, 4),
        },
        (192, 192): {
            PLAIN: Tiles(64, 2, walking=(2, 2)),
            ADDED: Tiles(64, 2, tied=True),
            MARKED: Tiles(64, 2, tied=True, by_square=True),
        },
        (256, 256): {
            PLAIN: Tiles(64, 2),
            CAPPED: Tiles(64, 2, tied=True),
            SEGMENTED: Tiles(64, 2, tied=True),
            ADDED: Tiles(64, 2, tied=True, by_square=True),
            MARKED: Tiles(64, 2, tied=True, by_square=True, registers=(240, 24)),
        },
    },
    (10, 0): {
        (64, 64): {PLAIN: Tiles(128, 4, rows=128)},
        (80, 80): {PLAIN: Tiles(128, 3, rows=128)},
        (96, 96): {PLAIN: Tiles(128, 3, rows=128)},
        (128, 128): {PLAIN: Tiles(128, 2, rows=128)},
        (192, 128): {PLAIN: Tiles(64, 3, rows=128)},
        (192, 192): {PLAIN: Tiles(64, 2, rows=128)},
        (256, 256): {PLAIN: Tiles(64, 2, consumers=1, rows=128)},
    },
}


def forward_tiles(
    chip: GpuChip,
    head_dim: int,
    head_dim_v: int,
    *,
    capped: bool,
    segmented: bool,
    added: bool = False,
    sloped: bool = False,
    bounded: bool = False,
) -> Tiles:
    """The tiles of a shape class on a chip.

    `added`: with a bias or slopes; `sloped`: with slopes and no bias; `bounded`: with a window or
    chunks beside lengths or offsets that are read.
    """
    classes = TILES[chip.capability][head_dim, head_dim_v]
    return _of_class(classes, capped, segmented, added, sloped, bounded)


def _of_class(
    classes: Mapping[str, Any],
    capped: bool,
    segmented: bool,
    added: bool,
    sloped: bool = False,
    bounded: bool = False,
) -> Any:
    """What the call's own class has, else what each thing in it asks for, else the plain tiles."""
    asked = [SLOPED] * (sloped and segmented and not capped) + [MARKED] * (added and segmented)
    asked += [CROWDED] * (added and (capped or segmented))
    asked += [ADDED] * added + [SEGMENTED] * segmented + [CAPPED] * capped + [BOUNDED] * bounded
    return next((classes[name] for name in asked if name in classes), classes[PLAIN])


def padded_sizes(capability: tuple[int, int], head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """The smallest head sizes of a chip's kernels that hold these, which 256 do."""
    sizes = [size for size in TILES[capability] if size[0] >= head_dim and size[1] >= head_dim_v]
    return min(sizes, key=sum)


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Sizes of the backward pipelines.

    Attributes:
        block_kv: keys of a tile where queries are owned (dq).
        k_stages, v_stages: key and value tiles in flight there.
        q_stages: query tiles in flight where keys are owned (dk, dv).
        split: dk and dv of the same keys are two warpgroups'.
        tied: whether addresses of what stays are computed in the loops (`gpu_addresses`).
        block_q: queries of a tile where keys are owned (Ampere, Blackwell).
    """

    block_kv: int
    k_stages: int
    v_stages: int
    q_stages: int
    split: bool
    tied: bool = False
    bias_stages: int = 2
    block_q: int = 64


# (head_dim, head_dim_v) -> shape class -> tiles, capability 9.0. Above 128, dk and dv of 64 keys do
# not fit one warpgroup's registers; at 128 not beside a soft cap's slopes, at 80 not beside those
# and everything else. Three slots: the next step beside this one. `tied` is for what spilled
# without it (bytes stored + loaded, dk and dv): at 80 with a bias, slopes, lengths and a chunk
# 4 + 4, at 64 with everything 8 + 8 where k and v are kept, at 96 with everything 12 + 16,
# or 44 + 40 with it beside a bias and slopes, at 128 beside those 124 + 124,
# at 128 with a window 8 + 4, with chunks and lengths 36 + 44, at 192 with everything 12 + 20, at 96
# with a bias, slopes, lengths and a chunk 12 + 16; dq there 16 + 16, at 192 48 + 60, at 256
# 176 + 188. It costs dk and dv at 64 49 instructions of 566 a tile.
BACKWARD_TILES = {
    (64, 64): {
        PLAIN: BackwardTiles(64, 2, 2, 2, split=False),
        CAPPED: BackwardTiles(64, 2, 2, 2, split=False, tied=True),
        ADDED: BackwardTiles(64, 2, 2, 2, split=False),
        CROWDED: BackwardTiles(64, 2, 2, 2, split=True),
    },
    (80, 80): {
        PLAIN: BackwardTiles(64, 2, 2, 2, split=False),
        CAPPED: BackwardTiles(64, 2, 2, 2, split=True),
        ADDED: BackwardTiles(64, 2, 2, 2, split=False, tied=True),
        CROWDED: BackwardTiles(64, 2, 2, 2, split=True),
    },
    (96, 96): {
        PLAIN: BackwardTiles(64, 2, 2, 2, split=False),
        CAPPED: BackwardTiles(64, 2, 2, 2, split=True),
        ADDED: BackwardTiles(64, 2, 2, 2, split=False, tied=True),
        CROWDED: BackwardTiles(64, 2, 2, 2, split=True),
    },
    (128, 128): {
        PLAIN: BackwardTiles(64, 2, 2, 2, split=False, tied=True),
        CAPPED: BackwardTiles(64, 2, 2, 2, split=True),
        ADDED: BackwardTiles(64, 2, 2, 2, split=True, tied=True),
    },
    (192, 128): {
        PLAIN: BackwardTiles(64, 2, 2, 3, split=True, bias_stages=1),
        CAPPED: BackwardTiles(64, 2, 2, 2, split=True, tied=True, bias_stages=1),
        ADDED: BackwardTiles(64, 2, 2, 2, split=True, tied=True, bias_stages=1),
    },
    (192, 192): {
        PLAIN: BackwardTiles(64, 2, 2, 2, split=True, bias_stages=1),
        CAPPED: BackwardTiles(64, 2, 2, 2, split=True, tied=True, bias_stages=1),
        ADDED: BackwardTiles(64, 2, 2, 2, split=True, tied=True, bias_stages=1),
    },
    (256, 256): {PLAIN: BackwardTiles(64, 2, 1, 2, split=True, tied=True, bias_stages=1)},
}


# head_dim -> shape class -> tiles, capability 8.0. From 80 on tiles of 32 let two blocks share a
# core's memory; at 128 tiles of 64 queries spill beside a soft cap and segments (16 + 12 bytes), of
# 32 beside a bias and slopes too (up to 20 + 16).
AMPERE_BACKWARD_TILES = {
    64: {PLAIN: BackwardTiles(64, 2, 2, 2, split=False)},
    80: {PLAIN: BackwardTiles(32, 2, 2, 2, split=False, bias_stages=1, block_q=32)},
    96: {PLAIN: BackwardTiles(32, 2, 2, 2, split=False, bias_stages=1, block_q=32)},
    128: {
        PLAIN: BackwardTiles(32, 2, 2, 2, split=False, bias_stages=1, block_q=32),
        CROWDED: BackwardTiles(32, 2, 2, 2, split=False, bias_stages=1, block_q=16),
    },
}
# Columns of a tile in TMEM, where 512 hold two tiles of logits, dk and dv; what dbias, by mma.sync,
# takes of a core's memory.
_128, _64 = (
    functools.partial(BackwardTiles, n, 2, 2, 2, split=False, block_q=n) for n in (128, 64)
)
BLACKWELL_BACKWARD_TILES = {
    64: {PLAIN: _128()},
    80: {PLAIN: _128(bias_stages=1)},
    96: {PLAIN: _128(bias_stages=1)},
    128: {PLAIN: _128(bias_stages=1)},
    192: {PLAIN: _64(bias_stages=1)},
}
# By head_dim.
OTHER_BACKWARD_TILES = {(8, 0): AMPERE_BACKWARD_TILES, (10, 0): BLACKWELL_BACKWARD_TILES}


def backward_tiles(
    capability: tuple[int, int], head_dim: int, head_dim_v: int, *, capped: bool,
    segmented: bool, added: bool = False,
) -> BackwardTiles:  # fmt: skip
    """The tiles of the backward for a chip, a head size and a shape class.

    Raises:
        ValueError: the chip has no backward for the head size.
    """
    if capability in OTHER_BACKWARD_TILES:
        sizes = OTHER_BACKWARD_TILES[capability]
        if head_dim not in sizes:
            allowed = ", ".join(map(str, sizes))
            raise ValueError(
                "head_dim is {}, must be one of {} where gradients are taken on "
                "compute_capability {}.{}: use CUDNN or XLA".format(head_dim, allowed, *capability)
            )
        return _of_class(sizes[head_dim], capped, segmented, added)
    classes = BACKWARD_TILES[head_dim, head_dim_v]
    return _of_class(classes, capped, segmented, added)
