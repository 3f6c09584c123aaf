"""A third party's kernel that returns what its contract does not say is refused, not passed on."""

import dataclasses
import functools

import jax
import pytest
from calls import NUM_PAGES, PAGE_SIZE, batch, dense, mla, normal, paged, sparse
from third_party import backend as third_party

from attnsel_jax import (
    MeshAxes,
    dot_product_attention,
    indexer_scores,
    mla_attention,
    paged_attention,
    sparse_mla_attention,
    topk_positions,
)
from attnsel_jax.backend import AttentionBackend
from attnsel_jax.backends.xla import XlaBackend
from attnsel_jax.backends.xla_mla import XlaMlaBackend
from attnsel_jax.backends.xla_mla_sparse import XlaMlaSparseBackend

BACKENDS = {
    "mla": XlaMlaBackend,
    "sparse_mla": XlaMlaSparseBackend,
    "indexer_scores": XlaMlaSparseBackend,
    "topk_positions": XlaMlaSparseBackend,
}


def indexer():
    return {
        "q_index": normal(1, 5, 2, 4),
        "weights": normal(2, 5, 2),
        "index_pages": normal(3, NUM_PAGES, PAGE_SIZE, 4),
        "metadata": batch(),
    }


CALLS = {
    "dense": (dot_product_attention, dense),
    "paged": (paged_attention, paged),
    "mla": (mla_attention, mla),
    "sparse_mla": (sparse_mla_attention, sparse),
    "indexer_scores": (indexer_scores, indexer),
    "topk_positions": (topk_positions, lambda: {"scores": normal(1, 5, 8), "topk": 3}),
}


def spoilt(op, spoil, **declared) -> type[AttentionBackend]:
    """The op's XLA backend, whose kernels' results are spoilt."""
    parent = BACKENDS.get(op, XlaBackend)
    right = parent.get_kernel(op)

    @functools.wraps(right)
    def kernel(*args, **kwargs):
        return spoil(right(*args, **kwargs))

    attributes = {"name": "THIRD", "get_kernel": staticmethod(lambda op: kernel)}
    return type("ThirdBackend", (parent,), attributes | declared)


def first(change):
    """Changes the first of a kernel's results."""
    return lambda r: (change(r[0]), *r[1:]) if isinstance(r, tuple) else change(r)


SPOILT = [
    *((op, first(lambda x: x[:1]), r"\[1, .*, must be \w+\[[25], ") for op in CALLS),
    *((op, first(lambda x: x.astype("float16")), r" is float16\[") for op in CALLS),
    *((op, lambda r: (*(r if isinstance(r, tuple) else (r,)), 0), r"returns \d results, must")
      for op in CALLS),
    ("dense", lambda r: r[0], r"returns float32\[2, 5, 4, 8\], must return 2 \(out, lse\)"),
    ("dense", list, r"returns list, must return 2 "),
    ("dense", lambda r: (r[0], None), r"^lse of op .* is NoneType, must be float32\[2, 5, 4\]"),
    ("paged", lambda r: (*r[:2], r[2][:, :1]), r"^kv_pages of .* float32\[2, 1, .*\[2, 6, "),
    ("mla", lambda r: (r[0], r[1][..., None], r[2]), r"^lse of .* float32\[5, 4, 1\], must be "),
]  # fmt: skip


@pytest.mark.parametrize(("op", "spoil", "message"), SPOILT)
def test_results_that_the_contract_does_not_say_are_refused(op, spoil, message):
    door, make = CALLS[op]
    with pytest.raises(ValueError, match=message) as refused:
        door(**make(), backend=spoilt(op, spoil))
    assert f"op {op} of backend THIRD" in str(refused.value)
    assert str(refused.value).endswith("says: mend the kernel, or use another")


def test_right_results_are_passed_on():
    call = dense()
    assert dot_product_attention(**call, backend=third_party("SAME")).shape == call["query"].shape


def test_no_lse_is_right_where_none_is_declared():
    declared = dataclasses.replace(XlaBackend.capabilities["dense"], needs_lse=(False,))
    backend = spoilt("dense", lambda r: (r[0], None), capabilities={"dense": declared})
    assert dot_product_attention(**dense(), backend=backend).shape == (2, 5, 4, 8)


def test_the_class_interface_and_a_mesh_refuse_too():
    call, backend = paged(), spoilt("paged", first(lambda x: x[:1]))
    message = r"^out of op paged of backend THIRD is float32\[1, .*, must be float32\["
    impl = backend.get_impl_cls()(4, 8, 0.3, 2)
    with pytest.raises(ValueError, match=message):
        impl.forward(call["q"], call["k"], call["v"], call["cache"], call["metadata"])
    axes = MeshAxes(heads="h", mesh=jax.make_mesh((2,), ("h",), devices=jax.devices()[:2]))
    with pytest.raises(ValueError, match=message):
        paged_attention(**call, backend=backend, mesh_axes=axes)
