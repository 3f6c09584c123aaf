"""From true values to a cache's dtype, as the contract of `paged` says."""

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray


def quantise(x: ArrayLike, scale: ArrayLike | None, dtype: DTypeLike) -> NDArray:
    """The quotient x / scale, saturated and rounded to nearest even into dtype.

    The division is float32's, as every lowering's is: a float64 quotient next to a tie would round
    the other way.

    Args:
        x: true values.
        scale: broadcastable to x; None = 1.
        dtype: the cache's.

    Returns:
        x's shape, in dtype.
    """
    dtype = np.dtype(dtype)
    quotient = np.asarray(x).astype(np.float32)
    if scale is not None:
        with np.errstate(over="ignore"):  # past float32's largest is past the cache's too
            quotient = quotient / np.asarray(scale).astype(np.float32)
    if dtype.kind == "i":
        limits = np.iinfo(dtype)
        return np.clip(np.rint(np.nan_to_num(quotient)), limits.min, limits.max).astype(dtype)
    largest = float(ml_dtypes.finfo(dtype).max)
    return np.clip(quotient, -largest, largest).astype(dtype)
