"""How a device's share is attended to: alone, or with what lies on the devices along `context`.

Alone suffices for batch and heads. Positions need a form: ring, all-gather or all-to-all for dense
attention; for a paged cache, partial results of the pages that lie here, merged.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from attnsel_jax.mesh import groups
from attnsel_jax.mesh.dimensions import CACHES, page_counts
from attnsel_jax.mesh.plan import Plan
from attnsel_jax.mesh.ring import ring_attention
from attnsel_jax.mesh.spread_pages import spread_attention, spread_scores
from attnsel_jax.mesh.whole_keys import all_gather_attention, all_to_all_attention

Arrays = dict[str, jax.Array]
Kernel = Callable[..., Any]


def attend_dense(
    kernel: Kernel, arrays: Arrays, static: dict[str, Any], plan: Plan
) -> tuple[jax.Array, jax.Array]:
    """Out and lse of this device's queries."""
    if plan.context is None:
        return kernel(arrays)
    n = plan.size(plan.context)
    if plan.form == "ring":
        return ring_attention(kernel, arrays, static, plan.context, n)
    if plan.form == "all_gather":
        return all_gather_attention(kernel, arrays, static, plan.context, n)
    return all_to_all_attention(kernel, arrays, plan.context, n)


def attend_ragged(
    kernel: Kernel, op: str, arrays: Arrays, static: dict[str, Any], plan: Plan, layout: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Out, lse and this device's part of the cache."""
    cache = CACHES[op]
    arrays = groups.with_own_pages(op, arrays, plan, layout)
    if plan.context is not None:
        kernel = functools.partial(
            spread_attention,
            kernel,
            cache=cache,
            counts=page_counts(op, arrays[cache], layout),
            axis=plan.context,
            static=static,
            layout=layout,
        )
    return groups.attend(kernel, op, arrays)


def score_ragged(
    kernel: Kernel, op: str, arrays: Arrays, plan: Plan, layout: str
) -> tuple[jax.Array]:
    """The indexer's scores of this device's tokens, summed over the heads of all devices."""
    arrays = groups.with_own_pages(op, arrays, plan, layout)
    if plan.context is not None:
        counts = page_counts(op, arrays[CACHES[op]], layout)
        kernel = functools.partial(spread_scores, kernel, counts=counts)
    (scores,) = groups.attend(kernel, op, arrays)
    if plan.heads:
        scores = jax.lax.psum(scores, plan.heads)
    return (scores if plan.context is None else jax.lax.pmax(scores, plan.context),)


def asked_of_kernel(
    op: str, plan: Plan | None, question: dict[str, Any], *, by_position: bool
) -> dict[str, Any]:
    """The question of a call as the kernel of one device meets it.

    Args:
        op: the op.
        plan: of the call.
        question: the features that the call uses.
        by_position: whether what a query sees depends on where it is.
    """
    if plan is None or plan.context is None:
        return question
    if op == "dense" and plan.form == "all_to_all":
        return question
    if op == "dense":
        question = question | {"has_q_offset": by_position or question["has_q_offset"]}
        if plan.form == "all_gather":
            return question
    if op == "paged":  # what a token sees is told by pages and lengths
        question = question | {"has_sliding_window": False, "has_attention_chunk": False}
    return question | {"context_axis": plan.context, "has_sink": False}


def check_context(op: str, plan: Plan, arrays: Arrays, static: dict[str, Any]) -> None:
    """Refuses what the form of a call cannot do.

    Raises:
        ValueError: an argument that needs another form, or sizes that the form does not cut.
    """
    if plan.context is None:
        return
    axis = f"mesh axis {plan.context!r} cuts"
    if op != "dense":
        if "alibi_slopes" in arrays and not static.get("causal", True):
            raise ValueError(
                f"causal is False, must be True with alibi_slopes where {axis} the pages of a "
                f"sequence, whose distances are those to a last key: cut its heads, or groups of "
                f"sequences, instead"
            )
        return
    chunk, n = static.get("attention_chunk_size"), plan.size(plan.context)
    if plan.form == "ring" and chunk is not None and arrays["k"].shape[1] // n % chunk:
        raise ValueError(
            f"attention_chunk_size is {chunk}, must divide {arrays['k'].shape[1] // n}, the keys "
            f"of each of {n} devices along mesh axis {plan.context!r}: use form='all_gather' or "
            f"'all_to_all', or pad the keys"
        )
    if plan.form == "all_to_all":
        _check_heads(arrays, plan)


def _check_heads(arrays: Arrays, plan: Plan) -> None:
    """Refuses heads that cannot be exchanged for positions."""
    n, shards = plan.size(plan.context), plan.size(plan.heads)
    for name, count in (
        ("num_heads", arrays["q"].shape[2]),
        ("num_kv_heads", arrays["k"].shape[2]),
    ):
        mine = max(1, count // shards)
        if mine % n and (name == "num_heads" or n % mine):
            divide = "" if name == "num_heads" else ", or divide it"
            raise ValueError(
                f"{name} of a shard is {mine}, must be a multiple of {n}, the size of mesh axis "
                f"{plan.context!r}{divide}: form 'all_to_all' exchanges heads for positions; use "
                f"form='ring' or 'all_gather'"
            )
