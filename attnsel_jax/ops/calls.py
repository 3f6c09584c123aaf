"""From a call's arguments to a kernel's: what all ops share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnsel_jax.mesh import Plan
from attnsel_jax.mesh.shares import own_heads
from attnsel_jax.metadata import AttentionMetadata
from attnsel_jax.selector import DeviceLike


def features(static: dict[str, Any]) -> dict[str, bool]:
    """The question's flags for the static arguments."""
    return {
        "has_sliding_window": static["sliding_window"] is not None,
        "has_attention_chunk": static["attention_chunk_size"] is not None,
        "has_soft_cap": static["soft_cap"] is not None,
    }


def head_counts(plan: Plan | None, num_heads: int, num_kv_heads: int) -> dict[str, int]:
    """The heads that a kernel meets, which is what the question asks: those of one shard."""
    if plan is None:
        return {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    return {
        "num_heads": num_heads // plan.size(plan.heads),
        "num_kv_heads": own_heads(plan, num_heads, num_kv_heads),
    }


def asked_device(device: DeviceLike, *arrays: jax.Array | None) -> DeviceLike:
    """The device that was named, else the one where an array was put; None = JAX's default.

    A traced array does not show where it lies, and one that nobody put anywhere may be moved.
    """
    if device is not None:
        return device
    for array in arrays:
        is_here = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
        if is_here and array.committed:
            return min(array.devices(), key=lambda one: one.id)
    return None


def batch_arrays(metadata: AttentionMetadata, k: jax.Array | None) -> dict[str, jax.Array | None]:
    """The batch by the contracts' names; no slots where there is nothing to write."""
    slots = None if k is None else metadata.slot_mapping
    if k is not None and slots is None:
        raise ValueError(
            "k and v are given and metadata.slot_mapping is None, must be an array: build the "
            "batch with writes=True, or pass k=None and v=None"
        )
    return metadata.arrays() | {"slot_mapping": slots}


def as_array(name: str, values: ArrayLike) -> jax.Array:
    """The values as an array.

    Raises:
        TypeError: they are none.
    """
    try:
        return jnp.asarray(values)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is {type(values).__name__}, must be an array") from error


def as_float32(name: str, values: ArrayLike | None) -> jax.Array | None:
    """Real numbers as float32; None stays.

    Raises:
        TypeError: they are no array.
        ValueError: they are no real numbers.
    """
    if values is None:
        return None
    array = as_array(name, values)
    if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(
        array.dtype, jnp.integer
    ):
        raise ValueError(f"{name} has dtype {array.dtype}, must be float32")
    return array.astype(jnp.float32)


def as_scale(name: str, values: ArrayLike | None, heads: int | None = None) -> jax.Array | None:
    """A cache's scale as float32 [] (or [heads], where one a head may be given); None stays.

    It is the cache's own, a copy: who donates the cache donates it, and keeps what was given.

    Raises:
        TypeError: it is no array.
        ValueError: no real numbers, another shape, or one on the host that is not above 0.
    """
    scale = as_float32(name, values)
    if scale is None:
        return None
    if scale.shape not in ((), *([] if heads is None else [(heads,)])):
        a_head = "" if heads is None else f" or ({heads},), one a kv head"
        raise ValueError(f"{name} has shape {scale.shape}, must be (){a_head}")
    if not any(isinstance(x, jax.Array) for x in jax.tree.leaves(values)):
        host = np.asarray(values, np.float32)
        wrong = host[~((host > 0) & (host < np.inf))]
        if wrong.size:
            raise ValueError(
                f"{name} is {wrong[0]}, must be a finite number above 0: what is stored is divided "
                f"by it"
            )
    return jnp.array(scale, copy=True)
