"""MLA on TPU: one kernel writes this step's rows, then attends with decodes and prefills alike.

The contract (maths, arguments, edge cases) is `pallas_kernels/mla/__init__.py`. The cache is
"striped", [num_pages, 2 * kv_lora_rank / 128 + 1, page_size / 2, 128]: stripes of 128 numbers of
the latents of a page's first half, then of its second half, then rotary keys, two tokens a line
(`attnsel_jax.cache_layouts` has it to the number). So a page lies in HBM as in registers: its copy
has no stride, and every operand of the matrix unit begins at a register.

Phases, in one `pallas_call`: this step's rows into their pages (`mosaic_tpu_writes`); where few
tokens come for each sequence, tiles of as many; tiles of one query, for sequences with one new
token; tiles of many queries, for the others; zeros for padding tokens. `mosaic_tpu_attend` has the
pipeline.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import empty_calls, tpu_chip
from pallas_kernels.jax_settings import under_own_settings
from pallas_kernels.mla.mosaic_tpu_arguments import check_striped
from pallas_kernels.mla.mosaic_tpu_attend import attend_tiles
from pallas_kernels.mla.mosaic_tpu_batch import Batch, blank_padding, list_tiles
from pallas_kernels.mla.mosaic_tpu_scratch import Arrays, Sizes, Tiles
from pallas_kernels.mla.mosaic_tpu_tiles import Tiles as TileSizes
from pallas_kernels.mla.mosaic_tpu_tiles import few_tokens, tiles_for
from pallas_kernels.mla.mosaic_tpu_writes import Writes, stored_rows, write_rows
from pallas_kernels.shape_checks import check_positive
from pallas_kernels.stored_values import quantise
from pallas_kernels.tpu_operands import factor_of
from pallas_kernels.tpu_sequences import Needs, some_sequences_at_a_time


class _Passes(NamedTuple):
    """Static sizes of the passes; `many` is None where every tile is of one query."""

    few: Sizes | None  # a tile is all new tokens of a sequence; None where there is no such pass
    one: Sizes
    many: Sizes | None
    most_keys: int  # positions that a row of the page table can name


@under_own_settings
@some_sequences_at_a_time(Needs(token=16, seq=32))
def mla_attention(
    ql_nope: jax.Array,
    q_pe: jax.Array,
    kv_c: jax.Array | None,
    k_pe: jax.Array | None,
    latent_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    slot_mapping: jax.Array | None,
    *,
    scale: float,
    soft_cap: float | None = None,
    kv_scale: jax.Array | None = None,
    kv_cache_dtype: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Absorbed MLA of a ragged batch over a striped latent cache, as the contract of `mla` has it.

    Numerics: logits, softmax and sums are float32. bfloat16 queries are multiplied in bfloat16 by
    float8 as it is (a float32 cache is rounded to bfloat16), weights are rounded to bfloat16;
    float32 queries are multiplied at the highest precision.

    Page ids in use are trusted: this is compiled without bounds checks, which every copy would pay
    for. Slots outside the cache write nowhere.

    Raises:
        ValueError: a shape or dtype is not the contract's, or not this lowering's: float16, a page
            size other than 64, 128 and 256, a kv_lora_rank that is no multiple of 128, a rope_dim
            other than 64, fp8_ds_mla.
    """
    dims = check_striped(
        locals(),
        kv_cache_dtype,
    )
    check_positive("soft_cap", soft_cap)
    if empty_calls.is_empty(dims):
        return empty_calls.ragged(ql_nope, latent_pages)
    num_heads = ql_nope.shape[1]
    factor = jnp.full((1,), factor_of(latent_pages.dtype, ql_nope.dtype), jnp.float32)
    factor = factor if kv_scale is None else factor * kv_scale
    rows = None
    if kv_c is not None:
        stored = (quantise(x, kv_scale, latent_pages.dtype) for x in (kv_c, k_pe))
        rows = stored_rows(*stored)
    # Heads are sublanes: a packed register of bfloat16 has 16.
    ql_nope, q_pe = (_heads_padded(x) for x in (ql_nope, q_pe))
    out, lse, latent_pages = _call(
        page_table, kv_lens, cu_q_lens, num_seqs.reshape(1), slot_mapping, factor,
        ql_nope, q_pe, rows, latent_pages, scale=float(scale), soft_cap=soft_cap,
    )  # fmt: skip
    return out[:, :num_heads], lse[:, 0, :num_heads], latent_pages


def _call(
    page_table, kv_lens, cu_q_lens, num_seqs, slot_mapping, kv_scale, ql_nope, q_pe, rows, pages,
    *, scale, soft_cap,
):  # fmt: skip
    """The `pallas_call`."""
    num_tokens, num_heads, _ = ql_nope.shape
    max_num_seqs = kv_lens.shape[0]
    writes = rows is not None
    passes = _passes(ql_nope, q_pe, pages, page_table.shape, scale, soft_cap)
    missing = passes.one.columns - page_table.shape[1]
    flat_table = jnp.pad(page_table, ((0, 0), (0, missing))).reshape(-1)
    scalars = [flat_table, kv_lens, cu_q_lens, num_seqs, kv_scale]
    scalars += [slot_mapping] if writes else []
    arrays = [ql_nope, q_pe, *([rows] if writes else []), pages]
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    most_tiles = num_tokens
    if passes.many is not None:
        most_tiles = max(max_num_seqs, num_tokens // passes.many.block_q + max_num_seqs)
    return tpu_chip.pallas_call(
        functools.partial(_kernel, passes=passes, writes=writes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[in_hbm] * len(arrays),
            out_specs=[in_hbm] * 3,
            scratch_shapes=[pltpu.SMEM((most_tiles,), jnp.int32) for _ in Tiles._fields],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(ql_nope.shape, ql_nope.dtype),
            jax.ShapeDtypeStruct((num_tokens, 1, num_heads), jnp.float32),
            jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        ],
        input_output_aliases={len(scalars) + len(arrays) - 1: 2},
        compiler_params=tpu_chip.compiler_params(["arbitrary"], checks_bounds=False),
        name="mla_attention",
    )(*scalars, *arrays)


def _kernel(*refs, passes: _Passes, writes: bool):
    """The phases of the kernel, one after another."""
    refs = iter(refs)
    page_table, kv_lens, cu_q_lens, num_seqs, kv_scale = (next(refs) for _ in range(5))
    slot_mapping = next(refs) if writes else None
    ql_nope, q_pe = next(refs), next(refs)
    rows = next(refs) if writes else None
    _, out, lse, pages, *tiles = refs
    tiles, batch = Tiles(*tiles), Batch(kv_lens, cu_q_lens, num_seqs)
    arrays = Arrays(ql_nope, q_pe, pages, out, lse, page_table, kv_scale)

    def write():
        if writes:
            write_rows(Writes(slot_mapping, rows, pages))

    most = 1 if passes.few is None else passes.few.block_q
    kinds = (
        (passes.few, lambda q_len: (q_len > 1) & (q_len <= most)),
        (passes.one, lambda q_len: (q_len == 1) | (passes.many is None)),
        (passes.many, lambda q_len: q_len > most),
    )
    first = write
    for sizes, belongs in kinds:
        if sizes is not None:
            listed = list_tiles(
                tiles, batch, belongs, block_q=sizes.block_q, block_kv=sizes.block_kv,
                most_keys=passes.most_keys,
            )  # fmt: skip
            attend_tiles(sizes, arrays, tiles, *listed, first)
            first = None
    blank_padding(arrays, batch)


def _passes(ql_nope, q_pe, pages, table: tuple[int, int], scale: float, soft_cap) -> _Passes:
    """The tile sizes of the passes."""
    num_tokens, num_heads, rank = ql_nope.shape
    page_size = 2 * pages.shape[2]
    max_num_seqs, columns = table
    dtype = "float32" if ql_nope.dtype == jnp.float32 else pages.dtype.name
    decode, few, prefill = (
        tiles_for(tpu_chip.current().generation, dtype, kind)
        for kind in ("decode", "few", "prefill")
    )
    longest = max(decode.block_kv, few.block_kv, prefill.block_kv, page_size) // page_size

    def sizes(chosen: TileSizes, block_q: int) -> Sizes:
        return Sizes(
            block_q=block_q,
            block_kv=max(chosen.block_kv, page_size),
            blocks=chosen.blocks,
            lead=min(chosen.lead, chosen.blocks),
            lag=min(chosen.lag, chosen.blocks),
            finishes=chosen.finishes,
            starts_within=chosen.starts_within,
            num_heads=num_heads, rank=rank, rope_dim=q_pe.shape[2], page_size=page_size,
            columns=pl.cdiv(columns, longest) * longest,
            q_dtype=ql_nope.dtype, cache_dtype=pages.dtype, scale=scale, soft_cap=soft_cap,
            rolls_ropes=tpu_chip.current().mxu == 256,
        )  # fmt: skip

    def of_few() -> Sizes | None:
        tokens = few_tokens(num_tokens, max_num_seqs, num_heads, few.rows)
        if tokens == 1:
            return None
        return sizes(decode if tokens * num_heads <= decode.rows else few, tokens)

    many = None
    if num_tokens > max_num_seqs:
        many = sizes(prefill, max(2, prefill.rows // num_heads))
    return _Passes(of_few(), sizes(decode, 1), many, columns * page_size)


def _heads_padded(x: jax.Array) -> jax.Array:
    """With heads up to a whole packed register."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 16), (0, 0)))
