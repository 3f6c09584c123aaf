"""`jax.export`: caches and batches go into its files; symbolic sizes are taken, or refused."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from calls import NUM_TOKENS, dense, mla, paged

from attnsel_jax import (
    dot_product_attention,
    indexer_scores,
    mla_attention,
    paged_attention,
    topk_positions,
)

TOKENS, SEQS = jax.export.symbolic_shape("t, n")


def shapes(arrays, tokens=TOKENS):
    """The arrays' shapes, their number of tokens left open."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            [tokens if size == NUM_TOKENS else size for size in x.shape], x.dtype
        ),
        arrays,
    )


def exported(op, call, **static):
    return jax.export.export(jax.jit(lambda call: op(**call, **static)))(call)


@pytest.mark.parametrize(("op", "make"), [(paged_attention, paged), (mla_attention, mla)])
def test_a_step_is_written_and_read_again(op, make):
    call = make()
    static = {"scale": call.pop("scale")} if "scale" in call else {}
    step = exported(op, call, **static)
    read = jax.export.deserialize(step.serialize())
    assert (read.in_tree, read.out_tree) == (step.in_tree, step.out_tree)
    assert jax.tree.structure(((call,), {})) == read.in_tree  # what is static included


def test_the_reference_takes_dense_calls_of_symbolic_length():
    call = {"query": dense()["query"], "key": dense()["query"], "value": dense()["query"]}
    whole = exported(dot_product_attention, shapes(call), is_causal=True, backend="XLA_REFERENCE")
    expected = dot_product_attention(**call, is_causal=True, backend="XLA_REFERENCE")
    np.testing.assert_allclose(whole.call(call), expected, rtol=2e-5, atol=2e-5)


def test_the_reference_takes_batches_of_symbolic_sizes():
    call = paged()
    open_call = shapes(call)
    of_seqs = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32)
        for name, shape in {"kv_lens": (SEQS,), "cu_q_lens": (SEQS + 1,)}.items()
    }
    table = jax.ShapeDtypeStruct((SEQS, call["metadata"].page_table.shape[1]), jnp.int32)
    open_call["metadata"] = dataclasses.replace(open_call["metadata"], page_table=table, **of_seqs)
    step = exported(paged_attention, open_call, backend="XLA_REFERENCE")
    out, cache = step.call(call)
    expected, written = paged_attention(**call, backend="XLA_REFERENCE")
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(cache.pages, written.pages)


@pytest.mark.parametrize(
    ("op", "call", "static", "message"),
    [
        (
            dot_product_attention,
            dense(),
            {},
            r"shapes are q \(2, t, 4, 8\), must be numbers where op dense of backend XLA chooses "
            r"its tiles by them: name backend='XLA_REFERENCE', which is plain jax.numpy, or export "
            r"a program for each size",
        ),
        (paged_attention, paged(), {}, r"q \(t, 4, 8\).* op paged of backend XLA"),
        (mla_attention, mla(), {}, r"ql_nope \(t, 4, 8\).*backend XLA_MLA .*: export a program"),
        (
            indexer_scores,
            {
                "q_index": jnp.ones((NUM_TOKENS, 2, 8)),
                "weights": jnp.ones((NUM_TOKENS, 2)),
                "index_pages": jnp.ones((6, 4, 8)),
                "metadata": paged()["metadata"],
            },
            {},
            r"q_index \(t, 2, 8\)",
        ),
        (topk_positions, {"scores": jnp.ones((3, NUM_TOKENS))}, {"topk": 2}, r"scores \(3, t\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_kernel_that_chooses_by_sizes_refuses_symbolic_ones(op, call, static, message):
    call = dict(call)
    static = static | ({"scale": call.pop("scale")} if "scale" in call else {})
    with pytest.raises(ValueError, match=message):
        exported(op, shapes(call), **static)
