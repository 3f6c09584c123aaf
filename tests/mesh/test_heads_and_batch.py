"""Batch and heads cut by a mesh: the oracle's numbers, and no communication."""

import jax
import numpy as np
import pytest
from meshes import collectives, mesh, on_mesh, put

import attnsel_jax
from attnsel_jax import AttentionBackendEnum, AttentionMetadata, KVCache, LatentCache
from attnsel_jax.compare import compare
from attnsel_jax.compare.comparison import PASS
from attnsel_jax.mesh.groups import groups_of
from attnsel_jax.problems import Problem
from attnsel_jax.problems.dense_inputs import dense_inputs
from attnsel_jax.problems.mla_inputs import mla_inputs
from attnsel_jax.problems.paged_inputs import paged_inputs

DENSE = {"batch": 2, "heads": (8, 4), "head_size": 16, "q_len": 13, "dtype": "float32"}
PAGED = {"heads": (8, 4), "head_size": 16, "q_lens": (1, 9, 0, 4), "kv_lens": (35, 25, 7, 4),
         "page_size": 16, "dtype": "float32", "pad_tokens": 2}  # fmt: skip
LATENT = {"num_heads": 4, "rank": 16, "rope_dim": 8, "qk_nope_head_dim": 8,
          "q_lens": (1, 9, 0, 4), "kv_lens": (35, 25, 7, 4), "page_size": 16, "dtype": "float32",
          "pad_tokens": 2}  # fmt: skip


def check(problem, names, on, **cuts):
    """Each backend, cut so, gives the oracle's numbers within the dtype's budget."""
    for name in names:
        backend = AttentionBackendEnum[name].get_class()
        with jax.set_mesh(on):
            (row,) = compare([problem], {name: on_mesh(backend, problem.op, on, **cuts)}).rows
        assert row.verdict == PASS, str(row)


CUTS = {
    "heads": {"heads": "model", "kv_heads": "model"},
    "batch": {"batch": "data"},
    "both": {"batch": "data", "heads": "model", "kv_heads": "model"},
    "heads over two axes": {"heads": ("data", "model"), "kv_heads": None},
    "kv heads over the first of two axes": {"heads": ("data", "model"), "kv_heads": "data"},
    "kv heads whole": {"batch": "data", "heads": "model"},
}


@pytest.mark.parametrize("cut", CUTS)
def test_dense_and_its_gradients(cut):
    problem = Problem("cut", "dense", "", dense_inputs, DENSE | {"causal": True}, gradients=True)
    check(problem, ["XLA"], mesh(data=2, model=4), **CUTS[cut])


FEATURES = {
    "one kv head, bfloat16": {"heads": (8, 1), "dtype": "bfloat16", "causal": True},
    "fewer kv heads than shards, cap": {"heads": (8, 2), "soft_cap": 5.0, "causal": True},
    "everything": {
        "sinks": True, "alibi": True, "bias": (True, True, True, True), "segments": 2,
        "sliding_window": 7, "q_lens": (13, 8), "kv_lens": (13, 9), "masked": True,
        "q_offset": (0, 1), "causal": True, "head_size_v": 8,
    },
    "bias of each key, length 1": {"bias": (True, False, False, True), "q_len": 1, "kv_len": 11},
}  # fmt: skip


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("name", ["XLA", "XLA_REFERENCE"])
def test_dense_features(features, name):
    options = DENSE | FEATURES[features]
    problem = Problem(features, "dense", "", dense_inputs, options, gradients=name == "XLA")
    kv_heads = "model" if options["heads"][1] % 4 == 0 else None
    check(problem, [name], mesh(data=2, model=4), batch="data", heads="model", kv_heads=kv_heads)


def test_an_axis_that_cuts_nothing():
    """Beside the axes that cut, a mesh may have others: each device of those does the same."""
    problem = Problem("cut", "dense", "", dense_inputs, DENSE | {"causal": True}, gradients=True)
    on = mesh(data=2, other=2, model=2)
    check(problem, ["XLA"], on, batch="data", heads="model", kv_heads="model")


RAGGED = {"tokens": None, "heads": "model", "kv_heads": "model", "cache_heads": "model"}


@pytest.mark.parametrize("name", ["XLA", "XLA_REFERENCE"])
@pytest.mark.parametrize("options", [
    {}, {"cache_dtype": "int8", "scales": "head", "sinks": True, "alibi": True,
         "sliding_window": 20, "dtype": "bfloat16"},
], ids=["mixed", "everything"])  # fmt: skip
def test_paged_heads(name, options):
    problem = Problem("cut", "paged", "", paged_inputs, PAGED | options)
    check(problem, [name], mesh(model=4), **RAGGED)


@pytest.mark.parametrize("topk", [None, 16])
def test_mla_heads(topk):
    op, name = ("mla", "XLA_MLA") if topk is None else ("sparse_mla", "XLA_MLA_SPARSE")
    options = LATENT if topk is None else LATENT | {"topk": topk}
    problem = Problem("cut", op, "", mla_inputs, options)
    check(problem, [name], mesh(model=4), heads="model")


# The public ops: a model's call, unchanged, on arrays that lie on a mesh.


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def qkv(heads=8, kv_heads=4):
    return tuple(normal(i, 2, 11, n, 16) for i, n in enumerate((heads, kv_heads, kv_heads)))


def attend(q, k, v):
    return attnsel_jax.dot_product_attention(q, k, v, is_causal=True)


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "automatic"])
@pytest.mark.parametrize("spec", [("data", None, "model"), (None, None, "model"), ("data",)])
def test_ops_outside_jit_read_the_arrays(spec, explicit):
    on = mesh(explicit, data=2, model=4)
    q, k, v = qkv()
    out = attend(*(put(x, on, *spec) for x in (q, k, v)))
    close(out, attend(q, k, v))
    assert out.sharding.is_equivalent_to(put(q, on, *spec).sharding, 4)


@pytest.mark.parametrize("spec", [("data", None, "model"), (None, None, "model"), ("data",)])
def test_under_jit_with_explicit_axes_nothing_is_said_and_nothing_is_sent(spec):
    on = mesh(data=2, model=4)
    placed = [put(x, on, *spec) for x in qkv()]
    assert collectives(attend, *placed) == []
    close(jax.jit(attend)(*placed), attend(*qkv()))


def test_gradients_of_cut_heads_and_batch_need_no_communication():
    on = mesh(data=2, model=4)
    placed = [put(x, on, "data", None, "model") for x in qkv()]

    def loss(q, k, v):
        return (attend(q, k, v) ** 2).sum()

    sums = collectives(jax.grad(lambda *x: loss(*x), (0, 1, 2)), *placed)
    assert sums == []
    for a, b in zip(
        jax.jit(jax.grad(loss, (0, 1, 2)))(*placed), jax.grad(loss, (0, 1, 2))(*qkv()), strict=True
    ):
        close(a, b)


@pytest.mark.parametrize("how", ["argument", "context"])
def test_under_jit_with_automatic_axes_the_caller_says_them(how):
    on = mesh(False, data=2, model=4)
    axes = attnsel_jax.MeshAxes(batch="data", heads="model", mesh=on)
    placed = [put(x, on, "data", None, "model") for x in qkv()]

    def said(q, k, v):
        if how == "argument":
            return attnsel_jax.dot_product_attention(q, k, v, is_causal=True, mesh_axes=axes)
        with attnsel_jax.use_mesh_axes(axes):
            return attend(q, k, v)

    assert collectives(said, *placed) == []
    close(jax.jit(said)(*placed), attend(*qkv()))


def test_the_context_is_part_of_jit_s_key():
    on = mesh(False, data=2, model=4)
    traces = []

    @jax.jit
    def traced(q, k, v):
        traces.append(1)
        return attend(q, k, v)

    with attnsel_jax.use_mesh_axes(attnsel_jax.MeshAxes(heads="model", mesh=on)):
        inside = traced(*qkv())
    close(inside, traced(*qkv()))
    assert len(traces) == 2


@pytest.mark.parametrize("cut", ["heads", "positions"])
def test_a_policy_of_checkpoint_keeps_what_the_gradient_needs(cut):
    spec = (None, None, "model") if cut == "heads" else (None, "model")
    q = put(normal(0, 1, 16, 4, 16), mesh(model=4), *spec)

    def kept(name):
        policy = jax.checkpoint_policies.save_only_these_names(name)
        call = jax.checkpoint(lambda q: attend(2 * q, 2 * q, 2 * q), policy=policy)
        return len(jax.tree.leaves(jax.eval_shape(lambda q: jax.vjp(call, q)[1], q)))

    assert (kept(attnsel_jax.DENSE_RESIDUALS), kept("another's")) == (3, 1)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_the_caller_s_own_shard_map_a_call_is_one_device_s(check_vma):
    on = mesh(data=2, model=4)
    specs = (jax.P("data", None, "model"),) * 3
    mapped = jax.shard_map(
        attend, mesh=on, in_specs=specs, out_specs=specs[0], check_vma=check_vma
    )  # fmt: skip
    placed = [put(x, on, "data", None, "model") for x in qkv()]
    close(jax.jit(mapped)(*placed), attend(*qkv()))
    with attnsel_jax.use_mesh_axes(attnsel_jax.MeshAxes(batch="data", heads="model", mesh=on)):
        close(jax.jit(mapped)(*placed), attend(*qkv()))


def paged_call(groups=1, cache_heads=4):
    """A step of `groups` groups of two sequences: (q, k, v, cache, metadata), on no mesh."""
    pages, page_size = 4 * groups, 4
    batches = [
        AttentionMetadata.from_lengths(
            [3, 1], [5, 6 + i % 3], [[4 * i + 3, 4 * i], [4 * i + 1, 4 * i + 2]], page_size,
            num_tokens=5, max_num_seqs=3,
        )
        for i in range(groups)
    ]  # fmt: skip
    metadata = AttentionMetadata.grouped(batches) if groups > 1 else batches[0]
    cache = normal(7, 2, pages, page_size, cache_heads, 16)
    return (normal(3, 5 * groups, 8, 16), normal(4, 5 * groups, 4, 16),
            normal(5, 5 * groups, 4, 16), KVCache(cache), metadata)  # fmt: skip


def one_group(call, i, groups):
    """Group i of a call by itself: its own tokens, the whole cache."""
    q, k, v, cache, metadata = call
    cut = lambda x: x[i * (x.shape[0] // groups) : (i + 1) * (x.shape[0] // groups)]  # noqa: E731
    return cut(q), cut(k), cut(v), cache, groups_of(metadata)[i]


@pytest.mark.once
@pytest.mark.parametrize("on_a_mesh", [False, True])
def test_groups_of_sequences_with_their_pages(on_a_mesh):
    """Each group's result is what it has alone; the cache is each group's rows together."""
    groups = 4
    q, k, v, cache, metadata = call = paged_call(groups)
    if on_a_mesh:
        on = mesh(data=2, model=4)
        q, k, v = (put(x, on, "data", "model") for x in (q, k, v))
        cache = KVCache(put(cache.pages, on, None, "data", None, "model"))
        metadata = jax.tree.map(lambda x: put(x, on, "data"), metadata)
        assert collectives(attnsel_jax.paged_attention, q, k, v, cache, metadata) == []
    out, written = jax.jit(attnsel_jax.paged_attention)(q, k, v, cache, metadata)
    alone = call[3]
    for i in range(groups):
        q_i, k_i, v_i, _, metadata_i = one_group(call, i, groups)
        expected, alone = attnsel_jax.paged_attention(
            q_i, k_i, v_i, alone, metadata_i, checked=True
        )
        close(np.asarray(out)[5 * i : 5 * i + 5], expected)
    close(written.pages, alone.pages)


@pytest.mark.once
def test_groups_of_latents_with_their_pages():
    on = mesh(data=2, model=4)
    _, _, _, _, metadata = paged_call(2)
    tokens = normal(1, 10, 8, 16), normal(2, 10, 8, 8), normal(3, 10, 16), normal(4, 10, 8)
    cache = LatentCache(normal(5, 8, 4, 24))

    def step(ql_nope, q_pe, kv_c, k_pe, cache, metadata):
        return attnsel_jax.mla_attention(ql_nope, q_pe, kv_c, k_pe, cache, metadata, scale=0.3)

    heads, rows = ("data", "model"), ("data",)
    placed = [put(x, on, *(heads if x.ndim == 3 else rows)) for x in tokens]
    placed += [LatentCache(put(cache.pages, on, "data")),
               jax.tree.map(lambda x: put(x, on, "data"), metadata)]  # fmt: skip
    assert collectives(step, *placed) == []
    for a, b in zip(
        jax.tree.leaves(jax.jit(step)(*placed)), jax.tree.leaves(step(*tokens, cache, metadata)),
        strict=True,
    ):  # fmt: skip
        close(a, b)


@pytest.mark.parametrize("on_a_mesh", [False, True])
def test_a_cache_of_more_heads_than_k_holds_copies(on_a_mesh):
    """Four kv heads on eight shards: the cache has eight, each of k's heads twice."""
    q, k, v, cache, metadata = paged_call(cache_heads=8)
    few = KVCache(cache.pages[:, :, :, ::2])
    cache = KVCache(np.repeat(few.pages, 2, axis=3))
    expected, written = attnsel_jax.paged_attention(q, k, v, few, metadata)
    if on_a_mesh:
        on = mesh(model=8)
        q = put(q, on, None, "model")
        cache = KVCache(put(cache.pages, on, None, None, None, "model"))
        assert collectives(attnsel_jax.paged_attention, q, k, v, cache, metadata) == []
    out, copies = jax.jit(attnsel_jax.paged_attention)(q, k, v, cache, metadata)
    close(out, expected)
    close(copies.pages, np.repeat(np.asarray(written.pages), 2, axis=3))


@pytest.mark.once
def test_an_impl_reads_the_arrays_too():
    on = mesh(model=4)
    q, k, v, cache, metadata = paged_call()
    impl = AttentionBackendEnum["XLA"].get_class().get_impl_cls()(8, 16, 0.25, num_kv_heads=4)
    expected, written = impl.forward(q, k, v, cache, metadata)
    cut = [put(x, on, None, "model") for x in (q, k, v)]
    cache = KVCache(put(cache.pages, on, None, None, None, "model"))
    assert collectives(impl.forward, *cut, cache, metadata) == []
    out, cache = jax.jit(impl.forward)(*cut, cache, metadata)
    close(out, expected)
    close(cache.pages, written.pages)


def test_the_cache_is_updated_in_place_on_every_device():
    on = mesh(model=4)
    q, k, v, cache, metadata = paged_call()
    q, k, v = (put(x, on, None, "model") for x in (q, k, v))
    cache = KVCache(put(cache.pages, on, None, None, None, "model"))
    step = jax.jit(attnsel_jax.paged_attention, donate_argnums=3)
    memory = step.lower(q, k, v, cache, metadata).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.pages.nbytes // 4


def test_the_question_asks_for_one_shard_s_heads(monkeypatch):
    from attnsel_jax.ops import dense

    asked = {}
    chosen = dense.get_attn_backend
    monkeypatch.setattr(
        dense, "get_attn_backend", lambda *a, **k: asked.update(k) or chosen(*a, **k)
    )
    on = mesh(data=2, model=4)
    q, k, v = qkv(kv_heads=2)
    attend(put(q, on, "data", None, "model"), put(k, on, "data"), put(v, on, "data"))
    assert (asked["num_heads"], asked["num_kv_heads"]) == (2, 1)
