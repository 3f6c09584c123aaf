"""The indexer's scores on Hopper, interpreted with race detection, and compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_compiler import compiled_cleanly
from gpu_interpreter import gpu_interpreter, needs_gpu_interpreter

from attnsel_jax.backends.mosaic_gpu_mla_sparse import SPARSE, MosaicGpuMlaSparseBackend
from attnsel_jax.compare import compare
from attnsel_jax.compare.comparison import PASS
from attnsel_jax.problems import Problem
from attnsel_jax.problems.indexer_inputs import indexer_inputs
from pallas_kernels.sparse_mla import mosaic_gpu_indexer
from pallas_kernels.sparse_mla.mosaic_gpu_indexer import indexer_scores

needs_gpu_interpreter()

SHAPE = {"q_lens": (1, 3, 0), "kv_lens": (300, 70, 5), "num_index_heads": 4, "index_head_dim": 128,
         "pad_tokens": 1}  # fmt: skip
CASES = {"mixed": {}, "pages-of-16": {"page_size": 16, "kv_lens": (129, 64, 5)}}
MORE = {
    "float16-64-heads": {"dtype": "float16", "num_index_heads": 64, "page_size": 128},
    "one-key": {"q_lens": (1,), "kv_lens": (1,), "index_head_dim": 64},
    "several-shares": {"kv_lens": (520, 300, 5), "page_size": 32},
}


@pytest.fixture(autouse=True)
def _short_shares(monkeypatch):
    """So few keys in a block of the grid that sequences have several."""
    monkeypatch.setattr(mosaic_gpu_indexer, "SHARE", 3)


def row_of(**options):
    problem = Problem("interpreted", "indexer_scores", "", indexer_inputs, SHAPE | options)
    with gpu_interpreter("h200"):
        (row,) = compare([problem], {"kernel": indexer_scores}).rows
    return row


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_it_agrees_with_the_oracle(options):
    row = row_of(**options)
    assert row.verdict == PASS, str(row)


@pytest.mark.sweep
@pytest.mark.parametrize("options", MORE.values(), ids=MORE)
@pytest.mark.parametrize("share", [1, 8])
def test_it_agrees_with_the_oracle_on_more_shapes(options, share, monkeypatch):
    monkeypatch.setattr(mosaic_gpu_indexer, "SHARE", share)
    row = row_of(**options)
    assert row.verdict == PASS, str(row)


def wrong_stage(monkeypatch):
    real = mosaic_gpu_indexer._load
    monkeypatch.setattr(
        mosaic_gpu_indexer,
        "_load",
        lambda refs, tile, first, page_size, block: real(
            refs, tile._replace(seq=tile.seq * 0), first, page_size, block
        ),
    )


def negative_kept(monkeypatch):
    real = mosaic_gpu_indexer.jnp.maximum

    def faulty(a, b):
        return a if getattr(a, "shape", ()) == (64, 64) else real(a, b)

    monkeypatch.setattr(mosaic_gpu_indexer.jnp, "maximum", faulty)


FAULTS = {"the first sequence's keys": wrong_stage, "no relu": negative_kept}


@pytest.mark.sweep
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    fault(monkeypatch)
    assert row_of().verdict != PASS


def arguments_of(**options):
    made = indexer_inputs(np.random.default_rng(0), **SHAPE | options)
    return {name: jnp.asarray(x) for name, x in made.items()}


REFUSED = {
    "dtypes": ({"index_pages": jnp.zeros((9, 64, 128), jnp.float16)}, "dtypes are q_index bfloat"),
    "dimension": ({"index_head_dim": 32}, "index_head_dim is 32, must be one of 64, 128, 192"),
    "heads": ({"num_index_heads": 65}, "num_index_heads is 65, must be at most 64"),
    "pages": ({"page_size": 8}, "page_size is 8, must be one of 16, 32, 64, 128, 256"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_does_not_take_is_refused_with_both_values(change, message):
    arrays = {name: x for name, x in change.items() if isinstance(x, jax.Array)}
    options = {name: x for name, x in change.items() if name not in arrays}
    with pytest.raises(ValueError, match=message):
        indexer_scores(**arguments_of(**options) | arrays)


def compiled(monkeypatch, **options):
    monkeypatch.undo()  # the chip and the kernel as they are, not as they are interpreted
    kernel = MosaicGpuMlaSparseBackend.kernels["indexer_scores"]
    compiled_cleanly("h200", kernel, arguments_of(**options))


def test_a_sample_compiles(monkeypatch):
    compiled(monkeypatch, num_index_heads=64)


@pytest.mark.sweep
@pytest.mark.parametrize("page_size", SPARSE.block_size.values)
@pytest.mark.parametrize("dtype", SPARSE.dtype.values)
@pytest.mark.parametrize("index_head_dim", [64, 128, 192, 256])
def test_everything_declared_compiles(monkeypatch, page_size, dtype, index_head_dim):
    compiled(monkeypatch, page_size=page_size, dtype=dtype, index_head_dim=index_head_dim)
