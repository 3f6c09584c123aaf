"""How far from the oracle an element may lie: the only place where a tolerance is written.

A budget is a bound on rounding errors, element by element, and not a fraction of the element: what
rounds are the terms of a sum, so the scale is the sum of their absolute values (`magnitude`), and
an element that cancels to nothing is not judged relative to itself. With u the unit roundoff of the
arguments' dtype, and u32 that of float32, in which the contracts have logits, softmax and sums:

- a logit is a dot product of head_dim terms. Its error is u32 * sqrt(head_dim) times the size of
  the terms (Higham and Mary 2019: rounding errors of random sign), and CONSTANT more roundings of
  that size: scale, soft cap (tanh is good to a few units), bias, exponent's argument;
- lse has a logit's error, and that of a sum of num_keys terms;
- a weight exp(logit - lse) has both errors relative to itself, twice a logit's. A kernel rounds
  weights to the dtype before the second dot, and rounds the output: 2 roundings of u;
- gradients round the weights, dS, the result, and the result once more where heads of a group are
  added: 4 roundings of u of sums over |dS|. The output inside rowsum(dO * O) was rounded too, each
  feature by itself: 4 u (7 standard deviations) of the root of the sum of their squares. That of a
  bias of another dtype is rounded to it, too. The slope of a soft cap, 1 - tanh^2, is a difference:
  its error is CONSTANT roundings of 1, and all there is of it where the cap is saturated.

Where the cache holds more bits than the queries' dtype does, a kernel may round keys and values to
that dtype once, for the matrix unit: one more u each in logits and outputs.
"""

import numpy as np
from numpy.typing import DTypeLike, NDArray

from attnsel_jax.oracle import Attended

# Unit roundoff, and the smallest step near zero: float16 alone has one that matters.
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SMALLEST = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-24}
SIGNIFICANT_BITS = {"float32": 24, "bfloat16": 8, "float16": 11, "int8": 8, "float8_e4m3fn": 4,
                    "float8_e5m2": 3, "uint8": 24}  # fmt: skip
OUTPUT_ROUNDINGS, GRADIENT_ROUNDINGS, CONSTANT = 2, 4, 8
U32 = UNIT["float32"]
NUDGE = 2.0**-21  # of a scale: how far float32 quotients may differ before they are rounded


def rounds_on_load(cache_dtype: DTypeLike, dtype: DTypeLike) -> bool:
    """Whether cached values do not fit the queries' dtype (uint8 = fp8_ds_mla, scaled by tile)."""
    bits = SIGNIFICANT_BITS
    return bits[np.dtype(cache_dtype).name] > bits[np.dtype(dtype).name]


def of_two_dots(head_dim: int, rank: int) -> float:
    """The head_dim whose root is the sum of both: a dot of features that are dots of rank terms."""
    return (head_dim**0.5 + rank**0.5) ** 2


def made_values_budget(
    latents: NDArray[np.float64], w_uv: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Error of values that are dots of latents [..., rank] and w_uv: [num_q_heads, v_dim].

    It scales with the lengths of both, and not with the value, which may cancel.
    """
    lengths = np.linalg.norm(latents, axis=-1)
    longest = lengths[np.isfinite(lengths)].max(initial=0)
    return U32 * np.sqrt(latents.shape[-1]) * longest * np.linalg.norm(w_uv, axis=0)


def logit_budget(
    logit_size: NDArray[np.float64], head_dim: float, dtype: DTypeLike, loaded: bool = False
) -> NDArray[np.float64]:
    """Error of a row's logits; `loaded` says that keys are rounded to dtype on loading."""
    units = U32 * (np.sqrt(head_dim) + CONSTANT) + loaded * UNIT[np.dtype(dtype).name]
    return units * logit_size


def lse_budget(
    attended: Attended, head_dim: float, num_keys: int, dtype: DTypeLike, loaded: bool = False
) -> NDArray[np.float64]:
    """Error of lse, absolute; 0 for an empty row."""
    lse = np.where(np.isfinite(attended.lse), attended.lse, 0)
    logits = logit_budget(attended.logit_size, head_dim, dtype, loaded)
    budget = logits + U32 * (np.abs(lse) + np.sqrt(num_keys) + CONSTANT)
    return np.where(np.isfinite(attended.lse), budget, 0)


def out_budget(
    attended: Attended, head_dim: float, num_keys: int, dtype: DTypeLike, loaded: bool = False
) -> NDArray[np.float64]:
    """Error of the output, like it in shape; 0 where nothing is seen."""
    name = np.dtype(dtype).name
    weights = 2 * logit_budget(attended.logit_size, head_dim, dtype, loaded)[..., None]
    sums = U32 * (np.sqrt(num_keys) + CONSTANT)
    roundings = (OUTPUT_ROUNDINGS + loaded) * UNIT[name]
    return (roundings + weights + sums) * attended.magnitude + floor(attended.magnitude, name)


def gradient_budget(
    magnitude: NDArray[np.float64],
    rounded: NDArray[np.float64],
    slopes: NDArray[np.float64],
    largest_logit_size: float,
    head_dim: int,
    num_rows: int,
    num_keys: int,
    dtype: DTypeLike,
) -> NDArray[np.float64]:
    """Error of a gradient; the sizes are those of `oracle.Gradients`.

    num_rows (queries times heads of a group) is the longest of its sums beside num_keys.
    """
    name = np.dtype(dtype).name
    weights = 2 * logit_budget(np.float64(largest_logit_size), head_dim, dtype)
    sums = U32 * (np.sqrt(num_keys) + np.sqrt(num_rows) + np.sqrt(head_dim) + CONSTANT)
    roundings = GRADIENT_ROUNDINGS * UNIT[name] * rounded + U32 * CONSTANT * slopes
    return roundings + (weights + sums) * magnitude + floor(magnitude, name)


def rounded_once_more(
    budget: NDArray[np.float64], values: NDArray[np.float64], dtype: DTypeLike
) -> NDArray[np.float64]:
    """Error of a result that comes in a dtype of its own: a bias need not have that of q."""
    name = np.dtype(dtype).name
    return budget + UNIT[name] * (np.abs(values) + budget) + SMALLEST[name] * (values != 0)


def score_budget(sizes: NDArray[np.float64], head_dim: int, num_heads: int) -> NDArray[np.float64]:
    """Error of indexer scores; sizes = sum over heads of |weight| * |q| * |k|."""
    return U32 * (np.sqrt(head_dim) + np.sqrt(num_heads) + CONSTANT) * sizes


def floor(magnitude: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """Steps near zero: weights below the smallest number are lost, whatever they multiply."""
    smallest = CONSTANT * SMALLEST[name] * magnitude.max(initial=0)
    return np.where(magnitude > 0, smallest, 0)
