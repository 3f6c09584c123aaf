"""Dataclasses of arrays that go through every part of JAX, `jax.export`'s files among them."""

import json
from typing import TypeVar

import jax
import jax.export

T = TypeVar("T")


def exportable_pytree(cls: type[T]) -> type[T]:
    """Registers a dataclass as a pytree whose static fields `jax.export` writes as JSON.

    A process that reads such a file has to have imported the class.
    """
    jax.tree_util.register_dataclass(cls)
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"attnsel_jax.{cls.__name__}",
        serialize_auxdata=lambda static: json.dumps(static).encode(),
        deserialize_auxdata=lambda text: tuple(json.loads(text)),
    )
    return cls
