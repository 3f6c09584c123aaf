"""Sizes of 0 at every kernel's door: no query or no key is answered, all else is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnsel_jax import AttentionBackendEnum, oracle
from attnsel_jax.cache_layouts import LATENT_LAYOUTS, LAYOUTS
from pallas_kernels.empty_calls import MAY_BE_EMPTY

SIZES = {
    "batch": 2, "q_len": 16, "kv_len": 16, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 128,
    "head_dim_v": 128, "num_tokens": 4, "max_num_seqs": 2, "pages_per_seq": 2, "num_pages": 4,
    "page_size": 64, "kv_lora_rank": 512, "rope_dim": 64, "topk": 128, "num_index_heads": 64,
    "index_head_dim": 128,
}  # fmt: skip
BATCH = {
    "page_table": "max_num_seqs pages_per_seq", "kv_lens": "max_num_seqs", "num_seqs": "",
    "cu_q_lens": "max_num_seqs+1",
}  # fmt: skip
LATENT = BATCH | {
    "ql_nope": "num_tokens num_q_heads kv_lora_rank", "q_pe": "num_tokens num_q_heads rope_dim",
    "kv_c": "num_tokens kv_lora_rank", "k_pe": "num_tokens rope_dim", "slot_mapping": "num_tokens",
}  # fmt: skip
ARRAYS = {
    "dense": {
        "q": "batch q_len num_q_heads head_dim", "k": "batch kv_len num_kv_heads head_dim",
        "v": "batch kv_len num_kv_heads head_dim_v",
    },
    "paged": BATCH | {
        "q": "num_tokens num_q_heads head_dim", "k": "num_tokens num_kv_heads head_dim",
        "v": "num_tokens num_kv_heads head_dim", "slot_mapping": "num_tokens",
    },
    "mla": LATENT,
    "sparse_mla": LATENT | {"topk_indices": "num_tokens topk"},
    "indexer_scores": BATCH | {
        "q_index": "num_tokens num_index_heads index_head_dim",
        "weights": "num_tokens num_index_heads",
        "index_pages": "num_pages page_size index_head_dim",
    },
}  # fmt: skip
INTEGERS = (*BATCH, "slot_mapping", "topk_indices")
DOORS = [
    (member.name, op)
    for member in AttentionBackendEnum
    for op in member.get_class().kernels
    if op in ARRAYS
]
every_door = pytest.mark.parametrize(("name", "op"), DOORS)


def call_of(name, op, **changed):
    """(kernel, arrays by name) with some sizes changed; what is not float is 0."""
    backend, sizes = AttentionBackendEnum[name].get_class(), SIZES | changed

    def array(argument, dims):
        shape = [sizes[d.removesuffix("+1")] + d.endswith("+1") for d in dims.split()]
        dtype = jnp.int32 if argument in INTEGERS else jnp.bfloat16
        dtype = jnp.float32 if argument == "weights" else dtype
        return jnp.zeros(shape, dtype) if dtype == jnp.int32 else jnp.ones(shape, dtype)

    arrays = {argument: array(argument, dims) for argument, dims in ARRAYS[op].items()}
    pages = [sizes[n] for n in ("num_pages", "page_size")]
    if op == "paged":
        shape = LAYOUTS[backend.layout].shape(*pages, sizes["num_kv_heads"], sizes["head_dim"])
        arrays["kv_pages"] = jnp.ones(shape, jnp.bfloat16)
    if op.endswith("mla"):
        row = sizes["kv_lora_rank"] + sizes["rope_dim"]
        shape = LATENT_LAYOUTS[backend.latent_layout].shape(*pages, row, 2)
        arrays["latent_pages"] = jnp.ones(shape, jnp.bfloat16)
    scale = {"scale": 0.1} if op.endswith("mla") else {}
    return functools.partial(backend.get_kernel(op), **scale), arrays


@every_door
def test_a_call_without_queries_gives_nothing_and_runs_no_kernel(name, op):
    for size in ("num_tokens",) if op != "dense" else ("batch", "q_len"):
        kernel, arrays = call_of(name, op, **{size: 0})
        made = jax.make_jaxpr(lambda arrays, kernel=kernel: kernel(**arrays))(arrays)
        assert {eqn.primitive.name for eqn in made.eqns} <= {"broadcast_in_dim"}
        results = kernel(**arrays)
        if op == "indexer_scores":
            assert (results.shape, results.dtype) == ((0, 128), jnp.float32)
            continue
        out, lse, *pages = results
        queries = arrays["ql_nope" if op.endswith("mla") else "q"]
        assert (out.shape, out.dtype) == (queries.shape, queries.dtype)
        assert name == "CUDNN" or (lse.shape, lse.dtype) == (queries.shape[:-1], jnp.float32)
        assert all(written is arrays["kv_pages" if op == "paged" else "latent_pages"]
                   for written in pages)  # fmt: skip


@pytest.mark.parametrize("name", [name for name, op in DOORS if op == "dense"])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_queries_that_have_no_key_are_those_that_see_none(name, has_sinks):
    if has_sinks and name == "CUDNN":
        pytest.skip("it refuses sinks")
    kernel, arrays = call_of(name, "dense", kv_len=0)
    sinks = {"sinks": jnp.arange(4.0)} if has_sinks else {}
    more = sinks | {"q_lens": jnp.asarray([16, 3])}
    out, lse = kernel(**arrays, **more)
    expected, expected_lse = oracle.dense_attention(**arrays, **more)
    np.testing.assert_array_equal(out.astype(jnp.float32), expected)
    assert name == "CUDNN" or np.array_equal(lse, expected_lse)


@pytest.mark.parametrize("name", [name for name, op in DOORS if op == "dense"])
@pytest.mark.parametrize("empty", ["batch", "q_len", "kv_len"])
def test_gradients_of_nothing_are_zeros(name, empty):
    kernel, arrays = call_of(name, "dense", **{empty: 0})
    arrays |= {} if name == "CUDNN" else {"sinks": jnp.arange(4.0)}

    def total(arrays):
        out, lse = kernel(**arrays)
        return out.astype(jnp.float32).sum() + (0 if lse is None else 2 * lse.sum())

    for argument, gradient in jax.grad(total)(arrays).items():
        assert gradient.shape == arrays[argument].shape
        # Each of 2 x 16 rows has its sink for lse.
        assert (gradient == (64 if argument == "sinks" and empty == "kv_len" else 0)).all()


@every_door
def test_any_other_size_of_0_is_refused_by_name(name, op):
    named = {d.removesuffix("+1") for dims in ARRAYS[op].values() for d in dims.split()}
    named |= {"num_pages", "page_size"} if op != "dense" else set()
    # Sizes that the layout of a cache refuses before, and cuDNN's values, as wide as its keys.
    before = {"head_dim", "rope_dim", "page_size"} if name.startswith("MOSAIC_TPU") else set()
    before |= {"head_dim", "head_dim_v"} if name == "CUDNN" else set()
    for size in named - set(MAY_BE_EMPTY) - before:
        kernel, arrays = call_of(name, op, **{size: 0})
        with pytest.raises(ValueError, match=rf"^{size} is 0, must be at least 1"):
            jax.eval_shape(lambda a, kernel=kernel: kernel(**a), arrays)
