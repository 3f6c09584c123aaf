"""Each op of each backend refuses sizes that a mesh does not divide, whatever its cache's layout.

The size, the axis, the axis's size, and what to do: read off shapes, before a kernel is traced.
"""

import jax
import jax.numpy as jnp
import pytest
from meshes import mesh

from attnsel_jax import AttentionBackendEnum, MeshAxes
from attnsel_jax.aot.arguments import dense_arguments, mla_arguments, paged_arguments
from attnsel_jax.cache_layouts import LAYOUTS, latent_layout_named
from attnsel_jax.mesh import plan_call
from attnsel_jax.mesh.dimensions import ARGUMENTS

TOKENS = 6


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def arguments_of(backend, op, heads=8, kv_heads=4, pages=8):
    """Shapes of a call; of a ragged one, TOKENS sequences of one token each."""
    if op == "dense":
        return dense_arguments(batch=6, q_len=10, kv_len=10, num_heads=heads,
                               num_kv_heads=kv_heads, head_size=64, dtype="bfloat16")  # fmt: skip
    sizes = {"batch": TOKENS, "q_len": 1, "kv_len": 128, "num_heads": heads, "dtype": "bfloat16",
             "cache_dtype": "bfloat16", "page_size": 64}  # fmt: skip
    if op == "paged":
        shape = LAYOUTS[backend.layout].shape(pages, 64, kv_heads, 64)
        return paged_arguments(num_kv_heads=kv_heads, head_size=64, cache_shape=shape, **sizes)
    shape = latent_layout_named(backend.latent_layout).shape(pages, 64, 576, 2)
    topk = 16 if op == "sparse_mla" else None
    given = mla_arguments(kv_lora_rank=512, rope_dim=64, cache_shape=shape, topk=topk, **sizes)
    if op == "indexer_scores":
        new = {"q_index": floats(TOKENS, heads, 128), "weights": floats(TOKENS, heads),
               "index_pages": floats(pages, 64, 128)}  # fmt: skip
        return new | {n: given[n] for n in ("page_table", "kv_lens", "cu_q_lens", "num_seqs")}
    if op == "topk_positions":
        return {"scores": floats(TOKENS, 128)}
    return given


def in_groups(given, groups):
    """The same shapes as of a batch of groups."""
    ints = {"num_seqs": (groups,), "cu_q_lens": (TOKENS + groups,)}
    return given | {n: jax.ShapeDtypeStruct(shape, jnp.int32) for n, shape in ints.items()}


HEADS = "cut heads by an axis whose size divides them"
FEW_PAGES = "allocate the cache with more pages"
EVERY_RAGGED = ("paged", "mla", "sparse_mla", "indexer_scores")
# What is cut over an axis of four, of which ops, with which sizes; and what is said.
CASES = {
    "heads": ("heads", ("dense", *EVERY_RAGGED), {"heads": 6, "kv_heads": 2},
              rf"^num_heads of \w+ is 6, must be a multiple of 4, {{axis}}: {HEADS}"),
    "kv heads": ("heads", ("dense",), {"heads": 12, "kv_heads": 6},
                 r"^num_kv_heads is 6, must divide, or be a multiple of, 4, {axis}: each shard "
                 r"has 3 of 12 query heads, and a kv head serves 2; repeat k and v"),
    "cached heads": ("heads", ("paged",), {"kv_heads": 2},
                     r"^the cache's num_kv_heads of kv_pages is 2, must be a multiple of 4, "
                     r"{axis}: allocate the cache with more kv heads"),
    "batch": ("batch", ("dense",), {}, r"^batch of \w+ is 6, must be a multiple of 4, {axis}: pad"),
    "no groups": ("batch", EVERY_RAGGED, {},
                  r"^num_seqs has shape \(\), must be \(groups,\) with a multiple of 4 groups, "
                  r"{axis}, .*AttentionMetadata.grouped"),
    "groups": ("batch", EVERY_RAGGED, {"groups": 3},
               r"^the number of groups of num_seqs is 3, must be a multiple of 4, {axis}"),
    "groups' pages": ("batch", EVERY_RAGGED, {"groups": 4, "pages": 7}, None),
    "tokens": ("batch", ("topk_positions",), {},
               r"^num_tokens of scores is 6, must be a multiple of 4, {axis}"),
    "positions": ("context", ("dense",), {},
                  r"^(q|kv)_len of \w+ is 10, must be a multiple of 4, {axis}: pad them and pass"),
    "pages": ("context", EVERY_RAGGED, {"pages": 7},
              rf"^num_pages of \w+ is 7, must be a multiple of 4, {{axis}}: {FEW_PAGES}"),
}  # fmt: skip
ALL = [
    pytest.param(member.name, op, case, id=f"{member.name}-{op}-{case}")
    for member in AttentionBackendEnum
    for op in member.get_class().kernels
    if op in ARGUMENTS
    for case, (_, ops, *_) in CASES.items()
    if op in ops
]


@pytest.mark.parametrize(("name", "op", "case"), ALL)
def test_sizes_that_an_axis_does_not_divide(name, op, case):
    backend = AttentionBackendEnum[name].get_class()
    cut, _, sizes, message = CASES[case]
    sizes = dict(sizes)
    groups = sizes.pop("groups", None)
    given = arguments_of(backend, op, **sizes)
    if groups:
        given = in_groups(given, groups)
    if message is None:  # six tokens of four groups: tokens, sequences or pages, as they come
        message = r"^(num_tokens|max_num_seqs|num_pages|the number of groups) of \w+ is \d+, must "
        message += r"be a multiple of 4, {axis}: (build|allocate)"
    arrays = {n: x for n, x in given.items() if hasattr(x, "shape")}
    axes = MeshAxes(mesh=mesh(False, part=4), **{cut: "part"})
    layout = backend.latent_layout if backend.is_mla() else backend.layout
    with pytest.raises(ValueError, match=message.format(axis="the size of mesh axis 'part'")):
        plan_call(op, arrays, axes, layout)
