"""Paged attention on XLA against the float64 oracle."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ragged_batch import JUNK, MIXED, SIDE_BY_SIDE, SMALL, as_jax, attend_with, batch, check

from attnsel_jax.xla import paged, paged_tile


def test_the_batch_bites():
    """Half of the rows give one key more than half of the weight, and need not be the same key."""
    args = batch(*MIXED)
    k = np.repeat(args["k"][1:8], 2, axis=1)
    logits = np.einsum("thd,shd->hts", args["q"][1:8], k) / 4
    logits[:, *np.triu_indices(7, 1)] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    assert np.median(weights.max(-1)) > 0.5
    assert len(np.unique(weights[:, -1].argmax(-1))) > 1


MASKS = {
    "causal": {},
    "window": {"sliding_window": 5},
    "window of a block": {"sliding_window": 8},
    "not causal": {"causal": False},
    "two-sided": {"causal": False, "sliding_window": (3, 6)},
    "right window": {"causal": False, "sliding_window": (None, 2)},
    "chunks": {"attention_chunk_size": 6},
    "chunks of a page": {"attention_chunk_size": 4},
    "chunks both ways": {"attention_chunk_size": 5, "causal": False},
    "window in chunks": {"attention_chunk_size": 16, "sliding_window": 7},
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
def test_masks(masks):
    check(batch(*MIXED), **masks)


def extras(*names, heads=4):
    rng = np.random.default_rng(1)
    every = {
        "alibi_slopes": (2.0 ** -np.arange(1, heads + 1)).astype(np.float32),
        "sinks": rng.normal(6, 4, heads).astype(np.float32),
    }
    return {n: every[n] for n in names}


@pytest.mark.parametrize(
    ("given", "static"),
    [
        (extras(), {"soft_cap": 5.0}),
        (extras(), {"scale": 0.11}),
        (extras("alibi_slopes"), {"causal": False}),
        (extras("sinks"), {}),
        (extras("alibi_slopes", "sinks"), {"soft_cap": 5.0, "sliding_window": 6, "scale": 0.3}),
    ],
    ids=["soft cap", "scale", "alibi", "sinks", "all"],
)
def test_what_joins_the_logits(given, static):
    check(batch(*MIXED) | given, **static)


@pytest.mark.parametrize("sink", [-np.inf, 3.0])
def test_rows_that_see_no_key(sink):
    """More new tokens than cache positions: the leading queries see nothing."""
    args = batch([5, 1, 3], [2, 0, 9]) | {"sinks": np.array([0, sink, 1, 2], np.float32)}
    want = check(args)
    assert want.lse[0, 1] == sink
    assert want.lse[5, 1] == sink
    no_sinks = check(batch([5, 1, 3], [2, 0, 9]))
    assert np.isneginf(no_sinks.lse[[0, 5]]).all()


@pytest.mark.parametrize(
    ("cache", "k_scale", "v_scale"),
    [
        ("float32", [0.2, 0.34], [0.4, 0.2]),
        ("bfloat16", [0.2, 0.34], [0.4, 0.2]),
        ("float16", [0.2, 0.34], [0.4, 0.2]),
        ("float8_e4m3fn", [0.2, 0.34], [0.4, 0.2]),
        ("float8_e4m3fn", 0.2, 0.6),
        ("float8_e5m2", None, None),
        ("int8", [0.03, 0.05], [0.06, 0.03]),
        ("int8", 0.03, 0.09),
    ],
)
def test_caches(cache, k_scale, v_scale):
    check(batch(*MIXED, cache=cache, k_scale=k_scale, v_scale=v_scale))


@pytest.mark.parametrize(
    ("dtype", "cache"),
    [
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("bfloat16", "int8"),
        ("float16", "bfloat16"),
    ],
)
def test_half_precision_queries(dtype, cache):
    scale = 0.03 if cache == "int8" else None
    check(batch(*MIXED, dtype=dtype, cache=cache, k_scale=scale, v_scale=scale))


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_page_sizes(page_size):
    check(batch(*MIXED, page_size=page_size))


@pytest.mark.parametrize("heads", [(3, 3), (6, 1)], ids=["MHA", "MQA"])
def test_heads_and_odd_head_size(heads):
    check(batch([1, 7, 12], [29, 7, 20], heads=heads, head_dim=13))


def test_decode_alone():
    check(batch([1, 1, 0, 1], [29, 1, 5, 64], pad_tokens=1))


def test_cross_attention_writes_nothing():
    """More queries than keys, fewer queries than keys, no keys; the cache comes back as it was."""
    check(batch([4, 9, 2], [33, 5, 0], write=False), causal=False)


def test_long_sequences_with_the_measured_blocks():
    check(
        batch([70, 1, 9], [600, 531, 300], page_size=16),
        attend=attend_with(paged.CPU),
        sliding_window=280,
    )


@pytest.mark.parametrize("side_by_side", [SIDE_BY_SIDE, paged.ACCELERATOR], ids=["small", "real"])
def test_what_other_platforms_run(side_by_side):
    attend = attend_with(side_by_side)
    check(batch(*MIXED) | extras("sinks"), attend=attend, sliding_window=11)
    check(batch(*MIXED, dtype="bfloat16", cache="float8_e4m3fn"), attend=attend)


def test_nothing_at_all():
    """No sequences: whatever the table, lengths and queries hold, padding is 0 and -inf."""
    args = batch([3, 4], [9, 4])
    nothing = args | {"num_seqs": np.int32(0), "slot_mapping": np.full(10, -1, np.int32)}
    out, lse, pages = attend_with(SMALL)(**as_jax(nothing))
    assert not np.asarray(out).any()
    assert np.isneginf(lse).all()
    np.testing.assert_array_equal(pages, args["kv_pages"])


def test_expired_pages_may_be_gone():
    """Pages before every query's window: their table entries are junk, their slots NaN."""
    args = batch([1, 2], [30, 41], write=False)
    table, pages = args["page_table"].copy(), args["kv_pages"].copy()
    for seq, first_seen in ((0, 30 - 6), (1, 41 - 7)):
        for column in range(first_seen // 4):
            pages[:, table[seq, column]] = np.nan
            table[seq, column] = JUNK[column % 4]
        pages[:, table[seq, first_seen // 4], : first_seen % 4] = np.nan
    check(args, given=args | {"kv_pages": pages, "page_table": table}, sliding_window=6)


@pytest.mark.parametrize(
    ("masks", "most"),
    [
        ({}, 5 + 1 + 2),  # 40 keys, 3, and 9: blocks of 8, for tiles of 1
        ({"sliding_window": 4}, 2 + 1 + 2),
        ({"attention_chunk_size": 8}, 1 + 1 + 1),
    ],
)
def test_reads_only_what_is_seen(monkeypatch, masks, most):
    """Blocks read: each sequence its own length, however wide the table; less behind a mask."""
    blocks = []
    load = paged_tile._load_keys

    def counted(*args):
        jax.debug.callback(lambda: blocks.append(1))
        return load(*args)

    monkeypatch.setattr(paged_tile, "_load_keys", counted)
    args = batch([1, 1, 1], [40, 3, 9], pad_seqs=5)
    args["page_table"] = np.pad(args["page_table"], ((0, 0), (0, 100)), constant_values=-7)
    check(args, attend=attend_with.__wrapped__(SMALL), **masks)
    jax.effects_barrier()
    assert 3 <= len(blocks) <= most


def test_vmap():
    """Two batches at once: the same sequences with other numbers."""
    args = [batch([1, 5], [19, 7], seed=seed) for seed in (0, 1)]
    stacked = {
        n: None if args[0][n] is None else jnp.stack([jnp.asarray(a[n]) for a in args])
        for n in args[0]
    }
    attend = attend_with(SMALL)
    together = jax.jit(jax.vmap(lambda a: attend(**a)))(stacked)
    for i, one in enumerate(args):
        for got, want in zip(together, attend(**as_jax(one)), strict=True):
            np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-5)


def sized(num_seqs, q_len, kv_len, cache="float32", page_size=16):
    """Shapes of a batch, for compiling only."""

    def array(*shape, dtype="int32"):
        return jax.ShapeDtypeStruct(shape, dtype)

    tokens, pages = num_seqs * q_len, num_seqs * kv_len // page_size
    return {
        "q": array(tokens, 8, 32, dtype="float32"),
        "k": array(tokens, 4, 32, dtype="float32"),
        "v": array(tokens, 4, 32, dtype="float32"),
        "kv_pages": array(2, pages, page_size, 4, 32, dtype=cache),
        "page_table": array(num_seqs, kv_len // page_size),
        "kv_lens": array(num_seqs), "cu_q_lens": array(num_seqs + 1), "num_seqs": array(),
        "slot_mapping": array(tokens),
    }  # fmt: skip


@pytest.mark.parametrize("cache", ["float32", "float8_e4m3fn"])
def test_a_donated_cache_is_updated_in_place(cache):
    shapes = sized(8, 1, 32768, cache)
    donated = jax.jit(paged.paged_attention, donate_argnames="kv_pages")
    memory = donated.lower(**shapes).compile().memory_analysis()
    cache_bytes = np.prod(shapes["kv_pages"].shape) * jnp.dtype(cache).itemsize
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 50


def test_memory_does_not_grow_with_the_keys():
    temp = [
        jax.jit(paged.paged_attention)
        .lower(**sized(1, 2048, kv_len))
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for kv_len in (2048, 65536)
    ]
    assert temp[1] < temp[0] + 2**20  # logits would be 2**31 bytes more


def test_exports_for_every_platform():
    exported = jax.export.export(jax.jit(paged.paged_attention), platforms=["cpu", "cuda", "tpu"])(
        **sized(4, 2, 64)
    )
    assert exported.out_avals[0].shape == (8, 8, 32)


@pytest.mark.parametrize("x64", [False, True])
def test_strict_promotion_and_x64(x64):
    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(x64):
        check(batch([1, 5], [19, 7]) | extras("sinks", "alibi_slopes"), soft_cap=9.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": None}, "v is None, must be given with k and slot_mapping"),
        ({"cu_q_lens": np.zeros(5, np.int32)}, "cu_q_lens has 5 entries, must have 6"),
        ({"kv_lens": np.zeros(4, np.int32)}, "kv_lens has max_num_seqs 4, must be 5"),
        ({"page_table": np.zeros((5, 0), np.int32)}, "pages_per_seq is 0, must be at least 1"),
        ({"q": np.zeros((16, 5, 16), np.float32)}, "num_q_heads is 5, must be a multiple"),
        ({"q": np.zeros((16, 4, 16), np.float16)}, "dtypes are q float16, k float32"),
        ({"k_scale": np.ones(4, np.float32)}, "k_scale has num_kv_heads 4, must be 2"),
        ({"soft_cap": -1.0}, "soft_cap is -1.0, must be above 0"),
        ({"sliding_window": (0, 4)}, "sliding_window is 0, must be above 0"),
    ],
)
def test_refuses(change, message):
    args = batch([3, 4, 6], [9, 4, 8]) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        paged.paged_attention(**as_jax(args))
