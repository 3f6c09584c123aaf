"""NaN that a query holds or sees: its row is NaN and so are its gradients; no other number changes.

A GPU's gradients may be NaN beside those, where a weight of 0 meets NaN in a product.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import gpu_interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu
from mosaic_gpu.gpu_latents import with_raw_rows_apart
from tpu_interpreter import tpu_interpreter

from attnsel_jax import AttentionBackendEnum, oracle
from attnsel_jax.cache_layouts import in_layouts
from attnsel_jax.mesh import merging
from attnsel_jax.mesh.merging import Partial
from attnsel_jax.oracle.attend import visible
from attnsel_jax.problems.mla_inputs import mla_inputs
from attnsel_jax.problems.paged_inputs import paged_inputs
from attnsel_jax.xla import indexer
from pallas_kernels.dense import mosaic_tpu_tiles
from pallas_kernels.sparse_mla import mosaic_tpu as sparse_tpu
from pallas_kernels.sparse_mla.mosaic_tpu_tiles import Tiles

LENGTH = 140
SHAPES = {
    "causal": {"causal": True, "sinks": True},
    "window": {"causal": True, "sliding_window": 40, "q_offset": -3},
    "added": {"causal": True, "soft_cap": 8.0, "alibi_slopes": True, "bias": True},
}


def on_gpu(chip, *marks, name="MOSAIC_GPU"):
    """A test's (backend, interpreter), where jax has one."""
    missing = not hasattr(plgpu, "InterpretGPUParams")
    marks = [pytest.mark.skipif(missing, reason="jax has no Mosaic GPU interpreter"), *marks]
    interpreter = functools.partial(gpu_interpreter, chip, detect_races=False)
    return pytest.param(name, interpreter, marks=marks, id=chip)


def on(name, *marks):
    """The same for a backend that is interpreted as a TPU, or runs here."""
    interpreted = functools.partial(tpu_interpreter, detect_races=False)
    place = interpreted if "TPU" in name else contextlib.nullcontext
    return pytest.param(name, place, marks=marks, id=name)


def dense_arguments(shape, dtype):
    """(arguments, the same with NaN in two queries, and in a key of another row; who sees whom)."""
    rng = np.random.default_rng(0)
    drawn = {name: rng.standard_normal((2, LENGTH, 1 + (name == "q"), 64)) for name in "qkv"}
    clean = {name: x.astype(dtype) for name, x in drawn.items()} | SHAPES[shape]
    added = {
        "sinks": np.asarray([0.5, -1.0], np.float32),
        "alibi_slopes": np.asarray([0.25, 0.0625], np.float32),
        "bias": rng.standard_normal((1, 2, LENGTH, LENGTH)).astype(dtype),
    }
    clean |= {name: x for name, x in added.items() if name in clean}
    spoiled = clean | {"q": clean["q"].copy(), "k": clean["k"].copy()}
    spoiled["q"][0, [0, 70], 0, 5] = np.nan
    spoiled["k"][1, 70, 0, 5] = np.nan
    q_pos = np.arange(LENGTH) + clean.get("q_offset", 0)
    see = visible(q_pos, np.arange(LENGTH), True, clean.get("sliding_window"), None)
    return clean, spoiled, see


def nan_rows_and_keys(see):
    """Bool [2, length, 2] and [2, length, 1]: whose out is NaN, and which keys these see."""
    rows = np.zeros((2, LENGTH, 2), bool)
    rows[0, [0, 70], 0] = see[[0, 70]].any(axis=1)
    rows[1] = see[:, 70, None]
    return rows, (rows[:, :, None] & see[None, :, :, None]).any(axis=(1, 3))[..., None]


def results(kernel, calls, *layouts, cotangents=None):
    """[out, lse, and gradients of floats by name] of each call, compiled once."""
    static = {name: x for name, x in calls[0].items() if not isinstance(x, np.ndarray)}
    wrt = ("q", "k", "v", "sinks") if cotangents else ()

    @jax.jit
    def call(arrays):
        def of(floats):
            return kernel(**in_layouts(arrays | floats, *layouts), **static)[:2]

        found, pull_back = jax.vjp(of, {name: arrays[name] for name in wrt if name in arrays})
        return *found, pull_back(tuple(cotangents))[0] if cotangents else None

    arrays = [{name: jnp.asarray(x) for name, x in c.items() if name not in static} for c in calls]
    return [jax.tree.map(np.asarray, call(these)) for these in arrays]


def check(got, clean, is_nan, *, beside=False):
    """NaN exactly where it is to be, or there at least; all else as it is without any."""
    is_nan = np.broadcast_to(is_nan, got.shape)
    found = np.isnan(got.astype(np.float32))
    assert found[is_nan].all()
    assert beside or not found[~is_nan].any()
    np.testing.assert_array_equal(np.where(found, clean, got), clean)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "place"),
    [
        on("XLA"), on("XLA_REFERENCE"), on("MOSAIC_TPU", pytest.mark.once),
        *(on_gpu(chip, pytest.mark.sweep) for chip in ("h200", "a100", "b200")),
    ],
)  # fmt: skip
def test_dense_rows_are_nan_with_their_gradients_and_no_others(monkeypatch, name, place, shape):
    for key in mosaic_tpu_tiles.TILES:
        tiles = mosaic_tpu_tiles.Tiles(128, 128, 128, 256, 256)
        monkeypatch.setitem(mosaic_tpu_tiles.TILES, key, tiles)
    is_gpu = name == "MOSAIC_GPU"
    clean, spoiled, see = dense_arguments(shape, "bfloat16" if is_gpu else "float32")
    rng = np.random.default_rng(1)
    cotangents = rng.standard_normal(clean["q"].shape), rng.standard_normal((2, LENGTH, 2))
    cotangents = cotangents[0].astype(clean["q"].dtype), cotangents[1].astype(np.float32)
    kernel = AttentionBackendEnum[name].get_class().get_kernel("dense")
    with place():
        wanted, got = results(kernel, (clean, spoiled), "stacked", cotangents=cotangents)
    rows, keys = nan_rows_and_keys(see)
    check(got[0], wanted[0], rows[..., None])
    check(got[1], wanted[1], rows)
    for of, is_nan in {"q": rows, "k": keys, "v": keys}.items():
        check(got[2][of], wanted[2][of], is_nan[..., None], beside=is_gpu)
    assert np.isnan(got[2].get("sinks", np.nan)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_oracle_says_the_same(shape):
    clean, spoiled, see = dense_arguments(shape, "float32")
    rows, keys = nan_rows_and_keys(see)
    ones = np.ones_like(clean["q"]), np.ones((2, LENGTH, 2))
    for result, of, is_nan in zip(
        oracle.dense_attention(**spoiled), oracle.dense_attention(**clean), (rows[..., None], rows),
        strict=True,
    ):  # fmt: skip
        check(result, of, is_nan)
    got, wanted = (oracle.dense_gradients(*ones, **x) for x in (spoiled, clean))
    for name, is_nan in {"q": rows, "k": keys, "v": keys}.items():
        check(got[name], wanted[name], is_nan[..., None])


RAGGED = {"q_lens": (3, 9, 1), "kv_lens": (70, 9, 40), "pad_tokens": 2}
OF_SECOND = slice(3, 12)  # tokens of the second sequence
EMPTY = 9  # of these the one whose list is empty
LATENT = {"num_heads": 3, "rank": 128, "rope_dim": 64, "qk_nope_head_dim": 16, "page_size": 64,
          "dtype": "float32"}  # fmt: skip
MAKES = {
    "paged": functools.partial(paged_inputs, heads=(4, 2), head_size=64, page_size=16),
    "mla": functools.partial(mla_inputs, **LATENT),
    "sparse_mla": functools.partial(mla_inputs, topk=30, **LATENT | {"rank": 512}),
}
MASKED = Tiles(32, 2, reach=1000, rows=64, step_rows=32, masked_kv=128)
sweep = pytest.mark.sweep


@pytest.mark.parametrize(
    ("op", "name", "place"),
    [
        pytest.param(op, *case.values, marks=case.marks, id=f"{op}-{case.id}")
        for op, cases in {
            "paged": (
                on("XLA"), on("XLA_REFERENCE"), on("MOSAIC_TPU", sweep),
                *(on_gpu(chip, sweep) for chip in ("h200", "a100", "b200")),
            ),
            "mla": (
                on("XLA_MLA"), on("MOSAIC_TPU_MLA", sweep),
                on_gpu("h200", sweep, name="MOSAIC_GPU_MLA"),
            ),
            "sparse_mla": (
                on("XLA_MLA_SPARSE"), on("MOSAIC_TPU_MLA_SPARSE", pytest.mark.once),
                on_gpu("h200", sweep, name="MOSAIC_GPU_MLA_SPARSE"),
            ),
        }.items()
        for case in cases
    ],
)  # fmt: skip
def test_rows_of_a_batch_are_nan_and_no_others(monkeypatch, op, name, place):
    """A query, that of an empty list, and the second sequence's first key are NaN."""
    monkeypatch.setattr(sparse_tpu, "tiles", lambda *_, **__: MASKED)  # both halves
    with_raw_rows_apart(monkeypatch)  # else the interpreter waits without end
    of_gpu = {"dtype": "bfloat16"} if "GPU" in name else {}
    clean = MAKES[op](np.random.default_rng(0), **RAGGED, **of_gpu)
    q, k = ("q", "k") if op == "paged" else ("ql_nope", "kv_c")
    spoiled = clean | {q: clean[q].copy(), k: clean[k].copy()}
    spoiled[q][1, 0, 5] = spoiled[k][OF_SECOND.start, ..., 5] = np.nan
    if op == "sparse_mla":
        assert (clean["topk_indices"][EMPTY] == -1).all()
        spoiled[q][EMPTY] = np.nan
    backend = AttentionBackendEnum[name].get_class()
    layouts = (backend.layout,) if op == "paged" else ("stacked", backend.latent_layout)
    with place():
        wanted, got = results(backend.get_kernel(op), (clean, spoiled), *layouts)
    (out, lse, _), (clean_out, clean_lse, _) = got, wanted
    is_nan = np.zeros(lse.shape, bool)
    is_nan[1, 0] = is_nan[OF_SECOND] = True
    if op == "sparse_mla":
        is_nan[OF_SECOND] = (clean["topk_indices"][OF_SECOND] == 0).any(axis=1)[:, None]
        assert (out[EMPTY] == 0).all()
        assert (lse[EMPTY] == -np.inf).all()
    # In a masked tile a row of latents is multiplied for tokens that do not name it, as 0 * NaN.
    beside = name == "MOSAIC_TPU_MLA_SPARSE"
    check(out, clean_out, is_nan[..., None], beside=beside)
    check(lse, clean_lse, is_nan, beside=beside)
    others = np.r_[: OF_SECOND.start, OF_SECOND.stop : len(lse)]
    assert np.array_equal(np.isnan(lse[others]), is_nan[others])


def test_merged_parts_are_nan_where_one_is_and_empty_where_all_are():
    lse = np.asarray([[np.nan, -np.inf, 0.5], [0.25, -np.inf, 0.25]], np.float32)
    out = np.asarray([[np.nan, 0, 3], [2, 0, 1]], np.float32)[..., None]
    parts = Partial(jnp.asarray(out), jnp.asarray(lse))
    one, other = (jax.tree.map(lambda x, i=i: x[i], parts) for i in range(2))
    by_axis = jax.vmap(lambda part: merging.merged_over(part, "parts"), axis_name="parts")(parts)
    for found in (
        merging.merged(one, other), merging.merged(other, one), merging.merged_along(parts, 0),
        jax.tree.map(lambda x: x[0], by_axis), jax.tree.map(lambda x: x[1], by_axis),
    ):  # fmt: skip
        assert np.isnan(found.out).tolist() == [[True], [False], [False]]
        assert np.isnan(found.lse).tolist() == [True, False, False]
        assert found.out[1, 0] == 0
        assert found.lse[1] == -np.inf
    sinks = merging.with_sinks(one, jnp.zeros(3), None)
    assert np.isnan(sinks.lse).tolist() == [True, False, False]


def test_a_score_of_nan_is_the_largest_whatever_its_sign():
    scores = np.asarray([[1, np.nan, np.inf, -np.nan, -np.inf]], np.float32)
    assert np.signbit(scores[0]).tolist() == [False, False, False, True, True]
    assert indexer.topk_positions(jnp.asarray(scores), 5).tolist() == [[1, 3, 2, 0, -1]]
    assert oracle.topk_positions(scores, 5).tolist() == [[1, 3, 2, 0, -1]]
