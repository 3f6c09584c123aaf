"""Shardings that cannot work are refused: the axis, its size, and what it must divide."""

import ast
import dataclasses
import functools
import pathlib
import re

import jax
import numpy as np
import pytest
from meshes import mesh, put

import attnsel_jax
from attnsel_jax import (
    AttentionBackend,
    AttentionMetadata,
    AttentionSelectorConfig,
    KVCache,
    LatentCache,
    MeshAxes,
)
from attnsel_jax.backends.xla import XLA_DENSE, XlaBackend
from attnsel_jax.constraints import NEVER
from attnsel_jax.mesh import asked_of_kernel, kernel_over_mesh, over_mesh, plan_call


def ones(*shape):
    return np.ones(shape, np.float32)


def dense(q, k, on=None, cut=(None, None), **said):
    q, k = (x if spec is None else put(x, on, *spec) for x, spec in zip((q, k), cut, strict=True))
    axes = MeshAxes(mesh=on, **said) if said else None
    return lambda: attnsel_jax.dot_product_attention(q, k, k, mesh_axes=axes)


def refused(call, message):
    """At trace time, and outside jit too."""
    for run in (call, lambda: jax.eval_shape(call)):
        with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
            run()


def test_heads_that_the_axis_does_not_divide():
    on = mesh(False, model=4)
    call = dense(ones(2, 8, 6, 8), ones(2, 8, 2, 8), on, heads="model")
    refused(
        call,
        r"^num_heads of q is 6, must be a multiple of 4, the size of mesh axis 'model': "
        "cut heads by an axis whose size divides them",
    )


def test_kv_heads_whose_groups_would_be_torn():
    on = mesh(model=2)
    call = dense(ones(2, 8, 6, 8), ones(2, 8, 3, 8), on, ((None, None, "model"), ()))
    refused(call, r"^num_kv_heads is 3, must divide, or be a multiple of, 2, the size of mesh "
                  r"axis 'model': each shard has 3 of 6 query heads, and a kv head serves "
                  "2; repeat k and v to 6 heads, or use fewer shards")  # fmt: skip


def test_a_batch_that_the_axis_does_not_divide():
    on = mesh(False, data=2, model=4)
    call = dense(ones(3, 8, 4, 8), ones(3, 8, 4, 8), on, batch="data")
    refused(
        call,
        r"^batch of q is 3, must be a multiple of 2, the size of mesh axis 'data': pad "
        "the batch, or cut it by fewer devices",
    )


def test_positions_that_the_axis_does_not_divide():
    on = mesh(False, seq=4)
    call = dense(ones(1, 8, 4, 8), ones(1, 10, 4, 8), on, context="seq")
    refused(
        call,
        r"^kv_len of k is 10, must be a multiple of 4, the size of mesh axis 'seq': pad "
        "them and pass query_seq_lengths and key_value_seq_lengths, or cut",
    )


@pytest.mark.parametrize("form", ["ring", "all_gather", "all_to_all"])
def test_queries_that_the_axis_does_not_divide(form):
    on = mesh(False, seq=4)
    call = dense(ones(1, 10, 4, 8), ones(1, 8, 4, 8), on, context="seq", form=form)
    refused(
        call,
        r"^q_len of q is 10, must be a multiple of 4, the size of mesh axis 'seq': pad "
        "them and pass query_seq_lengths and key_value_seq_lengths, or cut",
    )


def test_a_dimension_that_is_never_cut():
    on = mesh(model=4)
    call = dense(ones(1, 8, 4, 8), ones(1, 8, 4, 8), on, ((None, None, None, "model"), ()))
    refused(
        call,
        r"^q is sharded over mesh axis 'model' of size 4 in a dimension that is never "
        "shared out, .*: jax.sharding.reshard it",
    )


def test_arrays_that_disagree():
    on = mesh(data=2, model=4)
    call = dense(ones(8, 8, 4, 8), ones(8, 8, 4, 8), on, (("data",), ("model",)))
    refused(call, r"^k \(batch\) is sharded over mesh axis 'model' of size 4, must be over mesh "
                  r"axis 'data' of size 2, as q \(batch\), or over none: jax.sharding.reshard "
                  "it")  # fmt: skip


def test_what_is_said_and_what_the_arrays_show():
    on = mesh(data=2, model=4)
    call = dense(ones(8, 8, 4, 8), ones(8, 8, 4, 8), on, (("data",), ()), batch="model")
    refused(call, r"^q \(batch\) is sharded over mesh axis 'data' of size 2, must be over mesh "
                  r"axis 'model' of size 4, as mesh_axes, or over none: jax.sharding.reshard "
                  "it")  # fmt: skip


def test_an_axis_that_the_mesh_has_not():
    call = dense(ones(8, 8, 4, 8), ones(8, 8, 4, 8), mesh(False, data=2), heads="modle")
    refused(
        call,
        r"^mesh_axes.heads names 'modle', must be one of data, the mesh's axes: name one of "
        "these, or pass MeshAxes\\(mesh=...\\) with that axis",
    )


def test_axes_without_a_mesh():
    call = dense(ones(8, 8, 4, 8), ones(8, 8, 4, 8), None, heads="model")
    refused(
        call,
        r"^mesh_axes names axes and no mesh, and the arrays show none, must have one: "
        r"pass MeshAxes\(mesh=...\), or call under",
    )


def test_mesh_axes_that_cannot_be():
    with pytest.raises(
        ValueError, match=r"^form is 'rings', must be one of ring, .*: use 'ring', or 'all_"
    ):
        MeshAxes(form="rings")
    with pytest.raises(
        ValueError, match=r"^mesh axis 'x' is named 2 times, .*: leave it to one of them"
    ):
        MeshAxes(batch=("x", "y"), heads="x")
    with pytest.raises(
        ValueError, match=r"^mesh_axes is 'x', must be a MeshAxes, or None: say MeshAxes"
    ):
        attnsel_jax.dot_product_attention(*[ones(1, 8, 4, 8)] * 3, mesh_axes="x")


def ragged(on, cache_spec, q_spec, cache_heads=4):
    metadata = AttentionMetadata.from_lengths([2], [3], [[1]], 4)
    q, k = put(ones(2, 8, 8), on, *q_spec), ones(2, cache_heads, 8)
    cache = KVCache(put(ones(2, 4, 4, cache_heads, 8), on, *cache_spec))
    return lambda: attnsel_jax.paged_attention(q, k, k, cache, metadata)


def test_a_cache_with_fewer_heads_than_shards():
    call = ragged(mesh(model=4), (), (None, "model"), cache_heads=2)
    refused(call, r"^the cache's num_kv_heads of kv_pages is 2, must be a multiple of 4, the size "
                  r"of mesh axis 'model': allocate the cache with more kv heads")  # fmt: skip


def test_a_cut_batch_of_one_group():
    call = ragged(mesh(data=2), (None, "data"), ("data",))
    refused(call, r"^num_seqs has shape \(\), must be \(groups,\) with a multiple of 2 groups, the "
                  r"size of mesh axis 'data'.*AttentionMetadata.grouped")  # fmt: skip


def test_groups_that_the_axis_does_not_divide():
    on = mesh(data=2)
    one = AttentionMetadata.from_lengths([2], [3], [[1]], 4)
    metadata = AttentionMetadata.grouped([one] * 3)
    cache = LatentCache(put(ones(6, 4, 24), on, "data"))
    call = lambda: attnsel_jax.mla_attention(  # noqa: E731
        put(ones(6, 4, 16), on, "data"), ones(6, 4, 8), None, None, cache, metadata, scale=1.0
    )
    refused(call, r"^the number of groups of num_seqs is 3, must be a multiple of 2, the size of "
                  r"mesh axis 'data'")  # fmt: skip


def test_batches_that_are_no_groups():
    one = AttentionMetadata.from_lengths([2], [3], [[1]], 4)
    two = AttentionMetadata.from_lengths([3], [3], [[1]], 4)
    for batches in ([], [one, two], [AttentionMetadata.grouped([one, one])] * 2):
        with pytest.raises(ValueError, match="must be at least one, all alike and of one group"):
            AttentionMetadata.grouped(batches)


def test_chunks_in_a_ring():
    axes = MeshAxes(context="seq", form="ring", mesh=mesh(False, seq=4))
    x = ones(1, 24, 4, 8)

    def call():
        return attnsel_jax.dot_product_attention(x, x, x, attention_chunk_size=4, mesh_axes=axes)

    refused(
        call,
        r"^attention_chunk_size is 4, must divide 6, the keys of each of 4 devices along mesh axis "
        "'seq': use form='all_gather' or 'all_to_all', or pad the keys",
    )


def test_heads_that_cannot_be_exchanged_for_positions():
    axes = MeshAxes(context="seq", form="all_to_all", mesh=mesh(False, seq=4))
    x = ones(1, 8, 6, 8)
    call = lambda: attnsel_jax.dot_product_attention(x, x, x, mesh_axes=axes)  # noqa: E731
    refused(
        call,
        r"^num_heads of a shard is 6, must be a multiple of 4, the size of mesh axis "
        "'seq': form 'all_to_all' exchanges .*; use form='ring' or 'all_gather'",
    )


def test_over_spread_pages_a_kernel_need_not_know_of_windows():
    on = mesh(False, seq=4)
    plan = plan_call("topk_positions", {"scores": ones(4, 8)}, MeshAxes(context="seq", mesh=on))
    asked = {"has_sliding_window": True, "has_attention_chunk": True, "has_alibi": True}
    told = asked_of_kernel("paged", plan, asked, by_position=False)
    assert told == {"has_sliding_window": False, "has_attention_chunk": False, "has_alibi": True,
                    "context_axis": "seq", "has_sink": False}  # fmt: skip


def test_alibi_over_spread_pages_where_later_keys_are_seen():
    on = mesh(seq=4)
    metadata = AttentionMetadata.from_lengths([1], [3], [[1]], 4)
    arrays = metadata.arrays() | {"q": ones(1, 4, 8), "alibi_slopes": ones(4)}
    arrays |= {"k": None, "v": None, "kv_pages": put(ones(2, 4, 4, 4, 8), on, None, "seq")}
    plan = plan_call("paged", arrays)
    call = functools.partial(
        kernel_over_mesh(XlaBackend, "paged", plan), **arrays | {"slot_mapping": None}, causal=False
    )
    refused(call, r"^causal is False, must be True with alibi_slopes where mesh axis 'seq' cuts "
                  "the pages of a sequence, .*: cut its heads, or groups of sequences, "
                  "instead")  # fmt: skip


def test_a_kernel_without_lse_that_is_called_by_itself_over_spread_keys():
    x = jax.ShapeDtypeStruct((1, 8, 4, 8), "float32")
    on = mesh(False, seq=4)
    for form, fits in (("ring", False), ("all_gather", True)):
        plan = plan_call("dense", dict.fromkeys("qkv", x),
                         MeshAxes(context="seq", form=form, mesh=on))  # fmt: skip
        if fits:
            kernel_over_mesh(NoLseBackend, "dense", plan)
            continue
        with pytest.raises(ValueError, match=r"^needs_lse is True, must be .*; use form='all_gather"
                                             "' or 'all_to_all', or another backend$"):  # fmt: skip
            kernel_over_mesh(NoLseBackend, "dense", plan)


SOURCES = sorted(pathlib.Path(over_mesh.__file__).parent.glob("*.py"))
WAYS_OUT = r"\b(use|cut|pass|pad|reshard|leave|say|name|make|allocate|_WAYS_OUT|why)\b"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_refusal_names_a_way_out(path):
    """What stands after what must be, in each message that the mesh's code raises."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise):
            _, must, rest = ast.unparse(node.exc).partition("must")
            assert must, ast.unparse(node)
            assert re.search(WAYS_OUT, rest), ast.unparse(node)


class NoLseBackend(AttentionBackend):
    """Serves dense attention, and returns no lse."""

    name = "NO_LSE"
    capabilities = {"dense": dataclasses.replace(XLA_DENSE, needs_lse=NEVER)}
    kernels = {"dense": "attnsel_jax.xla.dense:dense_attention"}


def test_a_backend_without_lse_is_not_eligible_where_partial_results_are_merged():
    question = AttentionSelectorConfig(8, "float32", op="dense", context_axis="seq")
    reasons = NoLseBackend.validate_configuration(question)
    assert [str(reason) for reason in reasons] == [
        "needs_lse is True, must be False: mesh axis 'seq' spreads a sequence's keys, and partial "
        "results are merged by lse"
    ]
    with pytest.raises(ValueError, match="context_axis is 3, must be the name of a mesh axis"):
        AttentionSelectorConfig(8, "float32", context_axis=3)


@pytest.mark.parametrize(("form", "serves"), [("ring", False), ("all_gather", True),
                                              ("all_to_all", True)])  # fmt: skip
def test_the_op_asks_what_its_form_needs(form, serves):
    axes = MeshAxes(context="seq", form=form, mesh=mesh(False, seq=4))
    x = ones(1, 8, 4, 8)

    def call():
        return attnsel_jax.dot_product_attention(x, x, x, backend=NoLseBackend, mesh_axes=axes)

    if serves:
        jax.eval_shape(call)
    else:
        refused(call, "NO_LSE, asked for by argument backend, does not serve .*needs_lse is True, "
                      "must be False: mesh axis 'seq'")  # fmt: skip
