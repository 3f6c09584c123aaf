"""Rules of a `jax.custom_vjp` whose own differentiation is refused with a way out."""

import functools
from collections.abc import Callable
from typing import Any

import jax

REFUSAL = (
    "the gradient of dense attention is differentiated (a Hessian, or a gradient of a gradient), "
    "must be differentiated once, for no kernel has its derivative: name backend='XLA_REFERENCE', "
    "which is plain jax.numpy, or put jax.lax.stop_gradient around the gradient"
)


def differentiated_once(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule, called as `rule(static, *arrays)`; JAX would name a loop or a primitive of it.

    Raises:
        NotImplementedError: when its results are differentiated.
    """

    @functools.wraps(rule)
    def call(static: Any, *arrays: Any) -> Any:
        guarded = jax.custom_jvp(functools.partial(rule, static))
        guarded.defjvp(_refuse)
        return guarded(*arrays)

    return call


def _refuse(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(REFUSAL)
