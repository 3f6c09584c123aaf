"""Sparse MLA and the lightning indexer on XLA against the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from latent_batches import (
    DTYPES,
    MIXED,
    assert_close,
    assert_same_cache,
    attended,
    batch,
    on_device,
)

from attnsel_jax import oracle
from attnsel_jax.xla import indexer, sparse_mla
from attnsel_jax.xla.indexer import indexer_scores, topk_positions
from attnsel_jax.xla.sparse_mla import sparse_mla_attention

STATIC = ("scale", "soft_cap", "kv_cache_dtype")
attend = functools.partial(jax.jit, static_argnames=STATIC)(sparse_mla_attention)
score = jax.jit(indexer_scores)
BATCH = ("page_table", "kv_lens", "cu_q_lens", "num_seqs")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A few tokens or keys at a time, in sizes that do not divide what there is."""
    monkeypatch.setattr(sparse_mla, "GATHERED", 7 * 9 * 24)  # 7 tokens of 9 positions of 24
    monkeypatch.setattr(indexer, "BLOCK_ROWS", 16)  # 4 queries of 4 heads
    monkeypatch.setattr(indexer, "BLOCK_KV", 11)


def positions(arguments, topk=9, seed=4):
    """Distinct positions in any order: seen, future, past the end, and negative ones."""
    rng = np.random.default_rng(seed)
    tokens = arguments["ql_nope"].shape[0]
    chosen = np.full((tokens, topk), -1, np.int32)
    starts = arguments["cu_q_lens"][: int(arguments["num_seqs"]) + 1]
    for i, kv_len in enumerate(arguments["kv_lens"][: len(starts) - 1]):
        for token in range(starts[i], starts[i + 1]):
            some = rng.permutation(kv_len + 4)[:topk]
            chosen[token, rng.permutation(topk)[: len(some)]] = some
    chosen[rng.random(chosen.shape) < 0.2] = -1
    chosen[:, 3] = [-5, -(2**31), 2**31 - 1, 10**6] * (tokens // 4) + [-1] * (tokens % 4)
    chosen[2], chosen[-1] = -1, 0  # a token that names nothing, and padding that names something
    return chosen


def check(arguments, dtype="float32", **static):
    """Holds out, lse and the cache against the oracle's."""
    out, lse, pages = attend(**on_device(arguments), **static)
    want, written = attended(arguments, **static)
    assert (out.dtype, lse.dtype) == (DTYPES[dtype], np.float32)
    assert_close((out, lse), want, dtype)
    assert_same_cache(pages, written)
    return want


def test_a_mixed_batch():
    arguments = batch(*MIXED)
    arguments["topk_indices"] = positions(arguments)
    want = check(arguments)
    dense, _ = attended({n: x for n, x in arguments.items() if n != "topk_indices"})
    assert np.median(np.abs(want.out - dense.out)) > 0.1  # it matters which positions are named
    assert np.isneginf(want.lse[2]).all()
    other = batch([6, 3, 7, 16, 8, 5], [9, 8, 17, 40, 7, 5], seed=1)
    check(other | {"topk_indices": positions(other)})
    check(arguments | {"num_seqs": np.int32(0)})


CACHES = {
    "e4m3 with a scale": {"dtype": "bfloat16", "cache": "float8_e4m3fn", "kv_scale": 0.03},
    "fp8_ds_mla": {
        "dtype": "bfloat16", "cache": "fp8_ds_mla", "rank": 512, "rope": 64, "page_size": 16
    },
}  # fmt: skip


@pytest.mark.parametrize("facts", CACHES.values(), ids=CACHES.keys())
def test_caches(facts):
    arguments = batch(*MIXED, **facts)
    check(arguments | {"topk_indices": positions(arguments)}, facts["dtype"], soft_cap=3.0)


def test_all_positions_named_is_mla():
    arguments = batch(*MIXED, write=False)
    everything = np.tile(np.random.default_rng(2).permutation(41).astype(np.int32), (48, 1))
    out, lse, _ = attend(**on_device(arguments | {"topk_indices": everything}))
    assert_close((out, lse), attended(arguments)[0], "float32")


def test_strict_promotion_x64_and_export():
    arguments = batch(*MIXED)
    arguments["topk_indices"] = positions(arguments)
    static = {name: arguments.pop(name) for name in ("scale", "kv_cache_dtype", "kv_scale")}
    jitted = jax.jit(lambda **arrays: sparse_mla_attention(**arrays, **static))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        exported = export.export(jitted)(**on_device(arguments))
        again = export.deserialize(bytearray(exported.serialize()))
        out, lse, _ = again.call(**on_device(arguments))
    assert (out.dtype, lse.dtype) == (np.float32, np.float32)
    assert_close((out, lse), attended(arguments | static)[0], "float32")


def test_long_prefill_gathers_a_little_at_a_time():
    tokens, topk, rank, rope = 512, 64, 16, 8
    shapes = {
        "ql_nope": ((tokens, 2, rank), "float32"), "q_pe": ((tokens, 2, rope), "float32"),
        "latent_pages": ((64, 16, rank + rope), "float32"), "topk_indices": ((tokens, topk), "i4"),
        "page_table": ((1, 64), "i4"), "kv_lens": ((1,), "i4"), "cu_q_lens": ((2,), "i4"),
        "num_seqs": ((), "i4"),
    }  # fmt: skip
    given = {name: jax.ShapeDtypeStruct(*spec) for name, spec in shapes.items()}
    nothing = {"kv_c": None, "k_pe": None, "slot_mapping": None}
    compiled = attend.lower(**given, **nothing, scale=0.1).compile()
    everything = tokens * topk * (rank + rope) * 4
    assert compiled.memory_analysis().temp_size_in_bytes < everything / 8


def test_refusals():
    arguments = on_device(batch([1, 2], [3, 4]))
    with pytest.raises(ValueError, match=r"topk_indices has num_tokens 5, must be 6"):
        sparse_mla_attention(**arguments, topk_indices=jnp.zeros((5, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"topk_indices has dtype float32, must be one of int32"):
        sparse_mla_attention(**arguments, topk_indices=jnp.zeros((6, 2), jnp.float32))
    with pytest.raises(ValueError, match=r"topk is 0, must be at least 1"):
        topk_positions(jnp.zeros((1, 4), jnp.float32), 0)
    with pytest.raises(ValueError, match=r"scores has dtype bfloat16"):
        topk_positions(jnp.zeros((1, 4), jnp.bfloat16), 2)


def index_problem(dtype="float32", seed=0):
    """Arguments of `indexer_scores`: NaN wherever nothing is seen; some weights are negative."""
    arguments = batch(*MIXED, seed=seed, write=False, dtype=dtype)
    rng = np.random.default_rng(seed)
    tokens = arguments["ql_nope"].shape[0]
    q_index = rng.standard_normal((tokens, 4, 16)).astype(DTYPES[dtype])
    weights = rng.standard_normal((tokens, 4)).astype(np.float32)
    q_index[-3:], weights[-3:] = np.nan, np.nan
    pages = np.ascontiguousarray(arguments["latent_pages"][..., :16])
    return [q_index, weights, pages] + [arguments[name] for name in BATCH]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores(dtype):
    given = index_problem(dtype)
    got = np.asarray(score(*map(jnp.asarray, given)))
    want = oracle.indexer_scores(*given)
    assert got.dtype == np.float32
    assert got.shape == want.shape == (48, given[3].shape[1] * 4)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    finite = np.isfinite(want)
    np.testing.assert_allclose(got[finite], want[finite], atol=2e-5)


def test_scores_of_one_token_a_sequence_and_of_nothing():
    given = index_problem(seed=1)
    given[5] = np.array([0, 1, 2, 3, 4, 5, 6, -9, 77], np.int32)
    got, want = score(*map(jnp.asarray, given)), oracle.indexer_scores(*given)
    np.testing.assert_allclose(got, want, atol=2e-5)
    given[6] = np.int32(0)
    assert np.isneginf(score(*map(jnp.asarray, given))).all()


def test_scores_under_strict_promotion_and_x64():
    given = index_problem(seed=2)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        got = jax.jit(lambda *x: topk_positions(indexer_scores(*x), 5))(*map(jnp.asarray, given))
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, oracle.topk_positions(oracle.indexer_scores(*given), 5))


def test_the_best_positions_first_and_ties_to_the_lower():
    scores = np.array(
        [
            [1, 3, 2, 3, -np.inf, 0],
            [-0.0, 0.0, -0.0, 0.0, -1, -np.inf],  # heads of negative weight give -0
            [-np.inf] * 6,
            [-2, -np.inf, -1, -np.inf, -np.inf, -3],
        ],
        np.float32,
    )
    want = np.array([[1, 3, 2, 0], [0, 1, 2, 3], [-1] * 4, [2, 0, 5, -1]], np.int32)
    got = jax.jit(topk_positions, static_argnums=1)(scores, 4)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got, oracle.topk_positions(scores, 4))
    wide = topk_positions(jnp.asarray(scores), 8)
    np.testing.assert_array_equal(wide, oracle.topk_positions(scores, 8))
    assert wide.dtype == np.int32


def test_scores_of_numpy_arrays_are_the_same():
    given = index_problem(seed=3)
    np.testing.assert_array_equal(indexer_scores(*given), score(*map(jnp.asarray, given)))
