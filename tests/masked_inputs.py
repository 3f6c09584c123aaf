"""Dense calls with a boolean mask, as tests of several backends make them."""

import numpy as np

from attnsel_jax.problems.dense_inputs import dense_inputs


def masked_inputs(rng, *, of, **options):
    """Inputs with a mask that has some tiles whole, some empty, and of others a part.

    Keys that it hides from everybody are NaN.

    Args:
        rng: source of everything drawn.
        of: which of the dimensions (batch, heads, q, kv) it has.
        options: of `dense_inputs`.
    """
    arguments = dense_inputs(rng, **options)
    q, k, v = (arguments[name].copy() for name in "qkv")
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    mask = rng.random(full) < 0.5
    mask |= np.arange(full[2])[:, None] >= 128  # these see all keys
    mask &= np.arange(full[3]) // 128 != 1  # but nobody those
    mask = mask[tuple(slice(None if is_wide else 1) for is_wide in of)]
    group = q.shape[2] // k.shape[2]
    of_kv_heads = np.broadcast_to(mask, full).reshape(full[0], -1, group, *full[2:])
    unseen = ~of_kv_heads.any((2, 3)).swapaxes(1, 2)
    k[unseen] = v[unseen] = np.nan
    return arguments | {"k": k, "v": v, "mask": mask}
