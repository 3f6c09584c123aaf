"""Pallas kernels over a mesh of GPUs that are not here: they compile, and send what they should.

XLA compiles for several H200s of one host as it does for one, ptxas included; NCCL is not asked.
"""

import jax
import pytest
import test_pallas_latents as latents
from test_pallas_kernels import LOCAL_KV, LOCAL_Q, SHAPE, compiled, dense

from attnsel_jax.aot import MeshCall
from attnsel_jax.aot.arguments import paged_arguments
from attnsel_jax.cache_layouts import layout_named

CHIP = "h200"
STANDARD = "attnsel_jax.backends.mosaic_gpu:MosaicGpuBackend"
MLA = "attnsel_jax.backends.mosaic_gpu_mla:MosaicGpuMlaBackend"
SPARSE = "attnsel_jax.backends.mosaic_gpu_mla_sparse:MosaicGpuMlaSparseBackend"
DENSE = "pallas_kernels.dense.mosaic_gpu:dense_attention"
PAGED = "pallas_kernels.paged.mosaic_gpu:paged_attention"
SEQ = {"axes": {"seq": 4}, "context": "seq"}
LSE = 128 * 8 * 4

if jax.__version_info__ < (0, 11):
    pytest.skip("jax_version must be at least 0.11: MOSAIC_GPU's", allow_module_level=True)


def paged():
    cache = layout_named("by_head").shape(512, 16, 4, 128)
    return paged_arguments(batch=8, q_len=1, kv_len=1024, cache_dtype="bfloat16",
                           cache_shape=cache, page_size=16, scale=0.1, **SHAPE)  # fmt: skip


def test_dense_heads_and_batch_send_nothing_with_gradients():
    over = MeshCall(STANDARD, "dense", {"data": 2, "model": 2}, ("data",), ("model",))
    assert compiled(CHIP, DENSE, dense(256, 2), over, gradients=True) == {}


SENT = {
    "ring": {"collective-permute": 4 * LOCAL_KV + 2 * LOCAL_Q + LSE},
    "all_to_all": {"all-to-all": (LOCAL_KV + 2 * LOCAL_Q + LSE) * 3 / 4},
    "all_gather": {"all-gather": 3 * LOCAL_KV},
}


@pytest.mark.sweep
@pytest.mark.parametrize("form", SENT)
def test_each_form_sends_what_it_should(form):
    over = MeshCall(STANDARD, "dense", form=form, **SEQ)
    assert compiled(CHIP, DENSE, dense(512, 1), over) == pytest.approx(SENT[form], rel=0.01)


@pytest.mark.sweep
def test_paged_heads_and_groups_send_nothing():
    over = MeshCall(STANDARD, "paged", {"data": 2, "model": 4}, ("data",), ("model",))
    assert compiled(CHIP, PAGED, paged(), over) == {}


@pytest.mark.sweep
def test_spread_pages_send_partial_results_only():
    sent = compiled(CHIP, PAGED, paged(), MeshCall(STANDARD, "paged", **SEQ))
    merged = 2 * 3 / 4 * 8 * 8 * (128 + 2) * 4  # all-reduced: out, weight and maximum, float32
    assert sent == {"all-reduce": pytest.approx(merged, rel=0.05)}


@pytest.mark.sweep
@pytest.mark.parametrize("form", latents.FORMS)
@pytest.mark.parametrize("op", latents.KERNELS)
def test_latents(op, form):
    over = MeshCall(MLA if op == "mla" else SPARSE, op, *latents.FORMS[form](8))
    kernel = latents.KERNELS[op].replace("mosaic_tpu", "mosaic_gpu")
    sent = compiled(CHIP, kernel, latents.arguments_of(op, latents.ROWS), over)
    latents.agrees(sent, op, form, 8)
