"""Whether the sizes of a call can be shared out as its plan says: refusals, with their numbers."""

from collections.abc import Mapping

import jax

from attnsel_jax.cache_layouts import layout_named
from attnsel_jax.mesh.dimensions import Dims
from attnsel_jax.mesh.plan import Plan

_WORDS = {"heads": "num_heads", "cache_heads": "the cache's num_kv_heads", "pages": "num_pages",
          "seqs": "max_num_seqs", "tokens": "num_tokens", "groups": "the number of groups",
          "kv_heads": "num_kv_heads"}  # fmt: skip
_POSITIONS = (
    "pad them and pass query_seq_lengths and key_value_seq_lengths, or cut batch or heads instead"
)
_WAYS_OUT = {
    "batch": "pad the batch, or cut it by fewer devices",
    "heads": "cut heads by an axis whose size divides them, or batch or positions instead",
    "q_len": _POSITIONS,
    "kv_len": _POSITIONS,
    "tokens": "build the batch with AttentionMetadata.from_lengths(num_tokens=...), which pads it",
    "seqs": "build the batch with AttentionMetadata.from_lengths(max_num_seqs=...), which pads it",
    "pages": "allocate the cache with more pages",
    "cache_heads": "allocate the cache with more kv heads; each of k and v is then repeated",
    "groups": "build the batch with AttentionMetadata.grouped, a group for each shard",
}


def check_shares(
    op: str,
    plan: Plan,
    arrays: Mapping[str, jax.Array],
    dims: Mapping[str, Dims],
    layout: str,
) -> None:
    """Refuses a call whose sizes the plan's axes do not divide.

    Raises:
        ValueError: the size, the axis and its size, and what it must divide.
    """
    if plan.batch and "groups" not in dims.get("num_seqs", ("groups",)):
        raise ValueError(
            f"num_seqs has shape (), must be (groups,) with a multiple of {plan.size(plan.batch)} "
            f"groups, the size of {_named(plan.batch)}, over which tokens, sequences and pages are "
            f"sharded: {_WAYS_OUT['groups']}"
        )
    for name in sorted(arrays, key=lambda name: name != "num_seqs"):
        array = arrays[name]
        for axes, dim, size in zip(plan.spec(dims[name]), dims[name], array.shape, strict=True):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            if size % plan.size(axes):
                raise ValueError(
                    f"{_WORDS.get(dim, dim)} of {name} is {size}, must be a multiple of "
                    f"{plan.size(axes)}, the size of {_named(axes)}: "
                    f"{_WAYS_OUT.get(dim, _WAYS_OUT['groups'])}"
                )
    if plan.heads and "q" in arrays and "kv_heads" in dims.get("k", ()):
        q, k = (arrays[x].shape[dims[x].index(d)] for x, d in (("q", "heads"), ("k", "kv_heads")))
        own_heads(plan, q, k)
    if "kv_pages" in arrays:
        _check_layout(plan, arrays["kv_pages"], dims["kv_pages"], layout)


def own_heads(plan: Plan, num_heads: int, num_kv_heads: int) -> int:
    """How many kv heads the query heads of one shard use.

    Args:
        plan: of the call.
        num_heads, num_kv_heads: of the whole call.

    Raises:
        ValueError: a shard's query heads would use a part of a group beside another group.
    """
    group, mine = num_heads // num_kv_heads, num_heads // plan.size(plan.heads)
    if mine % group and group % mine:
        raise ValueError(
            f"num_kv_heads is {num_kv_heads}, must divide, or be a multiple of, "
            f"{plan.size(plan.heads)}, the size of {_named(plan.heads)}: each shard has {mine} of "
            f"{num_heads} query heads, and a kv head serves {group}; repeat k and v to "
            f"{num_heads} heads, or use fewer shards"
        )
    return max(1, mine // group)


def _check_layout(plan: Plan, pages: jax.Array, dims: Dims, layout: str) -> None:
    """Refuses shares of a cache that are no cache in its layout: heads that are stored together."""
    of = layout_named(layout)
    share = tuple(
        size // plan.size(plan.axes(dim)) for dim, size in zip(dims, pages.shape, strict=True)
    )
    heads = of.dims(pages.shape)[2]
    wanted = heads // plan.size(plan.heads)
    fits = of.dims(share)[2] == wanted and of.shape(*of.dims(share)) == share
    if wanted < 1 or not fits:
        raise ValueError(
            f"num_kv_heads of the cache is {heads}, must give each of the "
            f"{plan.size(plan.heads)} shards of {_named(plan.heads)} whole rows of the layout "
            f"{layout!r}: allocate the cache with more kv heads"
        )


def _named(axes: tuple[str, ...]) -> str:
    names = " x ".join(map(repr, axes))
    return f"mesh axis {names}" if len(axes) == 1 else f"mesh axes {names}"
