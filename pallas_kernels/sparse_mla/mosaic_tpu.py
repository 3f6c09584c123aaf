"""Sparse MLA on TPU: one kernel writes this step's rows, then gathers each token's and attends.

The contract (maths, arguments, edge cases) is `pallas_kernels/sparse_mla/__init__.py`. The cache is
"tiled", [num_pages, page_size, parts, packed, 128]: every token's row is whole tiles of its own, so
that one descriptor brings one row and no other (`mosaic_tpu_rows`).

Phases, in one `pallas_call`: this step's rows into their slots; every token over the rows that it
names, decodes and prefills alike (`mosaic_tpu_attend` has the pipeline); zeros for padding tokens.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip
from pallas_kernels.shape_checks import check_positive
from pallas_kernels.sparse_mla.mosaic_tpu_arguments import check_tiled, quantised
from pallas_kernels.sparse_mla.mosaic_tpu_attend import Arrays, Sizes, attend_tokens, factors_of
from pallas_kernels.sparse_mla.mosaic_tpu_positions import chosen_rows
from pallas_kernels.sparse_mla.mosaic_tpu_rows import Row, stored_rows, write_rows
from pallas_kernels.sparse_mla.mosaic_tpu_tiles import tiles


def sparse_mla_attention(
    ql_nope: jax.Array,
    q_pe: jax.Array,
    kv_c: jax.Array | None,
    k_pe: jax.Array | None,
    latent_pages: jax.Array,
    topk_indices: jax.Array,
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
    """MLA over the positions that each token names, as the contract of `sparse_mla` has it.

    Rows that no token names are not read. Of lists whose last entries name nothing only whole
    groups of blocks are left out: put -1 last.

    Numerics: as `mla`'s lowering for TPU.

    Raises:
        ValueError: a shape or dtype is not the contract's, or not this lowering's: float16, a
            kv_lora_rank that does not fill whole registers of the cache, a rope_dim other than 64,
            fp8_ds_mla.
    """
    dims = check_tiled(
        {
            "ql_nope": ql_nope, "q_pe": q_pe, "kv_c": kv_c, "k_pe": k_pe,
            "latent_pages": latent_pages, "topk_indices": topk_indices, "page_table": page_table,
            "kv_lens": kv_lens, "cu_q_lens": cu_q_lens, "num_seqs": num_seqs,
            "slot_mapping": slot_mapping, "kv_scale": kv_scale,
        },
        kv_cache_dtype,
    )  # fmt: skip
    check_positive("soft_cap", soft_cap)
    row = Row(dims["parts"], dims["packed"], dims["kv_lora_rank"], dims["rope_dim"])
    chosen = tiles(
        tpu_chip.current().generation, latent_pages.dtype.name, topk=dims["topk"],
        is_decode=dims["num_tokens"] <= dims["max_num_seqs"],
    )  # fmt: skip
    # Heads are sublanes: a packed register of bfloat16 has 16.
    ql_nope, q_pe = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % 16), (0, 0))) for x in (ql_nope, q_pe))
    gathered = chosen_rows(
        topk_indices, page_table, kv_lens, cu_q_lens, num_seqs, page_size=dims["page_size"],
        num_pages=dims["num_pages"], parts=row.parts, group=chosen.block_kv * chosen.buffers,
    )  # fmt: skip
    sizes = Sizes(
        *chosen, num_heads=ql_nope.shape[1], num_keys=gathered.rows.shape[2], row=row,
        q_dtype=ql_nope.dtype, cache_dtype=latent_pages.dtype, soft_cap=soft_cap,
    )  # fmt: skip
    rows = None
    if kv_c is not None:
        rows = stored_rows(*(quantised(x, kv_scale, latent_pages.dtype) for x in (kv_c, k_pe)))
    out, lse, written = _call(
        gathered,
        factors_of(kv_scale, scale, soft_cap),
        slot_mapping, ql_nope, q_pe, rows,
        latent_pages.reshape(-1, row.packed, tpu_chip.LANES), sizes=sizes,
    )  # fmt: skip
    heads = dims["num_q_heads"]
    return out[:, :heads], lse[:, 0, :heads], written.reshape(latent_pages.shape)


def _call(gathered, factors, slot_mapping, ql_nope, q_pe, rows, pages, *, sizes):
    """The `pallas_call`."""
    num_tokens, num_heads, _ = ql_nope.shape
    writes = rows is not None
    scalars = [gathered.groups, gathered.tokens, factors, *([slot_mapping] if writes else [])]
    arrays = [ql_nope, q_pe, gathered.rows, gathered.bias, *([rows] if writes else []), pages]
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, writes=writes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[in_hbm] * len(arrays),
            out_specs=[in_hbm] * 3,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(ql_nope.shape, ql_nope.dtype),
            jax.ShapeDtypeStruct((num_tokens, 1, num_heads), jnp.float32),
            jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        ],
        input_output_aliases={len(scalars) + len(arrays) - 1: 2},
        # Every address is clamped above; a check would be half a descriptor's instructions again.
        compiler_params=tpu_chip.compiler_params(["arbitrary"], checks_bounds=False),
        name="sparse_mla_attention",
    )(*scalars, *arrays)


def _kernel(*refs, sizes: Sizes, writes: bool):
    """The phases of the kernel, one after another."""
    refs = iter(refs)
    groups, tokens, factors = (next(refs) for _ in range(3))
    slot_mapping = next(refs) if writes else None
    ql_nope, q_pe, rows_at, bias = (next(refs) for _ in range(4))
    rows = next(refs) if writes else None
    _, out, lse, pages = refs
    if writes:
        write_rows(slot_mapping, rows, pages, sizes.row)
    attend_tokens(
        sizes,
        Arrays(ql_nope, q_pe, rows_at, bias, pages, out, lse, groups, tokens, factors),
    )
    _blank_padding(out, lse, tokens[0])


def _blank_padding(out, lse, first) -> None:
    """Gives the tokens after the last sequence's out 0 and lse -inf."""
    num_tokens, num_heads, rank = out.shape

    @pl.when(first < num_tokens)
    def _():
        def scoped(blank_out, blank_lse, sem):
            blank_out[...] = jnp.zeros_like(blank_out)
            blank_lse[...] = jnp.full_like(blank_lse, -jnp.inf)

            def each(act):
                def one(token, _):
                    act(pltpu.make_async_copy(blank_out, out.at[token], sem))
                    act(pltpu.make_async_copy(blank_lse, lse.at[token], sem))
                    return _

                jax.lax.fori_loop(first, num_tokens, one, 0)

            each(lambda copy: copy.start())
            each(lambda copy: copy.wait())

        pl.run_scoped(
            scoped,
            pltpu.VMEM((num_heads, rank), out.dtype),
            pltpu.VMEM((1, num_heads), jnp.float32),
            pltpu.SemaphoreType.DMA(()),
        )
