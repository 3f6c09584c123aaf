"""Shapes and dtypes of an op's arguments against its contract, at trace time, as one table.

    dims = check_arguments({
        "q": (q, "batch q_len num_q_heads head_dim", FLOATS),
        "bias": (bias, "~batch ~num_q_heads ~q_len ~kv_len", FLOATS),   # ~ = this size, or 1
    })

A name is bound by the first argument that has it; a later one that differs is refused, with both
values. Arguments that are None are passed over, unless they are required. A number in place of a
name is an exact size.
"""

from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp

FLOATS = ("float32", "bfloat16", "float16")
CACHE_DTYPES = (*FLOATS, "float8_e4m3fn", "float8_e5m2", "int8")
INT32 = ("int32",)
FLOAT32 = ("float32",)
BOOL = ("bool",)

Spec = tuple[jax.Array | None, str, Sequence[str]]


def check_arguments(table: Mapping[str, Spec], required: Collection[str] = ()) -> dict[str, int]:
    """Binds dimension names to sizes, and refuses what does not fit.

    Args:
        table: argument name -> (array or None, dimension names, allowed dtype names).
        required: names of arguments that must not be None.

    Returns:
        Dimension name -> size.

    Raises:
        TypeError: an argument is no array.
        ValueError: a rank, a dtype or a size is not what the table says, or a required one is None.
    """
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    for name, (array, dims_text, dtypes) in table.items():
        if array is None and name not in required:
            continue
        dims = dims_text.split()
        layout = f"[{', '.join(d.lstrip('~') for d in dims)}]"
        if array is None:
            raise ValueError(f"{name} is None, must be an array {layout}: it is required")
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise TypeError(
                f"{name} is {type(array).__name__}, must be an array {layout}: "
                f"convert it with jnp.asarray"
            )
        if len(array.shape) != len(dims):
            raise ValueError(
                f"{name} has {len(array.shape)} dimensions {tuple(array.shape)}, must have "
                f"{len(dims)}: {layout}"
            )
        if jnp.dtype(array.dtype).name not in dtypes:
            raise ValueError(
                f"{name} has dtype {jnp.dtype(array.dtype).name}, must be one of "
                f"{', '.join(dtypes)}: convert it with .astype"
            )
        for dim, size in zip(dims, array.shape, strict=True):
            _bind(name, tuple(array.shape), layout, dim, size, sizes, origin)
    return sizes


def _bind(name, shape, layout, dim, size, sizes, origin) -> None:
    """Holds one dimension of one argument against what is bound, or binds it."""
    broadcast, dim = dim.startswith("~"), dim.lstrip("~")
    if broadcast and size == 1:
        return
    if dim.isdigit():
        wanted, source = int(dim), "by definition"
    elif dim in sizes:
        wanted, source = sizes[dim], f"as in {origin[dim]}"
    else:
        sizes[dim], origin[dim] = size, name
        return
    if size != wanted:
        what = "size" if dim.isdigit() else dim
        raise ValueError(
            f"{name} has {what} {size}, must be {wanted}{' or 1' if broadcast else ''} ({source}): "
            f"{name} is {layout} = {shape}"
        )


def check_groups(num_q_heads: int, num_kv_heads: int) -> int:
    """Query heads per kv head; refuses counts that do not divide."""
    if num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"num_q_heads is {num_q_heads}, must be a multiple of num_kv_heads, {num_kv_heads}: "
            f"each kv head serves as many query heads as every other"
        )
    return num_q_heads // num_kv_heads


def check_positive(name: str, value: float | None) -> None:
    """Refuses a static number that is given and not above zero."""
    if value is not None and not value > 0:
        raise ValueError(f"{name} is {value}, must be above 0, or None for none of it")


def check_same_dtype(**arrays: jax.Array | None) -> None:
    """Refuses arrays of differing dtypes; None is passed over."""
    given = {name: jnp.dtype(a.dtype).name for name, a in arrays.items() if a is not None}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{name} {dtype}" for name, dtype in given.items())
        raise ValueError(f"dtypes are {listed}, must all be the same: convert with .astype")
