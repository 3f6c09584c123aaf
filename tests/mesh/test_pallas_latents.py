"""The latent kernels over a mesh of TPUs that are not here: they compile, and what they send.

Groups and heads of MLA and sparse MLA send nothing; pages of one sequence, spread, send partial
results to be merged; the indexer sums its scores over heads.
"""

import jax
import jax.numpy as jnp
import pytest
from test_pallas_kernels import compiled

from attnsel_jax.aot import MeshCall
from attnsel_jax.aot.arguments import mla_arguments

pytestmark = pytest.mark.once
TOKENS, HEADS, PAGES, PAGE_SIZE, KV_LEN = 8, 64, 512, 64, 1024
MLA = "attnsel_jax.backends.mosaic_tpu_mla:MosaicTpuMlaBackend"
SPARSE = "attnsel_jax.backends.mosaic_tpu_mla_sparse:MosaicTpuMlaSparseBackend"
KERNELS = {
    "mla": "pallas_kernels.mla.mosaic_tpu:mla_attention",
    "sparse_mla": "pallas_kernels.sparse_mla.mosaic_tpu:sparse_mla_attention",
    "indexer_scores": "pallas_kernels.sparse_mla.mosaic_tpu_indexer:indexer_scores",
}
SHAPES = {"mla": (PAGES, 9, 32, 128), "sparse_mla": (PAGES, PAGE_SIZE, 3, 2, 128)}
ROWS = (PAGES, PAGE_SIZE, 576)


def arguments_of(op, cache_shape):
    """A decode step of eight sequences, bfloat16."""
    given = mla_arguments(
        batch=TOKENS, q_len=1, kv_len=KV_LEN, num_heads=HEADS, kv_lora_rank=512, rope_dim=64,
        dtype="bfloat16", cache_dtype="bfloat16", cache_shape=cache_shape,
        page_size=PAGE_SIZE, scale=0.1, topk=256 if op == "sparse_mla" else None,
    )  # fmt: skip
    if op != "indexer_scores":
        return given
    batch = {name: given[name] for name in ("page_table", "kv_lens", "cu_q_lens", "num_seqs")}
    return {
        "q_index": jax.ShapeDtypeStruct((TOKENS, HEADS, 128), jnp.bfloat16),
        "weights": jax.ShapeDtypeStruct((TOKENS, HEADS), jnp.float32),
        "index_pages": jax.ShapeDtypeStruct((PAGES, PAGE_SIZE, 128), jnp.bfloat16),
        **batch,
    }


FORMS = {
    "groups and heads": lambda n: ({"data": 2, "model": n // 2}, ("data",), ("model",), None),
    "pages": lambda n: ({"seq": n}, (), (), "seq"),
    "pages and heads": lambda n: ({"seq": 2, "model": n // 2}, (), ("model",), "seq"),
}


def expected(op, form, devices):
    """Bytes that a device sends: a ring all-reduce sends 2 (n - 1) / n of what it reduces."""

    def reduced(size, n):
        return 2 * (n - 1) / n * size

    if op == "indexer_scores":
        tokens = TOKENS // 2 if form == "groups and heads" else TOKENS
        scores, n = tokens * KV_LEN * 4, devices // 2
        heads = reduced(scores, n) if "heads" in form else 0
        pages = {"pages": reduced(scores, devices), "pages and heads": reduced(scores, 2)}
        return heads + pages.get(form, 0)
    spread = {"pages": devices, "pages and heads": 2}.get(form)
    heads = HEADS // (devices // 2) if "heads" in form else HEADS
    # Out, weight and maximum of every head.
    return reduced(TOKENS * heads * (512 + 2) * 4, spread) if spread else 0


def check(chip, op, form, devices):
    over = MeshCall(MLA if op == "mla" else SPARSE, op, *FORMS[form](devices))
    sent = compiled(chip, KERNELS[op], arguments_of(op, SHAPES.get(op, ROWS)), over)
    agrees(sent, op, form, devices)


def agrees(sent, op, form, devices):
    """The bytes are those of `expected`."""
    wanted = expected(op, form, devices)
    assert sent == ({"all-reduce": pytest.approx(wanted, rel=0.02)} if wanted else {})


DEFAULT = {("mla", "groups and heads"), ("sparse_mla", "pages and heads"),
           ("indexer_scores", "pages and heads")}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "form"),
    [
        pytest.param(op, form, marks=[] if (op, form) in DEFAULT else pytest.mark.sweep)
        for op in KERNELS
        for form in FORMS
    ],
)
def test_over_a_v5e_slice(op, form):
    check("v5e", op, form, 8)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", ["v6e", "7x", "v5p"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", KERNELS)
def test_over_larger_slices(chip, op, form):
    check(chip, op, form, 16)
