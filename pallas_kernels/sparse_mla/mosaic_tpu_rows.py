"""How a token's row lies in a "tiled" latent cache on TPU, and how it gets into and out of it.

The cache is [num_pages, page_size, parts, packed, 128], packed = 4 / itemsize: a token owns `parts`
registers' rows of 128 words, in which the hardware packs `packed` lines of 128 numbers each. The
latent fills all parts but the last, whose first line begins with the rotary key. So any token's row
is contiguous, a whole number of tiles, and one descriptor brings it; in plain rows a register packs
neighbouring tokens into one word, and none can be copied alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_chip import LANES, SUBLANES


class Row(NamedTuple):
    """What is static of a row.

    Attributes:
        parts: rows of 128 words.
        packed: numbers of a word.
        rank, rope_dim: numbers of the latent and of the rotary key.
    """

    parts: int
    packed: int
    rank: int
    rope_dim: int

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
        buffer: [block_kv * parts, packed, 128] in VMEM; tokens in the order of `_line`.
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
    holds keys s * packed and on: the order of a packed register.
    """
    group, place = divmod(at, row.group)
    part, word = divmod(place, SUBLANES)
    return group * row.group + word * row.packed + part


def unpack(buffer: Any, keys: Any, row: Row, *, count: jax.Array | None = None) -> None:
    """Rows of a block, token by token, as the matrix unit wants them: [block_kv, width].

    Args:
        buffer: [block_kv * parts, packed, 128]: as gathered, in the order of `_key`; with a count
            as pages have them.
        keys: [block_kv, rank + 128] in the queries' dtype; written.
        row: its sizes.
        count: tokens that there are; those after them become zeros.
    """
    words = buffer.bitcast(jnp.uint32).reshape(keys.shape[0] * row.parts, LANES)
    apart, stride = (SUBLANES, 1) if count is None else (1, row.packed)
    for group in range(keys.shape[0] // row.group):
        firsts = [group * row.group + i * apart for i in range(row.packed)]
        for part in range(row.parts):
            of_tokens = [
                words[pl.ds(at * row.parts + part, SUBLANES, stride * row.parts), :]
                for at in firsts
            ]
            if count is not None:
                of_tokens = [
                    _existing(x, at, row, count) for x, at in zip(of_tokens, firsts, strict=True)
                ]
            is_rope = part == row.parts - 1
            for line in range(1 if is_rope else row.packed):
                numbers = _line(of_tokens, line, row, buffer.dtype).astype(keys.dtype)
                lane = (part * row.packed + line) * LANES
                keys[pl.ds(group * row.group, row.group), pl.ds(lane, LANES)] = numbers


def _existing(words: jax.Array, first: int, row: Row, count: jax.Array) -> jax.Array:
    """Words of every `packed`-th token from `first` on; 0 where the token is not below count."""
    sublane = jax.lax.broadcasted_iota(jnp.int32, words.shape, 0)
    return jnp.where(first + sublane * row.packed < count, words, jnp.uint32(0))


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
