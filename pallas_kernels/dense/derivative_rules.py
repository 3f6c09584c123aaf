"""What the rules of each lowering's `jax.custom_vjp` share."""

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

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

    The rule gives (out, lse, ..), (what came in, out, lse), or (what came in, correction, out, lse)
    (see `corrected`): where a policy saves them, the forward kernel does not run again for the
    backward one.
    """

    @functools.wraps(forward)
    def call(static: Any, *arrays: Any) -> Any:
        results, (*given, _, _) = forward(static, *arrays)
        more = [x if x is None else _named(x) for x in given[len(arrays) :]]
        out, lse = map(_named, results[:2])
        return (out, lse, *results[2:]), (*given[: len(arrays)], *more, out, lse)

    return call


def told_what_is_asked(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward rule for `defvjp(..., symbolic_zeros=True)`.

    Args:
        forward: a rule of (static, asked, *arrays); asked has True for each array, in the arrays'
            own structure, whose gradient is asked for.
    """

    @functools.wraps(forward)
    def call(static: Any, *given: Any) -> Any:
        arrays, asked = (
            jax.tree.map(operator.attrgetter(name), given) for name in ("value", "perturbed")
        )
        return forward(static, asked, *arrays)

    return call


def with_zeros(cotangents: Any) -> Any:
    """The cotangents, of which `symbolic_zeros=True` leaves out those that are 0."""

    def made(x: Any) -> Any:
        return jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x

    return jax.tree.map(made, cotangents, is_leaf=lambda x: isinstance(x, SymbolicZero))


def batched_with(v: jax.Array, of_rows: jax.Array) -> jax.Array:
    """The same numbers, which `jax.vmap` batches where it batches v, as it does out.

    lse does not depend on v. Where a `jax.custom_vjp` has a result that is not batched beside one
    that is, JAX adds its cotangent once for each element (0.12 refuses). XLA drops the choice, in
    which v, NaN or not, is never taken.
    """
    return jnp.where(False, jnp.sum(v[:1, :1, :1, :1]).astype(of_rows.dtype), of_rows)


def giving_correction(attend: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of the contract, out and lse, of a function that gives a correction beside them.

    `with_correction` of the kernel gives all three, for who merges parts of the keys by lse: a part
    holds exp(lse) / correction. The third (see `corrected`) is None where it is 1, as with no bias.

    Args:
        attend: the contract's arguments, and `correction`: whether it is asked for.
    """
    signature = inspect.signature(attend)
    named = [p for p in signature.parameters.values() if p.name != "correction"]

    @functools.wraps(attend)
    def kernel(*args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
        return attend(*args, **kwargs)[:2]

    kernel.__signature__ = signature.replace(parameters=named)
    kernel.with_correction = functools.partial(attend, correction=True)
    return kernel


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


def _named(x: Any) -> Any:
    return checkpoint_name(x, DENSE_RESIDUALS)


def _refuse(residuals: Any, cotangents: Any) -> Any:
    raise NotImplementedError(REFUSAL)
