"""Cache layouts that packages register: a kernel of one is compared like any other."""

import jax.numpy as jnp
import numpy as np
import pytest
from third_party import backend

from attnsel_jax import allocate_kv_cache, register_cache_layout, unregister_cache_layout
from attnsel_jax.backends.xla import XlaBackend
from attnsel_jax.cache_layouts import LATENT_LAYOUTS, LAYOUTS, LatentLayout, Layout
from attnsel_jax.compare import compare
from attnsel_jax.kv_cache import KVCache
from attnsel_jax.registry import register_backend
from attnsel_jax.xla.paged import paged_attention as stacked_attention

PROBLEM = "quick.paged.mixed"


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


@pytest.fixture(autouse=True)
def registered():
    register_cache_layout("page_by_page", layout())
    yield
    for name in {*LAYOUTS, *LATENT_LAYOUTS} - {"stacked", "by_head", "side_by_side"}:
        if name not in ("rows", "striped", "tiled"):
            unregister_cache_layout(name)


def paged_attention(q, k, v, kv_pages, *args, **options):
    """XLA's, of a cache of `layout()`."""
    out, lse, pages = stacked_attention(q, k, v, jnp.swapaxes(kv_pages, 0, 1), *args, **options)
    return out, lse, jnp.swapaxes(pages, 0, 1)


MINE = backend(
    "MINE", layout="page_by_page", kernels={"paged": f"{__name__}:paged_attention"},
    capabilities={"paged": XlaBackend.capabilities["paged"]},
)  # fmt: skip


def test_a_kernel_of_a_registered_layout_is_compared_like_any_other():
    assert [row.verdict for row in compare([PROBLEM], [MINE])] == ["pass"]
    register_cache_layout("page_by_page", layout(split=lambda pages: (pages[:, 1], pages[:, 0])))
    assert [row.verdict for row in compare([PROBLEM], [MINE])] == ["fail"]


def test_caches_are_allocated_and_converted():
    register_backend("MINE", MINE)
    cache = allocate_kv_cache(5, 16, 2, 64, "bfloat16", backend="MINE")
    assert (cache.layout, cache.pages.shape) == ("page_by_page", (5, 2, 16, 2, 64))
    assert (cache.num_pages, cache.page_size, cache.num_kv_heads) == (5, 16, 2)
    filled = KVCache(jnp.arange(2 * 3 * 8 * 2 * 4, dtype=jnp.float32).reshape(2, 3, 8, 2, 4))
    mine = filled.converted("page_by_page")
    np.testing.assert_array_equal(mine.pages[1, 0], filled.pages[0, 1])
    np.testing.assert_array_equal(mine.converted("stacked").pages, filled.pages)


def test_a_layout_of_latent_caches():
    by_number = LatentLayout(
        shape=lambda num_pages, page_size, row, itemsize: (num_pages, row, page_size),
        dims=lambda shape: (shape[0], shape[2], shape[1]),
        to_rows=lambda pages, rope_dim: jnp.swapaxes(pages, 1, 2),
        from_rows=lambda rows, rope_dim: jnp.swapaxes(rows, 1, 2),
    )
    register_cache_layout("by_number", by_number)
    assert LATENT_LAYOUTS["by_number"] is by_number
    assert "by_number" not in LAYOUTS


@pytest.mark.parametrize(
    ("name", "given", "error", "message"),
    [
        ("mine", "stacked", TypeError, "layout is 'stacked', must be a Layout or a LatentLayout"),
        ("rows", layout(), ValueError, "name is 'rows', which is a built-in layout"),
        ("stacked", layout(), ValueError, "name is 'stacked', which is a built-in layout"),
        (
            "page_by_page", LATENT_LAYOUTS["rows"], ValueError,
            "name is 'page_by_page', which is a layout of the other kind",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(name, given, error, message):
    with pytest.raises(error, match=message):
        register_cache_layout(name, given)


def test_only_registered_layouts_go_away():
    with pytest.raises(ValueError, match="name is 'stacked', must be page_by_page"):
        unregister_cache_layout("stacked")
    cache = KVCache(jnp.zeros((3, 2, 8, 2, 4)), layout="page_by_page")
    unregister_cache_layout("page_by_page")
    with pytest.raises(ValueError, match="layout is 'page_by_page', must be one of stacked"):
        cache.num_pages  # noqa: B018
    with pytest.raises(ValueError, match="there is none"):
        unregister_cache_layout("page_by_page")
    register_cache_layout("page_by_page", layout())
