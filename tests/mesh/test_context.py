"""Positions and pages cut by a mesh: every form, forward and gradients, against the oracle."""

import itertools

import jax
import numpy as np
import pytest
from meshes import collectives, mesh, on_mesh, put

import attnsel_jax
from attnsel_jax import AttentionBackendEnum, MeshAxes, use_mesh_axes
from attnsel_jax.compare import compare
from attnsel_jax.compare.comparison import PASS
from attnsel_jax.problems import Problem
from attnsel_jax.problems.dense_inputs import dense_inputs
from attnsel_jax.problems.mla_inputs import mla_inputs
from attnsel_jax.problems.paged_inputs import paged_inputs

DENSE = {"heads": (4, 4), "head_size": 16, "q_len": 24, "dtype": "float32", "causal": True}
FORMS = ("ring", "all_gather", "all_to_all")


def check(problem, on, form="ring", name="XLA", **cuts):
    backend = AttentionBackendEnum[name].get_class()
    with jax.set_mesh(on), use_mesh_axes(MeshAxes(form=form)):
        (row,) = compare([problem], {name: on_mesh(backend, problem.op, on, **cuts)}).rows
    assert row.verdict == PASS, str(row)


FEATURES = {
    "window, segments, sinks": {"sliding_window": 9, "segments": 3, "sinks": True},
    "encoder, two-sided window, odd shares": {
        "causal": False, "sliding_window": (5, 9), "q_len": 20,
    },
    "cross, lengths and an offset": {
        "batch": 2, "q_len": 16, "kv_len": 32, "q_lens": (16, 9), "kv_lens": (32, 21),
        "q_offset": (-3, 13), "sinks": True,
    },
    "soft cap, bfloat16, grouped heads": {
        "heads": (8, 4), "soft_cap": 5.0, "dtype": "bfloat16", "head_size_v": 8,
    },
}  # fmt: skip
ONE_BY_ONE = {
    "causal": {},
    "odd shares": {"q_len": 20},
    "odd mesh": {"q_len": 18},
    "window": {"sliding_window": 7},
    "segments": {"segments": 3},
    "sinks": {"sinks": True},
    "encoder": {"causal": False},
    "encoder window": {"causal": False, "sliding_window": (5, None)},
    "queries' lengths": {"batch": 2, "q_lens": (24, 5), "sinks": True},
    "a long offset": {"q_offset": 40, "kv_len": 64},
    "head sizes": {"head_size": 24, "head_size_v": 8},
    "float16": {"dtype": "float16"},
    "one kv head": {"heads": (4, 1)},
}


ON_OLD_JAX_TOO = ("cross, lengths and an offset", "soft cap, bfloat16, grouped heads")


@pytest.mark.parametrize(
    "features",
    [pytest.param(x, marks=() if x in ON_OLD_JAX_TOO else pytest.mark.once) for x in FEATURES],
)
@pytest.mark.parametrize("form", FORMS)
def test_dense_and_its_gradients(features, form):
    options = DENSE | FEATURES[features]
    problem = Problem(features, "dense", "", dense_inputs, options, gradients=True)
    # The reference compiles faster; the sweep has both on every feature.
    name = "XLA" if "bfloat16" in features or "sinks" in features else "XLA_REFERENCE"
    check(problem, mesh(seq=4), form, name, q_len="seq", kv_len="seq")


@pytest.mark.sweep
@pytest.mark.parametrize("features", ONE_BY_ONE)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["XLA", "XLA_REFERENCE"])
def test_features_one_by_one(features, form, name):
    options = DENSE | ONE_BY_ONE[features]
    problem = Problem(features, "dense", "", dense_inputs, options, gradients=True)
    size = 3 if features == "odd mesh" and form != "all_to_all" else 4
    if features == "odd mesh" and size == 4:
        pytest.skip("4 heads on 3 devices")
    check(problem, mesh(seq=size), form, name, q_len="seq", kv_len="seq")


@pytest.mark.once
@pytest.mark.parametrize("form", ["ring"])
def test_beside_batch_and_heads(form):
    options = DENSE | {"batch": 2, "heads": (8, 4), "alibi": True, "sinks": True, "q_len": 12}
    problem = Problem("all", "dense", "", dense_inputs, options, gradients=True)
    cuts = {"batch": "data", "heads": "model", "kv_heads": "model"}
    check(problem, mesh(data=2, model=2, seq=2), form, q_len="seq", kv_len="seq", **cuts)


@pytest.mark.parametrize(("form", "q_len"), [("ring", 24), ("ring", 21), ("all_gather", 21)])
def test_on_the_reference_backend_and_an_odd_mesh(form, q_len):
    """Shares of 8, and odd ones of 7, whose halves are not whole: in natural order."""
    options = DENSE | {"q_len": q_len}
    problem = Problem("causal", "dense", "", dense_inputs, options, gradients=True)
    check(problem, mesh(seq=3), form, "XLA_REFERENCE", q_len="seq", kv_len="seq")


def with_bias(form, wide, name="XLA_REFERENCE", **options):
    """Checks a bias of which the dimensions (batch, heads, q, kv) are wide, or stand for all."""
    options = DENSE | {"batch": 2, "bias": wide} | options
    problem = Problem("bias", "dense", "", dense_inputs, options, gradients=True)
    check(problem, mesh(seq=4), form, name, q_len="seq", kv_len="seq")


def test_all_gather_with_a_bias_and_chunks():
    chunks = {"attention_chunk_size": 9}
    with_bias("all_gather", (True, True, True, True), "XLA", masked=True, **chunks)


@pytest.mark.parametrize("form", ["ring", "all_to_all"])
def test_a_bias_and_a_mask(form):
    """In zig-zag order too, and with pieces of an odd size."""
    with_bias(form, (True, True, True, True), masked=True, sinks=True)


BROADCAST = {"keys": (False, False, False, True), "heads and queries": (False, True, True, False)}


@pytest.mark.once
@pytest.mark.parametrize("wide", BROADCAST)
@pytest.mark.parametrize("form", FORMS)
def test_a_bias_that_is_one_for_several(form, wide):
    with_bias(form, BROADCAST[wide])


@pytest.mark.sweep
@pytest.mark.parametrize("wide", list(itertools.product((False, True), repeat=4)))
@pytest.mark.parametrize("form", FORMS)
def test_every_bias(form, wide):
    with_bias(form, wide, "XLA")
    with_bias(form, wide, causal=False, q_len=20, kv_len=12, masked=True)


@pytest.mark.parametrize("options", [
    {}, {"causal": False, "q_offset": 5}, {"attention_chunk_size": 6}, {"sliding_window": 2},
], ids=["zig-zag", "encoder, offset", "natural order", "window"])  # fmt: skip
def test_chunks_in_a_ring(options):
    """Chunks of 3 keys, of which each piece of 3, or of 6 in natural order, has whole ones."""
    options = DENSE | {"attention_chunk_size": 3} | options
    problem = Problem("chunks", "dense", "", dense_inputs, options, gradients=True)
    check(problem, mesh(seq=4), "ring", "XLA_REFERENCE", q_len="seq", kv_len="seq")


def test_a_bias_beside_batch_and_heads():
    options = DENSE | {"batch": 2, "heads": (4, 2), "bias": (False, True, True, True), "q_len": 10}
    problem = Problem("all", "dense", "", dense_inputs, options, gradients=True)
    cuts = {"batch": "data", "heads": "model", "kv_heads": "model"}
    check(problem, mesh(data=2, model=2, seq=2), "ring", q_len="seq", kv_len="seq", **cuts)


def qkv(mesh_, heads=(4, 4), length=32):
    rng = np.random.default_rng(0)
    return [
        put(rng.standard_normal((1, length, n, 16), np.float32), mesh_, None, "seq")
        for n in (heads[0], heads[1], heads[1])
    ]


EXPECTED = {
    "ring": {"collective-permute"},
    "all_gather": {"all-gather"},
    "all_to_all": {"all-to-all"},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_sends_what_it_should(form):
    def attend(q, k, v):
        axes = MeshAxes(form=form)
        return attnsel_jax.dot_product_attention(q, k, v, is_causal=True, mesh_axes=axes)

    arguments = qkv(mesh(seq=4))
    assert set(collectives(attend, *arguments)) == EXPECTED[form]


PAGED = {"heads": (4, 2), "head_size": 16, "q_lens": (1, 3, 0, 1), "kv_lens": (35, 25, 7, 61),
         "page_size": 4, "dtype": "float32", "pad_tokens": 2}  # fmt: skip
LATENT = {"num_heads": 4, "rank": 16, "rope_dim": 8, "qk_nope_head_dim": 8, "page_size": 4,
          "q_lens": (1, 3, 0, 1), "kv_lens": (35, 25, 7, 61), "dtype": "float32",
          "pad_tokens": 2}  # fmt: skip


@pytest.mark.parametrize(("name", "options"), [
    ("XLA", {}), ("XLA_REFERENCE", {"sinks": True}),
    ("XLA", {"sinks": True, "cache_dtype": "int8", "scales": "head", "dtype": "bfloat16"}),
    ("XLA", {"causal": False, "writes": False, "soft_cap": 5.0}),
], ids=["plain", "reference", "quantised", "cross"])  # fmt: skip
def test_pages_of_a_sequence_spread_over_devices(name, options):
    attn_type = "encoder_decoder" if options.get("causal") is False else None
    problem = Problem("spread", "paged", "", paged_inputs, PAGED | options, attn_type=attn_type)
    check(problem, mesh(seq=2), name=name, pages="seq")


# Pages of 4: windows and chunks that begin with a page, within one, and within the last one; of
# the longest sequence, too short to reach from device to device, and longer than all of it.
BOUNDED = {
    "window": {"sliding_window": 7},
    "window of whole pages": {"sliding_window": 8, "writes": False},
    "own key alone": {"sliding_window": 1, "sinks": True},
    "window longer than all": {"sliding_window": 99},
    "chunks": {"attention_chunk_size": 6},
    "chunks of whole pages": {"attention_chunk_size": 8, "sinks": True},
    "chunks and a window": {"attention_chunk_size": 10, "sliding_window": 5},
    "two-sided window": {"causal": False, "writes": False, "sliding_window": (6, 3)},
    "alibi": {"alibi": True},
    "alibi, window, sinks": {"alibi": True, "sliding_window": 11, "sinks": True},
    "quantised": {
        "sliding_window": 9, "alibi": True, "cache_dtype": "int8", "scales": "head",
        "dtype": "bfloat16", "soft_cap": 5.0,
    },
}  # fmt: skip


@pytest.mark.once
def test_gradients_of_a_rings_lse_that_vmap_has_no_need_to_batch():
    arguments = dense_inputs(np.random.default_rng(0), **DENSE | {"q_len": 8})
    q, k, v = (arguments[name] for name in "qkv")
    values = np.stack([v, 2 * v])

    def loss(q, **where):
        def one(v):
            out, lse = attnsel_jax.dot_product_attention(
                q, k, v, is_causal=True, return_residual=True, backend="XLA_REFERENCE", **where
            )
            return out.sum() + lse.sum()

        return jax.vmap(one)(values).sum()

    wanted = jax.grad(loss)(q)
    with jax.set_mesh(mesh(explicit=False, seq=2)):
        got = jax.jit(jax.grad(lambda q: loss(q, mesh_axes=MeshAxes(context="seq"))))(q)
    np.testing.assert_allclose(got, wanted, atol=1e-4)


ON_EVERY_JAX = ("window", "chunks and a window", "alibi, window, sinks")


@pytest.mark.parametrize(
    "features",
    [pytest.param(n, marks=() if n in ON_EVERY_JAX else pytest.mark.once) for n in BOUNDED],
)
def test_windows_chunks_and_alibi_over_spread_pages(features):
    """NaN stands in every slot that is not seen, and pages are shuffled."""
    options = PAGED | BOUNDED[features]
    attn_type = "encoder_decoder" if options.get("causal") is False else None
    problem = Problem(features, "paged", "", paged_inputs, options, attn_type=attn_type)
    cuts = {"pages": "seq", "heads": "model", "kv_heads": "model", "cache_heads": "model"}
    check(problem, mesh(seq=4, model=2), name="XLA_REFERENCE", **cuts)


@pytest.mark.sweep
@pytest.mark.parametrize("features", BOUNDED)
@pytest.mark.parametrize("page_size", [2, 5, 16])
def test_bounded_over_spread_pages_of_other_sizes(features, page_size):
    # Pages that 2 devices share: an even number, two of them nobody's.
    lens = {"kv_lens": (35, 25, 7, 61) if page_size != 5 else (35, 25, 7, 60)}
    options = PAGED | {"page_size": page_size} | lens | BOUNDED[features]
    attn_type = "encoder_decoder" if options.get("causal") is False else None
    problem = Problem(features, "paged", "", paged_inputs, options, attn_type=attn_type)
    pages = sum(-(-n // page_size) for n in options["kv_lens"]) + 2
    check(problem, mesh(seq=next(n for n in (4, 3, 2, 5) if pages % n == 0)), pages="seq")


@pytest.mark.parametrize("topk", [None, 16])
def test_latents_of_a_sequence_spread_over_devices(topk):
    op, name = ("mla", "XLA_MLA") if topk is None else ("sparse_mla", "XLA_MLA_SPARSE")
    options = LATENT if topk is None else LATENT | {"topk": topk}
    problem = Problem("spread", op, "", mla_inputs, options)
    check(problem, mesh(seq=2, model=2), name=name, pages="seq", heads="model")
