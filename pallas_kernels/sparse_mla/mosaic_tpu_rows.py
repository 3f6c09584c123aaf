"""How a token's row lies in a "tiled" latent cache on TPU, and how it gets into and out of it.

The cache is [num_pages, page_size, parts, packed, 128], packed = 4 / itemsize: a token owns `parts`
registers' rows of 128 words, in which the hardware packs `packed` lines of 128 numbers each. The
latent fills all parts but the last, whose first line begins with the rotary key. So any token's row
is contiguous, a whole number of tiles, and one descriptor brings it; in plain rows a register packs
neighbouring tokens into one word, and none can be copied alone.

A row of fp8_ds_mla (uint8, "scaled") has its 512 values in part 0, a group of 128 a line. In part 1
a word is a number: lane i < 64 has rotary value i in its upper half, which so is a float32, lane 64
+ g the scale of group g.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import fp8_ds_mla
from pallas_kernels.tpu_chip import LANES, SUBLANES
from pallas_kernels.tpu_operands import B11, B11_FACTOR, E4M3, as_readable, readable_dtype

UPPER_HALF = 0xFFFF0000  # of a word


class Row(NamedTuple):
    """What is static of a row.

    Attributes:
        parts: rows of 128 words.
        packed: numbers of a word.
        rank, rope_dim: numbers of the latent and of the rotary key.
        scaled: whether it is a row of fp8_ds_mla.
    """

    parts: int
    packed: int
    rank: int
    rope_dim: int
    scaled: bool

    @property
    def width(self) -> int:
        """Numbers of a row that mean something."""
        return self.rank + self.rope_dim

    @property
    def group(self) -> int:
        """Tokens whose numbers make one packed register."""
        return SUBLANES * self.packed


def stored_rows(latents: jax.Array, ropes: jax.Array) -> jax.Array:
    """Rows as the cache has them: [num_tokens * parts, packed, 128].

    Args:
        latents, ropes: [num_tokens, rank], [num_tokens, rope_dim], in the cache's dtype.
    """
    packed = 4 // latents.dtype.itemsize
    part = packed * LANES
    ropes = jnp.pad(ropes, ((0, 0), (0, part - ropes.shape[1])))
    return jnp.concatenate([latents, ropes], axis=1).reshape(-1, packed, LANES)


def scaled_rows(latents: jax.Array, ropes: jax.Array) -> jax.Array:
    """Rows of fp8_ds_mla as the cache has them: uint8 [num_tokens * 2, 4, 128].

    Args:
        latents, ropes: [num_tokens, 512], [num_tokens, 64], true values.
    """
    values, scales = fp8_ds_mla.scaled(latents)
    # A bfloat16 is the upper half of the float32 of the same value.
    numbers = jnp.concatenate([ropes.astype(jnp.bfloat16).astype(jnp.float32), scales], axis=1)
    numbers = jnp.pad(numbers, ((0, 0), (0, LANES - numbers.shape[1])))
    parts = (
        jax.lax.bitcast_convert_type(values, jnp.uint8),
        jnp.swapaxes(jax.lax.bitcast_convert_type(numbers, jnp.uint8), 1, 2),
    )
    return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


def write_rows(slot_mapping: Any, rows: Any, pages: Any, row: Row) -> None:
    """Puts every token's row at its slot; returns when all of them are there.

    Args:
        slot_mapping: int32 [num_tokens] in SMEM; a slot that is not in the cache is nowhere.
        rows: [num_tokens * parts, packed, 128] in HBM.
        pages: [num_slots * parts, packed, 128] in HBM.
        row: its sizes.
    """
    num_tokens, num_slots = slot_mapping.shape[0], pages.shape[0] // row.parts

    def scoped(sem):
        def each(act):
            def one(token, carry):
                slot = slot_mapping[token]

                @pl.when((slot >= 0) & (slot < num_slots))
                def _():
                    source = rows.at[pl.ds(token * row.parts, row.parts)]
                    target = pages.at[pl.ds(slot * row.parts, row.parts)]
                    act(pltpu.make_async_copy(source, target, sem))

                return carry

            jax.lax.fori_loop(0, num_tokens, one, 0)

        each(lambda copy: copy.start())
        each(lambda copy: copy.wait())

    pl.run_scoped(scoped, pltpu.SemaphoreType.DMA(()))


def start_gather(pages: Any, rows_at: Any, buffer: Any, sem: Any, row: Row) -> None:
    """Starts the copies of a block's rows, one descriptor each.

    Everything but the rows' addresses is static, so that a descriptor costs few scalar
    instructions: they are what the gather is made of.

    Args:
        pages: [num_slots * parts, packed, 128] in HBM.
        rows_at: int32 [1, block_kv] in SMEM: slot * parts of each key of the block.
        buffer: [block_kv * parts, packed, 128] in VMEM; tokens in the order of `_key`.
        sem: of the buffer.
        row: its sizes.
    """
    for at in range(rows_at.shape[1]):
        source = pages.at[pl.ds(rows_at[0, _key(at, row)], row.parts)]
        target = buffer.at[pl.ds(at * row.parts, row.parts)]
        pltpu.make_async_copy(source, target, sem).start()


def wait_gather(buffer: Any, sem: Any) -> None:
    """Waits for all of a block's rows at once: a semaphore counts bytes."""
    pltpu.make_async_copy(buffer, buffer, sem).wait()


def _key(at: int, row: Row) -> int:
    """Which key of the block lies at a place of the buffer.

    Eight places make an unpacked register, so that of `packed` of them, taken together, word s
    holds keys s * packed and on: the order of a packed register. A scaled row's scales lie in words
    of their own, by token, so these come in the list's order.
    """
    if row.scaled:
        return at
    group, place = divmod(at, row.group)
    part, word = divmod(place, SUBLANES)
    return group * row.group + word * row.packed + part


def unpack(buffer: Any, keys: Any, row: Row, *, count: jax.Array | None = None) -> None:
    """Rows of a block, token by token, as the matrix unit wants them: [block_kv, width].

    Args:
        buffer: [block_kv * parts, packed, 128]: as gathered, in the order of `_key`; with a count
            as pages have them.
        keys: [block_kv, rank + 128], operands beside the queries; written.
        row: its sizes.
        count: tokens that there are; those after them become zeros.
    """
    words = buffer.bitcast(jnp.uint32).reshape(keys.shape[0] * row.parts, LANES)
    in_order = row.scaled or count is not None
    apart, stride = (1, row.packed) if in_order else (SUBLANES, 1)
    last = row.parts - 1
    dtype = E4M3 if row.scaled else buffer.dtype

    def of_tokens(first: int, part: int, tokens: int, stride: int) -> jax.Array:
        """Words of every `stride`-th token from `first` on."""
        found = words[pl.ds(first * row.parts + part, tokens, stride * row.parts), :]
        return found if count is None else _existing(found, first, stride, count)

    for group in range(keys.shape[0] // row.group):
        start = group * row.group
        at = pl.ds(start, row.group)
        if row.scaled:
            numbers = of_tokens(start, last, row.group, 1)
            keys[at, pl.ds(row.rank, LANES)] = _ropes(numbers).astype(keys.dtype)
            scales = _scales(numbers)
        for part in range(last if row.scaled else row.parts):
            registers = [
                of_tokens(start + i * apart, part, SUBLANES, stride) for i in range(row.packed)
            ]
            for line in range(row.packed if part < last else 1):
                values = _line(registers, line, row, dtype)
                if row.scaled:
                    values = as_readable(values).astype(jnp.float32) * _scale(scales, line, row)
                elif keys.dtype == B11:
                    values = as_readable(values)
                lane = (part * row.packed + line) * LANES
                keys[at, pl.ds(lane, LANES)] = values.astype(keys.dtype)


def _ropes(numbers: jax.Array) -> jax.Array:
    """float32 [tokens, 128]: the rotary keys of scaled rows, and more, of their last parts."""
    return pltpu.bitcast(numbers & jnp.uint32(UPPER_HALF), jnp.float32)


def _scales(numbers: jax.Array) -> jax.Array:
    """float32 [tokens, 128]: factors of readable values, of the last parts of scaled rows."""
    scales = pltpu.bitcast(numbers, jnp.float32)
    return scales * B11_FACTOR if readable_dtype(E4M3) == B11 else scales


def _scale(scales: jax.Array, group: int, row: Row) -> jax.Array:
    """float32 [tokens, 1]: those of a group."""
    lane = row.rope_dim + group
    return scales[:, lane : lane + 1]


def _existing(words: jax.Array, first: int, stride: int, count: jax.Array) -> jax.Array:
    """Words of every `stride`-th token from `first` on; 0 where the token is not below count."""
    sublane = jax.lax.broadcasted_iota(jnp.int32, words.shape, 0)
    return jnp.where(first + sublane * stride < count, words, jnp.uint32(0))


def _line(words: list[jax.Array], line: int, row: Row, dtype: jnp.dtype) -> jax.Array:
    """[group, 128]: one line of `packed` registers of words, packed as that dtype is."""
    bits = 32 // row.packed
    mask = jnp.uint32((1 << bits) - 1)
    packed = None
    for i, word in enumerate(words):
        shifted = _shifted(word, bits * (i - line))
        kept = shifted if row.packed == 1 else shifted & (mask << jnp.uint32(bits * i))
        packed = kept if packed is None else packed | kept
    return pltpu.bitcast(packed, dtype)


def _shifted(word: jax.Array, left: int) -> jax.Array:
    if left == 0:
        return word
    return word << jnp.uint32(left) if left > 0 else word >> jnp.uint32(-left)
