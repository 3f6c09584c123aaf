"""Gradients of dense attention in float64, by the analytic formulas.

With P the weights, O = P V and dP = dO V^T, for every row::

    dS = P * (dP - rowsum(dO * O) + dlse)          (d lse / d logit is P)
    dV = P^T dO;  dbias = dS;  dslope = -sum dS * distance;  dQ = scale * (dS * cap') K, dK likewise
    dsink = sum over rows of P_sink * (dlse - rowsum(dO * O)),  P_sink = exp(sink - lse)
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnsel_jax.oracle.attend import float64, softmax_rows
from attnsel_jax.oracle.dense import Head, dense_heads

Arrays = dict[str, NDArray[np.float64]]


class Gradients(NamedTuple):
    """Gradients by argument, and the three sizes that their rounding errors are proportional to.

    Attributes:
        values: the gradients.
        magnitudes: the same sums with the absolute value of every product in them: what errors of
            float32 sums scale with.
        rounded: the same sums over |dS|, and over P times the root of the sum of squares of dO * O:
            what rounding dS, and O in rowsum(dO * O), to the dtype scales with.
        slopes: the magnitudes with 1 in place of the soft cap's slope cap' = 1 - tanh ** 2: what
            rounding the slope scales with, however small it is; 0 without a soft cap.
    """

    values: Arrays
    magnitudes: Arrays
    rounded: Arrays
    slopes: Arrays


def dense_gradients(
    dout: ArrayLike, dlse: ArrayLike | None = None, **arguments: Any
) -> dict[str, NDArray[np.float64] | None]:
    """Gradients of sum(dout * out) + sum(dlse * lse).

    Args:
        dout: like out; read only for rows that see a key.
        dlse: like lse, read only where lse is finite; None = 0.
        **arguments: the contract's, q, k and v by name too.

    Returns:
        q, k, v, bias, sinks, alibi_slopes -> gradient of the argument's own shape; None for an
        argument that is not given.
    """
    gradients = attend_dense_gradients(dout, dlse, **arguments).values
    return {name: gradients.get(name) for name in ("q", "k", "v", "bias", "sinks", "alibi_slopes")}


def attend_dense_gradients(
    dout: ArrayLike, dlse: ArrayLike | None = None, **arguments: Any
) -> Gradients:
    """Gradients with what an error budget needs; arguments as in `dense_gradients`."""
    given = {name: arguments.pop(name) for name in ("q", "k", "v")}
    numbers = {name: arguments.pop(name, None) for name in ("scale", "soft_cap")}
    for name in ("bias", "sinks", "alibi_slopes"):
        if arguments.get(name) is not None:
            given[name] = arguments[name]
    arrays = {name: float64(array) for name, array in given.items()}
    if numbers["scale"] is None:
        numbers["scale"] = arrays["q"].shape[-1] ** -0.5
    dout = float64(dout)
    dlse = np.zeros(dout.shape[:3]) if dlse is None else float64(dlse)
    zeros = [{n: np.zeros(array.shape) for n, array in arrays.items()} for _ in Gradients._fields]
    gradients = Gradients(*zeros)
    for head in dense_heads(arrays["q"].shape, arrays["k"].shape, **arguments):
        do, dl = dout[head.b, :, head.n], dlse[head.b, :, head.n]
        _add_head(head, arrays, do, dl, numbers, gradients)
    return gradients


def _add_head(
    head: Head,
    arrays: Arrays,
    dout: NDArray[np.float64],
    dlse: NDArray[np.float64],
    numbers: dict[str, Any],
    gradients: Gradients,
) -> None:
    """Adds one head's part; keys that no row sees and rows that see none stay out."""
    b, n, kv, scale = head.b, head.n, head.kv, float(numbers["scale"])
    some, keys = head.see.any(axis=1), head.see.any(axis=0)
    q = np.where(some[:, None], arrays["q"][b, :, n], 0)
    k = np.where(keys[:, None], arrays["k"][b, :, kv], 0)
    v = np.where(keys[:, None], arrays["v"][b, :, kv], 0)
    dout = np.where(some[:, None], dout, 0)
    p, lse, slope = softmax_rows(q, k, head.see, head.added, head.sinks, scale, numbers["soft_cap"])
    q, k = (np.where(np.isnan(x), 0, x) for x in (q, k))  # p of who sees it is NaN
    dlse = np.where(np.isfinite(lse), dlse, 0)[:, None]
    products = dout * (p @ v)
    delta = products.sum(axis=1, keepdims=True)
    delta_size = (np.abs(dout) * (p @ np.abs(v))).sum(axis=1, keepdims=True)
    delta_spread = np.linalg.norm(products, axis=1, keepdims=True)
    ds = np.where(head.see, p * (dout @ v.T - delta + dlse), 0)
    ds_size = p * (np.abs(dout) @ np.abs(v).T + delta_size + np.abs(dlse))
    sizes = abs(scale), np.abs(q), np.abs(k), np.abs(dout), 1
    if numbers["soft_cap"] is not None:
        gradients.slopes["q"][b, :, n] += abs(scale) * ds_size @ np.abs(k)
        gradients.slopes["k"][b, :, kv] += abs(scale) * ds_size.T @ np.abs(q)
    for into, s, row, (factor, x_q, x_k, x_dout, sign) in (
        (gradients.values, ds, dlse - delta, (scale, q, k, dout, -1)),
        (gradients.magnitudes, ds_size, np.abs(dlse) + delta_size, sizes),
        (gradients.rounded, np.abs(ds) + p * delta_spread, np.abs(dlse - delta) + delta_spread,
         sizes),
    ):  # fmt: skip
        into["v"][b, :, kv] += p.T @ x_dout
        into["q"][b, :, n] += factor * (s * slope) @ x_k
        into["k"][b, :, kv] += factor * (s * slope).T @ x_q
        if "bias" in into:
            _add_reduced(into["bias"], s, b, n)
        if "alibi_slopes" in into:
            into["alibi_slopes"][n] += sign * (s * head.distance).sum()
        if "sinks" in into:
            sink_weight = np.where(head.exists, np.exp(arrays["sinks"][n] - _or_zero(lse)), 0)
            into["sinks"][n] += (sink_weight[:, None] * row).sum()


def _or_zero(lse: NDArray[np.float64]) -> NDArray[np.float64]:
    """lse, 0 where it is -inf: such a row has no sink."""
    return np.where(np.isfinite(lse), lse, 0)


def _add_reduced(into: NDArray[np.float64], ds: NDArray[np.float64], b: int, n: int) -> None:
    """Adds one head's ds [q_len, kv_len] to a bias gradient of any broadcastable shape."""
    if into.shape[2] == 1:
        ds = ds.sum(axis=0, keepdims=True)
    if into.shape[3] == 1:
        ds = ds.sum(axis=1, keepdims=True)
    into[min(b, into.shape[0] - 1), min(n, into.shape[1] - 1)] += ds
