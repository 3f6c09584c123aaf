"""What model code calls: equal to jax.nn where it stands in for it, to the oracle everywhere."""

import dataclasses
import inspect

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from calls import PAGE_SIZE, batch, dense, mla, normal, paged, sparse
from third_party import PlainBackend

from attnsel_jax import (
    AttentionBackendEnum,
    AttentionMetadata,
    CommonAttentionMetadata,
    KVCache,
    LatentCache,
    NoAttentionBackendError,
    allocate_kv_cache,
    allocate_latent_cache,
    dot_product_attention,
    get_attn_backend,
    global_force_attn_backend_context_manager,
    mla_attention,
    oracle,
    paged_attention,
    register_backend,
    sparse_mla_attention,
)

DENSE_BACKENDS = ("XLA", "XLA_REFERENCE")
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}


def close(actual, expected, dtype="float32"):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def bits(*shape):
    """A mask under which every row sees its first key."""
    mask = np.random.default_rng(7).random(shape) < 0.6
    mask[..., 0] = True
    return jnp.asarray(mask)


# The drop-in.


def test_the_signature_is_that_of_jax_nn_and_more_keywords():
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(dot_product_attention).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind == parameter.kind, name
    more = [parameter for name, parameter in ours.items() if name not in theirs]
    assert all(parameter.kind == parameter.KEYWORD_ONLY for parameter in more)
    assert {"q_offset", "soft_cap", "sinks", "q_segment_ids", "kv_segment_ids", "backend"} <= set(
        ours
    )


DROP_IN = {
    "plain": (dense(), {}),
    "one kv head, scale": (dense(kv_heads=1), {"scale": 0.7}),
    "3 dimensions, causal": ({n: x[0] for n, x in dense(kv_len=5).items()}, {"is_causal": True}),
    "causal, more keys (top-left)": (dense(), {"is_causal": True}),
    "causal, more queries": (dense(q_len=9), {"is_causal": True}),
    "scale 0": (dense(), {"scale": 0}),
    "negative scale of numpy": (dense(), {"scale": np.float32(-0.5)}),
    "bias": (dense(), {"bias": normal(4, 2, 4, 5, 7)}),
    "bias for all heads": (dense(), {"bias": normal(4, 2, 1, 5, 7)}),
    "bias of keys": (dense(), {"bias": normal(4, 1, 1, 1, 7)}),
    "bias of queries and mask": (
        dense(), {"bias": normal(4, 2, 4, 5, 1), "mask": bits(1, 1, 5, 7)}
    ),
    "bias of 3 dimensions": (dense(), {"bias": normal(4, 4, 5, 7)}),
    "mask of keys": (dense(), {"mask": bits(2, 1, 1, 7)}),
    "window": (dense(), {"local_window_size": 2}),
    "window of none but oneself": (dense(), {"local_window_size": 0}),
    "uneven window of numpy": (dense(), {"local_window_size": (np.int64(1), np.int32(3))}),
    "window and causal": (dense(), {"local_window_size": (2, 2), "is_causal": True}),
    "lengths": (
        dense(),
        {"query_seq_lengths": jnp.array([5, 5]), "key_value_seq_lengths": jnp.array([4, 7])},
    ),
    "xla": (dense(kv_heads=4), {"implementation": "xla"}),
}  # fmt: skip


@pytest.mark.parametrize("case", DROP_IN)
def test_results_are_those_of_jax_nn(case):
    arrays, more = DROP_IN[case]
    theirs = {n: float(x) if isinstance(x, np.float32) else x for n, x in more.items()}
    if "window of numpy" in case:
        theirs = {"local_window_size": (1, 3)}
    expected = jax.nn.dot_product_attention(**arrays, **theirs)
    actual = dot_product_attention(**arrays, **more)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    close(actual, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_in_short_dtypes(dtype):
    arrays = dense(dtype=dtype)
    expected = jax.nn.dot_product_attention(**arrays, is_causal=True)
    actual = dot_product_attention(**arrays, is_causal=True)
    assert actual.dtype == expected.dtype == dtype
    close(actual, expected, dtype)


@pytest.mark.parametrize("case", ["causal, more keys (top-left)", "bias for all heads"])
def test_gradients_are_those_of_jax_nn(case):
    arrays, more = DROP_IN[case]
    more = {n: x for n, x in more.items() if n != "bias"}
    bias = DROP_IN[case][1].get("bias", jnp.zeros((1, 1, 1, 7)))
    weights = normal(9, 2, 5, 4, 8)

    def gradients(attend, **own):
        def loss(arrays, bias):
            return jnp.sum(weights * attend(**arrays, bias=bias, **more, **own))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(arrays, bias)

    expected = gradients(jax.nn.dot_product_attention)
    actual = gradients(dot_product_attention)
    jax.tree.map(close, actual, expected)


@pytest.mark.parametrize("rank", [3, 4])
def test_the_residual_is_the_lse_in_float32(rank):
    arrays = dense(dtype="bfloat16")
    if rank == 3:
        arrays = {n: x[0] for n, x in arrays.items()}
    _, lse = dot_product_attention(**arrays, return_residual=True)
    _, theirs = jax.nn.dot_product_attention(**arrays, return_residual=True)
    assert lse.dtype == jnp.float32
    assert lse.shape == theirs.shape == arrays["query"].shape[:-1]
    close(lse, theirs, "bfloat16")
    full = arrays if rank == 4 else {n: x[None] for n, x in arrays.items()}
    _, expected = oracle.dense_attention(*full.values())
    close(lse, expected if rank == 4 else expected[0])


@pytest.mark.parametrize("backend", DENSE_BACKENDS)
def test_the_one_difference_is_rows_that_see_no_key(backend):
    arrays = dense()
    mask = bits(2, 1, 5, 7).at[:, :, 2].set(False)
    out, lse = dot_product_attention(**arrays, mask=mask, return_residual=True, backend=backend)
    theirs = jax.nn.dot_product_attention(**arrays, mask=mask)
    assert not out[:, 2].any()
    assert (lse[:, 2] == -jnp.inf).all()
    assert theirs[:, 2].any(), "jax.nn gives the mean of v"
    rest = np.array([0, 1, 3, 4])
    close(out[:, rest], theirs[:, rest])


@pytest.mark.parametrize(
    ("q_len", "kv_len", "batch_size"), [(0, 7, 2), (5, 0, 2), (0, 0, 2), (5, 7, 0), (1, 1, 1)]
)
@pytest.mark.parametrize("sinks", [None, np.arange(4.0)])
def test_nothing_to_attend_from_or_to(q_len, kv_len, batch_size, sinks):
    call = dense(q_len=q_len, kv_len=kv_len, batch=batch_size)
    lens = np.full(batch_size, max(q_len - 1, 0))
    more = {"sinks": sinks, "query_seq_lengths": lens}
    out, lse = dot_product_attention(**call, **more, return_residual=True)
    expected, expected_lse = oracle.dense_attention(*call.values(), sinks=sinks, q_lens=lens)
    close(out, expected)
    close(lse, expected_lse)


def test_a_step_without_tokens():
    nothing = AttentionMetadata.from_lengths([], [], [], PAGE_SIZE)
    for op, make in ((paged_attention, paged), (mla_attention, mla)):
        call = make() | {"metadata": nothing}
        tokens = [name for name, x in call.items() if isinstance(x, jax.Array)]
        call |= {name: call[name][:0] for name in tokens}
        out, lse, cache = op(**call, return_lse=True, checked=True)
        assert (out.shape[0], lse.shape) == (0, (0, 4))
        assert cache.pages is call["cache"].pages


# More keywords, against the oracle.

MORE = {
    "an offset for each row, a cap and sinks": (
        {"is_causal": True, "q_offset": np.array([-1, 2]), "soft_cap": 1.5, "sinks": [1, 0, 2, -1]},
        {"causal": True, "q_offset": [-1, 2], "soft_cap": 1.5, "sinks": [1, 0, 2, -1]},
    ),
    "segments": (
        {"q_segment_ids": [[0, 0, 1, 1, 2]] * 2, "kv_segment_ids": [[0, 1, 1, 0, 3, 3, 1]] * 2},
        {"q_segment_ids": [[0, 0, 1, 1, 2]] * 2, "kv_segment_ids": [[0, 1, 1, 0, 3, 3, 1]] * 2},
    ),
    "slopes, chunks, lengths": (
        {"alibi_slopes": np.arange(4.0) / 4, "attention_chunk_size": 3,
         "query_seq_lengths": [5, 2], "key_value_seq_lengths": (3, 7)},
        {"alibi_slopes": np.arange(4.0) / 4, "attention_chunk_size": 3,
         "q_lens": [5, 2], "kv_lens": [3, 7]},
    ),
    "everything": (
        {"is_causal": True, "q_offset": 2, "soft_cap": 2.0, "sinks": np.arange(4.0),
         "local_window_size": (3, 0), "bias": normal(8, 1, 4, 5, 7), "mask": bits(2, 1, 5, 7)},
        {"causal": True, "q_offset": 2, "soft_cap": 2.0, "sinks": np.arange(4.0),
         "sliding_window": (4, 1), "bias": normal(8, 1, 4, 5, 7), "mask": bits(2, 1, 5, 7)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MORE)
def test_more_keywords_against_the_oracle(case):
    ours, contracts = MORE[case]
    call = dense()
    out, lse = dot_product_attention(**call, **ours, return_residual=True)
    expected, expected_lse = oracle.dense_attention(*call.values(), **contracts)
    close(out, expected)
    close(lse, expected_lse)


def test_a_head_size_of_v_of_its_own():
    call = dense()
    call["value"] = normal(5, 2, 7, 2, 12)
    out = dot_product_attention(**call)
    close(out, oracle.dense_attention(*call.values())[0])


# The ragged ops.


def expected_paged(call, **static):
    m, cache = call["metadata"], call["cache"]
    return oracle.paged_attention(
        call["q"], call["k"], call["v"], cache.pages, m.page_table, m.kv_lens, m.cu_q_lens,
        m.num_seqs, m.slot_mapping, k_scale=cache.k_scale, v_scale=cache.v_scale,
        causal=m.causal, **static,
    )  # fmt: skip


def expected_latent(call, **static):
    m, cache = call["metadata"], call["cache"]
    chosen = (call["topk_indices"],) if "topk_indices" in call else ()
    op = oracle.sparse_mla_attention if chosen else oracle.mla_attention
    return op(
        call["ql_nope"], call["q_pe"], call["kv_c"], call["k_pe"], cache.pages, *chosen,
        m.page_table, m.kv_lens, m.cu_q_lens, m.num_seqs, m.slot_mapping, scale=call["scale"],
        kv_scale=cache.kv_scale, kv_cache_dtype=cache.kv_cache_dtype, **static,
    )  # fmt: skip


DOORS = {
    "paged": (paged_attention, paged, expected_paged, "XLA"),
    "paged reference": (paged_attention, paged, expected_paged, "XLA_REFERENCE"),
    "mla": (mla_attention, mla, expected_latent, "XLA_MLA"),
    "sparse mla": (sparse_mla_attention, sparse, expected_latent, "XLA_MLA_SPARSE"),
}
PAGED_MORE = {
    "everything": {"scale": 0.9, "sliding_window": 3, "soft_cap": 1.2, "sinks": np.arange(4.0)},
    "chunks and slopes": {"attention_chunk_size": 4, "alibi_slopes": np.arange(1.0, 5)},
    "itself only": {"sliding_window": (1, None)},
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("return_lse", [False, True])
def test_the_ragged_doors_against_the_oracle(door, return_lse):
    op, make, expected, backend = DOORS[door]
    call = make()
    with jax.numpy_dtype_promotion("strict"):
        got = op(**call, return_lse=return_lse, backend=backend, checked=True)
    out, lse, pages = expected(call)
    close(got[0], out)
    if return_lse:
        close(got[1], lse)
        assert got[1].dtype == jnp.float32
    assert type(got[-1]) is type(call["cache"])
    np.testing.assert_array_equal(got[-1].pages, pages)


@pytest.mark.parametrize("case", PAGED_MORE)
def test_more_keywords_of_paged_attention(case):
    call = paged()
    out, lse, _ = paged_attention(**call, **PAGED_MORE[case], return_lse=True)
    expected, expected_lse, _ = expected_paged(call, **PAGED_MORE[case])
    close(out, expected)
    close(lse, expected_lse)


def test_encoder_and_cross_attention_and_nothing_to_write():
    call = paged() | {"k": None, "v": None}
    written = paged_attention(**paged())[-1]
    call |= {"cache": written, "metadata": batch(causal=False, writes=False)}
    out, cache = paged_attention(**call)
    close(out, expected_paged(call)[0])
    np.testing.assert_array_equal(cache.pages, written.pages)


@pytest.mark.parametrize(("stored", "per_head"), [("fp8", True), ("int8", False)])
def test_a_quantised_cache_has_scales(stored, per_head):
    scale = jnp.array([0.02, 0.05]) if per_head else 0.04
    cache = allocate_kv_cache(
        6, PAGE_SIZE, 2, 8, "float32", kv_cache_dtype=stored, k_scale=scale, v_scale=scale
    )
    q_lens = AttentionMetadata.from_lengths([5, 6], [5, 6], [[4, 1], [0, 5]], PAGE_SIZE)
    call = paged() | {"q": normal(1, 11, 4, 8), "k": normal(2, 11, 2, 8), "v": normal(3, 11, 2, 8)}
    call |= {"cache": cache, "metadata": q_lens}
    out, written = paged_attention(**call)
    expected, _, pages = expected_paged(call)
    np.testing.assert_array_equal(written.pages, pages)
    close(out, expected)


def test_soft_cap_of_mla():
    for op, make in ((mla_attention, mla), (sparse_mla_attention, sparse)):
        call = make()
        close(op(**call, soft_cap=0.5)[0], expected_latent(call, soft_cap=0.5)[0])


# backend= in all its forms.


def test_backend_may_be_a_name_a_member_or_a_class():
    call = dense()
    expected = dot_product_attention(**call)
    for backend in ("xla_reference", AttentionBackendEnum["XLA"], PlainBackend, "auto", None):
        close(dot_product_attention(**call, backend=backend), expected)


def test_the_backend_that_is_asked_for_runs():
    ran = []

    def kernel(q, k, v, **arguments):
        ran.append(set(arguments))
        return v[:, : q.shape[1], :1].repeat(q.shape[2], 2), jnp.zeros(q.shape[:3])

    import sys
    import types

    sys.modules["noting_kernel"] = types.ModuleType("noting_kernel")
    sys.modules["noting_kernel"].run = kernel
    kernels = {"dense": "noting_kernel:run", "paged": "noting_kernel:run"}
    noting = type("NotingBackend", (PlainBackend,), {"name": "NOTING", "kernels": kernels})
    dot_product_attention(**dense(), backend=noting)
    assert len(ran) == 1
    register_backend("NOTING", noting)
    dot_product_attention(**dense(), backend="noting", soft_cap=1.0)
    assert len(ran) == 2
    with global_force_attn_backend_context_manager("NOTING"):
        dot_product_attention(**dense(), scale=0.1)
    assert len(ran) == 3
    dot_product_attention(**dense())
    assert len(ran) == 3


def test_forcing_reaches_the_ops():
    with (
        global_force_attn_backend_context_manager("XLA_MLA"),
        pytest.raises(
            NoAttentionBackendError, match=r"XLA_MLA, asked for by forced, does not serve"
        ),
    ):
        dot_product_attention(**dense())


# Under JAX's transformations.

TRANSFORMED = {
    "dense": (dot_product_attention, dense),
    "paged": (paged_attention, paged),
    "mla": (mla_attention, mla),
    "sparse mla": (sparse_mla_attention, sparse),
}


def split(call):
    """Arrays and pytrees, and static numbers."""
    static = {n: x for n, x in call.items() if isinstance(x, float)}
    return {n: x for n, x in call.items() if n not in static}, static


def same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        close(a, b)


@pytest.mark.parametrize("door", TRANSFORMED)
def test_jit_strict_promotion_export_and_round_trip(door):
    op, make = TRANSFORMED[door]
    arrays, static = split(make())
    expected = op(**arrays, **static)
    with jax.numpy_dtype_promotion("strict"):
        jitted = jax.jit(lambda arrays: jax.tree.leaves(op(**arrays, **static)))
        leaves, tree = jax.tree.flatten(arrays)
        flat = jax.jit(lambda *leaves: jitted(jax.tree.unflatten(tree, leaves)))
        exported = jax.export.export(flat)(*leaves)
    again = jax.export.deserialize(exported.serialize())
    for a, b in zip(again.call(*leaves), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        close(a, b)


@pytest.mark.parametrize("door", TRANSFORMED)
def test_vmap(door):
    op, make = TRANSFORMED[door]
    arrays, static = split(make())
    two = jax.tree.map(lambda x: jnp.stack([x, x[..., ::-1] if x.ndim > 2 else x]), arrays)
    got = jax.jit(jax.vmap(lambda arrays: op(**arrays, **static)))(two)
    for i in range(2):
        same(
            jax.tree.map(lambda x, i=i: x[i], got),
            op(**jax.tree.map(lambda x, i=i: x[i], two), **static),
        )


def test_gradients_of_an_lse_that_vmap_has_no_need_to_batch():
    call = dense()
    values = jnp.stack([call["value"], 2 * call["value"], -call["value"]])

    def loss(query, backend):
        def one(value):
            more = {"query": query, "value": value, "return_residual": True, "backend": backend}
            return sum(map(jnp.sum, dot_product_attention(**call | more)))

        return jnp.sum(jax.vmap(one)(values))

    got, wanted = (jax.grad(loss)(call["query"], name) for name in ("XLA", "XLA_REFERENCE"))
    close(got, wanted)


@pytest.mark.parametrize("door", TRANSFORMED)
def test_x64_changes_nothing(door):
    op, make = TRANSFORMED[door]
    arrays, static = split(make())
    if door == "dense":  # what NumPy makes int64 and float64 of
        arrays |= {"sinks": np.arange(4.0), "query_seq_lengths": np.array([5, 2])}
    expected = op(**arrays, **static)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        same(op(**arrays, **static), expected)


@pytest.mark.parametrize("backend", DENSE_BACKENDS)
def test_gradients_against_the_oracle_through_out_and_lse(backend):
    call = dense()
    dout, dlse = normal(5, 2, 5, 4, 8), normal(6, 2, 5, 4)
    floats = call | {"bias": normal(7, 1, 4, 5, 7), "sinks": normal(8, 4)}

    def loss(floats):
        out, lse = dot_product_attention(
            **floats, is_causal=True, return_residual=True, backend=backend
        )
        return jnp.sum(out * dout) + jnp.sum(lse * dlse)

    got = jax.jit(jax.grad(loss))(floats)
    names = {"query": "q", "key": "k", "value": "v", "bias": "bias", "sinks": "sinks"}
    arguments = {names[name]: x for name, x in floats.items()}
    expected = oracle.dense_gradients(dout, dlse, **arguments, causal=True)
    for name, theirs in names.items():
        close(got[name], expected[theirs])


@pytest.mark.parametrize("door", TRANSFORMED)
def test_arrays_that_were_put_on_a_device_are_attended_to_there(monkeypatch, door):
    """As on a machine with a GPU, whose user puts them on the processor."""
    op, make = TRANSFORMED[door]
    arrays, static = split(make())
    expected = op(**arrays, **static)

    def default_device():
        raise AssertionError("JAX's default device was asked for")

    monkeypatch.setattr("attnsel_jax.selector.current_device", default_device)
    same(op(**jax.device_put(arrays, jax.devices("cpu")[0]), **static), expected)
    with pytest.raises(AssertionError, match="default device was asked for"):
        op(**arrays, **static)


def test_a_gradient_is_differentiated_by_the_reference_alone():
    call = dense()

    def loss(query, backend):
        return jnp.sum(dot_product_attention(**call | {"query": query}, backend=backend) ** 2)

    gradient = jax.grad(loss)

    q, along = jnp.asarray(call["query"]), normal(9, *call["query"].shape)

    def twice(backend):
        return jax.grad(lambda q: jnp.vdot(gradient(q, backend), along))(q)

    with pytest.raises(NotImplementedError, match=r"gradient of a gradient.*'XLA_REFERENCE'"):
        twice("XLA")
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: gradient(q, "XLA"), (q,), (along,))
    step = 1e-2 * along
    slope = (gradient(q + step, "XLA") - gradient(q - step, "XLA")) / 2e-2
    forward = jax.jvp(lambda q: gradient(q, "XLA_REFERENCE"), (q,), (along,))[1]
    for found in (twice("XLA_REFERENCE"), forward):
        np.testing.assert_allclose(found, slope, rtol=2e-2, atol=2e-3)

    def after_a_step(q):
        return loss(q - jax.lax.stop_gradient(gradient(q, "XLA")), "XLA")

    close(jax.grad(after_a_step)(q), gradient(q - gradient(q, "XLA"), "XLA"))


def test_a_scan_over_layers_of_one_cache_copies_none():
    """As docs/kernels.md has it: the pages of all layers in one cache, the batch shifted."""
    layers, pages = 2, 256
    call = paged()
    cache = allocate_kv_cache(
        num_pages=layers * pages, page_size=PAGE_SIZE, num_kv_heads=2, head_size=8, dtype="float32"
    )

    def of_layer(metadata, i):
        slots = metadata.slot_mapping
        slots = jnp.where(slots < 0, slots, slots + i * pages * PAGE_SIZE)
        table = metadata.page_table + i * pages
        return dataclasses.replace(metadata, page_table=table, slot_mapping=slots)

    def step(cache, q):
        def layer(carry, i):
            q, cache = carry
            more = {"cache": cache, "metadata": of_layer(call["metadata"], i)}
            out, cache = paged_attention(**call | {"q": q} | more)
            return (q + out, cache), None

        return jax.lax.scan(layer, (q, cache), jnp.arange(layers))[0]

    compiled = jax.jit(step, donate_argnums=0).lower(cache, call["q"]).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == cache.pages.nbytes
    assert memory.temp_size_in_bytes < cache.pages.nbytes / layers
    q, written = call["q"], []
    for part in jnp.split(cache.pages, layers, axis=1):
        part = {"q": q, "cache": KVCache(part), "backend": "XLA_REFERENCE"}
        out, one = paged_attention(**call | part)
        q, written = q + out, [*written, one.pages]
    whole, cache = compiled(cache, call["q"])
    close(whole, q)
    close(cache.pages, jnp.concatenate(written, axis=1))


def test_caches_with_the_same_scale_are_donated_together_and_the_callers_scale_stays():
    scale = jnp.float32(0.5)
    stored = {"dtype": "float32", "kv_cache_dtype": "fp8"}
    caches = [
        allocate_kv_cache(2, 4, 2, 16, **stored, k_scale=scale, v_scale=scale),
        allocate_latent_cache(2, 4, 32, 8, **stored, kv_scale=scale),
    ]
    jax.block_until_ready(jax.jit(lambda caches: caches, donate_argnums=0)(caches))
    assert float(scale) == 0.5


@pytest.mark.parametrize("door", ["paged", "mla", "sparse mla"])
def test_a_donated_cache_is_updated_in_place(door):
    op, make = TRANSFORMED[door]
    arrays, static = split(make())
    cache = arrays.pop("cache")

    def step(arrays, cache):
        return op(**arrays, cache=cache, **static)

    compiled = jax.jit(step, donate_argnums=1).lower(arrays, cache).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.pages.nbytes
    copy = jax.tree.map(jnp.copy, cache)
    compiled(arrays, copy)
    assert copy.pages.is_deleted()


# The class interface, in vLLM's manner.


def common(metadata):
    """The batch in vLLM's words, on the host."""
    return CommonAttentionMetadata(
        query_start_loc=np.asarray(metadata.cu_q_lens), seq_lens=np.asarray(metadata.kv_lens),
        num_reqs=2, num_actual_tokens=4, max_query_len=3, max_seq_len=6,
        block_table_tensor=np.asarray(metadata.page_table),
        slot_mapping=np.asarray(metadata.slot_mapping, np.int64), causal=metadata.causal,
    )  # fmt: skip


@pytest.mark.parametrize(("wrapped", "flat"), [(True, False), (False, True)])
def test_the_standard_class_interface_equals_the_functional_door(wrapped, flat):
    backend = get_attn_backend(8, "float32", "auto", PAGE_SIZE)
    call = paged()
    shape = backend.get_kv_cache_shape(6, PAGE_SIZE, 2, 8)
    assert call["cache"].pages.shape == shape
    metadata = backend.get_builder_cls()(PAGE_SIZE).build(0, common(call["metadata"]))
    assert isinstance(metadata, backend.get_metadata_cls())
    extras = {"sliding_window": 4, "soft_cap": 3.0, "sinks": jnp.arange(4.0)}
    impl = backend.get_impl_cls()(
        4, 8, 0.4, 2, None, 4, "auto", 3.0, "decoder", sinks=extras["sinks"]
    )
    expected, expected_cache = paged_attention(**call, **extras, scale=0.4)
    tokens = [call[n].reshape(5, -1) if flat else call[n] for n in ("q", "k", "v")]
    cache = call["cache"] if wrapped else call["cache"].pages
    out, written = jax.jit(impl.forward)(*tokens, cache, metadata)
    assert out.shape == tokens[0].shape
    close(out.reshape(expected.shape), expected)
    assert type(written) is type(cache)
    pages = written.pages if wrapped else written
    np.testing.assert_array_equal(pages, expected_cache.pages)


@pytest.mark.parametrize("use_sparse", [False, True])
def test_the_mla_class_interface_equals_the_functional_door(use_sparse):
    backend = get_attn_backend(12, "float32", "auto", PAGE_SIZE, True, use_sparse=use_sparse)
    call = sparse() if use_sparse else mla()
    assert call["cache"].pages.shape == backend.get_kv_cache_shape(6, PAGE_SIZE, 1, 12)
    metadata = backend.get_builder_cls()(PAGE_SIZE).build(0, common(call["metadata"]))
    impl = backend.get_impl_cls()(4, call["scale"], 8, 4)
    op = sparse_mla_attention if use_sparse else mla_attention
    expected, expected_cache = op(**call)
    chosen = (call["topk_indices"],) if use_sparse else ()
    tokens = [call[n] for n in ("ql_nope", "q_pe", "kv_c", "k_pe")]
    out, written = jax.jit(impl.forward)(*tokens, call["cache"], metadata, *chosen)
    close(out, expected)
    np.testing.assert_array_equal(written.pages, expected_cache.pages)


def test_an_encoder_layer_sees_later_keys():
    impl = get_attn_backend(8, "float32", "auto", PAGE_SIZE, attn_type="encoder_only")
    layer = impl.get_impl_cls()(4, 8, 8**-0.5, 2, attn_type="encoder_only")
    call = paged()
    out, _ = jax.jit(layer.forward)(
        call["q"], call["k"], call["v"], call["cache"], call["metadata"]
    )
    both_ways = call | {"metadata": batch(causal=False)}
    close(out, expected_paged(both_ways)[0])


def test_the_cache_is_allocated_for_the_backend():
    cache = allocate_kv_cache(3, None, 2, 8, "bfloat16", kv_cache_dtype="fp8")
    assert (
        cache.page_size == get_attn_backend(8, "bfloat16", "fp8", None).get_preferred_block_size()
    )
    assert cache.pages.dtype == jnp.float8_e4m3fn
    assert isinstance(cache, KVCache)
    assert (cache.num_pages, cache.num_kv_heads) == (3, 2)
    assert LatentCache(jnp.zeros((3, 4, 656), jnp.uint8)).kv_cache_dtype == "fp8_ds_mla"
