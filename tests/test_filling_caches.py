"""Caches filled without attention: in every layout the same slots, to the same bits, in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import mla, paged
from strict_settings import strict_settings
from test_cache_layouts import latent_layout, layout

from attnsel_jax import (
    AttentionMetadata,
    KVCache,
    LatentCache,
    copy_pages,
    dot_product_attention,
    mla_attention,
    oracle,
    paged_attention,
    register_cache_layout,
    unregister_cache_layout,
    write_index_keys,
    write_kv_cache,
    write_latent_cache,
)
from attnsel_jax.aot import compile_for, target_for
from attnsel_jax.cache_layouts import LATENT_LAYOUTS, LAYOUTS
from attnsel_jax.oracle.ragged import write_slots

PAGES, SIZE, HEADS = 5, 64, 2
# The last slot, the first, nowhere, past the end, halves and tiles of a striped page.
SLOTS = np.array(
    [PAGES * SIZE - 1, 0, -1, 70, PAGES * SIZE, 63, 32, 95, 17, 2**31 - 1, -2, -(2**31)], np.int32
)
KNOWN = np.where(SLOTS < PAGES * SIZE, SLOTS, -1)  # the oracle knows negative ones only
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")


@pytest.fixture(autouse=True, scope="module")
def registered():
    register_cache_layout("page_by_page", layout())
    register_cache_layout("by_number", latent_layout())
    yield
    unregister_cache_layout("page_by_page")
    unregister_cache_layout("by_number")


def drawn(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * 3, dtype)


def pages(*shape, dtype):
    """What lies in a cache before: numbers, and NaN where the dtype has it."""
    values = np.random.default_rng(0).standard_normal(shape) * 9
    if dtype not in ("int8", "uint8"):
        values[np.random.default_rng(1).random(shape) < 0.1] = np.nan
    return np.asarray(jnp.asarray(np.abs(values) if dtype == "uint8" else values, dtype))


def assert_same(got, want):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(np.float32(got), np.float32(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*LAYOUTS, "page_by_page"])
@pytest.mark.parametrize("head_size", [64, 40])
def test_keys_and_values(name, dtype, head_size):
    before = pages(2, PAGES, SIZE, HEADS, head_size, dtype=dtype)
    k, v = drawn(1, len(SLOTS), HEADS, head_size), drawn(2, len(SLOTS), HEADS, head_size)
    scales = {"k_scale": np.float32([0.1, 0.7]), "v_scale": np.float32(0.3)}
    want = oracle.write_kv(k, v, before, KNOWN, **scales)
    cache = KVCache(jnp.asarray(before), **scales).converted(name)
    got = write_kv_cache(cache, k, v, SLOTS)
    assert (got.layout, got.k_scale is cache.k_scale) == (name, True)
    assert_same(jnp.stack(got.split()), want)


@pytest.mark.parametrize("dtype", DTYPES[:-1])
@pytest.mark.parametrize("name", [*LATENT_LAYOUTS, "by_number"])
def test_latents(name, dtype):
    before = pages(PAGES, SIZE, 576, dtype=dtype)
    kv_c, k_pe = drawn(1, len(SLOTS), 512), drawn(2, len(SLOTS), 64)
    want = oracle.write_latents(kv_c, k_pe, before, KNOWN, np.float32(0.3))
    cache = LatentCache(jnp.asarray(before), jnp.float32(0.3)).converted(name)
    got = write_latent_cache(cache, kv_c, k_pe, SLOTS)
    assert got.layout == name
    assert_same(got.converted("rows").pages, want)


@pytest.mark.parametrize("name", ["rows", "tiled"])
def test_latents_of_fp8_ds_mla(name):
    before = pages(PAGES, SIZE, 656, dtype="uint8")
    kv_c, k_pe = drawn(1, len(SLOTS), 512), drawn(2, len(SLOTS), 64)
    want = oracle.write_latents(kv_c, k_pe, before, KNOWN, kv_cache_dtype="fp8_ds_mla")
    cache = LatentCache(jnp.asarray(before)).converted(name)
    got = write_latent_cache(cache, kv_c, k_pe, SLOTS)
    np.testing.assert_array_equal(got.converted("rows").pages, want)


@pytest.mark.parametrize("dtype", DTYPES[:-1])
def test_index_keys(dtype):
    before = pages(PAGES, SIZE, 128, dtype=dtype)
    keys = drawn(1, len(SLOTS), 128).at[0, :3].set(jnp.array([1e6, jnp.inf, jnp.nan]))
    want = before.copy()
    write_slots(want, oracle.quantise(keys, None, before.dtype), KNOWN)
    assert_same(write_index_keys(before, keys, SLOTS), want)


def test_attention_reads_what_was_written():
    """A step that writes for itself, and the same one over a cache that was filled before it."""
    given = paged()
    one, by_itself = paged_attention(**given)
    cache = write_kv_cache(given["cache"], given["k"], given["v"], given["metadata"].slot_mapping)
    np.testing.assert_array_equal(cache.pages, by_itself.pages)
    other, after = paged_attention(**given | {"k": None, "v": None, "cache": cache})
    np.testing.assert_array_equal(other, one)
    np.testing.assert_array_equal(after.pages, by_itself.pages)

    given = mla()
    one, by_itself = mla_attention(**given)
    cache = write_latent_cache(
        given["cache"], given["kv_c"], given["k_pe"], given["metadata"].slot_mapping
    )
    np.testing.assert_array_equal(cache.pages, by_itself.pages)


def test_a_cache_of_more_heads_than_k_holds_copies():
    k, v = drawn(1, len(SLOTS), 2, 64), drawn(2, len(SLOTS), 2, 64)
    cache = KVCache(jnp.zeros((2, PAGES, SIZE, 4, 64)))
    got = write_kv_cache(cache, k, v, SLOTS).pages
    twice = (np.asarray(x)[:, [0, 0, 1, 1]] for x in (k, v))
    assert_same(got, oracle.write_kv(*twice, cache.pages, KNOWN))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("name", [*LAYOUTS, "page_by_page"])
def test_pages_are_copied_as_they_were(name, dtype):
    """Two change places; nowhere, from nowhere and past the end nothing is copied."""
    before = pages(2, PAGES, SIZE, HEADS, 64, dtype=dtype)
    source = np.array([1, 3, 2, -1, 0, 5], np.int32)
    target = np.array([3, 1, -1, 0, 5, 4], np.int32)
    got = copy_pages(KVCache(jnp.asarray(before)).converted(name), source, target)
    want = before.copy()
    want[:, 3], want[:, 1] = before[:, 1], before[:, 3]
    assert_same(jnp.stack(got.split()), want)


@pytest.mark.parametrize("name", ["rows", "striped", "tiled", None])
def test_latents_and_index_keys_are_copied(name):
    before = pages(PAGES, SIZE, 576, dtype="bfloat16")
    want = before.copy()
    want[4] = before[2]
    source, target = np.int32([2]), np.int32([4])
    if name is None:
        got = copy_pages(before, source, target)
    else:
        cache = LatentCache(jnp.asarray(before)).converted(name)
        got = copy_pages(cache, source, target).converted("rows").pages
    assert_same(got, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_nothing_to_write_and_nothing_to_copy(dtype):
    none = jnp.zeros(0, jnp.int32)
    rows = jnp.zeros((0, 2, 64))
    for name in LAYOUTS:
        cache = KVCache(jnp.ones((2, PAGES, SIZE, 2, 64), dtype)).converted(name)
        for got in (write_kv_cache(cache, rows, rows, none), copy_pages(cache, none, none)):
            assert_same(got.pages, cache.pages)
    rows = jnp.zeros((0, 512)), jnp.zeros((0, 64))
    for name in LATENT_LAYOUTS:
        if name != "by_number":
            cache = LatentCache(jnp.ones((PAGES, SIZE, 576), dtype)).converted(name)
            assert_same(write_latent_cache(cache, *rows, none).pages, cache.pages)
    index = jnp.ones((PAGES, SIZE, 512), dtype)
    assert_same(write_index_keys(index, rows[0], none), index)


@pytest.mark.parametrize("name", LAYOUTS)
def test_under_strict_settings_jit_and_a_checked_shard_map(name):
    before = drawn(0, 2, PAGES, SIZE, HEADS, 64, dtype="bfloat16")
    cache = KVCache(before, jnp.float32(2.0)).converted(name)
    k, v = (drawn(i, len(SLOTS), HEADS, 64, dtype="bfloat16") for i in (1, 2))
    moved = KVCache(before.at[:, 4].set(before[:, 1]), jnp.float32(2.0)).converted(name)
    want = write_kv_cache(moved, k, v, SLOTS).pages
    mesh, along = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,)), jax.P("x")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(jax.P(), along), out_specs=along)
    def written(cache, k):
        moved = copy_pages(cache, np.int32([1]), np.int32([4]))
        return write_kv_cache(moved, k[0], v, SLOTS).pages[None]

    with strict_settings():
        got = written(cache, jnp.stack([k, k]))
    for each in got:
        assert_same(each, want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_what_pads_heads_is_written_too(dtype):
    """A slot that was never written may be NaN all over; attention multiplies what pads a key."""
    cache = KVCache(jnp.zeros((2, PAGES, SIZE, HEADS, 80), dtype)).converted("side_by_side")
    k, slots = drawn(1, len(SLOTS), HEADS, 80), SLOTS[SLOTS < PAGES * SIZE]
    got = write_kv_cache(cache.with_pages(cache.pages * jnp.asarray(jnp.nan, dtype)), k, k, SLOTS)
    whole = jnp.stack(LAYOUTS["side_by_side"].split(got.pages)).reshape(2, -1, HEADS, 128)
    whole = np.float32(whole[:, slots[slots >= 0]])
    assert np.isfinite(whole).all()
    assert not whole[..., 80:].any()


def test_over_layers_with_vmap():
    caches = KVCache(jnp.zeros((3, 2, PAGES, SIZE, HEADS, 64)))
    k = drawn(1, 3, len(SLOTS), HEADS, 64)
    got = jax.vmap(lambda cache, k: write_kv_cache(cache, k, k, SLOTS))(caches, k)
    for i in range(3):
        want = write_kv_cache(KVCache(caches.pages[i]), k[i], k[i], SLOTS)
        np.testing.assert_array_equal(got.pages[i], want.pages)


def shape(*sizes, dtype):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.once
@pytest.mark.parametrize("chip", ["v5e", "h100"])
@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", *(pytest.param(x, marks=pytest.mark.sweep) for x in DTYPES[:2])]
)
@pytest.mark.parametrize("name", ["side_by_side", "by_head", "striped", "tiled"])
def test_a_donated_cache_is_filled_where_it_lies(name, dtype, chip):
    """No second cache, neither of the cache's dtype nor of a wider one."""
    if (name == "by_head") != (chip == "h100"):
        pytest.skip("a layout of the other chip's kernels")
    if missing := target_for(chip).missing():
        pytest.skip(f"no compiler for {chip} here: {missing}")
    slots = shape(16, dtype="int32")
    if name in LAYOUTS:
        cache = shape(*LAYOUTS[name].shape(512, 64, 8, 128), dtype=dtype)
        rows = dict.fromkeys("kv", shape(16, 8, 128, dtype="bfloat16"))
        given = {"kv_pages": cache, **rows, "k_scale": None, "v_scale": None}
    else:
        itemsize = jnp.dtype(dtype).itemsize
        cache = shape(*LATENT_LAYOUTS[name].shape(512, 64, 576, itemsize), dtype=dtype)
        kv_c, k_pe = shape(16, 512, dtype="bfloat16"), shape(16, 64, dtype="bfloat16")
        given = {"latent_pages": cache, "kv_c": kv_c, "k_pe": k_pe, "kv_scale": None}
    path = f"attnsel_jax.xla.layout_writes:put_{'kv' if name in LAYOUTS else 'latents'}"
    report = compile_for(chip, path, given | {"slot_mapping": slots, "layout": name})
    assert report.compiled, report.refusal
    cache_bytes = cache.size * cache.dtype.itemsize
    assert report.memory["aliased"] == cache_bytes
    assert report.memory["temporaries"] < cache_bytes / 50


@pytest.mark.once
@pytest.mark.parametrize(
    ("chip", "name"),
    [
        ("v5e", "side_by_side"),
        *(pytest.param(c, "side_by_side", marks=pytest.mark.sweep) for c in ("v6e", "7x")),
        ("h100", "by_head"),
    ],
)
@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", pytest.param("bfloat16", marks=pytest.mark.sweep)]
)
@pytest.mark.parametrize(
    "head_size",
    [80, 128, *(pytest.param(n, marks=pytest.mark.sweep) for n in (8, 64, 96, 160, 192, 256))],
)
def test_pages_are_copied_and_written_where_they_lie(chip, name, dtype, head_size):
    if missing := target_for(chip).missing():
        pytest.skip(f"no compiler for {chip} here: {missing}")
    cache = shape(*LAYOUTS[name].shape(512, 64, 8, head_size), dtype=dtype)
    ids = dict.fromkeys(("source", "target"), shape(4, dtype="int32"))
    rows = dict.fromkeys("kv", shape(16, 8, head_size, dtype="bfloat16"))
    rows |= {"k_scale": None, "v_scale": None, "slot_mapping": shape(16, dtype="int32")}
    for function, given in (("copy_kv", ids), ("put_kv", rows)):
        path = f"attnsel_jax.xla.layout_writes:{function}"
        report = compile_for(chip, path, {"kv_pages": cache, **given, "layout": name})
        assert report.compiled, report.refusal
        assert report.memory["aliased"] == cache.size * cache.dtype.itemsize
        assert report.memory["temporaries"] < cache.size * cache.dtype.itemsize / 50


def refused(call, *arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(*arguments)


def test_what_does_not_fit_is_refused():
    given = paged()
    cache, k, v, slots = given["cache"], given["k"], given["v"], given["metadata"].slot_mapping
    write = write_kv_cache
    refused(write, cache.pages, k, v, slots, message="cache is .*must be KVCache")
    refused(write, cache, None, v, slots, message="k is NoneType, must be an array")
    refused(write, cache, k, v, None, message="slot_mapping is NoneType")
    refused(write, cache, k, v, slots[:-1], message="slot_mapping has num_tokens 4, must be 5")
    refused(write, cache, k, v, np.int64(slots), message="slot_mapping has dtype int64")
    refused(write, cache, k[..., :4], v, slots, message="k has head_size 4, must be 8")
    refused(write, cache, k, v.astype("bfloat16"), slots, message="dtypes are")
    three = jnp.zeros((5, 3, 8))
    refused(write, cache, three, three, slots, message="num_kv_heads 3, must be 2")
    given = mla()
    cache, kv_c, k_pe = given["cache"], given["kv_c"], given["k_pe"]
    write = write_latent_cache
    refused(write, cache, kv_c[:, :4], k_pe, slots, message="cache.pages has size 12, must be 8")
    refused(write, cache, kv_c, None, slots, message="k_pe is NoneType, must be an array")
    rows = LatentCache(jnp.zeros((6, 4, 656), jnp.uint8))
    refused(write, rows, kv_c, k_pe, slots, message=r"are \(8, 4\), must be \(512, 64\)")
    tiled = LatentCache(jnp.zeros((6, 4, 2, 4, 128), jnp.uint8), layout="tiled")
    refused(write, tiled, kv_c, k_pe, slots, message=r"are \(8, 4\), must be \(512, 64\)")
    rows, ropes = jnp.zeros((5, 512), "bfloat16"), jnp.zeros((5, 64), "bfloat16")
    short = LatentCache(jnp.zeros((3, 9, 4, 128), "bfloat16"), layout="striped")
    refused(write, short, rows, ropes, slots, message="page_size 8, must be .* multiple of 32")
    packed = LatentCache(jnp.zeros((3, 8, 3, 1, 128), "bfloat16"), layout="tiled")
    refused(write, packed, rows[:, :256], ropes, slots, message="must be .* in layout 'tiled'")
    whole = LatentCache(jnp.zeros((3, 9, 32, 128), "bfloat16"), layout="striped")
    wide = jnp.zeros((5, 544), "bfloat16")
    refused(write, whole, wide, ropes[:, :32], slots, message="rope_dim is 32, must be 64 in lay")
    index = jnp.zeros((6, 4, 8))
    refused(write_index_keys, index.astype("int8"), kv_c, slots, message="has dtype int8")
    refused(write_index_keys, index, kv_c, None, message="slot_mapping is None, must be an array")
    refused(write_index_keys, index[:0], kv_c, slots, message="num_pages is 0, must be at least 1")
    none = KVCache(jnp.zeros((2, 6, 4, 0, 8)))
    refused(write_kv_cache, none, k[:, :0], v[:, :0], slots, message="num_kv_heads is 0, must be")
    given = KVCache(jnp.zeros((3, 2, 6, 4, 2, 8)))
    refused(copy_pages, given, slots, slots, message="6 dimensions .*, must have 5")
    layers = LatentCache(jnp.zeros((3, 6, 4, 12)))
    refused(copy_pages, layers, slots, slots, message="has 4 dimensions .*, must have 3")
    refused(copy_pages, given.pages[0], slots, slots, message="has 5 dimensions .*, must have 3")
    by_number = LatentCache(jnp.zeros((6, 12, 4)), layout="by_number")
    refused(copy_pages, by_number, slots, slots, message="must be one of rows, striped, tiled")
    refused(copy_pages, cache, [1], slots, message="source is list, must be an array")
    refused(copy_pages, cache, slots, slots[:2], message="target has n 2, must be 5")
    refused(copy_pages, "cache", slots, slots, message="cache is str, must be an array")


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_refused(name):
    """They would be 0 where a cache is seen as integers, and right elsewhere."""
    k = drawn(1, len(SLOTS), HEADS, 64)
    cache = KVCache(jnp.zeros((2, PAGES, SIZE, HEADS, 64))).converted(name)
    for call in (
        lambda k: write_kv_cache(cache, k, k, SLOTS),
        lambda k: copy_pages(cache.with_pages(cache.pages + k.sum()), SLOTS, SLOTS),
    ):
        with pytest.raises(ValueError, match=r"needs_grad is True .*, must be False"):
            jax.grad(lambda k, call=call: call(k).pages.sum())(k)


def test_a_prompt_of_mla_over_keys_and_values_of_every_head():
    """As docs/kernels.md has it: dense attention, and the latents written beside it."""
    tokens, heads, rank, nope, rope = 7, 2, 16, 8, 4
    latent, k_pe = drawn(1, tokens, rank), drawn(2, tokens, rope)
    w_uk, w_uv = drawn(3, rank, heads, nope) / 9, drawn(4, rank, heads, nope) / 9
    q_nope, q_pe = drawn(5, tokens, heads, nope), drawn(6, tokens, heads, rope)
    metadata = AttentionMetadata.from_lengths([tokens], [tokens], [[1, 3]], 4)
    cache = LatentCache(jnp.zeros((5, 4, rank + rope)))
    scale = (nope + rope) ** -0.5
    absorbed = jnp.einsum("tnd,rnd->tnr", q_nope, w_uk)
    out, want = mla_attention(absorbed, q_pe, latent, k_pe, cache, metadata, scale=scale)
    out = jnp.einsum("tnr,rnv->tnv", out, w_uv)

    k = jnp.concatenate(
        [
            jnp.einsum("tr,rnd->tnd", latent, w_uk),
            jnp.broadcast_to(k_pe[:, None], (tokens, heads, rope)),
        ],
        axis=-1,
    )
    q, v = jnp.concatenate([q_nope, q_pe], axis=-1), jnp.einsum("tr,rnv->tnv", latent, w_uv)
    other = dot_product_attention(q, k, v, is_causal=True, scale=scale)
    np.testing.assert_allclose(other, out, rtol=2e-4, atol=2e-4)
    got = write_latent_cache(cache, latent, k_pe, metadata.slot_mapping)
    np.testing.assert_array_equal(got.pages, want.pages)
