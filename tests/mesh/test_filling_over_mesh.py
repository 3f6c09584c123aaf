"""Caches filled over a mesh: each device its share, and as one device would fill the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import collectives, mesh, put

from attnsel_jax import (
    KVCache,
    LatentCache,
    MeshAxes,
    copy_pages,
    use_mesh_axes,
    write_index_keys,
    write_kv_cache,
    write_latent_cache,
)

PAGES, SIZE, TOKENS = 8, 64, 6
# Of two groups, whose pages are the first and the second half.
SLOTS = np.array([5, 3 * SIZE, -1, 4 * SIZE, 8 * SIZE - 1, 7 * SIZE], np.int32)
KINDS = [pytest.param(True, id="explicit"), pytest.param(False, id="automatic")]


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def same(got, want, spec, on):
    np.testing.assert_array_equal(got, want)
    assert got.sharding.is_equivalent_to(jax.NamedSharding(on, jax.P(*spec)), got.ndim)


@pytest.mark.parametrize("explicit", KINDS)
@pytest.mark.parametrize("kv_heads", [8, 4, 2], ids="{} heads of k".format)
def test_heads(kv_heads, explicit):
    """Of which k may have fewer than there are shards; scales are a head's own."""
    on = mesh(explicit, data=2, model=4)
    k, v = normal(1, TOKENS, kv_heads, 64), normal(2, TOKENS, kv_heads, 64)
    scale = np.arange(1, 9, dtype=np.float32)
    cache = KVCache(normal(3, 2, PAGES, SIZE, 8, 64), scale, 2 * scale).converted("side_by_side")
    want = write_kv_cache(cache, k, v, SLOTS).pages
    cut = "model" if kv_heads % 4 == 0 else None
    spec = (None, "model")
    shared = KVCache(
        put(cache.pages, on, *spec), put(scale, on, "model"), put(2 * scale, on, "model"),
        layout="side_by_side",
    )  # fmt: skip
    rows = [put(x, on, None, cut) for x in (k, v)]
    same(write_kv_cache(shared, *rows, put(SLOTS, on)).pages, want, spec, on)
    if explicit:  # under jit automatic axes do not show
        assert collectives(lambda *x: write_kv_cache(*x).pages, shared, *rows, SLOTS) == []


@pytest.mark.parametrize("explicit", KINDS)
@pytest.mark.parametrize("by", ["groups", "pages"])
def test_pages(by, explicit):
    """A group's tokens with its pages; pages of one sequence anywhere, every device sees all."""
    on = mesh(explicit, data=2, model=4)
    tokens = "data" if by == "groups" else None
    rows = normal(1, TOKENS, 512), normal(2, TOKENS, 64)
    cache = LatentCache(normal(3, PAGES, SIZE, 576)).converted("tiled")
    want = write_latent_cache(cache, *rows, SLOTS).pages
    shared = cache.with_pages(put(cache.pages, on, "data"))
    given = (*(put(x, on, tokens) for x in rows), put(SLOTS, on, tokens))
    same(write_latent_cache(shared, *given).pages, want, ("data",), on)
    if explicit:
        assert collectives(lambda *x: write_latent_cache(*x).pages, shared, *given) == []

    index, keys = normal(4, PAGES, SIZE, 128), normal(5, TOKENS, 128)
    got = write_index_keys(put(index, on, "data"), put(keys, on, tokens), put(SLOTS, on, tokens))
    same(got, write_index_keys(index, keys, SLOTS), ("data",), on)


@pytest.mark.parametrize("layout", ["stacked", "by_head", "side_by_side"])
def test_groups_and_heads_under_jit_as_the_caller_says(layout):
    on = mesh(explicit=False, data=2, model=4)
    k, v = normal(1, TOKENS, 4, 80), normal(2, TOKENS, 4, 80)
    cache = KVCache(normal(3, 2, PAGES, SIZE, 4, 80)).converted(layout)
    want = write_kv_cache(cache, k, v, SLOTS).pages
    said = MeshAxes(mesh=on, batch="data", heads="model")
    np.testing.assert_array_equal(
        jax.jit(functools.partial(write_kv_cache, mesh_axes=said))(cache, k, v, SLOTS).pages, want
    )
    with use_mesh_axes(said):
        np.testing.assert_array_equal(jax.jit(write_kv_cache)(cache, k, v, SLOTS).pages, want)


@pytest.mark.parametrize("explicit", KINDS)
def test_pages_are_copied_where_heads_are_cut_and_nowhere_else(explicit):
    on = mesh(explicit, data=2, model=4)
    cache = KVCache(normal(3, 2, PAGES, SIZE, 4, 64)).converted("by_head")
    ids = np.array([1, 2], np.int32), np.array([2, 6], np.int32)
    want = copy_pages(cache, *ids).pages
    spec = (None, None, "model")
    shared = cache.with_pages(put(cache.pages, on, *spec))
    same(copy_pages(shared, *ids).pages, want, spec, on)
    if explicit:
        assert collectives(lambda *x: copy_pages(*x).pages, shared, *ids) == []
    for pages in (
        cache.with_pages(put(cache.pages, on, None, "data")),
        put(normal(4, PAGES, SIZE, 128), on, "data"),
    ):
        with pytest.raises(
            ValueError, match=r"sharded by pages over mesh axis 'data' .*, must be whole"
        ):
            copy_pages(pages, *ids)


def test_shares_that_cannot_be_are_refused():
    on = mesh(data=2, model=4)
    k = put(normal(1, TOKENS, 4, 64), on)
    cache = KVCache(put(normal(3, 2, 7, SIZE, 4, 64), on))
    with pytest.raises(ValueError, match="num_pages of kv_pages is 7, must be a multiple of 2"):
        write_kv_cache(cache, k, k, SLOTS, mesh_axes=MeshAxes(batch="data"))
    cache = KVCache(put(jnp.zeros((2, 8, SIZE, 2, 64)), on))
    two = k[:, :2]
    with pytest.raises(ValueError, match="the cache's num_kv_heads of kv_pages is 2, must be"):
        write_kv_cache(cache, two, two, SLOTS, mesh_axes=MeshAxes(heads="model"))
