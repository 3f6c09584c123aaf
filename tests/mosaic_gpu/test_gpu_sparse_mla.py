"""Sparse MLA on Hopper, interpreted with race detection and NaN in unused memory, and compiled."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_compiler import compiled_cleanly, views_that_lie_otherwise
from gpu_interpreter import needs_gpu_interpreter
from gpu_latents import SHAPE, row_of, with_cores, with_raw_rows_apart
from jax.experimental import pallas as pl

from attnsel_jax.backends.mosaic_gpu_mla_sparse import SPARSE, MosaicGpuMlaSparseBackend
from attnsel_jax.compare.comparison import PASS
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.platforms import Device
from attnsel_jax.problems.mla_inputs import mla_inputs
from pallas_kernels import fp8_ds_mla
from pallas_kernels.mla import mosaic_gpu_attend
from pallas_kernels.mla.mosaic_gpu_arguments import RANKS, ROPE_DIM
from pallas_kernels.sparse_mla import mosaic_gpu, mosaic_gpu_raw
from pallas_kernels.sparse_mla.mosaic_gpu import sparse_mla_attention

needs_gpu_interpreter()

CASES = {
    "mixed": {"topk": 150, "q_lens": (1, 8, 0), "kv_lens": (300, 9, 7)},
    "fp8_ds_mla": {"topk": 151, "rank": 512, "cache_dtype": "fp8_ds_mla", "q_lens": (1, 1),
                   "kv_lens": (200, 9), "pad_tokens": 1},
}  # fmt: skip
MORE = {
    "float16-128-heads-pages-16": {"topk": 128, "dtype": "float16", "num_heads": 128,
                                   "page_size": 16, "q_lens": (2,), "kv_lens": (140,)},
    "several-pairs": {"topk": 600, "q_lens": (1, 1), "kv_lens": (800, 500), "soft_cap": 5.0,
                      "rank": 512},
    "nothing-written": {"topk": 10, "writes": False, "q_lens": (3,), "kv_lens": (300,)},
    "e4m3": {"topk": 100, "cache_dtype": "float8_e4m3fn", "scaled": True, "q_lens": (2, 1),
             "kv_lens": (130, 40)},
    "e5m2-float16": {"topk": 130, "cache_dtype": "float8_e5m2", "dtype": "float16",
                     "q_lens": (2, 1), "kv_lens": (130, 40), "page_size": 32},
    "fp8_ds_mla-float16": {"topk": 30, "rank": 512, "cache_dtype": "fp8_ds_mla",
                           "dtype": "float16", "q_lens": (2,), "kv_lens": (90,)},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _few_cores(monkeypatch):
    with_cores(monkeypatch, 6)
    with_raw_rows_apart(monkeypatch)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_it_agrees_with_the_oracle(options):
    row = row_of(sparse_mla_attention, **options)
    assert row.verdict == PASS, str(row)


@pytest.mark.sweep
@pytest.mark.parametrize("options", MORE.values(), ids=MORE)
@pytest.mark.parametrize("cores", [1, 12])
def test_it_agrees_with_the_oracle_on_more_shapes(options, cores, monkeypatch):
    with_cores(monkeypatch, cores)
    row = row_of(sparse_mla_attention, **options)
    assert row.verdict == PASS, str(row)


def unseen_kept(monkeypatch):
    real = mosaic_gpu.chosen_rows

    def faulty(topk_indices, page_table, kv_lens, *rest, **sizes):
        return real(topk_indices, page_table, kv_lens + 1, *rest, **sizes)

    monkeypatch.setattr(mosaic_gpu, "chosen_rows", faulty)


def nothing_hidden(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "_is_row", lambda chosen, none, me, *_: ALL)


def last_rows_dropped(monkeypatch):
    real = mosaic_gpu.chosen_rows

    def faulty(*args, **sizes):
        chosen = real(*args, **sizes)
        return chosen._replace(used=jnp.minimum(chosen.used, 128))

    monkeypatch.setattr(mosaic_gpu, "chosen_rows", faulty)


def other_maximum_ignored(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_attend, "shrink_to", lambda old, new: jnp.ones_like(old))


ALL = np.bool_(True)
FAULTS = {
    "the position after the query's own": unseen_kept,
    "places that name nothing weigh": nothing_hidden,
    "the list's end is dropped": last_rows_dropped,
    "the running maximum is not applied": other_maximum_ignored,
}


@pytest.mark.sweep
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    fault(monkeypatch)
    assert row_of(sparse_mla_attention, **CASES["mixed"]).verdict != PASS


def scales_of_other_values(monkeypatch):
    real = mosaic_gpu_raw.ByteRows.scales_of
    monkeypatch.setattr(mosaic_gpu_raw.ByteRows, "scales_of", lambda *args: real(*args)[::-1])


def rotary_values_one_early(monkeypatch):
    real = mosaic_gpu_raw.as_numbers

    def faulty(raw, dtype, group, at, layout):
        early = int(dtype == jnp.bfloat16)
        return real(raw, dtype, group, pl.ds(at.start - early, at.size), layout)

    monkeypatch.setattr(mosaic_gpu_raw, "as_numbers", faulty)


@pytest.mark.sweep
@pytest.mark.parametrize("fault", [scales_of_other_values, rotary_values_one_early])
def test_a_fault_planted_in_rows_of_bytes_is_found(fault, monkeypatch):
    fault(monkeypatch)
    assert row_of(sparse_mla_attention, **CASES["fp8_ds_mla"]).verdict != PASS


def arguments_of(**options):
    made = mla_inputs(np.random.default_rng(0), **SHAPE | {"topk": 20} | options)
    return {n: jnp.asarray(x) if hasattr(x, "shape") else x for n, x in made.items()}


REFUSED = {
    "a name": ({"kv_cache_dtype": "int4"}, "kv_cache_dtype is 'int4', must be 'fp8_ds_mla' or N"),
    "bytes": ({"kv_cache_dtype": "fp8_ds_mla"}, "latent_pages has dtype bfloat16, must be one of"),
    "positions": ({"topk_indices": jnp.zeros((16, 4))}, "topk_indices has dtype float32, must be"),
    "scales": ({"kv_cache_dtype": "fp8_ds_mla", "kv_scale": jnp.float32(1)},
               "kv_scale is given, must be None with kv_cache_dtype 'fp8_ds_mla'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_does_not_take_is_refused_with_both_values(change, message):
    with pytest.raises(ValueError, match=message):
        sparse_mla_attention(**arguments_of() | change)


def test_the_backend_says_what_it_takes():
    def reasons(chip, **changes):
        asked = {"head_size": 576, "head_size_v": 512, "dtype": "bfloat16", "use_mla": True,
                 "use_sparse": True, "kv_cache_dtype": "fp8_ds_mla", "block_size": 64,
                 "op": "sparse_mla"}  # fmt: skip
        config = AttentionSelectorConfig(**asked | changes)
        found = MosaicGpuMlaSparseBackend.validate_configuration(config, Device.named(chip))
        return [reason.argument for reason in found]

    assert reasons("h200") == []
    assert reasons("h200", kv_cache_dtype="float16") == ["kv_cache_dtype"]
    assert reasons("a100", dtype="float32") == ["compute_capability", "dtype"]


def compiled(monkeypatch, num_pages=64, **options):
    """Lets the chip's own compiler have the kernel; its memory, and the cache's bytes."""
    monkeypatch.undo()  # the chip and the kernel as they are, not as they are interpreted
    arguments = arguments_of(rank=512, **options)
    pages = arguments["latent_pages"]
    pages = jax.ShapeDtypeStruct((num_pages, *pages.shape[1:]), pages.dtype)
    kernel = MosaicGpuMlaSparseBackend.kernels["sparse_mla"]
    memory = compiled_cleanly("h200", kernel, arguments | {"latent_pages": pages})
    return memory, pages.size * pages.dtype.itemsize


@pytest.mark.parametrize("cache_dtype", ["fp8_ds_mla", pytest.param(None, marks=pytest.mark.sweep)])
def test_a_sample_compiles_and_the_cache_is_not_copied(monkeypatch, cache_dtype):
    sizes = {"q_lens": (1, 1), "kv_lens": (1024, 9), "num_heads": 128, "topk": 256}
    memory, cache = compiled(monkeypatch, num_pages=8192, cache_dtype=cache_dtype, **sizes)
    assert memory["aliased"] >= cache > 4 * memory["temporaries"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "uint8"])
@pytest.mark.parametrize("rank", RANKS)
def test_copies_land_at_multiples_of_128_bytes(rank, dtype):
    row = fp8_ds_mla.ROW_BYTES if dtype == "uint8" else rank + ROPE_DIM
    pages = jax.ShapeDtypeStruct((2, 16, row), dtype)
    kind = mosaic_gpu_raw.kind_of(pages)
    raw = kind.scratch(jax.eval_shape(kind.in_cache, pages))
    assert all(math.prod(x.shape[2:]) * x.dtype.itemsize % 128 == 0 for x in raw)
    assert all(part.start % 128 == 0 for part in mosaic_gpu_raw.PARTS)


def a_view(offset, transforms, dtype):
    return (
        f'%1 = "mosaic_gpu.slice_smem"() <{{alias_id = 5 : i64, offset = {offset} : i32}}> '
        f"{{out_transforms = [[{transforms}]]}} : () -> memref<4x16x{dtype}, #gpu.address_space"
    )


def test_a_view_that_lies_otherwise_than_the_bytes_it_reads_is_found():
    tiles = "#mosaic_gpu.tile<[8, 64]>, #mosaic_gpu.swizzle<128 : i32>"
    declared = '%2 = "mosaic_gpu.with_transforms"(%1) <{transforms = []}>'
    raw, keys, ropes = (
        a_view(1024, "", "1152xi8"),
        a_view(1024, tiles, "bf16"),
        a_view(8, tiles, "f32"),
    )
    assert views_that_lie_otherwise("\n".join([raw, keys, declared, ropes])) == []
    found = views_that_lie_otherwise("\n".join([raw, keys, ropes]))
    assert found == [("1024", f"[{tiles}]", "bf16")]


CACHES = [None, "float8_e4m3fn", "float8_e5m2", "fp8_ds_mla"]


@pytest.mark.sweep
@pytest.mark.parametrize("page_size", SPARSE.block_size.values)
@pytest.mark.parametrize("dtype", SPARSE.dtype.values)
@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("num_heads", [128, 16])
@pytest.mark.parametrize("soft_cap", [None, 30.0])
def test_everything_declared_compiles(
    monkeypatch, num_heads, page_size, dtype, cache_dtype, soft_cap
):
    compiled(monkeypatch, num_heads=num_heads, page_size=page_size, dtype=dtype, soft_cap=soft_cap,
             cache_dtype=cache_dtype)  # fmt: skip
