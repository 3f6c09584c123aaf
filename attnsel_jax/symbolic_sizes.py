"""Sizes that `jax.export` leaves open: refused readably where a kernel decides by them."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.static_arguments import is_integer

_PLAIN = ("dense", "paged")  # the ops of XLA_REFERENCE, which takes any sizes


@contextlib.contextmanager
def refused_where_compared(
    backend: type[AttentionBackend], op: str, given: Mapping[str, Any]
) -> Iterator[None]:
    """While the kernel is traced: JAX's error about a symbolic size becomes a refusal.

    Args:
        backend: whose kernel it is.
        op: which kernel.
        given: what it is called with, by the contract's names.

    Raises:
        ValueError: the kernel compares a size that is symbolic.
    """
    try:
        yield
    except jax.errors.InconclusiveDimensionOperation as error:
        shapes = {name: getattr(values, "shape", ()) for name, values in given.items()}
        symbolic = [name for name, shape in shapes.items() if not all(map(is_integer, shape))]
        listed = ", ".join(f"{name} ({', '.join(map(str, shapes[name]))})" for name in symbolic)
        plain = (
            "name backend='XLA_REFERENCE', which is plain jax.numpy, or " if op in _PLAIN else ""
        )
        raise ValueError(
            f"shapes are {listed}, must be numbers where op {op} of backend {backend.name} "
            f"chooses its tiles by them: {plain}export a program for each size"
        ) from error
