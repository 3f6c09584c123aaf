"""The oracle against hand-computed cases, finite differences, and itself by another road."""

import math

import ml_dtypes
import numpy as np
import pytest

from attnsel_jax import oracle

LN = math.log


def row(*values):
    """One token, one head, of so many features: [1, 1, 1, len]."""
    return np.array(values, np.float64).reshape(1, 1, 1, -1)


def keys(*values):
    """Keys or values of one feature: [1, len, 1, 1]."""
    return np.array(values, np.float64).reshape(1, -1, 1, 1)


def test_two_keys_by_hand():
    # logits ln 3 and 0: weights 3/4 and 1/4, denominator 4
    out, lse = oracle.dense_attention(row(1.0), keys(LN(3), 0), keys(10, 20))
    np.testing.assert_allclose(out.ravel(), [12.5])
    np.testing.assert_allclose(lse.ravel(), [LN(4)])


def test_default_scale_is_the_root_of_head_dim():
    q = row(2.0, 0, 0, 0)
    k = np.zeros((1, 2, 1, 4))
    k[0, 0, 0, 0] = LN(3)  # 2 * ln 3 / sqrt(4)
    _, lse = oracle.dense_attention(q, k, np.zeros((1, 2, 1, 1)))
    np.testing.assert_allclose(lse.ravel(), [LN(4)])


def test_a_sink_only_joins_the_denominator():
    out, lse = oracle.dense_attention(
        row(1.0), keys(LN(3), 0), keys(10, 20), sinks=np.array([LN(4)])
    )
    np.testing.assert_allclose(out.ravel(), [6.25])
    np.testing.assert_allclose(lse.ravel(), [LN(8)])


def test_soft_cap_then_bias():
    cap = 2.0
    _, lse = oracle.dense_attention(
        row(1.0), keys(3.0), keys(1.0), soft_cap=cap, bias=np.array(5.0).reshape(1, 1, 1, 1)
    )
    np.testing.assert_allclose(lse.ravel(), [cap * math.tanh(3 / cap) + 5])


def test_alibi_is_minus_slope_times_distance():
    _, lse = oracle.dense_attention(
        row(0.0), keys(0.0), keys(1.0), q_offset=3, alibi_slopes=np.array([0.5])
    )
    np.testing.assert_allclose(lse.ravel(), [-1.5])


def seen_by(q_pos, kv_len, **masks):
    """Which keys the query at q_pos sees, read off the weights: v is the identity."""
    k = np.zeros((1, kv_len, 1, 1))
    out, _ = oracle.dense_attention(
        row(0.0), k, np.eye(kv_len).reshape(1, kv_len, 1, kv_len), q_offset=q_pos, **masks
    )
    return list(np.flatnonzero(out.ravel()))


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"causal": True}, [0, 1, 2, 3, 4, 5]),
        ({"causal": True, "sliding_window": 2}, [4, 5]),
        ({"causal": True, "sliding_window": (1, 9)}, [5]),
        ({"sliding_window": 2}, [4, 5, 6]),
        ({"sliding_window": (3, 1)}, [3, 4, 5]),
        ({"sliding_window": (None, 2)}, [0, 1, 2, 3, 4, 5, 6]),
        ({"sliding_window": (2, None)}, [4, 5, 6, 7]),
        ({"attention_chunk_size": 3}, [3, 4, 5]),
        ({"attention_chunk_size": 4, "causal": True}, [4, 5]),
        ({"kv_lens": np.array([3])}, [0, 1, 2]),
        (
            {
                "q_segment_ids": np.array([[1]]),
                "kv_segment_ids": np.array([[0, 1, 1, 2, 0, 1, 0, 0]]),
            },
            [1, 2, 5],
        ),
        ({"mask": np.array([0, 1, 0, 0, 1, 0, 0, 0], bool).reshape(1, 1, 1, 8)}, [1, 4]),
    ],
)  # fmt: skip
def test_masks_by_hand(masks, expected):
    assert seen_by(5, 8, **masks) == expected


def test_query_heads_share_kv_heads_in_runs():
    k, v = np.zeros((1, 1, 2, 1)), np.array([10.0, 20.0]).reshape(1, 1, 2, 1)
    out, _ = oracle.dense_attention(np.zeros((1, 1, 4, 1)), k, v)
    assert list(out.ravel()) == [10, 10, 20, 20]


def test_empty_rows_and_rows_that_do_not_exist():
    q, k, v = np.zeros((1, 3, 1, 1)), keys(0.0, 0.0), keys(1.0, 1.0)
    q[0, 2] = np.nan
    arguments = {"causal": True, "q_offset": -1, "q_lens": np.array([2])}
    out, lse = oracle.dense_attention(q, k, v, **arguments)
    assert list(out.ravel()) == [0, 1, 0]
    assert list(lse.ravel()) == [-np.inf, 0, -np.inf]
    out, lse = oracle.dense_attention(q, k, v, **arguments, sinks=np.array([0.5]))
    np.testing.assert_allclose(lse.ravel(), [0.5, np.logaddexp(0.5, 0), -np.inf])
    assert out.ravel()[0] == 0
    assert out.ravel()[2] == 0


def test_what_is_not_seen_is_not_read():
    k, v = keys(0.0, 0.0, np.nan), keys(1.0, 3.0, np.nan)
    bias = np.array([0, 0, np.nan]).reshape(1, 1, 1, 3)
    out, lse = oracle.dense_attention(row(1.0), k, v, kv_lens=np.array([2]), bias=bias)
    assert out.ravel() == [2]
    np.testing.assert_allclose(lse.ravel(), [LN(2)])


def test_magnitude_has_no_cancellation():
    attended = oracle.attend_dense(row(3.0), keys(0.0, 0.0), keys(-1.0, 1.0))
    assert attended.out.ravel() == [0]
    assert attended.magnitude.ravel() == [1]


def dense_case(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "q": rng.normal(size=(2, 5, 4, 8)),
        "k": rng.normal(size=(2, 7, 2, 8)),
        "v": rng.normal(size=(2, 7, 2, 6)),
        "bias": rng.normal(size=(1, 4, 1, 7)),
        "sinks": rng.normal(size=4),
        "alibi_slopes": rng.uniform(0.1, 1, size=4),
        "soft_cap": 3.0,
        "causal": True,
        "q_offset": np.array([2, -1]),
        "kv_lens": np.array([7, 6]),
        "q_lens": np.array([5, 3]),
        "sliding_window": 4,
    }


@pytest.mark.parametrize(
    ("name", "bias_shape"),
    [(name, (1, 4, 1, 7)) for name in ("q", "k", "v", "bias", "sinks", "alibi_slopes")]
    + [("bias", (2, 1, 5, 7)), ("bias", (1, 1, 1, 1))],
)
def test_gradients_by_finite_differences(name, bias_shape):
    rng = np.random.default_rng(1)
    arguments = dense_case() | {"bias": rng.normal(size=bias_shape)}
    dout, dlse = rng.normal(size=(2, 5, 4, 6)), rng.normal(size=(2, 5, 4))

    def loss(x):
        out, lse = oracle.dense_attention(**(arguments | {name: x}))
        return (dout * out).sum() + (dlse * np.where(np.isfinite(lse), lse, 0)).sum()

    x, step = arguments[name], 1e-5
    numeric = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        nudge = np.zeros_like(x)
        nudge[i] = step
        numeric[i] = (loss(x + nudge) - loss(x - nudge)) / (2 * step)
    analytic = oracle.dense_gradients(dout, dlse, **arguments)[name]
    np.testing.assert_allclose(analytic, numeric, atol=1e-8)
    magnitude = oracle.attend_dense_gradients(dout, dlse, **arguments).magnitudes[name]
    assert (np.abs(analytic) <= magnitude + 1e-12).all()


def test_gradients_do_not_read_what_is_not_seen():
    arguments = dense_case()
    rng = np.random.default_rng(2)
    dout = rng.normal(size=(2, 5, 4, 6))
    clean = oracle.dense_gradients(dout, **arguments)
    arguments["k"][1, 6] = arguments["v"][1, 6] = np.nan
    arguments["q"][1, 3:] = dout[1, 3:] = np.nan
    dirty = oracle.dense_gradients(dout, **arguments)
    for name in clean:
        np.testing.assert_array_equal(clean[name], dirty[name], err_msg=name)


PAGE = 4
TABLE = np.array([[7, 2, 5, 99], [1, 8, 99, 99], [99] * 4, [99] * 4], np.int32)
KV_LENS, Q_LENS = [11, 5, 0], [3, 5, 0]
BATCH = {
    "page_table": TABLE,
    "kv_lens": np.array([*KV_LENS, 77], np.int32),
    "cu_q_lens": np.array([0, 3, 8, 8, 99], np.int32),
    "num_seqs": np.int32(3),
}


def paged_case(width, num_pages=9):
    """Three sequences' rows [kv_len, *width]; the cache before; this step's rows; their slots."""
    rng = np.random.default_rng(3)
    rows = [rng.normal(size=(n, *width)).astype(np.float32) for n in KV_LENS]
    cache = np.full((num_pages, PAGE, *width), np.nan, np.float32)
    new, slots = [], []
    for i, (kv_len, q_len) in enumerate(zip(KV_LENS, Q_LENS, strict=True)):
        for p in range(kv_len):
            page, offset = TABLE[i, p // PAGE], p % PAGE
            if p < kv_len - q_len:
                cache[page, offset] = rows[i][p]
            else:
                new.append(rows[i][p])
                slots.append(page * PAGE + offset)
    new += [np.full(width, np.nan, np.float32)] * 2  # two tokens of padding
    return rows, cache, np.array(new), np.array([*slots, -1, -1], np.int32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 4, "sinks": np.ones(4)},
        {"soft_cap": 2.0, "alibi_slopes": np.array([0.5, 0.25, 0.1, 1.0])},
        {"causal": False, "sliding_window": (3, 2)},
        {"attention_chunk_size": 4, "scale": 0.7},
    ],
)
def test_paged_is_dense_on_the_same_rows(options):
    rows, cache, new, slots = paged_case((2, 2, 8))
    q = np.random.default_rng(4).normal(size=(10, 4, 8))
    q[8:] = np.nan
    pages = np.stack([cache[:, :, 0], cache[:, :, 1]])
    out, lse, written = oracle.paged_attention(
        q, new[:, 0], new[:, 1], pages, **BATCH, slot_mapping=slots, **options
    )
    dense_options = {"causal": True} | options
    for i, tokens in enumerate([slice(0, 3), slice(3, 8)]):
        expected, expected_lse = oracle.dense_attention(
            q[None, tokens], rows[i][None, :, 0], rows[i][None, :, 1],
            q_offset=KV_LENS[i] - Q_LENS[i], **dense_options,
        )  # fmt: skip
        np.testing.assert_array_equal(out[tokens], expected[0])
        np.testing.assert_array_equal(lse[tokens], expected_lse[0])
    assert not out[8:].any()
    assert (lse[8:] == -np.inf).all()
    assert np.isfinite(written[:, TABLE[0, 0]]).all()
    assert np.isnan(written[:, 0]).all()


def test_quantise_saturates_and_rounds_to_even():
    x = np.array([1e9, -1e9, 17.0, 19.0, 0.0])
    for dtype, largest in [(ml_dtypes.float8_e4m3fn, 448), (ml_dtypes.float8_e5m2, 57344)]:
        stored = oracle.quantise(x, np.float32(1), dtype).astype(np.float64)
        assert list(stored[:2]) == [largest, -largest]
    stored = oracle.quantise(x, None, ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert list(stored[2:]) == [16, 20, 0]  # ties: the even mantissa
    assert list(oracle.quantise([1e9, -1e9, 1.5, 2.5, -0.5], None, np.int8)) == [127, -128, 2, 2, 0]
    assert list(oracle.quantise([10.0], np.float32(4), np.int8)) == [2]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_a_quantised_cache_attends_to_what_is_stored(dtype):
    rows, _, _, _ = paged_case((2, 2, 8))
    k, v = rows[0][:, 0], rows[0][:, 1]
    k_scale, v_scale = np.array([0.02, 0.03], np.float32), np.float32(0.05)
    pages = np.zeros((2, 9, PAGE, 2, 8), np.dtype(dtype))
    q = np.random.default_rng(5).normal(size=(11, 4, 8))
    slots = np.array([TABLE[0, p // PAGE] * PAGE + p % PAGE for p in range(11)])
    out, _, written = oracle.paged_attention(
        q, k, v, pages, TABLE[:1], [11], [0, 11], 1, slots, k_scale=k_scale, v_scale=v_scale
    )
    assert written.dtype == np.dtype(dtype)
    stored_k = oracle.quantise(k, k_scale[:, None], dtype).astype(float) * k_scale[:, None]
    stored_v = oracle.quantise(v, v_scale, dtype).astype(float) * float(v_scale)
    expected, _ = oracle.dense_attention(q[None], stored_k[None], stored_v[None], causal=True)
    np.testing.assert_allclose(out, expected[0], rtol=1e-6)


def mla_case(**options):
    rows, cache, new, slots = paged_case((12,))
    rng = np.random.default_rng(6)
    ql_nope, q_pe = rng.normal(size=(10, 3, 8)), rng.normal(size=(10, 3, 4))
    arguments = {
        "ql_nope": ql_nope, "q_pe": q_pe, "kv_c": new[:, :8], "k_pe": new[:, 8:],
        "latent_pages": cache, **BATCH, "slot_mapping": slots, "scale": 0.4, **options,
    }  # fmt: skip
    return rows, arguments


def test_mla_is_dense_with_one_kv_head_whose_value_is_the_latent():
    rows, arguments = mla_case(soft_cap=3.0)
    out, lse, _ = oracle.mla_attention(**arguments)
    q = np.concatenate([arguments["ql_nope"], arguments["q_pe"]], axis=-1)
    for i, tokens in enumerate([slice(0, 3), slice(3, 8)]):
        k = rows[i][None, :, None]
        expected, expected_lse = oracle.dense_attention(
            q[None, tokens], k, k[..., :8], scale=0.4, soft_cap=3.0, causal=True,
            q_offset=KV_LENS[i] - Q_LENS[i],
        )  # fmt: skip
        np.testing.assert_allclose(out[tokens], expected[0], rtol=1e-12)
        np.testing.assert_allclose(lse[tokens], expected_lse[0], rtol=1e-12)
    assert not out[8:].any()


def test_sparse_mla_with_every_position_is_mla():
    _, arguments = mla_case()
    everything = np.random.default_rng(7).permuted(np.tile(np.arange(16), (10, 1)), axis=1)
    for got, expected in zip(
        oracle.sparse_mla_attention(**arguments, topk_indices=everything),
        oracle.mla_attention(**arguments),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)


def test_sparse_mla_sees_only_what_is_named():
    rows, arguments = mla_case()
    topk = np.full((10, 4), -1)
    topk[2] = [5, -1, 0, 13]  # the last token of sequence 0, position 10; 13 is past kv_lens
    topk[1] = [10, -1, -1, -1]  # after its own position, 9
    out, lse, _ = oracle.sparse_mla_attention(**arguments, topk_indices=topk)
    q = np.concatenate([arguments["ql_nope"], arguments["q_pe"]], axis=-1)
    named = rows[0][[0, 5]][None, :, None]
    expected, _ = oracle.dense_attention(q[None, 2:3], named, named[..., :8], scale=0.4)
    np.testing.assert_allclose(out[2], expected[0, 0], rtol=1e-12)
    assert not out[1].any()
    assert (lse[1] == -np.inf).all()


def test_fp8_ds_mla_round_trip_and_layout():
    rng = np.random.default_rng(8)
    kv_c, k_pe = rng.normal(size=(3, 512)) * 50, rng.normal(size=(3, 64))
    kv_c[1, 128:256] = 0
    stored = oracle.encode_fp8_ds_mla(kv_c, k_pe)
    assert stored.shape == (3, 656)
    assert stored.dtype == np.uint8
    scales = stored[:, 512:528].copy().view("<f4")
    np.testing.assert_allclose(scales[0, 2], np.abs(kv_c[0, 256:384]).max() / 448, rtol=1e-6)
    decoded = oracle.decode_fp8_ds_mla(stored)
    # e4m3 keeps 4 bits of mantissa: relative error 1/16, absolute 2**-10 of the scale near zero
    np.testing.assert_allclose(decoded[:, :512], kv_c, rtol=1 / 16, atol=50 * 5 / 448 / 1024)
    np.testing.assert_allclose(decoded[:, 512:], k_pe, rtol=2**-8)
    assert not decoded[1, 128:256].any()
    np.testing.assert_array_equal(
        oracle.decode_fp8_ds_mla(oracle.encode_fp8_ds_mla(decoded[:, :512], decoded[:, 512:]))[0],
        decoded[0],
    )


def test_mla_with_fp8_ds_mla_attends_to_what_is_stored():
    rng = np.random.default_rng(9)
    kv_c, k_pe = rng.normal(size=(3, 512)), rng.normal(size=(3, 64))
    pages = np.zeros((2, 4, 656), np.uint8)
    q, q_pe = rng.normal(size=(3, 2, 512)), rng.normal(size=(3, 2, 64))
    out, _, written = oracle.mla_attention(
        q, q_pe, kv_c, k_pe, pages, [[1]], [3], [0, 3], 1, [4, 5, 6], scale=0.05,
        kv_cache_dtype="fp8_ds_mla",
    )  # fmt: skip
    latent = oracle.decode_fp8_ds_mla(written[1, :3])[None, :, None]
    expected, _ = oracle.dense_attention(
        np.concatenate([q, q_pe], -1)[None], latent, latent[..., :512], scale=0.05, causal=True
    )
    np.testing.assert_allclose(out, expected[0], rtol=1e-9)


def test_indexer_by_hand_and_topk():
    q = np.array([[[1.0], [-1.0]], [[2.0], [1.0]]])  # two tokens, two index heads
    weights = np.array([[1.0, 10.0], [1.0, 1.0]])
    pages = np.full((3, 2, 1), np.nan)
    pages[2, :, 0], pages[0, 0, 0] = [1, -2], 3
    scores = oracle.indexer_scores(q, weights, pages, [[2, 0], [9, 9]], [3, 9], [0, 2, 2], 1)
    # positions of the tokens: 1 and 2
    assert scores.tolist() == [[1, 20, -np.inf, -np.inf], [3, 0, 9, -np.inf]]
    assert oracle.topk_positions(scores, 3).tolist() == [[1, 0, -1], [2, 0, 1]]
    ties = np.array([[5.0, 7.0, 7.0, 5.0]])
    assert oracle.topk_positions(ties, 3).tolist() == [[1, 2, 0]]
    assert oracle.topk_positions(ties, 6).tolist() == [[1, 2, 0, 3, -1, -1]]


def test_materialised_mla_is_mla_with_absorbed_queries():
    _, arguments = mla_case(soft_cap=3.0)
    rng = np.random.default_rng(10)
    w_uk, w_uv = rng.normal(size=(2, 8, 3, 5))
    q_nope = rng.normal(size=(10, 3, 5))
    step = ("kv_c", "k_pe", "latent_pages", "slot_mapping")
    written = oracle.write_latents(*(arguments[name] for name in step))
    made = oracle.attend_mla_materialized(
        q_nope, arguments["q_pe"], written, w_uk, w_uv, *BATCH.values(), scale=0.4, soft_cap=3.0
    )
    absorbed = arguments | {"ql_nope": np.einsum("tnd,rnd->tnr", q_nope, w_uk)}
    out, lse, _ = oracle.mla_attention(**absorbed)
    np.testing.assert_allclose(made.out, np.einsum("tnr,rnd->tnd", out, w_uv), rtol=1e-9)
    np.testing.assert_allclose(made.lse, lse, rtol=1e-12)
