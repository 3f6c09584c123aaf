"""Numbers and flags that are fixed when a call is traced: checked, and made plain Python values.

Plain values hash, so they can be part of `jax.jit`'s key, and no dtype of theirs meets an array's.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.masks import FARTHEST

LEAST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)  # of logits
Window = int | tuple[int | None, int | None] | None


def flag(name: str, value: Any) -> bool:
    """True or False, numpy's included.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    refuse_traced(name, value)
    raise ValueError(f"{name} is {value!r}, must be True or False")


def count(name: str, value: Any, *, optional: bool = True) -> int | None:
    """An integer of at least 1; None stays, if it is optional.

    Raises:
        ValueError: anything else.
    """
    if value is None and optional:
        return None
    refuse_traced(name, value)
    if not is_integer(value) or value.__index__() < 1:
        none = ", or None" if optional else ""
        raise ValueError(f"{name} is {value!r}, must be an integer of at least 1{none}")
    return value.__index__()


def is_integer(value: Any) -> bool:
    """Whether it is an integer, an array's of no dimensions too, and no bool."""
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 0 and np.issubdtype(value.dtype, np.integer)
    return hasattr(value, "__index__") and not isinstance(value, bool | np.bool_)


def distance(name: str, value: Any) -> int | None:
    """A count of positions, to which kernels add positions in int32; None stays.

    Raises:
        ValueError: no integer of at least 1, or one beyond `FARTHEST`.
    """
    value = count(name, value)
    if value is not None and value > FARTHEST:
        raise ValueError(
            f"{name} is {value}, must be at most {FARTHEST}, or None: pass None where nothing is "
            f"too far to be seen"
        )
    return value


def number(name: str, value: Any, *, positive: bool = False) -> float | None:
    """A finite number as float; None stays.

    Raises:
        ValueError: no number, not finite in float32, or not above 0 there where it must be.
    """
    if value is None:
        return None
    refuse_traced(name, value)
    wanted = f"a finite number{' above 0' if positive else ''}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        kinds = (jnp.floating, jnp.integer)
        is_number = value.ndim == 0 and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
        value = float(value) if is_number else value
    if not is_number or not abs(value) < math.inf or (positive and not value > 0):
        raise ValueError(f"{name} is {value!r}, must be {wanted}, or None")
    if abs(value) > LARGEST or (positive and value < LEAST):
        limits = f"{LEAST:.2g} to {LARGEST:.2g}" if positive else f"at most {LARGEST:.2g} in size"
        raise ValueError(f"{name} is {value!r}, must be {wanted} in float32 ({limits}), or None")
    return float(value)


def window(name: str, value: Any) -> Window:
    """A window in this library's words, the own key counted: an int, or (left, right).

    Raises:
        ValueError: neither, or a side below 1 or beyond `FARTHEST`.
    """
    if value is None or not isinstance(value, tuple | list):
        return distance(name, value)
    if len(value) != 2:
        raise ValueError(f"{name} is {value!r}, must be an integer, (left, right), or None")
    left, right = (distance(f"{name}[{i}]", side) for i, side in enumerate(value))
    return left, right


def on_host(values: Any) -> np.ndarray | None:
    """Integers that can be looked at without waiting for a device; None = there are none such."""
    if values is None or any(isinstance(x, jax.Array) for x in jax.tree.leaves(values)):
        return None
    array = np.asarray(values)
    return array if array.dtype.kind in "iu" else None


def check_int32(name: str, values: Any) -> None:
    """Refuses integers on the host that int32 has no room for: they would become others.

    Raises:
        ValueError: there is one.
    """
    array = on_host(values)
    if array is None or np.can_cast(array.dtype, np.int32):
        return
    limits = array.min(initial=0), array.max(initial=0)
    outside = [x for x in limits if not -(2**31) <= x < 2**31]
    if outside:
        raise ValueError(f"{name} has a value of {outside[0]}, must be {-(2**31)} to {2**31 - 1}")


def refuse_traced(name: str, value: Any) -> None:
    """Refuses what has no value while a program is traced.

    Raises:
        ValueError: it is such.
    """
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name} is traced by jit, vmap or grad, must be a plain value: it is part of the "
            f"program; take it out of the traced arguments (static_argnames)"
        )
