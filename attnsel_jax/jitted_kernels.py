"""A backend's kernels under `jax.jit`: what ops and impls call.

Outside a `jit` of the caller's, a bare kernel would run its loops op by op, and trace them anew at
each call.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.kernel_results import check_results
from attnsel_jax.symbolic_sizes import refused_where_compared

_STATIC = {
    "scale", "causal", "sliding_window", "attention_chunk_size", "soft_cap", "kv_cache_dtype",
    "topk",
}  # fmt: skip
_POSITIONAL = {"dense": ("q", "k", "v"), "topk_positions": ("scores",)}  # of what is called so


def jitted_kernel(backend: type[AttentionBackend], op: str) -> Callable[..., Any]:
    """The backend's kernel for the op, under `jit`.

    It refuses gradients that it does not declare, and results that are not the contract's.
    """
    return guarded(backend, op, _jitted(backend.get_kernel(op), backend, op))


def guarded(
    backend: type[AttentionBackend], op: str, call: Callable[..., Any]
) -> Callable[..., Any]:
    """The call of the backend's kernel, refusing gradients where the backend declares none."""
    if op not in backend.capabilities or True in backend.capabilities[op].needs_grad:
        return call
    return _without_gradient(call, f"op {op} of backend {backend.name}")


@functools.cache
def _jitted(
    kernel: Callable[..., Any], backend: type[AttentionBackend], op: str
) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def call(*args: Any, **named: Any) -> Any:
        given = dict(zip(_POSITIONAL.get(op, ()), args, strict=False)) | named
        with refused_where_compared(backend, op, given):
            return check_results(backend, op, kernel(*args, **named), given)

    return jax.jit(call, static_argnames=static_names(kernel))


def static_names(kernel: Callable[..., Any]) -> tuple[str, ...]:
    """The kernel's arguments that are fixed when it is traced."""
    parameters = inspect.signature(kernel).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())  # a wrapper's **others
    return tuple(sorted(_STATIC if takes_any else _STATIC.intersection(parameters)))


@functools.cache
def _without_gradient(kernel: Callable[..., Any], what: str) -> Callable[..., Any]:
    """The kernel, whose differentiation is refused in place of what JAX says about its loops."""

    def refuse(primals, tangents):
        raise ValueError(
            f"needs_grad is True (grad or jvp reaches the call), must be False for {what}, which "
            f"declares no gradient: put jax.lax.stop_gradient around its floating arguments, or "
            f"attend with dot_product_attention"
        )

    def call(*arrays: Any, **named: Any) -> Any:
        static = {name: named.pop(name) for name in (_STATIC | {"plan"}).intersection(named)}
        guarded = jax.custom_jvp(lambda arrays, named: kernel(*arrays, **named, **static))
        guarded.defjvp(refuse)
        return guarded(arrays, named)

    return call
