"""One jitted call of a kernel: its results, and gradients if wanted, by name."""

from collections.abc import Callable, Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from attnsel_jax.cache_layouts import LATENT_LAYOUTS, LAYOUTS, in_layouts
from attnsel_jax.compare.expected import gradient_names

RESULTS = {
    "dense": ("out", "lse"),
    "paged": ("out", "lse", "kv_pages"),
    "mla": ("out", "lse", "latent_pages"),
    "mla_materialized": ("out", "lse", "latent_pages"),
    "sparse_mla": ("out", "lse", "latent_pages"),
    "indexer_scores": ("scores",),
    "topk_positions": ("positions",),
}


def run(
    kernel: Callable[..., Any],
    op: str,
    arguments: Mapping[str, Any],
    cotangents: tuple[NDArray, NDArray] | None = None,
    *,
    layout: str = "stacked",
    without: Container[str] = (),
) -> dict[str, NDArray]:
    """Calls a kernel once, jitted.

    Args:
        kernel: has the signature of the op's contract.
        op: a key of `RESULTS`.
        arguments: the contract's, by name; what is no NumPy array is static.
        cotangents: of out and lse, if gradients are wanted; lse's is left out where lse is.
        layout: of the cache that the kernel takes; the arguments and results are "stacked", and
            "rows" where the cache is a latent one.
        without: "lse" or "gradients", where the kernel has none.

    Returns:
        The results by name, and gradients as "grad q", ...

    Raises:
        ValueError: the results are not as many arrays as the contract's, or one of another dtype.
    """
    static = {n: x for n, x in arguments.items() if not isinstance(x, np.ndarray)}
    arrays = {n: jnp.asarray(x) for n, x in arguments.items() if isinstance(x, np.ndarray)}
    cotangents = None if "gradients" in without else cotangents
    if cotangents is not None:
        wrt = {name: arrays.pop(name) for name in gradient_names(arguments)}
    else:
        wrt = {}

    def call(wrt: dict[str, jax.Array], arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        results = kernel(**_in_layout(arrays, layout), **wrt, **static)
        return _as_the_oracle(_named(op, results, without), layout, arrays)

    def call_and_differentiate(wrt, arrays, cotangents):
        results, pull_back = jax.vjp(lambda x: call(x, arrays), wrt)
        seeds = dict(zip(("out", "lse"), cotangents, strict=True))
        (gradients,) = pull_back({name: seeds[name] for name in results})
        return results | {f"grad {name}": gradient for name, gradient in gradients.items()}

    if cotangents is None:
        results = jax.jit(call)(wrt, arrays)
    else:
        results = jax.jit(call_and_differentiate)(
            wrt, arrays, jax.tree.map(jnp.asarray, cotangents)
        )
    _check_dtypes(results, arguments)
    return {name: np.asarray(x) for name, x in results.items()}


def _named(op: str, results: Any, without: Container[str]) -> dict[str, jax.Array]:
    """The results by name; refuses another count, and what is no array."""
    names, found = RESULTS[op], results if isinstance(results, tuple) else (results,)
    if len(found) != len(names):
        said = f"a tuple of {len(found)}" if isinstance(results, tuple) else "no tuple"
        raise ValueError(f"the kernel returns {said}, must return ({', '.join(names)})")
    named = {n: x for n, x in zip(names, found, strict=True) if n not in without}
    for name, x in named.items():
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise ValueError(f"{name} is {type(x).__name__}, must be an array")
    return named


def _check_dtypes(results: Mapping[str, jax.Array], arguments: Mapping[str, Any]) -> None:
    """Outputs in the queries' dtype, lse in float32, gradients and caches in their argument's."""
    q = next((arguments[n] for n in ("q", "ql_nope", "q_nope") if n in arguments), None)
    for name, result in results.items():
        of = {"out": q, "scores": np.zeros((), np.float32), "lse": np.zeros((), np.float32),
              "positions": np.zeros((), np.int32)}  # fmt: skip
        wanted = of.get(name, arguments.get(name.removeprefix("grad ")))
        if result.dtype != wanted.dtype:
            raise ValueError(f"{name} has dtype {result.dtype}, must be {wanted.dtype}")


def _in_layout(arrays: dict[str, jax.Array], layout: str) -> dict[str, jax.Array]:
    """The arguments with the cache as the backend wants it."""
    return (
        in_layouts(arrays, layout) if layout in LAYOUTS else in_layouts(arrays, "stacked", layout)
    )


def _as_the_oracle(
    results: dict[str, jax.Array], layout: str, arrays: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The results with the cache as the oracle has it."""
    if layout in LAYOUTS and layout != "stacked" and "kv_pages" in results:
        stacked = LAYOUTS["stacked"].join(*LAYOUTS[layout].split(results["kv_pages"]))
        head_dim = arrays["kv_pages"].shape[-1]
        return results | {"kv_pages": stacked[..., :head_dim]}
    if layout in LATENT_LAYOUTS and "latent_pages" in results:
        rope_dim = arrays["q_pe"].shape[-1]
        rows = LATENT_LAYOUTS[layout].to_rows(results["latent_pages"], rope_dim)
        return results | {"latent_pages": rows}
    return results
