"""What the rules of each lowering's `jax.custom_vjp` share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

# For `jax.checkpoint_policies.save_only_these_names` and its like.
DENSE_RESIDUALS = "attnsel_dense_residuals"
REFUSAL = (
    "the gradient of dense attention is differentiated (a Hessian, or a gradient of a gradient), "
    "must be differentiated once, for no kernel has its derivative: name backend='XLA_REFERENCE', "
    "which is plain jax.numpy, or put jax.lax.stop_gradient around it"
)


def differentiated_once(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule, called as `rule(static, *arrays)`; JAX would name a loop or a primitive of it.

    Raises:
        NotImplementedError: when its results are differentiated, in reverse mode.
    """

    @functools.wraps(rule)
    def call(static: Any, *arrays: Any) -> Any:
        guarded = jax.custom_vjp(functools.partial(rule, static))
        guarded.defvjp(lambda *arrays: (rule(static, *arrays), None), _refuse)
        return guarded(*arrays)

    return call


def with_named_residuals(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward rule, whose out and lse have a name for the policies of `jax.checkpoint`.

    The rule gives (out, lse), (what came in, out, lse), or (what came in, correction, out, lse)
    (see `corrected`): where a policy saves them, the forward kernel does not run again for the
    backward one.
    """

    @functools.wraps(forward)
    def call(static: Any, *arrays: Any) -> Any:
        results, (*given, _, _) = forward(static, *arrays)
        more = [x if x is None else _named(x) for x in given[len(arrays) :]]
        out, lse = map(_named, results)
        return (out, lse), (*given[: len(arrays)], *more, out, lse)

    return call


def corrected(
    cotangents: tuple[jax.Array, jax.Array], correction: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The cotangents of out and lse for a backward pass that knows probabilities from lse alone.

    Args:
        cotangents: dout [batch, q_len, num_q_heads, head_dim_v], dlse float32 without the last.
        correction: of each row, as dlse: what exp(logit - lse) is multiplied by to be its
            probability; None = 1. Every gradient is a sum of products of a row's probability and
            its cotangents, so these may have the factor.
    """
    if correction is None:
        return cotangents
    dout, dlse = cotangents
    return (dout * correction[..., None]).astype(dout.dtype), dlse * correction


def _named(x: jax.Array) -> jax.Array:
    return checkpoint_name(x, DENSE_RESIDUALS)


def _refuse(residuals: Any, cotangents: Any) -> Any:
    raise NotImplementedError(REFUSAL)
