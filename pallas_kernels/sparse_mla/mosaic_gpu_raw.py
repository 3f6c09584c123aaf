"""How a row of each kind of cache comes into a slot, and what its numbers are, on Hopper.

A slot's raw rows lie in the memory that its keys will fill (`mla.mosaic_gpu_slots`), each as wide
as a row of keys: a multiple of 128 bytes, which is where TMA puts things. A row of numbers, of 16
or of 8 bits, is one copy. A row of fp8_ds_mla is three: it is 656 bytes, a copy takes at most 256
in a dimension, and 656 = 41 * 16 splits into no larger parts that are multiples of the 16 bytes
that TMA wants.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import fp8_ds_mla
from pallas_kernels.mla.mosaic_gpu_attend import KEYS
from pallas_kernels.mla.mosaic_gpu_slots import GROUP, LANE_ROW, raw_pieces, row_pieces_layout


class NumberRows(NamedTuple):
    """A slot's raw rows of a cache of numbers."""

    numbers: Any  # [KEYS / GROUP, GROUP, columns / 64 or, of 8 bits, twice as many, 64]

    @staticmethod
    def in_cache(latent_pages: jax.Array) -> jax.Array:
        """The cache's rows as copies take them: [num_rows, columns / 64, 64]."""
        return latent_pages.reshape(-1, latent_pages.shape[-1] // LANE_ROW, LANE_ROW)

    @classmethod
    def scratch(cls, rows: jax.Array) -> "NumberRows":
        """What to allocate for rows of `in_cache`."""
        parts = rows.shape[1] * 2 // rows.dtype.itemsize
        return cls(plgpu.SMEM((KEYS // GROUP, GROUP, parts, LANE_ROW), rows.dtype))

    @staticmethod
    def copies() -> int:
        """Copies that bring a row."""
        return 1

    def bring(self, row: Any, group: Any, place: int, arrived: Any) -> None:
        """Starts the copies of one row."""
        to = self.numbers.at[group, pl.ds(place, 1), pl.ds(0, row.shape[1])]
        plgpu.copy_gmem_to_smem(row, to, arrived)

    def pieces(self, group: int, zero: Any, dtype: Any) -> list[jax.Array]:
        """The columns of a group of rows, as `load_and_expand` wants them."""
        is_wide = self.numbers.dtype.itemsize == 2
        parts = self.numbers.shape[2] // (1 if is_wide else 2)
        raw = self.numbers.at[group, :, pl.ds(0, parts)]
        return [widened(x, dtype) for x in raw_pieces(raw, zero, optimized=is_wide)]


class ByteRows(NamedTuple):
    """A slot's raw rows of fp8_ds_mla: the same memory, by what its bytes are read as."""

    values: Any  # uint8 [KEYS / GROUP, GROUP, 1152]; copies are to it
    scales: Any  # float32 [KEYS / GROUP, GROUP, 288]
    ropes: Any  # bfloat16 [KEYS / GROUP, GROUP, 576]

    @staticmethod
    def in_cache(latent_pages: jax.Array) -> jax.Array:
        """The cache's rows as copies take them: [num_rows, 656]."""
        return latent_pages.reshape(-1, latent_pages.shape[-1])

    @classmethod
    def scratch(cls, rows: jax.Array) -> "ByteRows":
        """What to allocate for rows of `in_cache`."""
        del rows
        width = 2 * (fp8_ds_mla.KV_LORA_RANK + fp8_ds_mla.ROPE_DIM)  # bytes of a row of keys
        return cls(
            *(
                plgpu.SMEM((KEYS // GROUP, GROUP, width // jnp.dtype(dtype).itemsize), dtype)
                for dtype in (jnp.uint8, jnp.float32, jnp.bfloat16)
            )
        )

    @staticmethod
    def copies() -> int:
        """Copies that bring a row."""
        return len(PARTS)

    def bring(self, row: Any, group: Any, place: int, arrived: Any) -> None:
        """Starts the copies of one row."""
        for part in PARTS:
            to = self.values.at[group, pl.ds(place, 1), part]
            plgpu.copy_gmem_to_smem(row.at[:, part], to, arrived)

    def pieces(self, group: int, zero: Any, dtype: Any) -> list[jax.Array]:
        """The columns of a group of rows, as `load_and_expand` wants them: true values, rounded."""
        layout = row_pieces_layout()
        scales = self.scales_of(group, zero)
        pieces = []
        for column in range(0, fp8_ds_mla.KV_LORA_RANK, LANE_ROW):
            at = pl.ds(column + zero, LANE_ROW)
            stored = plgpu.load(self.values.at[group, :, at], layout=layout, optimized=False)
            stored = jax.lax.bitcast_convert_type(stored, jnp.float8_e4m3fn)
            scale = scales[column // fp8_ds_mla.GROUP]
            scale = jax.lax.broadcast_in_dim(scale, stored.shape, [0])
            pieces.append((widened(stored, jnp.float32) * scale).astype(dtype))
        at = pl.ds(fp8_ds_mla.ROPE_AT // 2 + zero, fp8_ds_mla.ROPE_DIM)
        ropes = as_numbers(self, jnp.bfloat16, group, at, layout)
        return [*pieces, widened(ropes, dtype)]

    def scales_of(self, group: int, zero: Any) -> list[jax.Array]:
        """The scales of a group of rows, [GROUP] for each 128 values.

        A lane has all four of its row; which is which, the compiler knows. (A column of its own
        cannot be loaded: its numbers do not lie side by side.)
        """
        at = pl.ds(fp8_ds_mla.SCALES_AT // 4 + zero, fp8_ds_mla.NUM_GROUPS)
        scales = as_numbers(self, jnp.float32, group, at, scales_layout())
        number = plgpu.broadcasted_iota(jnp.int32, scales.shape, 1, layout=scales_layout())
        return [
            jnp.max(jnp.where(number == i, scales, -jnp.inf), axis=1)
            for i in range(fp8_ds_mla.NUM_GROUPS)
        ]


# Of a row of bytes: values, values, scales and rotary values; each begins at a multiple of 128.
PARTS = (pl.ds(0, 256), pl.ds(256, 256), pl.ds(512, fp8_ds_mla.ROW_BYTES - 512))


def as_numbers(raw: ByteRows, dtype: Any, group: int, at: Any, layout: Any) -> jax.Array:
    """Columns of a group of rows, counted as if a row had nothing but numbers of that dtype."""
    rows = raw.scales if dtype == jnp.float32 else raw.ropes
    return plgpu.load(rows.at[group, :, at], layout=layout, optimized=False)


def scales_layout() -> Any:
    """Of [GROUP, 4]: as `row_pieces_layout`, a row's four in each of its eight lanes."""
    tiles = plgpu.Tiling(((GROUP, fp8_ds_mla.NUM_GROUPS), (GROUP // 4, fp8_ds_mla.NUM_GROUPS)))
    lanes = (-2, plgpu.Replicated(8))
    return plgpu.Layout.TILED(tiles, warp_dims=(-4,), lane_dims=lanes, vector_dim=-1)


def widened(numbers: jax.Array, dtype: Any) -> jax.Array:
    """Numbers as dtype, by way of what the hardware has: float8 to float16, 16 bits to float32."""
    if numbers.dtype.itemsize == 1:
        numbers = numbers.astype(jnp.float16)
    if numbers.dtype != dtype:
        numbers = numbers.astype(jnp.float32)
    return numbers.astype(dtype)


def kind_of(latent_pages: jax.Array) -> type[NumberRows] | type[ByteRows]:
    """What the rows of a cache are: uint8 is fp8_ds_mla."""
    return ByteRows if latent_pages.dtype == jnp.uint8 else NumberRows
