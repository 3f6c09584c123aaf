"""MLA on XLA, absorbed and materialised, against the float64 oracle."""

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

from attnsel_jax.xla import mla, mla_materialized
from attnsel_jax.xla.mla import mla_attention, mla_attention_materialized

STATIC = ("scale", "soft_cap", "kv_cache_dtype")
attend = functools.partial(jax.jit, static_argnames=STATIC)(mla_attention)
attend_materialized = functools.partial(jax.jit, static_argnames=STATIC)(mla_attention_materialized)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Tiles of 4 queries of 3 heads, blocks of 8 keys: edges of each within a few positions."""
    monkeypatch.setattr(mla, "BLOCK_ROWS", 12)
    monkeypatch.setattr(mla, "BLOCK_KV", 8)
    monkeypatch.setattr(mla_materialized, "BLOCK_Q", 4)
    monkeypatch.setattr(mla_materialized, "BLOCK_KV", 8)


def check(arguments, dtype="float32", **static):
    """Holds out, lse and the cache against the oracle's."""
    out, lse, pages = attend(**on_device(arguments), **static)
    want, written = attended(arguments, **static)
    assert (out.dtype, lse.dtype, pages.dtype) == (DTYPES[dtype], np.float32, written.dtype)
    assert_close((out, lse), want, dtype)
    assert_same_cache(pages, written)
    return want


def test_a_mixed_batch_of_sharp_logits():
    arguments = batch(*MIXED)
    want = check(arguments)
    # the batch bites: without the key that it points at, a query would give something else
    flat, _ = attended(dict(arguments, scale=0.0))
    assert np.median(np.abs(want.out - flat.out)) > 0.5
    # the same shapes, so no compilation: other edges, more queries than keys, and nothing at all
    check(batch([6, 3, 7, 16, 8, 5], [9, 8, 17, 40, 7, 5], seed=1))
    check(batch([45, 0, 0, 0, 0, 0], [40, 1, 1, 1, 1, 1], seed=2))
    check(dict(arguments, num_seqs=np.int32(0)))


CACHES = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16 into bfloat16": {"dtype": "float16", "cache": "bfloat16"},
    "e4m3 with a scale": {"dtype": "bfloat16", "cache": "float8_e4m3fn", "kv_scale": 0.03},
    "e5m2": {"dtype": "float32", "cache": "float8_e5m2"},
    "fp8_ds_mla": {
        "dtype": "bfloat16", "cache": "fp8_ds_mla", "rank": 512, "rope": 64, "page_size": 16
    },
}  # fmt: skip


@pytest.mark.parametrize("facts", CACHES.values(), ids=CACHES.keys())
def test_caches(facts):
    check(batch(*MIXED, **facts), facts["dtype"])


def test_decoding_with_soft_cap_and_odd_sizes():
    arguments = batch(
        [1] * 7, [1, 8, 9, 16, 17, 30, 31], heads=5, rank=7, rope=3, page_size=3, write=False,
        pad_seqs=3,
    )  # fmt: skip
    capped = check(arguments, soft_cap=1.5)
    free, _ = attended(arguments)
    seen = np.isfinite(free.lse)
    assert np.abs(capped.lse[seen] - free.lse[seen]).max() > 1  # the cap matters


def test_vmap_over_layers():
    layers = [on_device(batch(*MIXED, seed=seed)) for seed in (0, 3)]
    static = {name: layers[0][name] for name in ("scale", "kv_cache_dtype", "kv_scale")}
    arrays = [{n: x for n, x in layer.items() if n not in static} for layer in layers]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *arrays)
    out, lse, _ = jax.jit(jax.vmap(lambda a: mla_attention(**a, **static)))(stacked)
    for i, seed in enumerate((0, 3)):
        assert_close((out[i], lse[i]), attended(batch(*MIXED, seed=seed))[0], "float32")


@pytest.mark.parametrize("function", [mla_attention, mla_attention_materialized])
def test_strict_promotion_x64_and_export(function):
    arguments = batch(*MIXED)
    want = attended(arguments)[0]
    if function is mla_attention_materialized:
        arguments, want = materialized(arguments, "float32")
    arguments["kv_scale"] = np.float32(1)
    static = {name: arguments.pop(name) for name in ("scale", "kv_cache_dtype")}
    static["scale"] = np.float64(static["scale"])
    jitted = jax.jit(lambda **arrays: function(**arrays, **static))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        exported = export.export(jitted)(**on_device(arguments))
        again = export.deserialize(bytearray(exported.serialize()))
        out, lse, pages = again.call(**on_device(arguments))
    assert (out.dtype, lse.dtype, pages.dtype) == (np.float32,) * 3
    assert_close((out, lse), want, "float32")


def materialized(arguments, dtype, nope=12, v=10):
    """Arguments of the materialised form with weights of their own, and what is to come out."""
    rng = np.random.default_rng(11)
    tokens, heads, rank = arguments["ql_nope"].shape
    w_uk, w_uv = (
        (rng.standard_normal((rank, heads, size)) / rank**0.5).astype(DTYPES[dtype])
        for size in (nope, v)
    )
    q_nope = 2 * rng.standard_normal((tokens, heads, nope))
    q_nope[np.isnan(arguments["ql_nope"].astype(np.float32)).any((1, 2))] = np.nan
    q_nope = q_nope.astype(DTYPES[dtype])
    absorbed = np.einsum("tnd,rnd->tnr", *(x.astype(np.float64) for x in (q_nope, w_uk)))
    want, _ = attended(dict(arguments, ql_nope=absorbed))
    expand = functools.partial(np.einsum, "tnr,rnd->tnd")
    want = want._replace(
        out=expand(want.out, w_uv.astype(np.float64)),
        magnitude=expand(want.magnitude, np.abs(w_uv.astype(np.float64))),
    )
    rest = {name: x for name, x in arguments.items() if name != "ql_nope"}
    return rest | {"q_nope": q_nope, "w_uk": w_uk, "w_uv": w_uv}, want


@pytest.mark.parametrize("facts", CACHES.values(), ids=CACHES.keys())
def test_materialised_is_the_same_attention(facts):
    dtype = facts["dtype"]
    arguments, want = materialized(batch(*MIXED, **facts), dtype)
    out, lse, _ = attend_materialized(**on_device(arguments))
    assert_close((out, lse), want, dtype)
    assert (out.dtype, lse.dtype) == (DTYPES[dtype], np.float32)


def test_materialised_agrees_with_absorbing():
    arguments, want = materialized(batch(*MIXED, dtype="bfloat16"), "bfloat16")
    given = on_device(arguments)
    w_uk, w_uv, q_nope = (given.pop(name) for name in ("w_uk", "w_uv", "q_nope"))
    ql_nope = jnp.einsum("tnd,rnd->tnr", q_nope, w_uk)
    latent, lse, _ = attend(**given, ql_nope=ql_nope)
    out = jnp.einsum("tnr,rnd->tnd", latent, w_uv)
    other, other_lse, _ = attend_materialized(**on_device(arguments))
    # absorbing rounds ql_nope to bfloat16: 2**-9 of logits of up to 10 or so
    assert np.all(np.abs((out - other).astype(jnp.float32)) <= 5e-2 * want.magnitude)
    np.testing.assert_allclose(lse, other_lse, atol=3e-2)


@pytest.mark.parametrize("function", [attend, attend_materialized])
@pytest.mark.parametrize("cache", ["float32", "bfloat16", "float8_e4m3fn"])
def test_temporary_memory_follows_neither_the_cache_nor_the_table(function, cache):
    def temporary(num_pages, pages_per_seq):
        arguments = batch([1, 5], [9, 9], cache=cache, write=False, pad_seqs=0)
        if function is attend_materialized:
            arguments, _ = materialized(arguments, "float32")
        arguments = on_device(arguments)
        arguments["latent_pages"] = jnp.zeros((num_pages, 4, 24), arguments["latent_pages"].dtype)
        arguments["page_table"] = jnp.zeros((2, pages_per_seq), jnp.int32)
        compiled = function.lower(**arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(num_pages=10**5, pages_per_seq=5000) < temporary(100, 50) + 2**12


def test_refusals():
    good = on_device(batch([1, 2], [3, 4]))

    def refused(match, **changes):
        with pytest.raises(ValueError, match=match):
            mla_attention(**(good | changes))

    refused(r"latent_pages has rows of 23, must be 24", latent_pages=good["latent_pages"][..., 1:])
    refused(r"kv_cache_dtype is 'fp8', must be 'fp8_ds_mla' or None", kv_cache_dtype="fp8")
    refused(r"latent_pages has dtype float32, must be one of uint8", kv_cache_dtype="fp8_ds_mla")
    uint8 = jnp.zeros((4, 4, 656), jnp.uint8)
    refused(
        r"kv_lora_rank is 16, must be 512 with kv_cache_dtype 'fp8_ds_mla': use a float8_e4m3fn",
        latent_pages=uint8, kv_cache_dtype="fp8_ds_mla",
    )  # fmt: skip
    refused(r"latent_pages has dtype uint8, must be one of float32", latent_pages=uint8)
    refused(r"slot_mapping is None, must be given with", slot_mapping=None)
    refused(r"soft_cap is 0, must be above 0", soft_cap=0)
    refused(r"cu_q_lens has 5 4, must be 5|cu_q_lens has", cu_q_lens=good["cu_q_lens"][:-1])
    refused(r"dtypes are .* must all be the same", q_pe=good["q_pe"].astype(jnp.bfloat16))
    refused(r"kv_scale has 1 dimensions", kv_scale=jnp.ones((1,), jnp.float32))
    packed = on_device(batch([1], [2], rank=512, rope=64, cache="fp8_ds_mla"))
    with pytest.raises(ValueError, match=r"kv_scale is given, must be None with .*fp8_ds_mla"):
        mla_attention(**(packed | {"kv_scale": jnp.float32(1)}))
