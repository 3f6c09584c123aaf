"""Kernels called by themselves, and what they have no gradient for: refused in plain words."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from calls import dense, mla, paged, sparse

from attnsel_jax import (
    AttentionBackendEnum,
    dot_product_attention,
    get_attn_backend,
    mla_attention,
    paged_attention,
    sparse_mla_attention,
)

XLA_DOORS = [
    (name, function)
    for name in ("XLA", "XLA_REFERENCE", "CUDNN", "XLA_MLA", "XLA_MLA_SPARSE")
    for function in AttentionBackendEnum[name].get_class().kernels
]
WRITTEN = ("kv_c", "k_pe", "slot_mapping")  # None, all of them: nothing is written


def arguments(function):
    """Right arguments of a kernel by name."""
    if function == "dense":
        call = dense()
        return {"q": call["query"], "k": call["key"], "v": call["value"]}
    if function in ("indexer_scores", "topk_positions"):
        batch = vars(mla()["metadata"])
        return batch | {
            "q_index": jnp.ones((5, 2, 4)),
            "weights": jnp.ones((5, 2)),
            "index_pages": jnp.ones((6, 4, 4)),
            "scores": jnp.ones((5, 8)),
            "topk": 2,
        }
    call = paged() if function == "paged" else sparse() if function == "sparse_mla" else mla()
    pages = call.pop("cache").pages
    call |= vars(call.pop("metadata")) | {"kv_pages": pages, "latent_pages": pages}
    return call | {
        "q_nope": jnp.ones((5, 4, 6)),
        "w_uk": jnp.ones((8, 4, 6)),
        "w_uv": jnp.ones((8, 4, 6)),
    }


@pytest.mark.parametrize(("name", "function"), XLA_DOORS)
def test_an_array_that_a_kernel_cannot_do_without_is_refused_by_name(name, function):
    kernel = AttentionBackendEnum[name].get_class().get_kernel(function)
    given = arguments(function)
    parameters = inspect.signature(kernel).parameters.values()
    call = {p.name: given[p.name] for p in parameters if p.default is p.empty}
    optional = ("k", "v", "slot_mapping") if function == "paged" else WRITTEN
    arrays = [n for n in call if n not in (*optional, "scale", "topk")]
    assert arrays
    for missing in arrays:
        with pytest.raises(ValueError, match=rf"^{missing} is None, must be an array \["):
            kernel(**call | {missing: None})


OPS = {
    "paged": (paged_attention, paged, "q"),
    "mla": (mla_attention, mla, "kv_c"),
    "sparse_mla": (sparse_mla_attention, sparse, "ql_nope"),
}
REFUSAL = r"^needs_grad is True .*, must be False for op {} of backend {}, .*lax.stop_gradient"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
def test_a_gradient_that_no_backend_declares_is_refused_in_plain_words(op, wrap):
    door, make, name = OPS[op]
    call = make()
    backend = {"paged": "XLA", "mla": "XLA_MLA", "sparse_mla": "XLA_MLA_SPARSE"}[op]

    def total(x):
        return jnp.sum(wrap(lambda x: door(**call | {name: x})[0])(x))

    for differentiated in (jax.grad(total), lambda x: jax.jvp(total, (x,), (x,))):
        with pytest.raises(ValueError, match=REFUSAL.format(op, backend)):
            differentiated(call[name])


def test_a_gradient_that_stops_before_the_op_is_none_of_its_business():
    call = paged()

    def total(q):
        stopped = call | {"q": jax.lax.stop_gradient(q)}
        return jnp.sum(q) + jnp.nansum(paged_attention(**stopped)[0])

    assert (jax.jit(jax.grad(total))(call["q"]) == 1).all()


def test_the_class_interface_refuses_a_gradient_too():
    call = paged()
    impl = get_attn_backend(8, "float32", "auto", 4).get_impl_cls()(4, 8, 0.3, 2)

    def total(q):
        return impl.forward(q, call["k"], call["v"], call["cache"], call["metadata"])[0].sum()

    with pytest.raises(ValueError, match=REFUSAL.format("paged", "XLA")):
        jax.grad(total)(call["q"])


@pytest.mark.parametrize("name", ["is_causal", "return_residual", "local_window_size", "scale"])
def test_a_static_argument_that_is_traced_is_named_with_the_way_out(name):
    message = rf"^{name} is traced by jit, vmap or grad, must be a plain value.*static_argnames"
    with pytest.raises(ValueError, match=message):
        jax.jit(dot_product_attention)(**dense(), **{name: 1})
