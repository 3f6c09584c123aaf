"""Cache layouts that packages register: a kernel of one is compared like any other."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from strict_settings import strict_settings
from third_party import backend

from attnsel_jax import (
    allocate_kv_cache,
    copy_pages,
    register_cache_layout,
    unregister_cache_layout,
    write_kv_cache,
)
from attnsel_jax.backend import AttentionBackend
from attnsel_jax.backends.xla import XlaBackend
from attnsel_jax.backends.xla_mla import XlaMlaBackend
from attnsel_jax.cache_layouts import LATENT_LAYOUTS, LAYOUTS, LatentLayout, Layout
from attnsel_jax.compare import compare
from attnsel_jax.kv_cache import KVCache, LatentCache
from attnsel_jax.registered_layouts import BUILT_IN
from attnsel_jax.registry import register_backend
from attnsel_jax.xla.mla import mla_attention as attention_of_rows
from attnsel_jax.xla.paged import paged_attention as stacked_attention


def layout(**changed) -> Layout:
    """Each page's keys, then its values."""
    known = {
        "shape": lambda num_pages, *rest: (num_pages, 2, *rest),
        "dims": lambda shape: (shape[0], *shape[2:]),
        "split": lambda pages: (pages[:, 0], pages[:, 1]),
        "join": lambda k_pages, v_pages: jnp.stack([k_pages, v_pages], axis=1),
        "stride_order": (0, 1, 2, 3, 4),
    }
    return Layout(**known | changed)


def latent_layout(**changed) -> LatentLayout:
    """Number by number."""
    known = {
        "ndim": 3,
        "shape": lambda num_pages, page_size, row, itemsize: (num_pages, row, page_size),
        "dims": lambda shape: (shape[0], shape[2], shape[1]),
        "to_rows": lambda pages, rope_dim: jnp.swapaxes(pages, 1, 2),
        "from_rows": lambda rows, rope_dim: jnp.swapaxes(rows, 1, 2),
    }
    return LatentLayout(**known | changed)


@pytest.fixture(autouse=True)
def registered():
    register_cache_layout("page_by_page", layout())
    register_cache_layout("by_number", latent_layout())
    yield
    for name in {*LAYOUTS, *LATENT_LAYOUTS} - BUILT_IN:
        unregister_cache_layout(name)


def replace(name: str, other: Layout | LatentLayout) -> None:
    unregister_cache_layout(name)
    register_cache_layout(name, other)


def paged_attention(q, k, v, kv_pages, *args, **options):
    """XLA's, of a cache of `layout()`."""
    out, lse, pages = stacked_attention(q, k, v, jnp.swapaxes(kv_pages, 0, 1), *args, **options)
    return out, lse, jnp.swapaxes(pages, 0, 1)


def mla_attention(ql_nope, q_pe, kv_c, k_pe, latent_pages, *args, **options):
    """XLA's, of a cache of `latent_layout()`."""
    rows = jnp.swapaxes(latent_pages, 1, 2)
    out, lse, rows = attention_of_rows(ql_nope, q_pe, kv_c, k_pe, rows, *args, **options)
    return out, lse, jnp.swapaxes(rows, 1, 2)


MINE = backend(
    "MINE", layout="page_by_page", kernels={"paged": f"{__name__}:paged_attention"},
    capabilities={"paged": XlaBackend.capabilities["paged"]},
)  # fmt: skip


class MineMla(AttentionBackend):
    name, family, latent_layout = "MINE_MLA", XlaMlaBackend.family, "by_number"
    capabilities = {"mla": XlaMlaBackend.capabilities["mla"]}
    kernels = {"mla": f"{__name__}:mla_attention"}


def verdict(problem, kind):
    (row,) = compare([problem], [kind]).rows
    return row.verdict


def test_a_kernel_of_a_registered_layout_is_compared_like_any_other():
    assert verdict("quick.paged.mixed", MINE) == "pass"
    replace("page_by_page", layout(split=lambda pages: (pages[:, 1], pages[:, 0])))
    assert verdict("quick.paged.mixed", MINE) == "fail"


def test_a_kernel_of_a_registered_latent_layout_is_compared_like_any_other():
    assert verdict("quick.mla.mixed", MineMla) == "pass"
    replace("by_number", latent_layout(to_rows=lambda pages, _: jnp.swapaxes(pages, 1, 2)[::-1]))
    assert verdict("quick.mla.mixed", MineMla) == "fail"


def test_caches_are_allocated_and_converted():
    register_backend("MINE", MINE)
    cache = allocate_kv_cache(5, 16, 2, 64, "bfloat16", backend="MINE")
    assert (cache.layout, cache.pages.shape) == ("page_by_page", (5, 2, 16, 2, 64))
    assert (cache.num_pages, cache.page_size, cache.num_kv_heads) == (5, 16, 2)
    filled = KVCache(jnp.arange(2 * 3 * 8 * 2 * 4, dtype=jnp.float32).reshape(2, 3, 8, 2, 4))
    mine = filled.converted("page_by_page")
    np.testing.assert_array_equal(mine.pages[1, 0], filled.pages[0, 1])
    np.testing.assert_array_equal(mine.converted("stacked").pages, filled.pages)


# (head size, as side_by_side stores it)
PADDED = [(8, 64), (64, 64), (80, 128), (112, 128), (160, 192), (224, 256)]


@pytest.mark.parametrize(("head_size", "stored"), PADDED)
@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn", "int8"])
def test_heads_are_padded_with_zeros(head_size, stored, dtype):
    """And the cache says what they are, where its array does not."""
    values = np.random.default_rng(0).integers(1, 9, (2, 3, 8, 2, head_size))
    stacked = KVCache(jnp.asarray(values, dtype))
    with strict_settings():
        cache = stacked.converted("side_by_side")
    assert cache.pages.shape == (3, 2, stored // 64, 8, 128)
    assert cache.head_size == (None if stored == head_size else head_size)
    assert cache.dims == (3, 8, 2, head_size)
    whole = jnp.stack(LAYOUTS["side_by_side"].split(cache.pages))
    assert whole.shape[-1] == stored
    assert not np.asarray(whole[..., head_size:], np.float32).any()
    np.testing.assert_array_equal(jnp.stack(cache.split()), stacked.pages)
    for other in ("stacked", "by_head", "page_by_page"):
        back = cache.converted(other)
        assert (back.head_size, back.dims) == (None, stacked.dims)
        np.testing.assert_array_equal(back.converted("stacked").pages, stacked.pages)


def test_padded_heads_are_known_wherever_a_cache_goes():
    cache = allocate_kv_cache(5, 16, 2, 80, "bfloat16", device="v5e")
    assert (cache.pages.shape, cache.head_size) == ((5, 2, 2, 16, 128), 80)
    assert allocate_kv_cache(5, 16, 2, 128, "bfloat16", device="v5e").head_size is None
    filled = cache.with_pages(cache.pages + 1)
    assert filled.dims == cache.dims == jax.tree.map(lambda x: x, cache).dims == (5, 16, 2, 80)
    k, slots = jnp.ones((3, 2, 80), jnp.bfloat16), np.int32([7, -1, 79])
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), filled)
    mapped = jax.vmap(lambda cache: write_kv_cache(cache, k, k, slots))(stack)
    carried, scanned = jax.lax.scan(
        lambda carry, cache: (write_kv_cache(cache, k, k, slots), cache), filled, stack
    )
    for found in (carried, *(jax.tree.map(lambda x: x[1], each) for each in (mapped, scanned))):
        assert [x.shape for x in found.split()] == [(5, 16, 2, 80)] * 2
    np.testing.assert_array_equal(copy_pages(carried, slots, slots).pages, carried.pages)
    write = jax.export.export(jax.jit(lambda cache: write_kv_cache(cache, k, k, slots)))(cache)
    read = jax.export.deserialize(write.serialize())
    assert read.call(cache).dims == cache.dims


def test_a_cache_whose_heads_are_stored_otherwise_is_refused():
    k, slots = jnp.ones((3, 2, 80)), np.int32([7, -1, 79])

    def refused(cache, message, k=k):
        with pytest.raises(ValueError, match=message):
            write_kv_cache(cache, k, k, slots)

    pages = jnp.zeros((5, 2, 2, 16, 128))
    refused(
        KVCache(pages, layout="side_by_side"),
        r"cache.head_size is None and its array has heads of 128, must be 80 \(as in k\): wrap it "
        r"as KVCache\(pages, ..., head_size=80\), for layout 'side_by_side' pads heads",
    )
    said = KVCache(pages, layout="side_by_side", head_size=80)
    assert write_kv_cache(said, k, k, slots).dims == (5, 16, 2, 80)
    refused(said, "k has head_size 96, must be 80", jnp.ones((3, 2, 96)))
    of_160 = r"cache.pages has shape \(5, 2, 1, 16, 160\), must be \(5, 2, 2, 16, 128\) in layout "
    of_160 += "'side_by_side' with head_size 80: allocate it with allocate_kv_cache"
    refused(KVCache(jnp.zeros((5, 2, 1, 16, 160)), layout="side_by_side"), of_160)
    more = KVCache(pages, layout="side_by_side", head_size=192)
    refused(more, r"cache.pages has shape .*, must be \(5, 2, 3, 16, 128\) .* head_size 192")
    less = KVCache(jnp.zeros((2, 5, 16, 2, 128)), head_size=80)
    refused(less, r"must be \(2, 5, 16, 2, 80\) in layout 'stacked' with head_size 80")


def test_a_layout_of_a_third_party_may_pad_heads():
    def padded(x):
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[3] % 8)))

    replace(
        "page_by_page",
        layout(
            shape=lambda n, size, heads, dim: (n, 2, size, heads, -(-dim // 8) * 8),
            join=lambda k_pages, v_pages: jnp.stack([padded(k_pages), padded(v_pages)], axis=1),
        ),
    )
    filled = KVCache(jnp.arange(2 * 3 * 8 * 2 * 20, dtype=jnp.float32).reshape(2, 3, 8, 2, 20))
    mine = filled.converted("page_by_page")
    assert (mine.pages.shape, mine.dims) == ((3, 2, 8, 2, 24), (3, 8, 2, 20))
    k, slots = -jnp.ones((2, 2, 20)), np.int32([3, 17])
    got, want = (write_kv_cache(cache, k, k, slots) for cache in (mine, filled))
    np.testing.assert_array_equal(got.converted("stacked").pages, want.pages)


def test_latent_caches_are_converted():
    filled = LatentCache(jnp.arange(3 * 8 * 20, dtype=jnp.float32).reshape(3, 8, 20))
    mine = filled.converted("by_number", rope_dim=4)
    assert (mine.pages.shape, mine.num_pages, mine.page_size) == ((3, 20, 8), 3, 8)
    np.testing.assert_array_equal(mine.pages[2, 7], filled.pages[2, :, 7])
    np.testing.assert_array_equal(mine.converted("rows", rope_dim=4).pages, filled.pages)


TAKEN = "which a layout has already: choose another"


@pytest.mark.parametrize(
    ("name", "given", "error", "message"),
    [
        (5, layout(), TypeError, "name is 5, must be a string"),
        ("mine", "stacked", TypeError, "layout is 'stacked', must be a Layout or a LatentLayout"),
        ("rows", layout(), ValueError, f"name is 'rows', {TAKEN}$"),
        ("stacked", layout(), ValueError, f"name is 'stacked', {TAKEN}$"),
        ("by_number", layout(), ValueError, f"name is 'by_number', {TAKEN}, or unregister"),
    ],
)
def test_what_is_refused(name, given, error, message):
    with pytest.raises(error, match=message):
        register_cache_layout(name, given)


def test_only_registered_layouts_go_away():
    with pytest.raises(ValueError, match="name is 'stacked', must be a registered layout's"):
        unregister_cache_layout("stacked")
    with pytest.raises(ValueError, match="name is 'mine', must be one of page_by_page, by_number"):
        unregister_cache_layout("mine")
    cache = KVCache(jnp.zeros((3, 2, 8, 2, 4)), layout="page_by_page")
    unregister_cache_layout("page_by_page")
    with pytest.raises(ValueError, match="layout is 'page_by_page', must be one of stacked"):
        cache.num_pages  # noqa: B018
    unregister_cache_layout("by_number")
    with pytest.raises(ValueError, match="name is 'page_by_page', must be registered first"):
        unregister_cache_layout("page_by_page")


@pytest.mark.parametrize(
    ("cache", "layout"),
    [
        (KVCache(jnp.arange(2 * 3 * 4 * 2 * 128.0).reshape(2, 3, 4, 2, 128)), "by_head"),
        (LatentCache(jnp.arange(3 * 64 * 576.0).reshape(3, 64, 576)), "striped"),
    ],
    ids=["kv", "latent"],
)
def test_a_stack_of_caches_is_not_read_as_one(cache, layout):
    stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), cache)
    for ask in (lambda c: c.num_pages, lambda c: c.page_size, lambda c: c.converted(layout)):
        with pytest.raises(ValueError, match=r"pages has . dimensions .* of caches in a stack"):
            ask(stack)
    converted = jax.vmap(lambda cache: cache.converted(layout))(stack)
    one = jax.tree.map(lambda x: x[1], converted)
    np.testing.assert_array_equal(one.pages, 2 * cache.converted(layout).pages)
    assert one.num_pages == 3
