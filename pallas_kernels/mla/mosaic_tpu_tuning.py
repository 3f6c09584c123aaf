"""Tile sizes of MLA on TPU, by generation, dtype and shape class."""

from typing import NamedTuple


class Tuning(NamedTuple):
    """What a pass of the kernel may choose without changing a result.

    Attributes:
        rows: queries times heads of a tile, where queries are many.
        block_kv: keys of a step, where pages are no larger.
        buffers: blocks of latents in VMEM.
    """

    rows: int
    block_kv: int
    buffers: int


def tuning(generation: str, cache_dtype: str, *, is_decode: bool) -> Tuning:
    """The tile sizes for a chip, a cache dtype and a kind of tile."""
    return Tuning(128, 256, 4) if is_decode else Tuning(512, 256, 4)
