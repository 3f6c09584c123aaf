"""From a call's arguments to a kernel's: what all ops share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnsel_jax.metadata import AttentionMetadata


def features(static: dict[str, Any]) -> dict[str, bool]:
    """The question's flags for the static arguments."""
    return {
        "has_sliding_window": static["sliding_window"] is not None,
        "has_attention_chunk": static["attention_chunk_size"] is not None,
        "has_soft_cap": static["soft_cap"] is not None,
    }


def batch_arrays(metadata: AttentionMetadata, k: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """The batch as the contracts order it; no slots where there is nothing to write."""
    slots = None if k is None else metadata.slot_mapping
    if k is not None and slots is None:
        raise ValueError(
            "k and v are given and metadata.slot_mapping is None, must be an array: build the "
            "batch with writes=True, or pass k=None and v=None"
        )
    batch = (metadata.page_table, metadata.kv_lens, metadata.cu_q_lens, metadata.num_seqs)
    return (*batch, slots)


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
