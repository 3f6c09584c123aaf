"""Sparse MLA on TPU: one kernel writes this step's rows, then attends in one of two ways.

The contract (maths, arguments, edge cases) is `pallas_kernels/sparse_mla/__init__.py`. The cache is
"tiled", [num_pages, page_size, parts, packed, 128]: every token's row is whole tiles of its own, so
that one descriptor brings one row and no other (`mosaic_tpu_rows`).

Phases, in one `pallas_call`: this step's rows into their slots; tiles of a prompt's tokens whose
context is short over all of it, under a mask (`mosaic_tpu_masked`); every other token over the rows
that it names (`mosaic_tpu_attend`); zeros for padding tokens. Which token goes which way depends on
lengths, and is found before the kernel (`mosaic_tpu_positions.shared_tokens`).
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import empty_calls, fp8_ds_mla, tpu_chip
from pallas_kernels.jax_settings import under_own_settings
from pallas_kernels.shape_checks import check_positive
from pallas_kernels.sparse_mla.mosaic_tpu_arguments import check_tiled
from pallas_kernels.sparse_mla.mosaic_tpu_attend import Arrays, Sizes, attend_tokens
from pallas_kernels.sparse_mla.mosaic_tpu_masked import (
    MaskedArrays,
    MaskedSizes,
    MaskedTiles,
    attend_tiles,
)
from pallas_kernels.sparse_mla.mosaic_tpu_positions import (
    chosen_rows,
    placed_tokens,
    shared_tokens,
)
from pallas_kernels.sparse_mla.mosaic_tpu_rows import Row, scaled_rows, stored_rows, write_rows
from pallas_kernels.sparse_mla.mosaic_tpu_softmax import factors_of
from pallas_kernels.sparse_mla.mosaic_tpu_tiles import Tiles, tiles
from pallas_kernels.stored_values import quantise
from pallas_kernels.tpu_chip import LANES
from pallas_kernels.tpu_operands import factor_of
from pallas_kernels.tpu_sequences import Needs, some_sequences_at_a_time

MOST_BLOCK_Q = 16  # tokens of a masked tile, whose heads may be few


@under_own_settings
@some_sequences_at_a_time(Needs(token=20, seq=8))
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

    Of a token that gathers, rows that it does not name are not read, and of lists whose last
    entries name nothing only whole groups of blocks are left out: put -1 last. Where a tile of a
    prompt's tokens is masked, its whole context is read, whose rows must be finite.

    Numerics: as `mla`'s lowering for TPU.

    Raises:
        ValueError: a shape or dtype is not the contract's, or not this lowering's: float16, a
            kv_lora_rank that does not fill whole registers of the cache, a rope_dim other than 64.
    """
    dims = check_tiled(
        locals(),
        kv_cache_dtype,
    )
    check_positive("soft_cap", soft_cap)
    if empty_calls.is_empty(dims):
        return empty_calls.ragged(ql_nope, latent_pages)
    row = Row(
        dims["parts"], dims["packed"], dims["kv_lora_rank"], dims["rope_dim"],
        scaled=kv_cache_dtype == fp8_ds_mla.NAME,
    )  # fmt: skip
    num_tokens, page_size = dims["num_tokens"], dims["page_size"]
    chosen = tiles(
        tpu_chip.current().generation, latent_pages.dtype.name, topk=dims["topk"],
        is_decode=num_tokens <= dims["max_num_seqs"],
    )  # fmt: skip
    # Heads are sublanes: a packed register of bfloat16 has 16.
    ql_nope, q_pe = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % 16), (0, 0))) for x in (ql_nope, q_pe))
    sizes = Sizes(
        chosen.block_kv, chosen.buffers, num_heads=ql_nope.shape[1], row=row,
        q_dtype=ql_nope.dtype, cache_dtype=latent_pages.dtype, soft_cap=soft_cap,
    )  # fmt: skip
    masked = _masked_sizes(chosen, sizes, dims)
    placed = placed_tokens(
        kv_lens, cu_q_lens, num_seqs, num_tokens=num_tokens,
        most_keys=dims["pages_per_seq"] * page_size,
    )  # fmt: skip
    shared = shared_tokens(
        placed, block_q=0 if masked is None else masked.block_q,
        keys_per_token=chosen.reach * dims["topk"] // 100,
    )  # fmt: skip
    page_table = jnp.clip(page_table, 0, dims["num_pages"] - 1)
    gathered = chosen_rows(
        topk_indices, page_table, placed, page_size=page_size, parts=row.parts, group=sizes.group
    )
    rows = None
    if kv_c is not None and row.scaled:
        rows = scaled_rows(kv_c, k_pe)
    elif kv_c is not None:
        rows = stored_rows(*(quantise(x, kv_scale, latent_pages.dtype) for x in (kv_c, k_pe)))
    lists = jnp.pad(topk_indices, ((0, 0), (0, -dims["topk"] % LANES)), constant_values=-1)
    scalars = {
        "groups": gathered.groups, "tokens": shared.gathered, "num_tokens": shared.num_gathered,
        "tiles": MaskedTiles(*shared.tiles, shared.num_tiles), "page_table": page_table,
        "factors": factors_of(
            kv_scale, scale, soft_cap, factor_of(latent_pages.dtype, ql_nope.dtype)
        ),
        "real_tokens": cu_q_lens[num_seqs].reshape(1),
    }  # fmt: skip
    arrays = {
        "ql_nope": ql_nope, "q_pe": q_pe, "rows": gathered.rows, "bias": gathered.bias,
        "topk": lists[:, None],
    }  # fmt: skip
    if rows is not None:
        scalars["slot_mapping"], arrays["new"] = slot_mapping, rows
    pages = latent_pages.reshape(-1, row.packed, LANES)
    out, lse, written = _call(scalars, arrays, pages, sizes=sizes, masked=masked)
    heads = dims["num_q_heads"]
    return out[:, :heads], lse[:, 0, :heads], written.reshape(latent_pages.shape)


def _masked_sizes(chosen: Tiles, sizes: Sizes, dims: Mapping[str, int]) -> MaskedSizes | None:
    """The sizes of the masked half; None where no tile can be masked."""
    heads, page_size = sizes.num_heads, dims["page_size"]
    block_q = max(1, min(MOST_BLOCK_Q, chosen.rows // heads))
    block_kv = max(chosen.masked_kv, page_size)
    capacity = dims["pages_per_seq"] * page_size
    most_keys = min(capacity, block_q * (chosen.reach * dims["topk"] // 100))
    if most_keys == 0:
        return None
    return MaskedSizes(
        block_q=block_q, step_q=max(1, min(block_q, chosen.step_rows // heads)), block_kv=block_kv,
        most_keys=pl.cdiv(most_keys, block_kv) * block_kv, num_heads=heads,
        topk=pl.cdiv(dims["topk"], LANES) * LANES, page_size=page_size, row=sizes.row,
        q_dtype=sizes.q_dtype, cache_dtype=sizes.cache_dtype, soft_cap=sizes.soft_cap,
    )  # fmt: skip


def _call(scalars, arrays, pages, *, sizes, masked):
    """The `pallas_call`; scalars and arrays by name."""
    num_tokens, num_heads, _ = arrays["ql_nope"].shape
    given, structure = jax.tree.flatten((scalars, arrays))
    num_scalars = len(jax.tree.leaves(scalars))
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return tpu_chip.pallas_call(
        functools.partial(_kernel, structure=structure, sizes=sizes, masked=masked),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=num_scalars,
            grid=(1,),
            in_specs=[in_hbm] * (len(given) + 1 - num_scalars),
            out_specs=[in_hbm] * 3,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(arrays["ql_nope"].shape, sizes.q_dtype),
            jax.ShapeDtypeStruct((num_tokens, 1, num_heads), jnp.float32),
            jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        ],
        input_output_aliases={len(given): 2},
        # Every address is clamped above; a check would be half a descriptor's instructions again.
        compiler_params=tpu_chip.compiler_params(["arbitrary"], checks_bounds=False),
        name="sparse_mla_attention",
    )(*given, pages)


def _kernel(*refs, structure, sizes: Sizes, masked: MaskedSizes | None):
    """The phases of the kernel, one after another."""
    scalars, arrays = jax.tree.unflatten(structure, refs[:-4])
    _, out, lse, pages = refs[-4:]
    if "new" in arrays:
        write_rows(scalars["slot_mapping"], arrays["new"], pages, sizes.row)

    def those_of(kind):
        found = {"pages": pages, "out": out, "lse": lse, **scalars, **arrays}
        return kind(**{name: found[name] for name in kind._fields})

    if masked is not None:
        attend_tiles(masked, those_of(MaskedArrays))
    attend_tokens(sizes, those_of(Arrays))
    _blank_padding(out, lse, scalars["real_tokens"][0])


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
