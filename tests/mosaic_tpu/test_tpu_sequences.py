"""What SMEM does not hold: of page tables some sequences at a time, of tiles' lists refused."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from latent_kernels import row_of
from tpu_interpreter import tpu_interpreter

from attnsel_jax import allocate_kv_cache, allocate_latent_cache
from attnsel_jax.aot import compile_for, target_for
from attnsel_jax.aot.arguments import mla_arguments, paged_arguments
from attnsel_jax.backends.mosaic_tpu import MosaicTpuBackend
from attnsel_jax.backends.mosaic_tpu_mla import MosaicTpuMlaBackend
from attnsel_jax.backends.mosaic_tpu_mla_sparse import MosaicTpuMlaSparseBackend
from attnsel_jax.compare import compare
from attnsel_jax.compare.comparison import PASS
from attnsel_jax.compare.deviations import deviation
from attnsel_jax.compare.expected import expected
from attnsel_jax.compare.kernel_runs import run
from attnsel_jax.problems import Problem
from attnsel_jax.problems.indexer_inputs import indexer_inputs
from attnsel_jax.problems.paged_inputs import paged_inputs
from pallas_kernels import tpu_sequences
from pallas_kernels.dense import mosaic_tpu
from pallas_kernels.mla.mosaic_tpu import mla_attention
from pallas_kernels.sparse_mla.mosaic_tpu import sparse_mla_attention
from pallas_kernels.sparse_mla.mosaic_tpu_indexer import indexer_scores

PAGED = MosaicTpuBackend.get_kernel("paged")
# Parts of two: a decode and a prompt; nothing and a decode; two short ones; one by itself.
BATCH = {"q_lens": (1, 20, 0, 1, 3, 2, 1), "kv_lens": (70, 59, 9, 33, 29, 24, 8)}
SHAPE = {"heads": (4, 2), "head_size": 64, "page_size": 8, "pad_tokens": 3, "sinks": True}


@pytest.fixture
def two_at_a_time(monkeypatch):
    monkeypatch.setattr(tpu_sequences, "_most_sequences", lambda *_: 2)


def paged_results():
    """Of the kernel, and the oracle's."""
    arguments = paged_inputs(np.random.default_rng(0), **SHAPE | BATCH)
    with tpu_interpreter():
        results = run(PAGED, "paged", arguments, layout="side_by_side")
    return results, expected("paged", arguments)


@pytest.mark.sweep
@pytest.mark.usefixtures("two_at_a_time")
def test_paged():
    results, answers = paged_results()
    for name, answer in answers.items():
        assert (found := deviation(name, results[name], answer)).passed, str(found)


@pytest.mark.sweep
@pytest.mark.usefixtures("two_at_a_time")
@pytest.mark.parametrize("fault", ["tokens are not turned", "the last part is left out"])
def test_planted_faults_are_found(monkeypatch, fault):
    cut = tpu_sequences._cut

    def with_one_less(given, most):
        part, parts = cut(given, most)
        return part, parts - 1

    if fault == "tokens are not turned":
        monkeypatch.setattr(tpu_sequences, "OF_TOKENS", ())
    else:
        monkeypatch.setattr(tpu_sequences, "_cut", with_one_less)
    results, answers = paged_results()
    assert not all(deviation(n, results[n], answer).passed for n, answer in answers.items())


@pytest.mark.sweep
@pytest.mark.usefixtures("two_at_a_time")
def test_mla():
    row = row_of(mla_attention, **BATCH)
    assert row.verdict == PASS, str(row)


@pytest.mark.sweep
@pytest.mark.usefixtures("two_at_a_time")
def test_sparse_mla():
    row = row_of(sparse_mla_attention, "tiled", topk=16, **BATCH)
    assert row.verdict == PASS, str(row)


@pytest.mark.once
@pytest.mark.usefixtures("two_at_a_time")
def test_indexer():
    shape = {"num_index_heads": 8, "dtype": "bfloat16"}
    problem = Problem("in parts", "indexer_scores", "", indexer_inputs, shape | BATCH)
    with tpu_interpreter():
        (row,) = compare([problem], {"kernel": indexer_scores}).rows
    assert row.verdict == PASS, str(row)


def large(op, *, pages_per_seq, q_len=1, batch=256, page_size=64, cache_dtype="bfloat16"):
    """Abstract arguments over a cache of 1024 pages, and the kernel's path."""
    given = {"batch": batch, "q_len": q_len, "kv_len": pages_per_seq * page_size,
             "page_size": page_size, "dtype": "bfloat16", "cache_dtype": cache_dtype}  # fmt: skip
    asked = {"kv_cache_dtype": cache_dtype, "device": "v5e"}
    if op == "paged":
        cache = allocate_kv_cache(1, page_size, 2, 128, "bfloat16", **asked).pages
        shape = {"num_heads": 8, "num_kv_heads": 2, "head_size": 128}
        arguments = paged_arguments(cache_shape=(1024, *cache.shape[1:]), **given, **shape)
        return arguments, MosaicTpuBackend.kernels["paged"]
    sparse = op == "sparse_mla"
    cache = allocate_latent_cache(
        1, page_size, 512, 64, "bfloat16", use_sparse=sparse, **asked
    ).pages
    shape = {"num_heads": 16, "kv_lora_rank": 512, "rope_dim": 64, "scale": 0.1}
    shape |= {"topk": 128} if sparse else {}
    arguments = mla_arguments(cache_shape=(1024, *cache.shape[1:]), **given, **shape)
    return arguments, (MosaicTpuMlaSparseBackend if sparse else MosaicTpuMlaBackend).kernels[op]


def compiles(chip, op, **sizes):
    missing = target_for(chip).missing()
    if missing:
        pytest.skip(f"no compiler for {chip} here: {missing}")
    arguments, kernel = large(op, **sizes)
    report = compile_for(chip, kernel, arguments)
    assert report.compiled, report.refusal


@pytest.mark.sweep
def test_a_table_of_four_mebibytes_compiles():
    compiles("v5e", "paged", pages_per_seq=4096)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "7x"])
@pytest.mark.parametrize("op", ["paged", "mla", "sparse_mla"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"pages_per_seq": 2048},
        {"pages_per_seq": 1000, "page_size": 256},
        {"pages_per_seq": 1024, "q_len": 32},  # 8192 tokens
        {"pages_per_seq": 200_000, "batch": 4},
        {"pages_per_seq": 1024, "batch": 4, "q_len": 10_000},
    ],
    ids=["decode", "large pages", "prompts", "long", "many tokens"],
)
def test_large_tables_compile(chip, op, sizes):
    compiles(chip, op, **sizes)


@pytest.mark.parametrize("op", ["paged", "mla", "sparse_mla"])
def test_a_row_that_does_not_fit_is_refused(op):
    arguments, _ = large(op, pages_per_seq=300_000, batch=2)
    kernel = {"paged": PAGED, "mla": mla_attention, "sparse_mla": sparse_mla_attention}[op]
    static = {name: x for name, x in arguments.items() if not hasattr(x, "dtype")}
    arrays = {name: x for name, x in arguments.items() if name not in static}
    with pytest.raises(ValueError, match=r"page_table has 300000 pages a sequence.*use larger"):
        jax.eval_shape(lambda arrays: kernel(**arrays, **static), arrays)


@pytest.mark.parametrize("op", ["paged", "mla", "sparse_mla"])
def test_tokens_whose_lists_do_not_fit_are_refused(op):
    arguments, _ = large(op, pages_per_seq=64, batch=2, q_len=140_000)
    kernel = {"paged": PAGED, "mla": mla_attention, "sparse_mla": sparse_mla_attention}[op]
    static = {name: x for name, x in arguments.items() if not hasattr(x, "dtype")}
    arrays = {name: x for name, x in arguments.items() if name not in static}
    with pytest.raises(ValueError, match=rf"{op}_attention wants \d+ bytes of a TPU's SMEM.*fewer"):
        jax.eval_shape(lambda arrays: kernel(**arrays, **static), arrays)


def test_gradients_of_many_short_rows_are_not_refused():
    """Whether each kv head has a NaN would be a mebibyte of SMEM: it is one number for all."""
    x = jax.ShapeDtypeStruct((4096, 16, 64, 64), jnp.bfloat16)
    loss = jax.grad(lambda *x: jnp.sum(mosaic_tpu.dense_attention(*x)[0].astype(jnp.float32)))
    jax.eval_shape(loss, x, x, x)


def test_a_page_has_one_entry_whatever_its_size():
    """As the kernel has it: 256 sequences of 896 pages of 256 tokens are one call."""
    arguments, _ = large("paged", pages_per_seq=896, page_size=256)
    assert tpu_sequences._most_sequences(arguments, tpu_sequences.Needs(8, 8)) >= 256


@pytest.mark.parametrize(
    ("batch", "length", "segments", "dtype", "fits"),
    [(1, 240_000, False, "bfloat16", True), (50, 1 << 15, True, "bfloat16", True),
     (1, 120_000, False, "float32", True), (1, 1 << 18, False, "bfloat16", False),
     (64, 1 << 15, True, "bfloat16", False)],
)  # fmt: skip
def test_a_list_of_tiles_that_does_not_fit_is_refused(batch, length, segments, dtype, fits):
    q = jax.ShapeDtypeStruct((batch, length, 1, 128), dtype)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32) if segments else None
    with (
        contextlib.nullcontext()
        if fits
        else pytest.raises(ValueError, match=r"want \d+ bytes of a TPU's SMEM.*or use XLA")
    ):
        jax.eval_shape(
            lambda q, ids: mosaic_tpu.dense_attention(
                q, q, q, causal=True, q_segment_ids=ids, kv_segment_ids=ids
            ),
            q, ids,
        )  # fmt: skip
