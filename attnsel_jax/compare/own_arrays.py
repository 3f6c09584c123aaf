"""A caller's own arrays as an op's arguments: what is wrong in them is no backend's error."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attnsel_jax.jitted_kernels import static_names
from attnsel_jax.metadata import AttentionMetadata
from attnsel_jax.problems.question import FAMILY_OF
from attnsel_jax.registry import AttentionBackendEnum
from attnsel_jax.value_checks import check_batch, check_topk

BATCH = ("page_table", "kv_lens", "cu_q_lens", "num_seqs")
PAGES = {"kv_pages": slice(1, 3), "latent_pages": slice(0, 2), "index_pages": slice(0, 2)}


def as_arguments(op: str, arguments: Mapping[str, Any], *, gradients: bool) -> dict[str, Any]:
    """The arguments as NumPy arrays, and what is static as Python numbers.

    Args:
        op: a key of the contracts.
        arguments: by the contract's names.
        gradients: whether they will be asked for.

    Raises:
        TypeError: a list where an array is meant.
        ValueError: no such op; a name that the op does not have, or one missing that it needs; a
            batch whose values do not fit together; gradients of an op that has none.
    """
    if op not in FAMILY_OF:
        raise ValueError(f"op is {op!r}, must be one of {', '.join(FAMILY_OF)}")
    if gradients and op != "dense":
        raise ValueError(f"gradients is True, must be False for op {op}: only dense has them")
    kernel = _kernel(op)
    _check_names(op, arguments, inspect.signature(kernel).parameters)
    static = static_names(kernel)
    found = {
        name: _plain(value) if name in static else _array(name, value)
        for name, value in arguments.items()
    }
    _check_values(found)
    return found


def _kernel(op: str) -> Callable[..., Any]:
    """XLA's, whose signature is the contract's."""
    backends = (member.get_class() for member in AttentionBackendEnum if "XLA" in member.name)
    return next(backend for backend in backends if op in backend.kernels).get_kernel(op)


def _check_names(op: str, given: Mapping[str, Any], has: Mapping[str, inspect.Parameter]) -> None:
    wrong = [name for name in given if name not in has]
    if wrong:
        raise ValueError(
            f"arguments has {', '.join(wrong)}, must have names of op {op}'s contract: "
            f"{', '.join(has)}"
        )
    empty = inspect.Parameter.empty
    missing = [name for name, p in has.items() if p.default is empty and name not in given]
    if missing:
        raise ValueError(f"arguments lacks {', '.join(missing)}, must have it: op {op} needs it")


def _plain(value: Any) -> Any:
    """A static argument as Python has it; `numpy.load` gives arrays for all."""
    if not hasattr(value, "shape") and not isinstance(value, list):
        return value
    plain = np.asarray(value).tolist()
    return tuple(plain) if isinstance(plain, list) else plain


def _array(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        raise TypeError(f"{name} is {type(value).__name__}, must be an array: np.asarray makes one")
    return np.asarray(value) if hasattr(value, "shape") else value


def _check_values(found: Mapping[str, Any]) -> None:
    """Refuses a batch that would be read elsewhere; wrong shapes are the kernels' to refuse."""
    cache = next((name for name in PAGES if name in found), None)
    if cache is None or not all(isinstance(found[name], np.ndarray) for name in (*BATCH, cache)):
        return
    num_pages, page_size = found[cache].shape[PAGES[cache]]
    tokens = next(found[name] for name in ("q", "ql_nope", "q_nope", "q_index") if name in found)
    slots = found.get("slot_mapping")
    batch = AttentionMetadata(*(found[name] for name in BATCH), slot_mapping=slots)
    check_batch(batch, len(tokens), num_pages, page_size)
    if "topk_indices" in found:
        check_topk(found["topk_indices"], found["page_table"].shape[1] * page_size)
