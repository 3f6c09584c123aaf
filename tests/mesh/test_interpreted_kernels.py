"""Pallas kernels over a mesh, run: interpreted as TPUs, against the oracle, races being errors.

Each device runs the kernel on its share by itself, so what is proved is the mesh's part: what lies
where, what a device is told of it, and how parts are put together.
"""

import numpy as np
import pytest
from meshes import mesh
from shared_out import check_shared_out
from test_context import check as check_context
from test_heads_and_batch import check
from tpu_interpreter import tpu_interpreter

from attnsel_jax.problems import Problem
from attnsel_jax.problems.dense_inputs import dense_inputs
from attnsel_jax.problems.indexer_inputs import indexer_inputs
from attnsel_jax.problems.mla_inputs import mla_inputs
from attnsel_jax.problems.paged_inputs import paged_inputs
from pallas_kernels.mla import mosaic_tpu as mla_kernel
from pallas_kernels.mla.mosaic_tpu_tiles import Tiles as MlaTiles
from pallas_kernels.paged import mosaic_tpu as paged_kernel
from pallas_kernels.paged.mosaic_tpu_tiles import Tiles as PagedTiles
from pallas_kernels.sparse_mla import mosaic_tpu as sparse_kernel
from pallas_kernels.sparse_mla import mosaic_tpu_indexer
from pallas_kernels.sparse_mla.mosaic_tpu_tiles import Tiles as SparseTiles

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Tiles of a size that a small problem has several of."""
    paged = PagedTiles(tile_tokens=32, block_tokens=32, chunk_tokens=16, num_buffers=3)
    monkeypatch.setattr(paged_kernel, "tiles_for", lambda *_: paged)
    monkeypatch.setattr(mla_kernel, "tiles_for", lambda *_, **__: MlaTiles(32, 64, 3, 2))
    monkeypatch.setattr(sparse_kernel, "tiles", lambda *_, **__: SparseTiles(32, 2))
    monkeypatch.setattr(mosaic_tpu_indexer, "BLOCK_KV", 128)


def dense(gradients=True, **options):
    shape = {"heads": (2, 1), "head_size": 64, "dtype": "float32", "causal": True}
    return Problem("p", "dense", "", dense_inputs, shape | options, gradients=gradients)


def test_dense_heads_and_batch_with_gradients():
    problem = dense(batch=2, heads=(4, 2), q_len=9, sinks=True)
    cuts = {"batch": "data", "heads": "model", "kv_heads": "model"}
    with tpu_interpreter():
        check(problem, ["MOSAIC_TPU"], mesh(data=2, model=2), **cuts)


AROUND = {
    # Five positions a device, which have no halves: the first device meets its own keys only.
    "ring, devices with unequal work": ("ring", {"q_len": 10, "sliding_window": 4}),
    "ring, zig-zag": ("ring", {"q_len": 12, "sinks": True}),
    "all-gather": ("all_gather", {"q_len": 10, "segments": 2}),
    "all-to-all": ("all_to_all", {"q_len": 10, "sinks": True}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.sweep] * (i > 0)) for i, c in enumerate(AROUND)]
)
def test_dense_positions_with_gradients(case):
    form, options = AROUND[case]
    with tpu_interpreter():
        check_context(dense(**options), mesh(seq=2), form, "MOSAIC_TPU", q_len="seq", kv_len="seq")


LENGTHS = [((1, 5), (19, 11)), ((5, 1), (11, 19))]
LONGER = [((1, 3), (150, 70)), ((3, 1), (70, 150))]
LATENT = {"num_heads": 2, "rope_dim": 64, "qk_nope_head_dim": 16, "dtype": "float32"}
INPUTS = {
    "paged": ("MOSAIC_TPU", "paged", paged_inputs, LENGTHS,
              {"heads": (4, 2), "head_size": 64, "page_size": 8, "dtype": "float32"}),
    "paged, int8": ("MOSAIC_TPU", "paged", paged_inputs, LENGTHS,
                    {"heads": (4, 2), "head_size": 80, "page_size": 16, "cache_dtype": "int8",
                     "scales": "head", "sinks": True, "dtype": "bfloat16"}),
    "mla": ("MOSAIC_TPU_MLA", "mla", mla_inputs, LONGER, LATENT | {"rank": 128, "page_size": 64}),
    "sparse": ("MOSAIC_TPU_MLA_SPARSE", "sparse_mla", mla_inputs, LENGTHS,
               LATENT | {"rank": 512, "page_size": 16, "topk": 12}),
    "indexer": ("MOSAIC_TPU_MLA_SPARSE", "indexer_scores", indexer_inputs, LENGTHS,
                {"num_index_heads": 4, "page_size": 16, "dtype": "float32"}),
}  # fmt: skip
BOTH = {"data": "data", "model": "model"}
FORMS = {
    "groups and heads": ({"data": 2, "model": 2}, BOTH),
    "heads": ({"model": 2}, {"model": "model"}),
    "two groups to a device": ({"data": 1}, {"data": "data"}),
    "pages": ({"seq": 2}, {"pages": "seq"}),
    "pages and heads": ({"seq": 2, "model": 2}, {"pages": "seq", "model": "model"}),
    "all": ({"data": 2, "seq": 2, "model": 2}, BOTH | {"pages": "seq"}),
}
DEFAULT = {("paged", "groups and heads"), ("mla", "pages and heads"), ("sparse", "heads")}
RAGGED = [
    pytest.param(name, form, marks=[] if (name, form) in DEFAULT else pytest.mark.sweep)
    for name in INPUTS
    for form in FORMS
]


@pytest.mark.parametrize(("name", "form"), RAGGED)
def test_ragged(name, form):
    backend, op, inputs, lengths, options = INPUTS[name]
    axes, cuts = FORMS[form]
    parts = [
        inputs(np.random.default_rng(i), q_lens=q_lens, kv_lens=kv_lens, pad_tokens=2, **options)
        for i, (q_lens, kv_lens) in enumerate(lengths if "data" in cuts else lengths[:1])
    ]
    with tpu_interpreter():
        check_shared_out(backend, op, parts, mesh(**axes), **cuts)
