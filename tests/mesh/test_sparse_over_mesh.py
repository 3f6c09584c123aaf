"""Sparse MLA over groups, heads and both: the oracle's numbers, and nothing sent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import collectives, mesh, put

import attnsel_jax
from attnsel_jax import AttentionMetadata, LatentCache, MeshAxes, oracle, use_mesh_axes
from attnsel_jax.problems.mla_inputs import mla_inputs

TOKENS = ("ql_nope", "q_pe", "kv_c", "k_pe", "topk_indices")
BATCH = ("page_table", "kv_lens", "cu_q_lens", "num_seqs", "slot_mapping")
LENGTHS = [((1, 6, 0, 2), (35, 25, 7, 2)), ((6, 2, 1, 0), (7, 35, 2, 25))]
PAGE_SIZE = 4


def one_group(i):
    """A group's arguments, this step's latents to be written; NaN where nothing is to be read."""
    q_lens, kv_lens = LENGTHS[i % 2]
    given = mla_inputs(
        np.random.default_rng(i), q_lens=q_lens, kv_lens=kv_lens, num_heads=8, rank=16, rope_dim=8,
        qk_nope_head_dim=8, page_size=PAGE_SIZE, dtype="float32", pad_tokens=2, topk=9,
    )  # fmt: skip
    return {name: x for name, x in given.items() if x is not None}


def side_by_side(parts):
    """(tokens' arrays, cache, metadata): page ids and slots are of the whole cache."""
    count = len(parts[0]["latent_pages"])
    batches = []
    for i, part in enumerate(parts):
        slots = part["slot_mapping"]
        moved = {
            "page_table": part["page_table"] + i * count,
            "slot_mapping": np.where(slots < 0, slots, slots + i * count * PAGE_SIZE),
        }
        batch = {name: jnp.asarray(part[name], jnp.int32) for name in BATCH}
        batches.append(
            AttentionMetadata(**batch | {n: jnp.asarray(x, jnp.int32) for n, x in moved.items()})
        )
    arrays = [np.concatenate([part[name] for part in parts]) for name in TOKENS]
    pages = np.concatenate([part["latent_pages"] for part in parts])
    metadata = AttentionMetadata.grouped(batches) if len(parts) > 1 else batches[0]
    return arrays, pages, metadata


def step(ql_nope, q_pe, kv_c, k_pe, topk_indices, pages, metadata):
    return attnsel_jax.sparse_mla_attention(
        ql_nope, q_pe, kv_c, k_pe, topk_indices, LatentCache(pages), metadata, scale=0.25,
        return_lse=True,
    )  # fmt: skip


CUTS = {
    "heads": (1, {"model": 4}),
    "groups": (4, {"data": 4}),
    "groups, two to a device": (4, {"data": 2}),
    "heads x groups": (2, {"data": 2, "model": 4}),
}


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "automatic"])
@pytest.mark.parametrize("cut", CUTS)
def test_nothing_is_sent_and_the_numbers_are_the_oracle_s(cut, explicit):
    groups, axes = CUTS[cut]
    on = mesh(explicit, **axes)
    parts = [one_group(i) for i in range(groups)]
    arrays, pages, metadata = side_by_side(parts)
    data, model = ("data" if "data" in axes else None), ("model" if "model" in axes else None)
    rows = (data,) if data else ()
    arguments = [put(x, on, *((data, model) if x.ndim == 3 else rows)) for x in arrays]
    arguments += [put(pages, on, *rows), jax.tree.map(lambda x: put(x, on, *rows), metadata)]
    said = None if explicit else MeshAxes(batch=data, heads=model, mesh=on)
    with use_mesh_axes(said):
        assert collectives(step, *arguments) == []
        out, lse, cache = jax.jit(step)(*arguments)
    for i, part in enumerate(parts):
        want = oracle.sparse_mla_attention(**part | {"scale": 0.25})
        for got, wanted in zip((out, lse, cache.pages), want, strict=True):
            size = len(wanted)
            mine = np.asarray(got)[i * size : (i + 1) * size]
            np.testing.assert_allclose(mine, np.asarray(wanted), rtol=2e-5, atol=2e-5)
