"""The lightning indexer on TPU: scores of every cached position for every token.

The contract (maths, arguments, edge cases) is `pallas_kernels/sparse_mla/__init__.py`.

Tokens are taken eight at a time, the rows of one register, and what a sequence has in such an octet
is a tile: one token of it (decode), or several (prefill). An octet's scores lie in VMEM, -inf at
first, until all of its tiles are through. How a tile goes through its keys is
`mosaic_tpu_scoring`'s.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import empty_calls, tpu_chip
from pallas_kernels.contract_checks import check_indexer
from pallas_kernels.jax_settings import under_own_settings
from pallas_kernels.sparse_mla import mosaic_tpu_scoring as scoring
from pallas_kernels.sparse_mla.mosaic_tpu_scoring import OCTET, Arrays, Batch, Scratch, Sizes, Tiles
from pallas_kernels.tpu_chip import LANES, SUBLANES
from pallas_kernels.tpu_sequences import Needs, some_sequences_at_a_time

QUERY_DTYPES = ("float32", "bfloat16")
KEY_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2")
BLOCK_KV = 2048  # keys of a step, whole pages


@under_own_settings
@some_sequences_at_a_time(Needs(token=4, seq=28))
def indexer_scores(
    q_index: jax.Array,
    weights: jax.Array,
    index_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
) -> jax.Array:
    """Scores of every cached position for every token, as the contract of `sparse_mla` has it.

    Pages that no token sees anything of are not read.

    Numerics: products of bfloat16 queries in bfloat16 (float32 keys are rounded to it), of float32
    ones at the highest precision; sums in float32.

    Raises:
        ValueError: a shape or dtype is not the contract's, or not this lowering's: float16, an
            index_head_dim that is no multiple of 128, a page that is no multiple of a packed
            register's rows, more positions than VMEM holds for eight tokens.
    """
    dims = _check(q_index, weights, index_pages, page_table, kv_lens, cu_q_lens, num_seqs)
    if empty_calls.is_empty(dims):
        return empty_calls.scores(dims)
    num_tokens, num_heads = dims["num_tokens"], dims["num_index_heads"]
    more_tokens, more_heads = -num_tokens % OCTET, -num_heads % 16
    q_index = jnp.pad(q_index, ((0, more_tokens), (0, more_heads), (0, 0)))
    weights = jnp.pad(weights, ((0, more_tokens), (0, more_heads)))
    sizes = Sizes(
        q_index.shape[1], dims["index_head_dim"], dims["page_size"],
        _pages_of_step(dims["pages_per_seq"], dims["page_size"]), dims["pages_per_seq"],
        q_index.dtype,
    )  # fmt: skip
    _check_positions(dims["pages_per_seq"] * dims["page_size"], sizes, index_pages.dtype)
    cu_q_lens = jnp.clip(cu_q_lens, 0, num_tokens)
    page_table = jnp.clip(page_table, 0, index_pages.shape[0] - 1).reshape(-1)
    scores = _call(
        Batch(page_table, kv_lens, cu_q_lens, num_seqs.reshape(1)), q_index, weights, index_pages,
        sizes,
    )  # fmt: skip
    return scores[:num_tokens, : dims["pages_per_seq"] * dims["page_size"]]


def _check(q_index, weights, index_pages, page_table, kv_lens, cu_q_lens, num_seqs):
    """Refuses what the contract or this lowering does not take; returns the dimensions."""
    dims = check_indexer(locals(), dtypes=QUERY_DTYPES, key_dtypes=KEY_DTYPES)
    if dims["index_head_dim"] % LANES:
        raise ValueError(
            f"index_head_dim is {dims['index_head_dim']}, must be a multiple of {LANES}: use "
            f"XLA_MLA_SPARSE for others"
        )
    rows = SUBLANES * 4 // index_pages.dtype.itemsize
    if dims["page_size"] % rows:
        raise ValueError(
            f"page_size is {dims['page_size']}, must be a multiple of {rows} with "
            f"{index_pages.dtype} keys: use XLA_MLA_SPARSE for others"
        )
    return dims


def _check_positions(positions: int, sizes: Sizes, key_dtype: jnp.dtype) -> None:
    """Refuses positions whose scores VMEM has no room for: half of it, less where keys are wide."""
    shapes = scoring.scratch_shapes(sizes, key_dtype)._replace(scores=None)
    vmem = [x for x in jax.tree.leaves(shapes) if x.memory_space == pltpu.VMEM]
    others = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in vmem)
    all_of_it = tpu_chip.current().vmem_bytes
    # Beside what is kept for others: registers that the compiler spills, and the last block's rest.
    free = all_of_it - others - 2 * tpu_chip.VMEM_RESERVED
    most = max(0, min(all_of_it // 2, free)) // (2 * OCTET * 4)
    if positions > most:
        raise ValueError(
            f"pages_per_seq * page_size is {positions}, must be at most {most}: VMEM holds the "
            f"scores of {2 * OCTET} tokens; use XLA_MLA_SPARSE for longer sequences"
        )


def _pages_of_step(pages_per_seq: int, page_size: int) -> int:
    """Pages of a step: whole registers of keys, and a divisor of a table's row where one fits."""
    most = max(1, BLOCK_KV // page_size)
    whole = [n for n in range(1, most + 1) if n * page_size % LANES == 0] or [LANES // page_size]
    return max((n for n in whole if pages_per_seq % n == 0), default=whole[-1])


def _call(batch, q, weights, pages, sizes):
    """The `pallas_call`."""
    num_tokens, max_num_seqs = q.shape[0], batch.kv_lens.shape[0]
    most_tiles = num_tokens // OCTET + max_num_seqs
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return tpu_chip.pallas_call(
        functools.partial(_kernel, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(batch),
            grid=(1,),
            in_specs=[in_hbm] * 3,
            out_specs=in_hbm,
            scratch_shapes=[
                *[pltpu.SMEM((most_tiles,), jnp.int32)] * len(Tiles._fields),
                *scoring.scratch_shapes(sizes, pages.dtype),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((num_tokens, sizes.width), jnp.float32),
        compiler_params=tpu_chip.compiler_params(["arbitrary"], checks_bounds=False),
        name="indexer_scores",
    )(*batch, q, weights, pages)


def _kernel(page_table, kv_lens, cu_q_lens, num_seqs, q, weights, pages, scores, *rest, sizes):
    """Lists the tiles, scores them, and fills the octets that no sequence has a token in."""
    batch = Batch(page_table, kv_lens, cu_q_lens, num_seqs)
    arrays = Arrays(q, weights, pages, scores)
    tiles = Tiles(*rest[: len(Tiles._fields)])
    scratch = Scratch(*rest[len(Tiles._fields) :])
    num_tiles, num_steps = _list_tiles(tiles, batch, sizes)
    pl.when(num_tiles > 0)(
        lambda: scoring.Scoring(sizes, batch, arrays, tiles, num_tiles, num_steps, scratch).run()
    )
    _blank_padding(arrays, scratch, cu_q_lens[num_seqs[0]])


def _list_tiles(tiles: Tiles, batch: Batch, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """Cuts sequences where octets end, in order; returns tiles, and steps of all together."""

    def one_sequence(seq, sums):
        first, stop = batch.cu_q_lens[seq], batch.cu_q_lens[seq + 1]
        most = sizes.pages_per_seq * sizes.page_size
        offset = jnp.minimum(batch.kv_lens[seq], most) - stop  # from a token to its position

        def is_left(state):
            return state[0] < stop

        def one_tile(state):
            token, at, steps = state
            count = jnp.minimum(stop, (token // OCTET + 1) * OCTET) - token
            blocks = jnp.maximum(pl.cdiv(offset + token + count, sizes.block_kv), 1)
            tiles.seq[at] = seq
            tiles.token[at] = token
            tiles.count[at] = count
            tiles.q_pos[at] = offset + token
            tiles.blocks[at] = blocks
            return token + count, at + 1, steps + blocks

        return jax.lax.while_loop(is_left, one_tile, (first, *sums))[1:]

    return jax.lax.fori_loop(0, batch.num_seqs[0], one_sequence, (jnp.int32(0), jnp.int32(0)))


def _blank_padding(arrays: Arrays, scratch: Scratch, num_tokens: jax.Array) -> None:
    """Gives octets without a token of a sequence scores of -inf."""
    first, stop = pl.cdiv(num_tokens, OCTET), arrays.scores.shape[0] // OCTET

    @pl.when(first < stop)
    def _():
        scoring.fill(scratch.scores.at[0])

        def each(act):
            def one(octet, carry):
                at = pl.ds(pl.multiple_of(octet * OCTET, OCTET), OCTET)
                sem = scratch.scores_left.at[0]
                act(pltpu.make_async_copy(scratch.scores.at[0], arrays.scores.at[at], sem))
                return carry

            jax.lax.fori_loop(first, stop, one, 0)

        each(scoring.start)
        each(scoring.wait)
