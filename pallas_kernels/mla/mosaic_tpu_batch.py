"""Which tiles a ragged batch makes, listed in SMEM by the kernel itself; and its padding tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla.mosaic_tpu_scratch import Arrays, Tiles


class Batch(NamedTuple):
    """The lengths of a ragged batch, in SMEM."""

    kv_lens: Any
    cu_q_lens: Any
    num_seqs: Any  # [1]


def list_tiles(
    tiles: Tiles,
    batch: Batch,
    belongs: Callable[[jax.Array], jax.Array],
    *,
    block_q: int,
    block_kv: int,
    most_keys: int,
) -> tuple[jax.Array, jax.Array]:
    """Cuts sequences into tiles of block_q queries, in order.

    Args:
        tiles: written.
        batch: the lengths.
        belongs: query length -> whether a sequence of it is listed.
        block_q, block_kv: of the pass that the list is for.
        most_keys: positions that a row of the page table can name; longer lengths are cut.

    Returns:
        Tiles, and the blocks that they take together.
    """

    def one_sequence(seq, sums):
        first, stop = batch.cu_q_lens[seq], batch.cu_q_lens[seq + 1]
        q_len = jnp.where(belongs(stop - first), stop - first, 0)
        q_pos = jnp.minimum(batch.kv_lens[seq], most_keys) - (stop - first)

        def one_tile(i, sums):
            at, end = sums
            done = i * block_q
            count = jnp.minimum(q_len - done, block_q)
            blocks = jnp.maximum(pl.cdiv(q_pos + done + count, block_kv), 1)
            tiles.seq[at] = seq
            tiles.token[at] = first + done
            tiles.count[at] = count
            tiles.q_pos[at] = q_pos + done
            tiles.blocks[at] = blocks
            tiles.end[at] = end + blocks
            return at + 1, end + blocks

        return jax.lax.fori_loop(0, pl.cdiv(q_len, block_q), one_tile, sums)

    return jax.lax.fori_loop(0, batch.num_seqs[0], one_sequence, (jnp.int32(0), jnp.int32(0)))


def blank_padding(arrays: Arrays, batch: Batch) -> None:
    """Gives the tokens after the last sequence's out 0 and lse -inf."""
    num_tokens, num_heads, rank = arrays.out.shape
    first = batch.cu_q_lens[batch.num_seqs[0]]

    @pl.when(first < num_tokens)
    def _():
        def scoped(out, lse, sem):
            out[...] = jnp.zeros_like(out)
            lse[...] = jnp.full_like(lse, -jnp.inf)

            def each(act):
                def one(token, _):
                    act(pltpu.make_async_copy(out, arrays.out.at[token], sem))
                    act(pltpu.make_async_copy(lse, arrays.lse.at[token], sem))
                    return _

                jax.lax.fori_loop(first, num_tokens, one, 0)

            each(lambda copy: copy.start())
            each(lambda copy: copy.wait())

        pl.run_scoped(
            scoped,
            pltpu.VMEM((num_heads, rank), arrays.out.dtype),
            pltpu.VMEM((1, num_heads), jnp.float32),
            pltpu.SemaphoreType.DMA(()),
        )
