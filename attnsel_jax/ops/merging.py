"""Attention over keys that several calls shared out among them: their results, made one."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from attnsel_jax.mesh.merging import Partial, merged
from pallas_kernels.jax_settings import under_default_rules
from pallas_kernels.shape_checks import FLOAT32, FLOATS, check_arguments, check_same_dtype


def merge_attention(
    outs: Sequence[jax.Array], lses: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """What one call over all the keys would give, of calls over some of them each.

    The calls have the same queries and scale, no key in common, and a sink in one of them at most.
    Each part weighs `exp(lse)`; one that saw no key (lse -inf) weighs nothing, whatever its out.
    Sums are float32; each out comes rounded to its dtype, and the sum is rounded to it again. Has
    gradients, through the lse too.

    Args:
        outs: of each call [..., head_size_v], in one dtype.
        lses: of each call float32 [...], as `return_lse` and `return_residual` give it.

    Returns:
        (out, lse) as the calls' are.

    Raises:
        TypeError: something that is no sequence of arrays.
        ValueError: no part, other counts of outs and lses, or parts of other shapes or dtypes.
    """
    for name, parts in (("outs", outs), ("lses", lses)):
        if hasattr(parts, "shape") or not isinstance(parts, Sequence):
            raise TypeError(f"{name} is {type(parts).__name__}, must be a list of arrays")
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"outs has {len(outs)} parts and lses {len(lses)}, must have as many, at least 1: each "
            f"call's out with its lse (return_lse=True, or return_residual=True)"
        )
    rows = [f"dim{i}" for i in range(max(getattr(outs[0], "ndim", 1) - 1, 0))]
    table = {}
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        table[f"outs[{i}]"] = (out, " ".join([*rows, "head_size_v"]), FLOATS)
        table[f"lses[{i}]"] = (lse, " ".join(rows), FLOAT32)
    check_arguments(table, required=tuple(table))
    check_same_dtype(**{f"outs[{i}]": out for i, out in enumerate(outs)})
    return _merged(list(outs), list(lses))


@jax.jit
@under_default_rules
def _merged(outs: list[jax.Array], lses: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    parts = [
        Partial(jnp.where(lse[..., None] == -jnp.inf, 0, out.astype(jnp.float32)), lse)
        for out, lse in zip(outs, lses, strict=True)
    ]
    whole = merged(*parts)
    return whole.out.astype(outs[0].dtype), whole.lse
