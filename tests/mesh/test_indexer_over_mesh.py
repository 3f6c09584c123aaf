"""The indexer and sparse MLA over a mesh: the oracle's numbers, and what is sent, counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import collectives, mesh, put

import attnsel_jax
from attnsel_jax import AttentionMetadata, LatentCache, MeshAxes, oracle, use_mesh_axes
from attnsel_jax.problems.indexer_inputs import indexer_inputs

pytestmark = pytest.mark.once
ORDER = ("q_index", "weights", "index_pages", "page_table", "kv_lens", "cu_q_lens", "num_seqs")
LENGTHS = [((1, 6, 0, 2), (35, 25, 7, 2)), ((6, 2, 1, 0), (7, 35, 2, 25))]


def one_group(i):
    """Arguments of one group: NaN in every slot and every token that is not to be read."""
    q_lens, kv_lens = LENGTHS[i % 2]
    part = indexer_inputs(
        np.random.default_rng(i), q_lens=q_lens, kv_lens=kv_lens, num_index_heads=8,
        index_head_dim=16, page_size=4, dtype="float32", pad_tokens=2,
    )  # fmt: skip
    pages = part["index_pages"]
    unused = np.full_like(pages[: len(pages) % 2], np.nan)  # two devices share them evenly
    return part | {"index_pages": np.concatenate([pages, unused])}


def problem(groups=1):
    """(q_index, weights, index_pages, metadata) of groups side by side; the oracle's scores."""
    parts = [one_group(i) for i in range(groups)]
    scores = np.concatenate([oracle.indexer_scores(**part) for part in parts])
    pages = len(parts[0]["index_pages"])
    batches = [
        AttentionMetadata(**{n: jnp.asarray(p[n] + (i * pages if n == "page_table" else 0))
                             for n in ORDER[3:]})
        for i, p in enumerate(parts)
    ]  # fmt: skip
    arrays = [np.concatenate([p[name] for p in parts]) for name in ORDER[:3]]
    return (*arrays, AttentionMetadata.grouped(batches) if groups > 1 else batches[0]), scores


def placed(call, on, data=None, model=None, pages=None):
    """The call's arrays on a mesh: groups over `data`, heads over `model`."""
    q, weights, index_pages, metadata = call
    rows = (data,) if data else ()
    return (
        put(q, on, data, model), put(weights, on, data, model), put(index_pages, on, pages or data),
        jax.tree.map(lambda x: put(x, on, *rows), metadata),
    )  # fmt: skip


def close(got, want):
    got = np.asarray(got)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    seen = np.isfinite(want)
    assert 0 < seen.sum() < seen.size
    np.testing.assert_allclose(got[seen], want[seen], atol=2e-5)


CUTS = {
    "groups": ({"data": 4}, {"data": "data"}, []),
    "groups, two to a device": ({"data": 2}, {"data": "data"}, []),
    "heads": ({"model": 4}, {"model": "model"}, ["all-reduce"]),
    "heads over two axes": ({"x": 2, "y": 4}, {"model": ("x", "y")}, ["all-reduce"]),
    "groups and heads": ({"data": 2, "model": 4}, {"data": "data", "model": "model"},
                         ["all-reduce"]),
}  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_scores_read_the_arrays_under_explicit_axes(cut):
    axes, cuts, sent = CUTS[cut]
    call, want = problem(4 if "data" in axes else 1)
    arguments = placed(call, mesh(**axes), **cuts)
    assert collectives(attnsel_jax.indexer_scores, *arguments) == sent
    got = jax.jit(attnsel_jax.indexer_scores)(*arguments)
    close(got, want)
    assert got.sharding.spec[0] == cuts.get("data")
    close(attnsel_jax.indexer_scores(*arguments), want)


@pytest.mark.parametrize("cut", ["groups", "groups and heads"])
def test_scores_under_automatic_axes_as_the_caller_says(cut):
    axes, cuts, sent = CUTS[cut]
    call, want = problem(4)
    on = mesh(False, **axes)
    said = MeshAxes(batch=cuts.get("data"), heads=cuts.get("model"), mesh=on)
    score = functools.partial(attnsel_jax.indexer_scores, mesh_axes=said)
    arguments = placed(call, on, **cuts)
    assert collectives(score, *arguments) == sent
    close(jax.jit(score)(*arguments), want)


@pytest.mark.parametrize(("data", "model", "sums"), [
    (None, None, 1), (None, "model", 2), ("data", "model", 2),
])  # fmt: skip
def test_scores_of_pages_spread_over_devices(data, model, sums):
    call, want = problem(2 if data else 1)
    on = mesh(data=2, seq=2, model=2)
    arguments = placed(call, on, data, model, pages=("data", "seq") if data else "seq")
    with use_mesh_axes(MeshAxes(batch=data, heads=model, context="seq", mesh=on)):
        assert collectives(attnsel_jax.indexer_scores, *arguments) == ["all-reduce"] * sums
        close(jax.jit(attnsel_jax.indexer_scores)(*arguments), want)


@pytest.mark.parametrize(("dtype", "cache"), [
    ("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn"), ("float32", "bfloat16"),
])  # fmt: skip
def test_scores_of_other_dtypes(dtype, cache):
    """The sum over devices is of float32 scores, as one device's is."""
    (q, weights, pages, metadata), _ = problem(2)
    call = jnp.asarray(q, dtype), weights, jnp.asarray(pages, cache), metadata
    want = np.asarray(attnsel_jax.indexer_scores(*call))
    got = jax.jit(attnsel_jax.indexer_scores)(
        *placed(call, mesh(data=2, model=2), "data", "model")
    )  # fmt: skip
    assert got.dtype == np.float32
    close(got, want)


def test_scores_on_no_mesh_of_numpy_arrays_and_of_nothing():
    for groups in (1, 2):
        call, want = problem(groups)
        close(attnsel_jax.indexer_scores(*call), want)
    q, weights, pages, metadata = problem()[0]
    none = attnsel_jax.indexer_scores(q[:0], weights[:0], pages, metadata)
    assert none.shape == (0, want.shape[1])


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "automatic"])
def test_the_best_positions_of_tokens_cut_by_a_mesh(explicit):
    scores = problem(4)[1].astype(np.float32)
    on = mesh(explicit, data=4)
    axes = None if explicit else MeshAxes(batch="data", mesh=on)
    best = functools.partial(attnsel_jax.topk_positions, topk=5, mesh_axes=axes)
    cut = put(scores, on, "data")
    assert collectives(best, cut) == []
    want = oracle.topk_positions(scores, 5)
    for got in (jax.jit(best)(cut), best(cut), attnsel_jax.topk_positions(scores, 5)):
        np.testing.assert_array_equal(got, want)


def latents(groups):
    """Queries and a cache of latents beside `problem`'s batch; nothing is written."""
    (q, _, pages, _), _ = problem(groups)
    normal = np.random.default_rng(9).standard_normal
    shapes = (len(q), 8, 16), (len(q), 8, 8), (*pages.shape[:2], 24)
    return [normal(shape, np.float32) for shape in shapes]


def step(q_index, weights, index_pages, metadata, ql_nope, q_pe, pages):
    """One step of a layer of DeepSeek V3.2: score, choose, attend."""
    scores = attnsel_jax.indexer_scores(q_index, weights, index_pages, metadata)
    best = attnsel_jax.topk_positions(scores, 7)
    out, lse, _ = attnsel_jax.sparse_mla_attention(
        ql_nope, q_pe, None, None, best, LatentCache(pages), metadata, scale=0.3, return_lse=True
    )
    return out, lse


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "automatic"])
def test_a_step_of_a_layer_sends_the_scores_alone(explicit):
    on = mesh(explicit, data=2, model=4)
    call, scores = problem(2)
    ql_nope, q_pe, pages = latents(2)
    cut = [
        put(ql_nope, on, "data", "model"),
        put(q_pe, on, "data", "model"),
        put(pages, on, "data"),
    ]
    arguments = [*placed(call, on, "data", "model"), *cut]
    said = None if explicit else MeshAxes(batch="data", heads="model", mesh=on)
    with use_mesh_axes(said):
        assert collectives(step, *arguments) == ["all-reduce"]
        out, lse = jax.jit(step)(*arguments)
    best = oracle.topk_positions(scores, 7)
    tokens, num_pages = len(scores) // 2, len(pages) // 2
    for i in range(2):
        part = one_group(i)
        rows = slice(i * tokens, (i + 1) * tokens)
        want_out, want_lse, _ = oracle.sparse_mla_attention(
            ql_nope[rows], q_pe[rows], None, None, pages[i * num_pages : (i + 1) * num_pages],
            best[rows], *(part[name] for name in ORDER[3:]), None, scale=0.3,
        )  # fmt: skip
        np.testing.assert_allclose(np.asarray(out)[rows], want_out, atol=2e-5)
        np.testing.assert_allclose(np.asarray(lse)[rows], want_lse, atol=2e-5)


def refused(message, kind=ValueError, **changed):
    names = ("q_index", "weights", "index_pages", "metadata")
    call = dict(zip(names, problem()[0], strict=True))
    with pytest.raises(kind, match=message):
        attnsel_jax.indexer_scores(**call | changed)


def test_refusals():
    on = mesh(False, model=3)
    axes = MeshAxes(heads="model", mesh=on)
    refused("^num_heads of q_index is 8, must be a multiple of 3, the size of mesh axis 'model'",
            mesh_axes=axes)  # fmt: skip
    refused("^num_seqs has shape .*AttentionMetadata.grouped",
            mesh_axes=MeshAxes(batch="model", mesh=on))  # fmt: skip
    refused("^weights has num_tokens 3", weights=np.ones((3, 8), np.float32))
    refused("^q_index is list, must be an array", TypeError, q_index=[1])
    refused("^metadata is NoneType", TypeError, metadata=None)
    batch = {name: jnp.asarray(one_group(0)[name]) for name in ORDER[3:]}
    refused("^metadata.causal is False, must be True.*causal=True",
            metadata=AttentionMetadata(**batch, causal=False))  # fmt: skip
    for scores, topk, message in (
        (np.ones((2, 3), np.float32), 0, "topk is 0, must be"),
        (np.ones(3, np.float32), 2, "scores has 1 dimensions"),
        (np.ones((2, 3), np.int32), 2, "scores has dtype int32"),
    ):
        with pytest.raises(ValueError, match=message):
            attnsel_jax.topk_positions(scores, topk)
