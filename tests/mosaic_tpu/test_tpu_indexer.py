"""The lightning indexer on TPU, interpreted with race detection and NaN; and compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from latent_kernels import found_faulty
from tpu_interpreter import tpu_interpreter

from attnsel_jax.aot import compile_for, target_for
from attnsel_jax.backends.mosaic_tpu_mla_sparse import TPU_TILED, MosaicTpuMlaSparseBackend
from attnsel_jax.compare import compare
from attnsel_jax.compare.comparison import PASS
from attnsel_jax.problems import Problem
from attnsel_jax.problems.indexer_inputs import indexer_inputs
from pallas_kernels import tpu_chip
from pallas_kernels.sparse_mla import mosaic_tpu_indexer, mosaic_tpu_scoring
from pallas_kernels.sparse_mla.mosaic_tpu_indexer import indexer_scores
from pallas_kernels.sparse_mla.mosaic_tpu_topk import topk_positions

# A chunk, a decode, nothing, a prompt over two octets, and one that ends in an octet of others.
SHAPE = {"q_lens": (3, 1, 0, 14, 2), "kv_lens": (70, 200, 3, 130, 2), "num_index_heads": 8,
         "dtype": "bfloat16"}  # fmt: skip
# Runs of two steps in the second octet; steps alone where octets begin and at the end.
DECODES = {"q_lens": (1,) * 11, "kv_lens": (1, 130, 64, 65, 128, 2, 7, 129, 600, 256, 700)}
CASES = {
    "bfloat16": {},
    "float32-padded": {"dtype": "float32", "pad_tokens": 20},
    "decode": DECODES,
}
MORE = {
    "deepseek": {"num_index_heads": 64, "page_size": 64},
    "three-heads": {"num_index_heads": 3},
    "page-16": {"page_size": 16},
    "page-256": {"page_size": 256},
    "head-size-256": {"index_head_dim": 256},
    "long": {"q_lens": (40, 1), "kv_lens": (500, 390)},
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of a size that a small problem has several of."""
    monkeypatch.setattr(mosaic_tpu_indexer, "BLOCK_KV", 128)


def interpreted(generation="v5e", **options):
    problem = Problem("interpreted", "indexer_scores", "", indexer_inputs, SHAPE | options)
    with tpu_interpreter(generation):
        (row,) = compare([problem], {"kernel": indexer_scores}).rows
    return row


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_it_agrees_with_the_oracle(options):
    row = interpreted(**options)
    assert row.verdict == PASS, str(row)


@pytest.mark.once
@pytest.mark.parametrize(
    "options", [DECODES, pytest.param({}, marks=pytest.mark.sweep)], ids=["decode", "mixed"]
)
def test_two_keys_may_share_a_column(monkeypatch, options):
    monkeypatch.setattr(mosaic_tpu_indexer, "BLOCK_KV", 256)
    row = interpreted("v6e", **options)
    assert row.verdict == PASS, str(row)


@pytest.mark.sweep
@pytest.mark.parametrize("options", MORE.values(), ids=MORE)
def test_it_agrees_with_the_oracle_on_more_shapes(options):
    row = interpreted(**options)
    assert row.verdict == PASS, str(row)


def _unsigned(dots, spread):
    return _SUMMED(dots, jnp.abs(spread))


def _of_the_step_before(self, step, k, parity):
    return _PRODUCTS(self, step, k - 2, parity)


def _of_each_other(self, at, dots, beside):
    return ((first ^ 128, these) for first, these in _BY_REGISTER(self, at, dots, beside))


SCORING = mosaic_tpu_scoring.Scoring
_PRODUCTS, _BY_REGISTER = SCORING._products, SCORING._by_register
_SUMMED = mosaic_tpu_scoring._summed
FAULTS = {
    "every position is seen": (mosaic_tpu_scoring, "_seen", lambda scores, past: scores),
    "weights without their sign": (mosaic_tpu_scoring, "_summed", _unsigned),
    "no waiting for keys": (SCORING, "_wait_keys", lambda self, k: None),
    "keys of the step but one before": (SCORING, "_products", _of_the_step_before),
    "octets not blank at first": (mosaic_tpu_scoring, "fill", lambda scores: None),
    "padding as it was": (mosaic_tpu_indexer, "_blank_padding", lambda *_: None),
}


@pytest.mark.once
@pytest.mark.parametrize(("owner", "name", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(monkeypatch, owner, name, fault):
    monkeypatch.setattr(owner, name, fault)
    found_faulty(lambda: interpreted(pad_tokens=20))


SHARED_FAULTS = {
    "scores change places": ("_by_register", _of_each_other),
    "what nobody sees is left": ("_clean_keys", lambda *_: None),
}


@pytest.mark.once
@pytest.mark.parametrize(("name", "fault"), SHARED_FAULTS.values(), ids=SHARED_FAULTS)
def test_a_fault_where_keys_share_a_column_is_found(monkeypatch, name, fault):
    monkeypatch.setattr(mosaic_tpu_indexer, "BLOCK_KV", 256)
    monkeypatch.setattr(SCORING, name, fault)
    found_faulty(lambda: interpreted("v6e", **DECODES))


def arguments_of(**options):
    shape = {"q_lens": (1, 9), "kv_lens": (70, 30)}
    made = indexer_inputs(np.random.default_rng(0), **shape | options)
    return {name: jnp.asarray(x) for name, x in made.items()}


REFUSED = {
    "float16": ({"q_index": jnp.zeros((10, 64, 128), jnp.float16)}, "q_index has dtype float16"),
    "head size": (
        {"q_index": jnp.zeros((10, 64, 64)), "index_pages": jnp.zeros((4, 64, 64))},
        "index_head_dim is 64, must be a multiple of 128",
    ),
    "pages of 8": (
        {"index_pages": jnp.zeros((4, 8, 128), jnp.bfloat16)}, "page_size is 8, must be a multiple",
    ),
    "a million positions": (
        {"page_table": jnp.zeros((3, 30_000), jnp.int32)},
        "pages_per_seq [*] page_size is 1920000, must be at most",
    ),
    "weights": ({"weights": jnp.zeros((10, 63))}, "weights has shape|num_index_heads"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_does_not_take_is_refused_with_both_values(change, message):
    given = arguments_of()
    if "page_table" in change:
        change = {"page_table": jnp.zeros((given["kv_lens"].shape[0], 30_000), jnp.int32)}
    with pytest.raises(ValueError, match=message):
        indexer_scores(**given | change)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 102_336), ("bfloat16", 131_072)])
def test_wide_keys_leave_fewer_positions_on_v4(monkeypatch, dtype, most):
    """With 131,072 of float32 the compiler wanted 16.5 of v4's 16 MiB."""
    monkeypatch.setattr(mosaic_tpu_indexer, "BLOCK_KV", 2048)
    given = arguments_of(page_size=64)
    given |= {name: given[name].astype(dtype) for name in ("q_index", "index_pages")}
    sequences = given["kv_lens"].shape[0]

    def traced(pages_per_seq):
        table = jnp.zeros((sequences, pages_per_seq), jnp.int32)
        with tpu_chip.for_generation("v4"):
            jax.eval_shape(lambda: indexer_scores(**given | {"page_table": table}))

    traced(most // 64)
    with pytest.raises(ValueError, match=f"must be at most {most}"):
        traced(most // 64 + 1)


def test_the_backend_has_the_whole_indexer():
    assert MosaicTpuMlaSparseBackend.get_kernel("indexer_scores") is indexer_scores
    assert MosaicTpuMlaSparseBackend.get_kernel("topk_positions") is topk_positions


def compiles(chip, **options):
    """Lets the chip's own compiler have the kernel."""
    missing = target_for(chip).missing()
    if missing:
        pytest.skip(f"no compiler for {chip} here: {missing}")
    path = MosaicTpuMlaSparseBackend.kernels["indexer_scores"]
    report = compile_for(chip, path, arguments_of(**options))
    assert report.compiled, report.refusal


@pytest.mark.parametrize(
    "chip",
    [
        pytest.param(chip, marks=() if chip in ("v5e", "7x") else pytest.mark.sweep)
        for chip in TPU_TILED.generation.values
    ],
)
def test_a_sample_compiles(chip):
    compiles(chip, q_lens=(1, 40), kv_lens=(700, 300))


@pytest.mark.sweep
@pytest.mark.parametrize("chip", TPU_TILED.generation.values)
@pytest.mark.parametrize("dtype", TPU_TILED.dtype.values)
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
def test_more_shapes_compile(monkeypatch, chip, dtype, page_size):
    monkeypatch.setattr(mosaic_tpu_indexer, "BLOCK_KV", 2048)
    compiles(chip, dtype=dtype, page_size=page_size, q_lens=(1, 40), kv_lens=(7000, 300))
