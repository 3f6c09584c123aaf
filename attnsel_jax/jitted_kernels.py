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

_STATIC = {
    "scale", "causal", "sliding_window", "attention_chunk_size", "soft_cap", "kv_cache_dtype",
}  # fmt: skip


def jitted_kernel(backend: type[AttentionBackend], op: str) -> Callable[..., Any]:
    """The backend's kernel for the op, under `jit`."""
    return _jitted(backend.get_kernel(op))


@functools.cache
def _jitted(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(kernel, static_argnames=static_names(kernel))


def static_names(kernel: Callable[..., Any]) -> tuple[str, ...]:
    """The kernel's arguments that are fixed when it is traced."""
    parameters = inspect.signature(kernel).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())  # a wrapper's **others
    return tuple(sorted(_STATIC if takes_any else _STATIC.intersection(parameters)))
