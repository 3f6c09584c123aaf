"""The public ops as they are called on chips that are not here: what is selected can be traced.

Kernels are tested by themselves elsewhere; this is the way from a user's arguments to them, under
jax's settings as they come, and under the strictest: 64-bit numbers, no promotion of dtypes and
none of ranks. Mosaic has no 64-bit numbers, so there TPU kernels are lowered, too.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from strict_settings import strict_settings

from attnsel_jax import (
    DENSE_RESIDUALS,
    AttentionMetadata,
    allocate_kv_cache,
    allocate_latent_cache,
    dot_product_attention,
    get_attn_backend,
    indexer_scores,
    mla_attention,
    paged_attention,
    sparse_mla_attention,
    topk_positions,
)
from attnsel_jax.jax_versions import jax_version
from pallas_kernels import tpu_chip

TPUS = ("v5e", "7x")
CHIPS = (*TPUS, "h100", "a100", "b200")
BATCH = AttentionMetadata.from_lengths((1, 70), (75, 90), np.arange(12).reshape(2, 6), 64)
PAGED_BY_XLA = [("a100", "fp8_e4m3"), *((chip, "int8") for chip in CHIPS if chip not in TPUS)]
TOKENS = BATCH.slot_mapping.shape[0]


STRICT = pytest.param(True, marks=pytest.mark.once, id="strict-settings")


def of_caches(*stored):
    """Parametrizes by cache: under strict settings one on each push, the others on demand."""
    once, sweep = pytest.mark.once, pytest.mark.sweep
    strict = (
        pytest.param(True, each, id=f"strict-settings-{each}", marks=[once, sweep] if i else once)
        for i, each in enumerate(stored)
    )
    plain = (pytest.param(False, each, id=f"settings-{each}") for each in stored)
    return pytest.mark.parametrize(
        ("_settings", "stored"), [*plain, *strict], indirect=["_settings"]
    )


@pytest.fixture(autouse=True, params=[pytest.param(False, id="settings"), STRICT])
def _settings(request):
    of_test = request.node.callspec.params
    if request.param and of_test.get("chip", "v5e") not in ("v5e", "h100"):
        pytest.skip("one TPU and one GPU are enough under strict settings")
    with strict_settings() if request.param else contextlib.nullcontext():
        yield


def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def traced(chip: str, call, *arguments, by_xla: bool = False, lowers: bool = True):
    """What the call gives, by shapes; asserts that it is the chip's own kernel, or XLA's."""
    jaxpr, found = jax.make_jaxpr(call, return_shape=True)(*arguments)
    by_xla |= chip not in TPUS and jax_version() < (0, 11)
    kernel = "pallas_call" if chip in TPUS else "gmem"  # GPU kernels: arguments in global memory
    assert (kernel in str(jaxpr)) != by_xla
    if lowers and jax.config.jax_enable_x64 and chip in TPUS:
        with tpu_chip.for_generation(chip):
            jax.jit(call).trace(*arguments).lower(lowering_platforms=("tpu",))
    return found


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
def test_dense(chip, gradients):
    q, kv = array(2, 130, 4, 64), array(2, 130, 2, 64)
    forward = functools.partial(dot_product_attention, is_causal=True, device=chip)
    call = forward
    if gradients:
        call = jax.grad(lambda *qkv: forward(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    found = jax.tree.leaves(traced(chip, call, q, kv, kv))
    assert [x.shape for x in found] == [x.shape for x in ((q, kv, kv) if gradients else (q,))]


@pytest.mark.parametrize("chip", CHIPS)
def test_a_gradient_of_a_gradient_is_refused(chip):
    q = array(1, 128, 2, 64)

    def loss(q):
        return dot_product_attention(q, q, q, device=chip).astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="gradient of a gradient"):
        jax.make_jaxpr(jax.grad(lambda q: jax.grad(loss)(q).astype(jnp.float32).sum()))(q)


@pytest.mark.parametrize("chip", CHIPS)
def test_dense_under_vmap(chip):
    """What vmap traces again is traced under the kernels' own settings, too."""
    q = array(3, 1, 130, 4, 64)

    def loss(q):
        return dot_product_attention(q, q, q, is_causal=True, device=chip).astype(jnp.float32).sum()

    assert traced(chip, jax.vmap(jax.grad(loss)), q).shape == q.shape


@pytest.mark.parametrize("chip", ["cpu", *CHIPS])
def test_a_policy_of_checkpoint_keeps_what_the_gradient_needs(chip):
    q = array(1, 128, 2, 64)

    def kept(policy):
        attend = functools.partial(dot_product_attention, device=chip)
        call = jax.checkpoint(lambda q: attend(2 * q, 2 * q, 2 * q), policy=policy)
        return jax.tree.leaves(jax.eval_shape(lambda q: jax.vjp(call, q)[1], q))

    names = jax.checkpoint_policies.save_only_these_names
    assert [x.shape for x in kept(names(DENSE_RESIDUALS))] == [q.shape, q.shape, q.shape[:-1]]
    assert [x.shape for x in kept(names("another's"))] == [q.shape]


@pytest.mark.parametrize("chip", CHIPS)
def test_inside_the_caller_s_own_shard_map(chip):
    """Which checks what varies over the mesh; values are tests/mesh's to compare."""
    q, kv, by_batch = array(2, 130, 4, 64), array(2, 130, 2, 64), jax.P("batch")
    mesh = jax.make_mesh((1,), ("batch",), (jax.sharding.AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(by_batch, jax.P()), out_specs=by_batch)
    def mapped(q, kv):
        return dot_product_attention(q, kv, kv, is_causal=True, device=chip)

    def gradients(q, kv):
        return jax.grad(lambda *x: mapped(*x).astype(jnp.float32).sum(), argnums=(0, 1))(q, kv)

    found = traced(chip, gradients, q, kv, lowers=False)  # the mesh is of this machine's devices
    assert [x.shape for x in found] == [q.shape, kv.shape]


@pytest.mark.parametrize("chip", CHIPS)
@of_caches("auto", "fp8_e4m3", "int8")
def test_paged(chip, stored):
    cache = allocate_kv_cache(16, 64, 2, 64, "bfloat16", kv_cache_dtype=stored, device=chip)
    q, new = array(TOKENS, 4, 64), array(TOKENS, 2, 64)
    call = functools.partial(paged_attention, metadata=BATCH, device=chip)
    out, after = traced(
        chip, lambda q, new, cache: call(q, new, new, cache), q, new, cache,
        by_xla=(chip, stored) in PAGED_BY_XLA,
    )  # fmt: skip
    assert (out.shape, after.layout, after.pages.shape) == (
        q.shape, cache.layout, cache.pages.shape,
    )  # fmt: skip


@pytest.mark.parametrize("chip", CHIPS)
@of_caches("auto", "fp8_e4m3", "fp8_ds_mla")
@pytest.mark.parametrize("use_sparse", [False, True], ids=["mla", "sparse_mla"])
def test_latent(chip, stored, use_sparse):
    cache = allocate_latent_cache(
        16, 64, 512, 64, "bfloat16", kv_cache_dtype=stored, device=chip, use_sparse=use_sparse
    )
    tokens = [array(TOKENS, *rest) for rest in ((16, 512), (16, 64), (512,), (64,))]
    call, lists = mla_attention, []
    if use_sparse:
        call, lists = sparse_mla_attention, [array(TOKENS, 128, dtype="int32")]
    call = functools.partial(call, metadata=BATCH, scale=0.1, device=chip)
    has_no_kernel = not use_sparse and stored == "fp8_ds_mla"
    out, after = traced(
        chip, lambda tokens, lists, cache: call(*tokens, *lists, cache), tokens, lists, cache,
        by_xla=chip in ("a100", "b200") or has_no_kernel,
    )  # fmt: skip
    assert (out.shape, after.layout, after.pages.shape) == (
        (TOKENS, 16, 512), cache.layout, cache.pages.shape,
    )  # fmt: skip


@pytest.mark.parametrize("chip", CHIPS)
def test_indexer(chip):
    arguments = array(TOKENS, 64, 128), array(TOKENS, 64, dtype="float32"), array(16, 64, 128)
    scores = traced(
        chip, functools.partial(indexer_scores, metadata=BATCH, device=chip), *arguments,
        by_xla=chip in ("a100", "b200"),
    )  # fmt: skip
    assert scores.shape == (TOKENS, 6 * 64)
    lists = traced(
        chip, functools.partial(topk_positions, topk=128, device=chip), scores,
        by_xla=chip not in TPUS,
    )  # fmt: skip
    assert lists.shape == (TOKENS, 128)


@pytest.mark.parametrize("chip", ["v5e", "h100"])
@pytest.mark.parametrize("family", ["standard", "mla", "sparse_mla"])
def test_impls(chip, family):
    asked = {"num_heads": 16, "num_kv_heads": 1, "device": chip}
    if family == "standard":
        found = get_attn_backend(64, "bfloat16", "auto", 64, **asked)
        cache = allocate_kv_cache(16, 64, 1, 64, "bfloat16", device=chip)
        arguments = [array(TOKENS, heads, 64) for heads in (16, 1, 1)]
        impl = found.get_impl_cls()(16, 64, 0.125, 1)
    else:
        asked |= {"use_mla": True, "use_sparse": family == "sparse_mla", "head_size_v": 512}
        found = get_attn_backend(576, "bfloat16", "auto", 64, **asked)
        cache = allocate_latent_cache(
            16, 64, 512, 64, "bfloat16", device=chip, use_sparse=asked["use_sparse"]
        )
        arguments = [array(TOKENS, *rest) for rest in ((16, 512), (16, 64), (512,), (64,))]
        impl = found.get_impl_cls()(16, 0.1, 512, 64)
    lists = [array(TOKENS, 128, dtype="int32")] if family == "sparse_mla" else []
    out, after = traced(
        chip, lambda arguments, cache, lists: impl.forward(*arguments, cache, BATCH, *lists),
        arguments, cache, lists,
    )  # fmt: skip
    assert (out.shape[0], after.pages.shape) == (TOKENS, cache.pages.shape)
