"""Pallas kernels over a mesh of TPUs that are not here: they compile, and send what they should.

To XLA such a kernel is opaque, so every byte sent is the mesh's: none where batch and heads are
cut; keys going round, or partial results merged, where positions or pages are.
"""

import pytest

from attnsel_jax.aot import MeshCall, compile_for, target_for
from attnsel_jax.aot.arguments import dense_arguments, paged_arguments
from attnsel_jax.cache_layouts import layout_named

BACKEND = "attnsel_jax.backends.mosaic_tpu:MosaicTpuBackend"
DENSE = "pallas_kernels.dense.mosaic_tpu:dense_attention"
PAGED = "pallas_kernels.paged.mosaic_tpu:paged_attention"
SHAPE = {"num_heads": 8, "num_kv_heads": 4, "head_size": 128, "dtype": "bfloat16"}


def compiled(chip, kernel, arguments, over, gradients=False):
    """Bytes that one device sends, by kind of collective, in the compiled program."""
    missing = target_for(chip).missing()
    if missing:
        pytest.skip(f"no compiler for {chip} here: {missing}")
    report = compile_for(chip, kernel, arguments, over=over, gradients=gradients)
    assert report.compiled, report.refusal
    return report.sent


def over_v5e(kernel, arguments, over, gradients=False):
    return compiled("v5e", kernel, arguments, over, gradients)


def dense(length, batch):
    return dense_arguments(batch=batch, q_len=length, kv_len=length, causal=True, **SHAPE)


def paged(batch):
    cache = layout_named("side_by_side").shape(512, 16, 4, 128)
    return paged_arguments(batch=batch, q_len=1, kv_len=1024, cache_dtype="bfloat16",
                           cache_shape=cache, page_size=16, scale=0.1, **SHAPE)  # fmt: skip


def test_dense_heads_and_batch_send_nothing_with_gradients():
    over = MeshCall(BACKEND, "dense", {"data": 2, "model": 4}, ("data",), ("model",))
    assert over_v5e(DENSE, dense(256, 2), over, gradients=True) == {}


LOCAL_Q, LOCAL_KV = 128 * 8 * 128 * 2, 2 * 128 * 4 * 128 * 2  # bytes of a device's q, of k and v


def test_a_ring_sends_keys_on_and_halves_for_zigzag_order():
    over = MeshCall(BACKEND, "dense", {"seq": 4}, context="seq", form="ring")
    sent = over_v5e(DENSE, dense(512, 1), over)
    lse = 128 * 8 * 4
    assert sent == {"collective-permute": pytest.approx(4 * LOCAL_KV + 2 * LOCAL_Q + lse, rel=0.01)}


def test_all_to_all_sends_heads_for_positions():
    over = MeshCall(BACKEND, "dense", {"seq": 4}, context="seq", form="all_to_all")
    sent = over_v5e(DENSE, dense(512, 1), over)
    lse = 128 * 8 * 4
    assert sent == {"all-to-all": pytest.approx((LOCAL_KV + 2 * LOCAL_Q + lse) * 3 / 4, rel=0.01)}


def test_all_gather_sends_keys_to_all():
    over = MeshCall(BACKEND, "dense", {"seq": 4}, context="seq", form="all_gather")
    sent = over_v5e(DENSE, dense(512, 1), over)
    assert sent == {"all-gather": pytest.approx(3 * LOCAL_KV, rel=0.01)}


def test_paged_heads_and_groups_send_nothing():
    over = MeshCall(BACKEND, "paged", {"data": 2, "model": 4}, ("data",), ("model",))
    assert over_v5e(PAGED, paged(8), over) == {}


def test_spread_pages_send_partial_results_only():
    over = MeshCall(BACKEND, "paged", {"seq": 4}, context="seq")
    sent = over_v5e(PAGED, paged(8), over)
    merged = 2 * 3 / 4 * 8 * 8 * (128 + 2) * 4  # all-reduced: out, weight and maximum, float32
    assert sent == {"all-reduce": pytest.approx(merged, rel=0.05)}


# What is packed on one device may not be on several: a kv head of half a register, alone; one query
# head; cached heads that are copies.
PACKED = {
    "one kv head of 64": {"heads": (8, 4)},
    "one head of all": {"heads": (4, 4), "cache": "int8"},
    "a float32 cache": {"heads": (4, 4), "cache": "float32", "size": 80},
    "each kv head twice": {"heads": (16, 2), "cache_heads": 4, "cache": "float8_e4m3fn"},
    "three kv heads of 64": {"heads": (12, 12)},
}


@pytest.mark.sweep
@pytest.mark.parametrize("chip", ["v5e", "v6e", "7x"])
@pytest.mark.parametrize("case", PACKED)
def test_few_heads_on_each_device(case, chip):
    options = {"size": 64, "cache": "bfloat16", **PACKED[case]}
    (heads, kv_heads), size, dtype = options["heads"], options["size"], options["cache"]
    cached = options.get("cache_heads", kv_heads)
    shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_size": size, "dtype": "bfloat16"}
    cache = layout_named("side_by_side").shape(512, 32, cached, size)
    given = paged_arguments(batch=8, q_len=1, kv_len=1024, cache_dtype=dtype, cache_shape=cache,
                            page_size=32, scale=0.1, **shape)  # fmt: skip
    cuts = {"data": 2, "model": 4}, ("data",), ("model",)
    assert compiled(chip, PAGED, given, MeshCall(BACKEND, "paged", *cuts)) == {}
    given = dense_arguments(batch=2, q_len=200, kv_len=200, causal=True, **shape)
    # K and v of fewer heads than shards are whole on each: their gradients are summed.
    sent = compiled(chip, DENSE, given, MeshCall(BACKEND, "dense", *cuts), gradients=True)
    assert set(sent) == ({"all-reduce"} if kv_heads < 4 else set())
